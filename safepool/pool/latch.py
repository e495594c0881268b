"""Waiting without a lock that a signal's handler could meet.

Python's own primitives let whoever waits hold a lock for some moments. A signal's handler that
runs in such a moment, and waits for the pool, waits for a thread that needs that lock: for ever.
So nothing of the pool that callers wait for is a ``Condition`` or an ``Event``.
"""

from __future__ import annotations

import _thread
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ["Bell", "Latch", "Releasable", "Waiters"]


class Releasable(Protocol):
    """A lock, or what is to be told as if it were one."""

    def release(self) -> object:
        """Let whoever waits for it go on. Never blocks."""


class Waiters:
    """Threads that wait for something to become true. Each has a lock of its own.

    Example:
        >>> waiters, there = Waiters(), []
        >>> waiters.wait(lambda: bool(there), 0.0)
        False
        >>> there.append(1)
        >>> waiters.wake()
        >>> waiters.wait(lambda: bool(there))
        True
    """

    __slots__ = ("_locks",)

    def __init__(self) -> None:
        self._locks: deque[Releasable] = deque()

    def wake(self) -> None:
        """Let everybody who waits look again. From any thread, never blocks."""
        # popleft() rather than a look at the length, which may be of before the other thread's
        # append() where there is no GIL.
        while True:
            try:
                self._locks.popleft().release()
            except IndexError:
                return

    def add(self, lock: Releasable) -> None:
        """Release a lock when all are woken next; look at what is waited for after this."""
        self._locks.append(lock)

    def wait(self, is_true: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait once: return when woken, or after that time; return what is true then."""
        mine = _thread.allocate_lock()
        mine.acquire()
        # First this, then the look: who makes it true does the two the other way round.
        self._locks.append(mine)
        if is_true():
            return True
        if timeout_s is None:
            mine.acquire()
        elif not (timeout_s > 0 and mine.acquire(True, timeout_s)):
            try:
                self._locks.remove(mine)
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
    """Wakes a coroutine from any thread, once: a lock of :class:`Waiters`, a future's callback.

    Args:
        loop: Where the coroutine runs.
        waiter: The future that it awaits.
    """

    __slots__ = ("_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        self._loop = loop
        self._waiter = waiter

    def release(self, _: object = None) -> None:
        """Let the coroutine go on. In a loop that was closed nobody waits any more."""
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            pass  # it was closed

    __call__ = release

    def _end(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)
