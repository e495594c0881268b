"""Work that one worker has been sent, in order, and that it still owes.

Everything sent to a worker gets a position, counted from 1. A worker does what it was sent in
that order, so what it owes is always: one that has begun perhaps, then some that have not. All
that the pool has to know of a worker that died is how far it came.

Positions in, work out: no process, no message, no clock.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.pool.core.work import Given


class Ledger:
    """Debts of one worker.

    Attributes:
        owed: Number of calls.
        expected_ns: Expected time of these calls.
    """

    __slots__ = ("_next", "_works", "expected_ns", "owed")

    def __init__(self) -> None:
        self._works: deque[Given] = deque()
        self._next = 1
        self.owed: int = 0
        self.expected_ns: int = 0

    def __iter__(self) -> Iterator[Given]:
        return iter(self._works)

    @property
    def last(self) -> int:
        """The position of the call that was sent last, 0 at first."""
        return self._next - 1

    @property
    def head(self) -> Given | None:
        """Work that the worker does now, or will do next."""
        return self._works[0] if self._works else None

    @property
    def tail(self) -> Given | None:
        """The last of the work that the worker has not answered."""
        return self._works[-1] if self._works else None

    def skip(self, calls: int) -> None:
        """Count calls that were sent and answered without being written down here."""
        self._next += calls

    def give(self, work: Given) -> None:
        """Note the work that is being sent."""
        work.position = self._next
        work.done = 0
        self._next += work.count
        self._works.append(work)
        self.owed += work.count
        self.expected_ns += work.expected_ns * work.count

    def settle(self, position: int, most: int = 1) -> tuple[Given, int, int] | None:
        """Remove answered calls, from this position on.

        Args:
            position: Position of the first answered call.
            most: Number of calls that are answered, at most; those of the next work are left.

        Returns:
            The work they belong to, the place of the first there, and how many were removed;
            ``None`` if they were answered before.

        Raises:
            ValueError: They are not the next calls of the ledger.
        """
        if position >= self._next:
            raise ValueError(f"answer for position {position}, last sent {self.last}")
        if not self._works:
            return None
        work = self._works[0]
        place, done = position - work.position, work.done
        if place != done:
            if place < done:
                return None
            raise ValueError(f"answer for position {position}, expected {work.position + done}")
        many = min(most, work.count - done)
        work.done += many
        if work.done == work.count:
            self._works.popleft()
        self._owe_less(work, many)
        return work, place, many

    def take_back(self, begun: int) -> list[Given]:
        """Remove the calls that have not begun, and return them in order."""
        back: list[Given] = []
        while self._works:
            work = self._works[-1]
            begun_of_it = begun + 1 - work.position
            if begun_of_it >= work.count:
                break
            if begun_of_it <= work.done:
                self._works.pop()
                if work.done:
                    work = work.split(work.done)
            else:
                work = work.split(begun_of_it)
            self._owe_less(work, work.count)
            back.append(work)
        back.reverse()
        return back

    def withdraw(self) -> Given:
        """Remove the rest of the next work, and return it.

        Work that was sent behind it stays: the worker may have begun that.

        Raises:
            IndexError: The ledger is empty.
        """
        work = self._works.popleft()
        if work.done:
            work = work.split(work.done)
        self._owe_less(work, work.count)
        return work

    def strike(self) -> tuple[Given, int]:
        """Remove the next call, and return its work and its index in the work.

        Raises:
            IndexError: The ledger is empty.
        """
        work = self._works[0]
        place = work.done
        self.settle(work.position + place)
        return work, place

    def _owe_less(self, work: Given, count: int) -> None:
        self.owed -= count
        self.expected_ns -= work.expected_ns * count
