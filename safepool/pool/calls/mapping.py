"""``map``: many calls of one function, with their results in order, or as they arrive.

The calls have no futures. The scheduler's thread stores each result under its index, and the
iterating thread takes it (``results``). Calls that are sent, taken back or lost together are a
span.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from concurrent.futures import CancelledError
from functools import partial
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass
from safepool.pool.core.work import Span
from safepool.pool.latch import Bell, Waiters
from safepool.transport.room import held_at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.functions import SentFunction
    from safepool.pool.calls.tasks import Turn
    from safepool.pool.core.policy import Policy
    from safepool.transport.reductions import Reductions

__all__ = ["Coming", "MapRun", "Raised", "Span"]

MOST_HELD_BYTES = 256 << 20
"""Bound on results that have arrived and were not taken. Above this bound, or above a part of the
memory that the limits left when the first arrived, no further call of that map is sent."""

# A smaller sum is always allowed.
_LITTLE_BYTES = 1 << 20
# Each of a larger size is counted, the others by their mean.
_COUNTED_BYTES = 64 * 1024

# The arguments of a call, or the only one.
Item = Any


class Raised:
    """Stands for a result: this call raised."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException = error


def _takes(function: Callable[..., Any], count: int) -> bool | None:
    """Return whether a function takes that many arguments; ``None`` if unknown."""
    import inspect  # noqa: PLC0415 -- of use to an error alone

    try:
        signature = inspect.signature(function)
    except Exception as error:  # noqa: BLE001 -- user code; builtins have none
        let_handlers_pass(error)
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class Coming:
    """Stands for items that are pushed into the results as they come (:meth:`Results.push`).

    Each is the tuple of a call's arguments if ``starred``, otherwise the only argument.
    """

    def __init__(self, *, starred: bool) -> None:
        self.starred: bool = starred

    def __iter__(self) -> Iterator[Item]:
        return iter(())


class Waiting:
    """Items in their order, added and taken many at a time."""

    __slots__ = ("_at", "_count", "_portions")

    def __init__(self) -> None:
        self._portions: deque[list[Item]] = deque()
        self._at = 0  # how many of the first portion were taken
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, items: list[Item]) -> None:
        """Add items. The caller must not change them afterwards."""
        if items:
            self._portions.append(items)
            self._count += len(items)

    def take(self, count: int) -> list[Item]:
        """Remove and return the first items, at most ``count``."""
        taken: list[Item] = []
        while self._portions and len(taken) < count:
            portion = self._portions[0]
            end = min(self._at + count - len(taken), len(portion))
            taken += portion[self._at : end]
            if end == len(portion):
                self._portions.popleft()
                self._at = 0
            else:
                # Items that a worker has are not kept here.
                portion[self._at : end] = [None] * (end - self._at)
                self._at = end
        self._count -= len(taken)
        return taken

    def clear(self) -> None:
        """Drop all."""
        self._portions.clear()
        self._at = self._count = 0


