"""Results of a ``map``: items in, results out.

Results         how many items are taken ahead of the results
ResultIterator  what the caller holds; an error of a call does not end it
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, Protocol, Self

from safepool.errors import PoolBrokenError, let_handlers_pass, users_frames
from safepool.pool.calls import mapping
from safepool.pool.calls.mapping import Item, MapRun, Raised
from safepool.pool.calls.tasks import fresh, here
from safepool.pool.latch import Bell, Waiters
from safepool.transport.room import held_at_most

__all__ = ["Feed", "OpenMaps", "ResultIterator", "Results", "end_failed"]

# Items that ``map`` takes before it returns, from an iterator without a length. The standard pool
# takes all of them, and the caller may close their source afterwards. The portions grow, so that
# workers have work early. Later portions double whenever the workers ran out, and are never larger
# than the last of these.
_FIRST_PORTION = 256
_AT_ONCE = 16384
_MOST_AHEAD = 65536

# The most items whose size is looked at together, and the size above which it matters.
_MOST_PORTION = 256
_LARGE_BYTES = 1 << 20
_SMALL = frozenset({int, float, complex, bool, type(None)})


def _size_of(items: list[Item], *, starred: bool) -> int:
    """Return about how many bytes items hold that are in one piece."""
    parts: list[Any] = [*itertools.chain.from_iterable(items)] if starred else items
    if _SMALL.issuperset(map(type, parts)):
        return 0
    return sum(
        # The first is small for a view of an array, the second is missing for arrays of some
        # libraries.
        max(sys.getsizeof(part, 0), getattr(part, "nbytes", 0))
        if type(part).__module__ == "numpy"
        else sys.getsizeof(part, 0)
        for part in parts
    )


class Feed(Protocol):
    """Methods that a result iterator needs of the pool."""

    def add_items(self, run: MapRun, items: list[Item], *, last: bool) -> None:
        """Queue further calls; ``last``: there will be no more."""

    def give_up(self, run: MapRun) -> None:
        """Drop the calls that no worker has: they are not needed."""

    def end_calls(self, run: MapRun) -> None:
        """End the workers that run calls of a run that was given up."""

    def wake(self) -> None:
        """Look again at runs that were held."""

    def check_may_wait(self) -> None:
        """Refuse that the scheduler's own thread waits: it would have to end the call."""


