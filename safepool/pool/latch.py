"""Waiting without a lock that a signal's handler could meet.

Python's own primitives let whoever waits hold a lock for some moments. A signal's handler that
runs in such a moment, and waits for the pool, waits for a thread that needs that lock: for ever.
So nothing of the pool that callers wait for is a ``Condition`` or an ``Event``.

Nor is it a lock, but a queue: where there is no GIL, a thread that waits for a lock yields its
processor forty times before it sleeps (CPython, Python/lock.c), to everybody else who wants one.
On a busy machine it gets the lock a tenth of a second late. Who waits for a queue sleeps at once.
"""

from __future__ import annotations

from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Bell", "Latch", "Place", "Waiters", "arrives"]


class Place(Protocol):
    """A queue, or what is to be told as if it were one."""

    def put(self, item: None, /) -> object:
        """Let whoever waits there go on. Never blocks."""


def arrives(place: SimpleQueue[None], timeout_s: float | None = None) -> bool:
    """Wait until something is put there; return whether it is by then.

    Example:
        >>> place = SimpleQueue()
        >>> arrives(place, 0.0)
        False
        >>> place.put(None)
        >>> arrives(place)
        True
    """
    try:
        if timeout_s is None or timeout_s > 0:
            place.get(timeout=timeout_s)
        else:
            place.get_nowait()
    except Empty:
        return False
    return True


class Waiters:
    """Threads that wait for something to become true. Each has a place of its own.

    Example:
        >>> waiters, there = Waiters(), []
        >>> waiters.wait(lambda: bool(there), 0.0)
        False
        >>> there.append(1)
        >>> waiters.wake()
        >>> waiters.wait(lambda: bool(there))
        True
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: deque[Place] = deque()

    def wake(self) -> None:
        """Let everybody who waits look again. From any thread, never blocks."""
        # popleft() rather than a look at the length, which may be of before the other thread's
        # append() where there is no GIL.
        while True:
            try:
                self._places.popleft().put(None)
            except IndexError:
                return

    def add(self, place: Place) -> None:
        """Put something there when all are woken next; look at what is waited for after this."""
        self._places.append(place)

    def wait(self, is_true: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait once: return when woken, or after that time; return what is true then."""
        mine: SimpleQueue[None] = SimpleQueue()
        # First this, then the look: who makes it true does the two the other way round.
        self._places.append(mine)
        if is_true():
            return True
        if not arrives(mine, timeout_s):
            try:
                self._places.remove(mine)
            except ValueError:
                pass  # just woken
        return is_true()


class Latch:
    """Opens once. Unlike ``threading.Event``, nobody who opens it or waits holds a lock.

    So a signal's handler may run at any moment of either, and wait for the pool.

    Example:
        >>> latch = Latch()
        >>> latch.wait(0.0)
        False
        >>> latch.open()
        >>> latch.wait()
        True
    """

    __slots__ = ("_waiters", "is_open")

    def __init__(self) -> None:
        self.is_open: bool = False
        self._waiters = Waiters()

    def open(self) -> None:
        """Let everybody who waits go on. Twice is once."""
        self.is_open = True
        self._waiters.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return whether it is open by then; ``None`` waits for ever."""
        return self.is_open or self._waiters.wait(self._is_open, timeout_s)

    def _is_open(self) -> bool:
        return self.is_open


class Bell:
    """Wakes a coroutine from any thread, once: a place of :class:`Waiters`, a future's callback.

    Args:
        loop: Where the coroutine runs.
        waiter: The future that it awaits.
    """

    __slots__ = ("_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        self._loop = loop
        self._waiter = waiter

    def put(self, _: object = None) -> None:
        """Let the coroutine go on. In a loop that was closed nobody waits any more."""
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            pass  # it was closed

    __call__ = put

    def _end(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)