class MapRun:
    """One ``map``, shared by the iterating thread and the scheduler's thread.

    Args:
        at_once: Calls that travel together; ``None`` is as many as their time allows.
        starred: ``True`` if an item is the tuple of a call's arguments, ``False`` if it is the
            only argument.
        ordered: ``True`` if results are taken in the order of their calls, ``False`` in the order
            of arrival.
        returns_errors: Whether an exception of a call is its result.

    Attributes:
        waiting, queued, most_at_once, dropped, held, noted: The same as in the core's ``Run``.
            Only the scheduler's thread reads the waiting calls.
        unsettled: Calls that were queued and have no result yet.
        turns: Turns by which callers have sent calls that the scheduler does not know yet, in
            order.
        length: Number of calls in all; ``None`` if unknown here.
        reductions: By the index of a call without a result: results of methods for pickling, for
            the next time that the call is sent.
        reader: Weak reference to the result iterator. When it is dead, results are discarded.
    """

    noted: Any
    taken: int
    fed: bool
    dropped: bool
    held: bool
    length: int | None = None
    # Another type for the results than `ResultIterator`.
    iterator: type[Any] | None = None
    # Advice for errors, if the items are tuples of arguments.
    spread = "give map() an iterable for each of them: map(function, *zip(*items))"
    # Of the first item, if it is a tuple or list and the only argument of its call: its length.
    _width = 0

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        policy: Policy,
        at_once: int | None,
        *,
        starred: bool = True,
        ordered: bool = True,
        returns_errors: bool = False,
    ) -> None:
        self.starred = starred
        self.returns_errors = returns_errors
        self.function = function
        self.name = name
        self.policy = policy
        self.at_once = at_once
        self.most_at_once: int = sys.maxsize
        self.unsettled: int = 0
        self.fed = self.dropped = self.held = False
        self.reader: Callable[[], object] = object
        # Bytes of large results, by the index of the first; put and taken so far, by different
        # threads. And of all the others that were put, with the index of the next to be taken.
        self._sizes: dict[int, int] = {}
        self._put_bytes = self._taken_bytes = self._most_held_bytes = 0
        self._small_bytes = self.taken = 0
        self.waiting: Waiting = Waiting()
        self.queued = False
        self.number: int = 0
        self.count: int = 0
        self.sent: SentFunction | None = None
        self.needs: Sequence[Delivery] = ()
        self.reductions: dict[int, Reductions] = {}
        self._cut = 0
        self.turns: deque[Turn] = deque()
        # By the index of the first: values of calls that follow each other, or an error.
        self._results: dict[int, list[Any] | Raised] = {}
        # The keys of that in the order of their arrival, if that is the one to take them in.
        self._arrived: deque[int] | None = None if ordered else deque()
        self._waiters = Waiters()
        # Nothing arrives from this index on: the run was stopped there.
        self._stopped: tuple[int, Callable[[], BaseException]] | None = None

    @property
    def stopped(self) -> bool:
        """Whether the remaining calls must not run: not needed, or an item failed."""
        return self._stopped is not None

    def add(self, items: list[Item], *, last: bool) -> None:
        """Take further calls from the thread that iterates."""
        self._count(items)
        self.waiting.add(items)
        self.fed = self.fed or last

    def _count(self, items: list[Item]) -> None:
        if not self.count and items and not self.starred:
            kind = type(items[0])  # whose metaclass may say that it is equal to any other
            if kind is tuple or kind is list:
                self._width = len(items[0])
        self.unsettled += len(items)
        self.count += len(items)

    @property
    def may_go_alone(self) -> bool:
        """Whether the thread that iterates may send all calls itself, and read the answers."""
        plain = type(self) is MapRun and self._arrived is None and self.at_once is None
        return plain and not self.count and self.policy.timeout_s is None

    def draw(self, items: list[Item]) -> Span:
        """Return the next calls, which do not wait for a worker."""
        self._count(items)
        span = Span(self, self._cut, items, alone=len(items) == 1)
        self._cut += len(items)
        return span

    def undraw(self, span: Span) -> None:
        """Undo the last :meth:`draw`, whose calls were not sent."""
        self.unsettled -= span.count
        self.count -= span.count
        self._cut -= span.count

    def has_run_out(self, fed: int) -> bool:
        """Return whether none of the first ``fed`` queued calls waits. From any thread."""
        return self._cut >= fed

    def cut(self, count: int) -> Span:
        """Take the next calls, at most ``count``, from those that wait."""
        items = self.waiting.take(count)
        span = Span(self, self._cut, items)
        self._cut += len(items)
        return span

    def arguments_of(self, item: Item) -> tuple[Any, ...]:
        """Return the arguments of an item's call."""
        return item if self.starred else (item,)

    @property
    def is_full(self) -> bool:
        """Whether too many results wait to be taken, and a reader can take them."""
        settled = self.count - self.unsettled
        held_bytes = self._put_bytes - self._taken_bytes
        held_bytes += self._small_bytes * max(0, settled - self.taken) // max(1, settled)
        # None is too much: a reader that has taken all waits for the next.
        if held_bytes <= _LITTLE_BYTES or self.dropped or self.reader() is None:
            return False
        self._most_held_bytes = self._most_held_bytes or held_at_most(MOST_HELD_BYTES)
        return held_bytes > self._most_held_bytes

    def put(self, index: int, results: list[Any], size_bytes: int = 0) -> None:
        """Store consecutive results; :meth:`tell` follows when these are all for now."""
        if self.reductions:
            for place in range(index, index + len(results)):
                self.reductions.pop(place, None)
        if self.dropped:
            return
        if size_bytes <= _COUNTED_BYTES:
            self._small_bytes += size_bytes
        elif self.reader() is None:
            return
        else:
            self._sizes[index] = size_bytes
            self._put_bytes += size_bytes
        self._results[index] = results
        if self._arrived is not None:
            self._arrived.append(index)

    def put_error(self, index: int, error: BaseException) -> None:
        """Store the exception of a call."""
        self.reductions.pop(index, None)
        if not self.dropped:
            self._results[index] = [error] if self.returns_errors else Raised(error)
            if self._arrived is not None:
                self._arrived.append(index)

    def hint(self, error: BaseException) -> None:
        """Add to an error that the items seem to be the arguments of calls, if they do."""
        if self._width < 2 or not isinstance(error, TypeError):
            return
        if _takes(self.function, 1) is False and _takes(self.function, self._width):
            error.add_note(
                f"map() calls {self.name} with each item as the only argument, and the first item "
                f"holds {self._width}. To call it with {self._width} arguments {self.spread}"
            )

    def drop(self) -> None:
        """Keep no more results: they are not needed."""
        self.dropped = True
        self.stop(CancelledError)
        self._results.clear()
        self._sizes.clear()
        self.reductions.clear()

    def end(self, length: int) -> None:
        """Store the number of results, for a reader that may wait for another one."""
        self.length = length
        self.tell()

    def tell(self) -> None:
        """Wake the waiting thread."""
        self._waiters.wake()

    def give_up(self, span: Span, error: Callable[[], BaseException]) -> None:
        """Let the calls of a span raise ``error()``, and those that follow."""
        for place in range(span.done, span.count):
            self.put_error(span.start + place, error())
        self.stop(error)

    def stop(self, error: Callable[[], BaseException]) -> None:
        """Give up the remaining calls: those that no worker has raise ``error()``."""
        self.waiting.clear()
        if self._stopped is None:
            self._stopped = (self._cut, error)
        self.tell()

    def has(self, index: int) -> bool:
        """Return whether the result with this index in the order of reading has arrived."""
        return index in self._results if self._arrived is None else bool(self._arrived)

    def take(self, index: int, deadline: float | None) -> list[Any]:
        """Return the next results, and keep them no longer; wait until ``deadline``.

        At least one, in order; none at the end. If the call raised, the call counts as taken and
        its exception is raised. After a ``TimeoutError``, ``taken`` is unchanged.
        """
        while (results := self._pop(index)) is None:
            if not self.wait(index, deadline):
                raise TimeoutError
            if not self.has(index):
                results = self._rest_at(index)
                break
        if isinstance(results, Raised):
            self.taken = index + 1
            try:
                raise results.error
            finally:
                del results
        self.taken = index + len(results)
        return results

    def _pop(self, index: int) -> list[Any] | Raised | None:
        if self._arrived is not None:
            if not self._arrived:
                return None
            index = self._arrived.popleft()
        results = self._results.pop(index, None)
        if results is not None:
            self._taken_bytes += self._sizes.pop(index, 0)
        return results

    def wait(self, index: int, deadline: float | None) -> bool:
        """Wait; return whether :meth:`take` would return or raise without waiting."""
        is_over = partial(self._is_over, index)
        while not is_over():
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            if self.turns:
                self._collect(left_s)
            else:
                self._waiters.wait(is_over, left_s)
        return True

    def _collect(self, timeout_s: float | None) -> None:
        """Read the next answers that this thread has asked for itself."""
        try:
            turn = self.turns.popleft()
        except IndexError as error:  # taken meanwhile
            let_handlers_pass(error)
            return
        turn.collect(timeout_s)
        if not turn.is_over:
            turn.ask()

    def look(self, index: int, bell: Bell | None) -> bool:
        """Return whether :meth:`take` need not wait; ring when it is time to look again."""
        if bell is not None:
            self._waiters.add(bell)
        for turn in [*self.turns]:
            turn.ask()
        return self._is_over(index)

    def _is_over(self, index: int) -> bool:
        if self.has(index) or index == self.length:
            return True
        return self._stopped is not None and (index >= self._stopped[0] or self.dropped)

    def _rest_at(self, index: int) -> list[Any] | Raised:
        """Return the replacement of a result that will not come."""
        if self._stopped is None or index == self.length:
            return []
        error = self._stopped[1]()
        return [error] if self.returns_errors else Raised(error)
