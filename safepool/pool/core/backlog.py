"""Work that waits for a worker, in order of arrival. No lock: the scheduler's holds."""

from __future__ import annotations

import itertools
import math
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from safepool.pool.core.work import Call, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from safepool.pool.core.work import Run

    # Arguments of `take`.
    _Offer = tuple[Callable[[str, int], int], Callable[[str], int], int, int]

# The most entries whose calls are counted; counting more would delay the submitting thread.
_MOST_COUNTED = 1000


class Backlog:
    """Calls, runs with calls that wait, and spans that were taken back.

    Attributes:
        holds: Whether runs whose results are not taken must wait; ``False`` while the pool ends.
    """

    def __init__(self) -> None:
        self._entries: deque[Call | Span | Run] = deque()
        # Runs whose results are not taken as fast as they come.
        self._held: list[Run] = []
        # Not itertools.count(), which Python 3.14 does not pickle: states are copied so.
        self._last_number = 0
        self.holds = True

    def __bool__(self) -> bool:
        return bool(self._entries or self._held)

    def __iter__(self) -> Iterator[Call | Span | Run]:
        return itertools.chain(self._held, self._entries)

    @property
    def first(self) -> int:
        """Place of the first that waits, in the order in which work came."""
        if self._held:
            self._let_go()
        return self._entries[0].number if self._entries else 0

    def at_most(self, limit: int) -> int:
        """Return how many calls wait, counted up to ``limit``."""
        count = 0
        for entry in self._entries:
            count += _size(entry)
            if count >= limit:
                return limit
        return count

    def waiting(self) -> int:
        """Return how many calls wait; of very many entries each further one counts as one."""
        entries = self._entries
        first = itertools.islice(entries, _MOST_COUNTED)
        further = max(0, len(entries) - _MOST_COUNTED)
        return sum(map(_size, [*self._held, *first])) + further

    def is_wanted(self) -> bool:
        """Return whether a call waits that may be sent; drop cancelled ones before it."""
        if self._held:
            self._let_go()
        entries = self._entries
        while entries:
            head = entries[0]
            if isinstance(head, Call):
                dead = not head.is_wanted()
            elif isinstance(head, Span):
                dead = head.run.dropped
            else:
                dead = head.stopped or not head.waiting
                head.queued = not dead
            if not dead:
                return True
            entries.popleft()
        return False

    def number(self, work: Call | Span | Run) -> None:
        """Note that work comes after all that came before, but is not queued."""
        self._last_number += 1
        work.number = self._last_number

    def add(self, task: Call) -> None:
        """Queue a task."""
        self.number(task)
        self._entries.append(task)

    def add_items(self, run: Run, items: list[Any], *, last: bool = False) -> None:
        """Queue further calls of a run; ``last``: there will be no more."""
        run.add(items, last=last)
        if run.waiting and not run.queued:
            run.queued = True
            self.number(run)
            self._entries.append(run)

    def put_back(self, works: Iterable[Call | Span | Run]) -> None:
        """Queue returned work, ahead of all that came after it."""
        entries, first = self._entries, list[Any]()
        for work in sorted(works, key=_rank):
            while entries and _rank(entries[0]) < _rank(work):
                _join(first, entries.popleft())
            _join(first, work)
        if entries:
            _join(first, entries.popleft())
        entries.extendleft(reversed(first))

    def clear(self) -> list[Any]:
        """Empty it, and return its content."""
        found = [*self._held, *self._entries]
        self._entries.clear()
        self._held.clear()
        for entry in found:
            if not isinstance(entry, Call | Span):
                entry.queued = False
        return found

    def take(
        self,
        room: Callable[[str, int], int],
        expected_ns: Callable[[str], int],
        among: int,
        most: int,
        before: int = sys.maxsize,
    ) -> Span | list[Any]:
        """Take what one worker gets in one message.

        Args:
            room: Function that returns the number of calls of a name to send, in addition to some
                nanoseconds of work.
            expected_ns: Expected time of one call of a name.
            among: Number of workers that share the waiting work.
            most: The most tasks in all; nothing is taken below 1.
            before: Only work that arrived before this place is taken.

        Returns:
            A span of one run, or tasks; an empty list without calls or without room.
        """
        if self._held:
            self._let_go()
        offer = room, expected_ns, among, most
        while self._entries and most > 0 and self._entries[0].number < before:
            head = self._entries[0]
            if isinstance(head, Call):
                return self._take_tasks(offer, before)
            if isinstance(head, Span):
                if head.run.dropped:
                    self._entries.popleft()
                    continue
                return self._take_span(head, offer)
            if head.stopped or not head.waiting:
                head.queued = False
                self._entries.popleft()
                continue
            if self.holds and self._hold(head):
                continue
            return self._cut(head, offer)
        return []

    def _hold(self, run: Run) -> bool:
        """Let the first run wait if it is full."""
        # Set before the check: a thread that takes a result does the two in the other order.
        run.held = True
        run.held = run.is_full
        if run.held:
            self._held.append(run)
            self._entries.popleft()
        return run.held

    def _let_go(self) -> None:
        """Queue runs again that are no longer full."""
        for run in self._held:
            run.held = self.holds and run.is_full
        self.put_back(run for run in self._held if not run.held)
        self._held = [run for run in self._held if run.held]

    def _take_tasks(self, offer: _Offer, before: int) -> list[Call]:
        room, expected_ns, among, most = offer
        entries = self._entries
        taken: list[Any] = []
        left = min(most, -(-len(entries) // among))
        name, fit, each, held = "", 0, 0, 0
        while left and entries and isinstance(entries[0], Call) and entries[0].number < before:
            task = entries[0]
            if task.name != name:
                name = task.name
                fit, each = room(name, held), expected_ns(name)
            if fit <= 0:
                break
            entries.popleft()
            task.expected_ns = each
            taken.append(task)
            held += each or 1
            fit -= 1
            left -= 1
        return taken

    def _take_span(self, span: Span, offer: _Offer) -> Span | list[Any]:
        room, expected_ns, among, most = offer
        # Divided when little is left behind it as well: halves of halves would be many messages.
        waiting = self.at_most(span.count * among)
        many = min(room(span.name, 0), -(-waiting // among))
        many = min(many, most * (span.run.at_once or 1))
        if many > 0 and (span.bound or span.pickled is not None):
            many = span.count
        if many <= 0:
            return []
        self._entries.popleft()
        span.expected_ns = expected_ns(span.name)
        if many < span.count:
            self._entries.appendleft(span.split(many))
        return span

    def _cut(self, run: Run, offer: _Offer) -> Span | list[Any]:
        room, expected_ns, among, most = offer
        many = room(run.name, 0)
        if many <= 0:
            return []
        if run.at_once is None:
            many = min(many, run.most_at_once, -(-len(run.waiting) // among), most)
        else:
            many = run.at_once
        span = run.cut(many)
        span.number = run.number
        span.expected_ns = expected_ns(run.name)
        if not run.waiting:
            run.queued = False
            self._entries.popleft()
        return span


def kept_for(
    aside: Sequence[int], *, full: bool, passed: Iterable[bool], fresh: Iterable[bool]
) -> tuple[int, int]:
    """Decide for how much work that is being pickled idle workers are kept.

    For a moment no worker is given anything. Then each work keeps one, also the only worker of a
    pool. What came before all of it is given out.

    Args:
        aside: The places of this work in the order of arrival.
        full: No more may wait to be pickled.
        passed: Whether each may wait for a later call: then nothing is kept.
        fresh: Whether each is being pickled for a moment only.

    Returns:
        ``kept`` and ``before`` of a :class:`HandOut`.
    """
    first = min(aside, default=0)
    if not aside or (not full and any(passed)):
        return 0, first
    return (sys.maxsize if full or any(fresh) else len(aside)), first


def _rank(entry: Call | Span | Run) -> tuple[int, float]:
    if isinstance(entry, Call):
        return entry.number, 0
    return entry.number, entry.start if isinstance(entry, Span) else math.inf


def _join(entries: list[Any], entry: Call | Span | Run) -> None:
    """Append an entry.

    Parts that workers gave back become one piece again: a message for each part would cost more
    than the calls (benchmarks/dispatch.py, map).
    """
    last = entries[-1] if entries else None
    if isinstance(last, Span) and isinstance(entry, Span) and last.is_followed_by(entry):
        last.items += entry.items
    else:
        entries.append(entry)


def _size(entry: Call | Span | Run) -> int:
    return entry.count if isinstance(entry, Call | Span) else len(entry.waiting)
