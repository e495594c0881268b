"""A worker's row in a trace: begin, end and outcome of each call.

There are two sources: the scheduler knows which calls were answered and how, and the worker when
each began and ended (``workers.timed``). Both deliver in the order of positions, either may be
first, and this module joins them.

Not covered:
    * Calls that a killed worker had ended but not reported: their times are estimated from the
      calls around them.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from safepool.pool.tracing.costs import pickled_ns, queued_ns
from safepool.pool.tracing.events import PLAIN, Calls, Events
from safepool.workers.timed import Timed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.pool.core.work import Given

# A function may have any name, and each of its events repeats it.
_LONGEST_NAME = 200


@dataclass(slots=True)
class Settled:
    """Calls of one work whose answers have arrived."""

    first: int
    count: int
    work: Given
    place: int
    outcome: str
    error: str | None


class Row:
    """The row of one worker, numbered from 1; and what its worker ran when the pool broke."""

    def __init__(self, number: int, events: Events, hired_ns: int) -> None:
        self.number = number
        self._events = events
        self._hired_ns = hired_ns
        # Answers whose times have not arrived, and the other way round.
        self._settled: deque[Settled] = deque()
        self._times: deque[Timed] = deque()
        # End of the last event, which further calls may join.
        self._end_ns = hired_ns
        self._calls: Calls | None = None
        self.given_up: tuple[Given, int] | None = None

    def ready(self, now_ns: int, pid: int) -> None:
        """The worker has started."""
        self._end_ns = now_ns
        self._events.start_of_worker(self.number, self._hired_ns, now_ns, pid)

    def settle(self, settled: Settled) -> None:
        """Calls were answered."""
        self._settled.append(settled)
        if self._times:
            self._join()

    def time(self, times: Iterable[Timed]) -> None:
        """The worker has sent the times of calls."""
        self._times += times
        if self._settled:
            self._join()

    def end(self, since_ns: int, now_ns: int, lost: Iterable[tuple[Given, int, str, int]]) -> None:
        """The worker has ended.

        Each lost call is given with the work it is a part of, the place in it, the outcome, and
        which attempt it was. The two times are the begin of the last call, and when the pool
        noticed the end.
        """
        begin = max(self._end_ns, min(now_ns, since_ns))
        lost = [*lost]
        self._estimate(begin if lost else now_ns)
        for work, place, outcome, attempt in lost:
            self.add(Settled(0, 1, work, place, outcome, None), begin, now_ns, attempt)
            begin = now_ns
        self._write()

    def write_old(self, now_ns: int) -> None:
        """Write the last event if nothing will join it any more."""
        if self._calls is not None and now_ns - self._calls.begin_ns > self._events.short_ns:
            self._write()

    def _write(self) -> None:
        calls, self._calls = self._calls, None
        if calls is not None:
            self._events.calls(self.number, calls)

    def _join(self) -> None:
        settled, times = self._settled, self._times
        while settled and times:
            done, timed = settled[0], times[0]
            if timed.first + timed.calls <= done.first:
                times.popleft()  # of a call that was given up
            elif done.first + done.count <= timed.first:
                self._estimate(timed.begin_ns, 1)
            else:
                self._join_first(done, timed)

    def _join_first(self, done: Settled, timed: Timed) -> None:
        """Add the calls that both heads are about, and take them off."""
        first = max(done.first, timed.first)
        end = min(done.first + done.count, timed.first + timed.calls)
        count = end - first
        if timed.first < first or count < timed.calls:
            # They were looked at on the board meanwhile: shared out evenly.
            each = (timed.end_ns - timed.begin_ns) / timed.calls
            begin = timed.begin_ns + int(each * (first - timed.first))
            part = Timed(
                first,
                count,
                begin,
                begin + int(each * count),
                timed.loaded_ns * count // timed.calls,
                timed.packed_ns * count // timed.calls,
            )
        else:
            part = timed
        if end == timed.first + timed.calls:
            self._times.popleft()
        else:
            self._times[0] = timed._replace(
                first=end,
                calls=timed.first + timed.calls - end,
                begin_ns=part.end_ns,
                loaded_ns=timed.loaded_ns - part.loaded_ns,
                packed_ns=timed.packed_ns - part.packed_ns,
            )
        if end == done.first + done.count:
            self._settled.popleft()
            whole = done
        else:
            whole = replace(done, count=end - done.first)
            done.count -= whole.count
            done.first, done.place = end, done.place + whole.count
        self.add(whole, part.begin_ns, part.end_ns, 0, part.loaded_ns, part.packed_ns)

    def _estimate(self, end_ns: int, most: int = sys.maxsize) -> None:
        """Add calls whose times never came: between the last event and this moment."""
        count = min(most, len(self._settled))
        if not count:
            return
        each = max(0, end_ns - self._end_ns) // count
        for _ in range(count):
            begin = self._end_ns
            self.add(self._settled.popleft(), begin, begin + each)

    def add(
        self,
        done: Settled,
        begin_ns: int,
        end_ns: int,
        attempt: int = 0,
        loaded_ns: int = 0,
        packed_ns: int = 0,
    ) -> None:
        """Add calls that follow those added before."""
        work, count, outcome = done.work, done.count, done.outcome
        name = work.name[:_LONGEST_NAME]
        # By two clocks that are one, but read in another order: never over each other.
        begin_ns = max(begin_ns, self._end_ns)
        self._end_ns = end_ns = max(end_ns, begin_ns)
        pickling_ns = pickled_ns(work) * count
        attempt = attempt or work.attempts + 1
        plain = attempt == 1 and outcome in PLAIN
        last = self._calls
        if last is not None:
            if plain and end_ns - last.begin_ns < self._events.short_ns:
                last.join(name, outcome, count, done.error)
                last.end_ns = end_ns
                last.busy_ns += end_ns - begin_ns
                last.pickled_ns += pickling_ns
                last.loaded_ns += loaded_ns
                last.packed_ns += packed_ns
                return
            self._write()
        self._calls = Calls(
            begin_ns,
            end_ns,
            name,
            outcome,
            count,
            done.error,
            attempt,
            begin_ns - (queued_ns(work, done.place) or begin_ns),
            end_ns - begin_ns,
            pickling_ns,
            loaded_ns,
            packed_ns,
        )
        if not plain or end_ns - begin_ns >= self._events.short_ns:
            self._write()  # nothing will join it
