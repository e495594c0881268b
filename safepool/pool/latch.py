"""Waiting without a lock that a signal's handler could meet.

Python's own primitives hold a lock for some moments while a thread waits. A signal handler may run
in such a moment and wait for the pool, hence for a thread that needs that lock: without end.
Therefore callers never wait for the pool by a ``Condition`` or an ``Event``.

They wait by a queue instead of a lock: on a Python without GIL, a thread that waits for a lock
yields its processor forty times to all other runnable threads before it sleeps (CPython,
Python/lock.c). On a busy machine the thread gets the lock a tenth of a second late. A thread that
waits for a queue sleeps at once.
"""

from __future__ import annotations

import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# A signal in the moment before the thread sleeps does not wake the thread, nor does
# _thread.interrupt_main(). The interpreter looks for signals between two waits.
_LOOK_S = 1.0


def arrives(place: SimpleQueue[None], timeout_s: float | None = None) -> bool:
    """Wait until something is put there; return whether it was in time.

    Example:
        >>> place = SimpleQueue()
        >>> arrives(place, 0.0)
        False
        >>> place.put(None)
        >>> arrives(place)
        True
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left_s = _LOOK_S if deadline is None else deadline - time.monotonic()
        try:
            if left_s > 0:
                place.get(timeout=min(left_s, _LOOK_S))
            else:
                place.get_nowait()
        except Empty:
            if left_s <= _LOOK_S and deadline is not None:
                return False
        else:
            return True


class Waiters:
    """Threads that wait for a condition, each with a separate queue.

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
        self._places: deque[SimpleQueue[None] | Bell] = deque()

    def wake(self) -> None:
        """Wake all waiting threads. From any thread, never blocks."""
        # popleft() rather than a look at the length, which may be of before the other thread's
        # append() where there is no GIL.
        while True:
            try:
                self._places.popleft().put(None)
            except IndexError:
                return

    def add(self, bell: Bell) -> None:
        """Ring the bell when all are woken next; check the condition after this."""
        self._places.append(bell)

    def wait(self, is_true: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait once, for a wake-up or for that time; return the present value of the condition."""
        mine: SimpleQueue[None] = SimpleQueue()
        # First add the place, then check: the other thread sets the condition first, then wakes
        # the places.
        self._places.append(mine)
        if is_true():
            return True
        if not arrives(mine, timeout_s):
            try:
                self._places.remove(mine)
            except ValueError:  # woken meanwhile
                pass
        return is_true()


class Latch:
    """Opens once. Unlike ``threading.Event``, it holds no lock while it opens or waits.

    A signal handler may run at any moment of ``set`` and ``wait``, and may wait for the pool.

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
        """Wake all waiting threads. Twice is once."""
        self.is_open = True
        self._waiters.wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return whether it opens in time; ``None`` waits without a limit."""
        return self.is_open or self._waiters.wait(lambda: self.is_open, timeout_s)


class Bell:
    """Wakes a coroutine from any thread, once: a place of `Waiters`, a future's callback."""

    __slots__ = ("_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        self._loop = loop
        self._waiter = waiter

    def put(self, _: object = None) -> None:
        """Let the coroutine go on. No coroutine waits in a closed loop."""
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            pass  # it was closed

    __call__ = put

    def _end(self) -> None:
        if not self._waiter.done():
            self._waiter.set_result(None)