class Results:
    """Takes items from the caller's iterators, and results in their order.

    Args:
        ahead: Items taken ahead of the results; ``None`` is as many as keep the workers busy,
            0 none but by :meth:`feed`.
        deadline: When waiting for a result ends, by the monotonic clock.
    """

    def __init__(
        self,
        run: MapRun,
        items: Iterator[Item],
        feed: Feed,
        ahead: int | None,
        deadline: float | None,
    ) -> None:
        self._run = run
        self._items: Iterator[Item] | None = items
        self._feed = feed
        self._grows = ahead is None
        self._ahead = _FIRST_PORTION if ahead is None else ahead
        self._is_fed = ahead == 0
        self._room = Waiters()
        self._most_ahead = _MOST_AHEAD
        self.deadline: float | None = deadline
        self._error: BaseException | None = None
        # Results of which each lets a further item be taken, in reverse order.
        self._rest: list[Any] = []
        # Large items that were taken and whose results were not: their end, and their bytes.
        self._sizes: deque[tuple[int, int]] = deque()
        self._bytes = self._most_bytes = 0
        self._portion = 1
        self._fed = 0
        # Results in `_rest` do not count.
        self._taken = 0
        self.seen: bool = False
        self._over = False
        self.at_end: Callable[[], object] | None = None
        # The thread that shuts the pool down takes items as well, beside the iterating thread.
        self._pulling = threading.RLock()
        self._pulls = False
        self._pid = here.pid
        if self._is_fed:
            return
        self._pull()
        while self._grows and self._items is not None and self._ahead < _AT_ONCE:
            if self._is_full:
                break
            self._ahead *= 2
            self._pull()
        if self._grows and self._error is not None:
            raise self._error

    @property
    def exhausted(self) -> bool:
        """Whether all items were taken."""
        return self._items is None

    def iterate(self, keep: object) -> ResultIterator:
        """Return the iterator over the results; it holds ``keep``, the pool, until the end."""
        return (self._run.iterator or ResultIterator)(self, keep)

    def feed(self, chunk: int) -> None:
        """Queue calls as their items arrive, in a separate thread.

        Items at hand are queued before the thread waits for the next item, which may depend on a
        result. Before the first request for a result there is no bound: the calls run for their
        effects. If the pool ends meanwhile, the calls of taken items raise its error.
        """
        items = self._items
        try:
            while items is not None and (batch := [*itertools.islice(items, chunk)]):
                if self._items is None:
                    break  # the rest is not needed
                if not self.push(batch):
                    break
                while not self._has_room():
                    self._room.wait(self._has_room)
        except Exception as error:  # noqa: BLE001 -- user code; raised when its turn comes
            self._error = error
        finally:
            self.push_no_more()

    def take_all(self) -> None:
        """Let :meth:`feed` go on without a bound: a thread waits for its end, not for results."""
        self._most_ahead = sys.maxsize
        self._room.wake()

    def push(self, batch: list[Item]) -> bool:
        """Queue calls for items that have just arrived; ``False`` if they cannot run."""
        self._fed += len(batch)
        try:
            self._feed.add_items(self._run, batch, last=False)
        except PoolBrokenError as error:
            self._run.stop(partial(fresh, error))
        except RuntimeError:  # the pool has ended
            self._run.stop(CancelledError)
        else:
            return True
        return False

    def push_no_more(self, error: BaseException | None = None) -> None:
        """Say that no further items come; raise the error after the last result."""
        self._error = self._error or error
        self._items = None
        self._feed.add_items(self._run, [], last=True)
        self._run.end(self._fed)

    @property
    def ahead(self) -> int:
        """Number of items that were taken and whose results were not."""
        return self._fed - self._taken

    def wait_for_room(self, bell: Bell) -> None:
        """Ring when more results were taken, or no more will be."""
        self._room.add(bell)

    def _has_room(self) -> bool:
        return not self.seen or self._items is None or self.ahead < self._most_ahead

    def wait(self, timeout_s: float) -> bool:
        """Wait; return whether :meth:`advance` would return at once."""
        if self._rest or self._over or (not self._is_fed and self._run.taken == self._fed):
            return True
        if self._pid != here.pid:
            return True  # it raises
        return self._run.wait(self._run.taken, time.monotonic() + timeout_s)

    def look(self, bell: Bell | None = None) -> bool:
        """Return whether :meth:`advance` returns at once; if not, ring when to look again.

        Further items are taken, if it is time. For a thread that waits for nothing.
        """
        if self._rest or self._over or self._pid != here.pid:
            return True
        index = self._run.taken
        if self._items is not None:
            self._refill()
        if not self._is_fed and index == self._fed:
            return True
        return self._run.look(index, bell)

    def end(self) -> None:
        """Drop waiting calls, and end running ones, because the reader itself is ended."""
        self.seen = True
        self.close()
        self._feed.end_calls(self._run)

    def is_of(self, feed: object) -> bool:
        """Tell whether this pool runs the calls."""
        return self._feed is feed

    def advance(self) -> list[Any] | Raised:
        """Return the next results in reverse order, none at the end, or raise an exception.

        After the last result: that of the items' iterator, or the pool's reason not to take them.
        """
        self.seen = True
        if self._pid != here.pid:
            self._leave()
        mine = object()
        try:
            if vars(self).setdefault("_inside", mine) is not mine:
                return Raised(ValueError("another thread waits for the next result of this map"))
            return self._advance()
        finally:
            # This excludes an iteration by another thread.
            if vars(self).get("_inside") is mine:
                del vars(self)["_inside"]

    def _leave(self) -> None:
        """Take no item in a fork: a thread that it lacks may be among them, and hold the locks."""
        self._pulling = threading.RLock()
        vars(self).pop("_inside", None)
        self._is_fed = self._is_fed or self._items is not None

    def _advance(self) -> list[Any] | Raised:
        if self._over:
            return []
        if not self._rest:
            before = self._run.taken
            try:
                results = self._next()
            except BaseException as error:
                if self._run.taken == before:
                    raise
                self._taken = self._run.taken
                self._run.hint(error)
                frames = users_frames(error.__traceback__, at_least_one=False)
                return Raised(BaseException.with_traceback(error, frames))
            if not results and self._error is not None:
                late, self._error = self._error, None
                raise late
            # Taken from the end, so that nothing here keeps a result that the caller has dropped.
            results.reverse()
            # Counted before: the caller may ask for the next item before it takes a result.
            if self._items is None or self._grows or self._is_fed:
                self._taken = self._run.taken
                return results
            self._rest = results
        else:
            self._refill()
        self._taken += bool(self._rest)
        return [self._rest.pop()] if self._rest else []

    def close(self) -> None:
        """Drop waiting calls, if a result was requested and not all were taken."""
        if not self.seen or self._over:
            return
        self._over = True
        early = self._items is not None or self._run.taken < self._fed or bool(self._rest)
        self._items = None
        self._rest = []
        self._room.wake()
        if early:
            self._feed.give_up(self._run)
        if self.at_end is not None:
            self.at_end()

    def finish(self) -> None:
        """Queue calls for all items that are left, as the standard pool does at first.

        If the pool was shut down or is broken, that is raised after the results of the others.
        """
        if self._grows:
            self._pull(everything=True)

    def _next(self) -> list[Any]:
        """Return the next results, none at the end."""
        if self._items is not None:
            self._refill()
        run, index = self._run, self._run.taken
        if self._is_fed:
            self._room.wake()
            if run.stopped and index > self._fed:
                return []  # how many there would have been nobody knows: one error stands for them
        elif index == self._fed:
            with self._pulling:  # another thread may be queueing the last ones
                if index == self._fed:
                    return []
        grows = self._grows and self._items is not None
        if grows and run.has_run_out(self._fed) and not run.has(index):
            self._ahead = min(2 * self._ahead, _MOST_AHEAD)  # the workers have run out
        if not run.has(index):
            self._feed.check_may_wait()
        results = run.take(index, self.deadline)
        if run.held and not run.is_full:
            self._feed.wake()
        return results

    def _refill(self) -> None:
        if self._is_fed:
            return
        if not self._grows or 2 * (self._fed - self._taken) <= self._ahead:
            self._pull()

    def _pull(self, *, everything: bool = False) -> None:
        """Queue calls for the items that may be taken ahead."""
        with self._pulling:
            if self._items is None or self._pulls:  # the items' own iterator shuts the pool down
                return
            self._pulls = True
            try:
                chunk = self._run.at_once or 1
                room = self._ahead - (self._fed - self._taken)
                many = None if everything else room // chunk * chunk
                if many is None or many > 0:
                    self._queue(self._items, many)
            finally:
                self._pulls = False

    def _take(self, items: Iterator[Item], many: int | None, batch: list[Item]) -> bool:
        """Take items, not more bytes than may be under way; return whether these were the last."""
        if many is None or not self._grows:
            batch.extend(itertools.islice(items, many))
            return many is None or len(batch) < many
        chunk = self._run.at_once or 1
        while len(batch) < many and not (self._is_full and self._fed + len(batch) > self._taken):
            wanted = min(many - len(batch), self._portion // chunk * chunk or chunk)
            taken = list(itertools.islice(items, wanted))
            batch += taken
            if len(taken) < wanted:
                return True
            size = _size_of(taken, starred=self._run.starred)
            if size <= _LARGE_BYTES:
                self._portion = min(2 * self._portion, _MOST_PORTION)
                continue
            self._portion = 1
            self._most_bytes = self._most_bytes or held_at_most(mapping.MOST_HELD_BYTES)
            # Their results give that back when they are taken.
            self._sizes.append((self._fed + len(batch), size))
            self._bytes += size
        return False

    @property
    def _is_full(self) -> bool:
        while self._sizes and self._sizes[0][0] <= self._taken:
            self._bytes -= self._sizes.popleft()[1]
        return self._bytes > self._most_bytes

    def _queue(self, items: Iterator[Item], many: int | None) -> None:
        batch: list[Item] = []
        error: Exception | None = None
        try:
            ended = self._take(items, many, batch)
        except Exception as problem:
            if not self._fed:
                raise
            let_handlers_pass(problem)
            error, ended = problem, True
        if ended:
            self._items = None
        elif not batch:
            return
        try:
            self._feed.add_items(self._run, batch, last=self._items is None)
        except RuntimeError as problem:  # the pool was shut down, or is broken
            if not self._fed:
                raise
            self._items, error = None, error or problem
        else:
            self._fed += len(batch)
        self._error = error


# Iterators whose last result was an error, and that were not asked again.
_failed: weakref.WeakSet[ResultIterator] = weakref.WeakSet()


class ResultIterator:
    """The results of a map, in the form that the caller has.

    The exception of a call is raised at its position, and the next request continues with the next
    result. Other exceptions end the iterator: the timeout is over, the pool takes no more items, a
    signal handler has raised.
    """

    __slots__ = ("__weakref__", "_failed", "_guard", "_here", "_keep", "results")

    def __init__(self, results: Results, keep: object) -> None:
        self.results: Results | None = results
        self._keep = keep
        self._here: list[Any] = []
        self._failed = False
        # It closes the results if it is dropped: not __del__(), in which a signal's handler may
        # come after the last result as well, and what that raises would be lost.
        self._guard: Generator[None] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        try:
            return self._here.pop()
        except IndexError:
            pass
        except BaseException:  # a handler's, in this moment
            self.close()
            raise
        found: list[Any] | Raised | None = None
        results = self.results
        try:
            if self._failed:
                self._failed = False
                _failed.discard(self)
            if results is None:
                raise StopIteration  # noqa: TRY301
            if self._guard is None:
                self._guard = _closing(results)
                next(self._guard)
            found = results.advance()
            if isinstance(found, Raised):
                self._failed = True
                _failed.add(self)
                raise _as_of_a_generator(found.error)  # noqa: TRY301
            self._here = found
            if found:
                return found.pop()
            raise StopIteration  # noqa: TRY301
        except BaseException:
            if not isinstance(found, Raised):
                self.close()
            raise
        finally:
            # An error that is kept would keep the frame, and this the calls.
            del self, found, results

    def close(self) -> None:
        """Take no more results; cancel waiting calls, if a result was requested."""
        self._here = []
        self._keep = None
        if self._guard is not None:
            self._guard.close()
            # With them goes the run's weak reference to this: nothing is called at its end.
            self._guard = self.results = None

    def end(self) -> None:
        """Take no more results, cancel waiting calls and end running ones."""
        results = self.results
        self.close()
        if results is not None:
            results.end()

    @property
    def is_at_hand(self) -> bool:
        """Whether the next result was fetched with one before."""
        return bool(self._here)


def _closing(results: Results) -> Generator[None]:
    try:
        yield
    finally:
        results.close()


def _as_of_a_generator(error: BaseException) -> BaseException:
    """Return an error as a generator raises it, and so the standard pool (PEP 479)."""
    if not isinstance(error, StopIteration):
        return error
    stopped = RuntimeError("generator raised StopIteration")
    stopped.__cause__ = error
    return stopped


class OpenMaps:
    """Maps of one pool over iterators of unknown length, whose items are not all taken yet.

    The standard pool takes all items when ``map`` is called. The pool takes the remaining items
    when it is shut down, or when the unused iterator over the results is dropped.
    """

    def __init__(self) -> None:
        self._results: dict[weakref.ref[Any], Results] = {}

    def add(
        self, iterator: ResultIterator, results: Results, do: Callable[[Callable[[], None]], None]
    ) -> None:
        """Register an open map: its calls run even if the program takes no result.

        ``do`` calls a function; in another thread if this is the pool's own thread, where the
        garbage collector may drop an iterator.
        """
        self._results[weakref.ref(iterator, partial(self._finish_unseen, do))] = results

    def finish(self) -> None:
        """Take all items that are left."""
        for results in [*self._results.values()]:
            results.finish()

    def _finish_unseen(
        self, do: Callable[[Callable[[], None]], None], iterator: weakref.ref[Any]
    ) -> None:
        results = self._results.pop(iterator, None)
        # The callback of a weak reference may run before the iterator's own finalizer.
        if results is not None and not results.seen:
            do(results.finish)


def end_failed(feed: Feed) -> None:
    """Drop the remaining calls of maps whose iterator has raised an error and was not asked again.

    Called when an error leaves a pool's block: otherwise the block would wait for calls whose
    results are not needed.
    """
    while True:
        try:
            found = [*_failed]
            break
        except RuntimeError:  # another map has just failed
            continue
    for iterator in found:
        results = iterator.results
        if results is not None and results.is_of(feed):
            iterator.close()
