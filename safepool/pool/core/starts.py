"""Decisions about the next workers: how many, when, in which place, or that the pool gives up.

A pool bears a limited number of useless workers in a row, which ended before they did any work. A
crash has a cause that stays: an initializer, a broken library. A kill from outside (``SIGKILL``
and ``SIGTERM``, sent by the out-of-memory killer and by service managers) hits any worker, and on
a busy host several new workers in a row. An error of the script, when it is run again for the next
worker, is like a crash.

Not covered:
    * Execution of a start: ``shell.hiring`` does that, and tells whether the system refuses it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from safepool.errors import FROM_OUTSIDE, text_of
from safepool.pool.core import events as e

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safepool.pool.core.backlog import Backlog
    from safepool.pool.core.ending import Ending
    from safepool.pool.core.worker import Member

# Time for which the index of an ending worker is not given to another, so that two processes
# rarely have the same: a port or device of that number may still be in use.
_PLACE_NS = 1_000_000_000
# Workers that cannot be ended, for each place of the pool, until it gives up: each is a process.
_MOST_LOST = 2
# Pause between two attempts to start a worker when the system refuses. A pool that has lost all
# workers tries for this long.
_RETRY_NS = 1_000_000_000
_RETRYING_NS = 30_000_000_000
# Useless workers in a row, or errors of the script; kills from outside have pauses that add up to
# a quarter of a minute.
_MOST_CRASHED, _MOST_KILLED = 3, 20
_FIRST_PAUSE_NS, _MOST_PAUSE_NS = 50_000_000, 1_000_000_000


class Starts:
    """Starts of one pool's workers.

    Args:
        size: The most workers at the same time.
        break_on_death: Whether one dead worker breaks the pool.

    Attributes:
        lost: Number of workers that could not be ended, and are still there.
        not_before_ns: Time of the next start.
    """

    def __init__(self, size: int, *, break_on_death: bool) -> None:
        self.size: int = size
        self.lost: int = 0
        self.not_before_ns: int = 0
        self._break_on_death = break_on_death
        # Useless workers in a row that ended by themselves, and that were killed from outside.
        self._crashed = self._killed = 0
        # The places of those that could not be ended.
        self._haunted: set[int] = set()
        self._had_one = False
        self._refused_since_ns: int | None = None
        # Errors of the script in a row.
        self._failed = 0

    def missing(self, members: Sequence[Member]) -> int:
        """Return how many more workers the pool may have."""
        # Not in the place of one that cannot be ended: the next would hang in the same way.
        return max(1, self.size - self.lost) - sum(not one.leaving for one in members)

    def for_all_places(self, members: Sequence[Member], now_ns: int) -> Iterator[e.Hire]:
        """Yield the start of all workers, before calls need them."""
        missing = self.missing(members)
        if missing > 0 and now_ns >= self.not_before_ns:
            yield e.Hire(missing, 0)

    def for_waiting(
        self, members: Sequence[Member], backlog: Backlog, now_ns: int
    ) -> Iterator[e.Hire]:
        """Yield the start of workers for calls that no starting worker will take."""
        most = self.missing(members)
        # A worker that fails to start may break the pool. Cancelled work is dropped here: without
        # a worker it would stay, and a pool with waiting work does not end.
        if (
            most <= 0
            or any(one.fails_to_start for one in members)
            or not backlog.is_wanted()
            or now_ns < self.not_before_ns
        ):
            return
        starting = sum(not (one.ready or one.leaving) for one in members)
        kept = {one.index for one in members if not one.leaving or _keeps_place(one, now_ns)}
        free = self.size - sum(place < self.size for place in kept)
        wanted = min(most, free, backlog.at_most(self.size) - starting)
        if wanted > 0:
            # At most as many workers may be ending slowly as stay: otherwise workers that do not
            # end would pile up.
            yield e.Hire(wanted, len(members) + wanted - 2 * self.size)

    def next_looks(self, members: Sequence[Member], now_ns: int) -> list[int]:
        """Return when a worker may be started for waiting work that none is started for now."""
        looks = [one.leaving_since_ns + _PLACE_NS for one in members if _keeps_place(one, now_ns)]
        return [*looks, self.not_before_ns] if now_ns < self.not_before_ns else looks

    def place_of_next(self, members: Sequence[Member]) -> int:
        """Return the place of a worker that is started now.

        The lowest of no process; if all have one, the lowest of one that takes its time to end.
        """
        staying = {one.index for one in members if not one.leaving}
        taken = {one.index for one in members} | self._haunted
        free = next(place for place in itertools.count() if place not in taken)
        if free < self.size:
            return free
        return next(place for place in itertools.count() if place not in staying)

    # The past, as far as it counts for the next start.

    def note_lost(self, lost: int, place: int | None = None) -> None:
        """Note how many workers could not be ended; one more is the one in this place."""
        if place is not None and lost > self.lost:
            self._haunted.add(place)
        elif not lost:
            self._haunted.clear()
        self.lost = lost

    def was_started(self) -> None:
        """Note that a worker has been started."""
        self._had_one, self._refused_since_ns, self._failed = True, None, 0

    def was_of_use(self) -> None:
        """Note that a worker has done something."""
        self._crashed = self._killed = 0

    def refused(self, refusal: e.Refused, now_ns: int, *, alone: bool) -> e.GiveUp | e.PutOff:
        """Decide about a start that is refused; ``alone``: the pool has no worker."""
        why, pause_ns = refusal.why, _RETRY_NS
        if self._refused_since_ns is None:
            self._refused_since_ns = now_ns
        lasts = now_ns - self._refused_since_ns > _RETRYING_NS
        if refusal.by_script:
            self._failed += 1
            lasts = lasts or self._failed >= _MOST_CRASHED
            pause_ns = _pause_ns(self._failed)
        else:
            lasts = lasts or not isinstance(why, OSError)
        if alone and (lasts or not self._had_one):
            return e.GiveUp(f"cannot start a worker: {text_of(why)}", why)
        self.not_before_ns = now_ns + pause_ns
        return e.PutOff(why)

    def after(self, ending: Ending, now_ns: int) -> Iterator[e.GiveUp]:
        """Count a worker that has ended; yield why the pool gives up."""
        if self.lost > _MOST_LOST * self.size:
            yield e.GiveUp(
                f"{self.lost} workers did not end after SIGKILL: each is in a system call that "
                "does not return. See whether a disk or network mount that they use has stopped"
            )
        if self._break_on_death and ending.breaks:
            yield e.GiveUp(
                "A process in the process pool was terminated abruptly while the future was "
                f"running or pending: worker {ending.pid} {ending.how}"
            )
        if ending.was_of_use:
            self.was_of_use()
        elif ending.was_for_nothing:
            yield from self._bear(ending, now_ns)

    def _bear(self, ending: Ending, now_ns: int) -> Iterator[e.GiveUp]:
        """Wait before the next start, or give up if workers end in a row that were of no use."""
        pause_ns = 0
        if ending.exitcode in FROM_OUTSIDE and not ending.by_pool:
            self._killed += 1
            pause_ns = _pause_ns(self._killed)
            is_borne = self._killed < _MOST_KILLED
        else:
            self._crashed += 1
            is_borne = self._crashed < _MOST_CRASHED
        if is_borne:
            self.not_before_ns = max(self.not_before_ns, now_ns + pause_ns)
            return
        why = (
            f"{self._crashed + self._killed} workers in a row died before they ran a task; the "
            f"last: worker {ending.unasked}"
        )
        why += "" if ending.oom is None else f": {ending.oom}"
        # After a death from outside, the next call might meet the same end.
        ask = ending.oom is None and (ending.by_pool or (ending.exitcode or 0) >= 0)
        yield e.GiveUp(why, ask=ask)


def _pause_ns(times: int) -> int:
    """Return the pause after as many failures in a row."""
    return min(_FIRST_PAUSE_NS << min(times - 1, _MOST_KILLED), _MOST_PAUSE_NS)


def _keeps_place(member: Member, now_ns: int) -> bool:
    return member.leaving and now_ns - member.leaving_since_ns < _PLACE_NS
