"""Threads that run the program's code, so that the scheduler's thread does not wait for it.

    Hands     any number at a time: pickling of arguments, unpickling of results. A slow job
              delays no other job.
    Teller    one after the other, in order: callbacks of futures, handlers of log records.

A job that ends within the scheduler's patience has its result in the scheduler's thread at once,
so the order of jobs is kept. A later job ends by a wake-up of the scheduler.

    scheduler's thread                  a thread of the hands
    do(run, finish)  ---------------->  run()
      in time: finish(), and None  <--
      late: the job, and goes on
    come_back(): finish()  <----------  and wakes the scheduler

Not covered:
    * A finalizer that the collector runs in the scheduler's thread: waiting for a call of the same
      pool there raises an error (``tasks``).
"""

from __future__ import annotations

import _thread
import contextvars
import math
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from safepool import procfs
from safepool.pool.latch import Latch, arrives
from safepool.workers.contained import ContainedLogger
from safepool.workers.fork import leave_fork

_T = TypeVar("_T")

_log = ContainedLogger()

# A job that runs for so long may wait for something: it no longer counts as one of the most.
_STUCK_S = 0.05
PATIENCE_S = 0.005
"""So long the scheduler waits for a job: most end by then, and keep the order of submission."""
HELD_UP_S = 0.5
"""So long no call begins behind one that is being pickled. An import may take that long."""
STANDS_S = 5.0
"""A job that uses no processor for so long may wait for what comes after it."""
# Behind one that is late, the next ones are waited for as long as a thread takes to be woken.
_BRIEF_S = 0.001
# Less time of a processor is taken by one that only looks whether it may go on.
_MOVES_MS = 50
# A thread of a closed pool ends at once, unless the program's code keeps it.
_ENDING_S = 1.0


class ThreadThatStarts(threading.Thread):
    """A daemon thread whose ``start`` holds no lock and does not wait.

    ``Thread.start`` holds a lock that the new thread needs: a signal handler that waits for the
    new thread at that moment would wait without end.
    """

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._runs = False

    def run(self) -> None:
        """Run the target, in the thread."""
        self._runs = True
        super().run()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, also if it has only been started: the base would raise."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._runs:
            if deadline is not None and time.monotonic() >= deadline:
                return
            time.sleep(_BRIEF_S)
        super().join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def start(self) -> None:
        """Start it, or raise ``RuntimeError`` if no thread can be started."""
        module, own = threading, vars(self)
        limbo: dict[Any, Any] | None = getattr(module, "_limbo", None)
        if limbo is None or not hasattr(self, "_bootstrap"):
            super().start()
            return
        if "_context" in own and own["_context"] is None:  # Python 3.14
            # Free-threaded: filters of warnings and the program's variables are the starter's.
            inherits = getattr(sys.flags, "thread_inherit_context", False)
            own["_context"] = contextvars.copy_context() if inherits else contextvars.Context()
        bootstrap: Any = getattr(self, "_bootstrap")  # noqa: B009 -- no checker knows it

        def begin() -> None:
            # The entry stays: an exception of a signal handler in start() may come before the
            # thread was started, or after.
            limbo[self] = self
            bootstrap()

        # Python 3.14 and 3.13 need it for join().
        handle = own.get("_os_thread_handle") or own.get("_handle")
        if handle is not None:
            start: Any = vars(_thread)["start_joinable_thread"]
            start(begin, handle=handle, daemon=True)
        else:
            _thread.start_new_thread(begin, ())


def in_a_thread(run: Callable[[], None], name: str) -> None:
    """Call a function in a separate thread, or here if no thread can be started."""
    try:
        ThreadThatStarts(run, name).start()
    except RuntimeError:
        run()


def _contain(run: Callable[[], None], failed: str) -> None:
    """Run the program's code: log its exceptions, and end a fork that it makes."""
    here = os.getpid()
    try:
        run()
    except BaseException as error:  # noqa: BLE001 -- a callback's SystemExit too
        if os.getpid() != here:
            leave_fork(error)
        _log.exception(failed)
    if os.getpid() != here:
        leave_fork()


def _busy_for(clock: int) -> float:
    """Return how long a thread has used its processor, in milliseconds; 0 if unknown."""
    try:
        return float(_used_ns(clock) // 1_000_000) if clock else 0.0
    except OSError:  # it has just ended
        return math.nan


class LateError(Exception):
    """The job did not end within its time."""


def within(patience_s: float, run: Callable[[], _T]) -> _T:
    """Call the program's code in a separate thread, and return its result.

    `LateError` if the call has waited for that time without using the processor: the thread goes
    on, and its result is dropped.

    Example:
        >>> within(30.0, lambda: 3)
        3
    """
    done: list[tuple[bool, Any]] = []
    ended, clocks = Latch(), list[int]()

    def note() -> None:
        clocks.append(_clock_of(threading.get_ident()))
        try:
            done.append((True, run()))
        except BaseException as error:  # noqa: BLE001 -- raised again by who waits
            done.append((False, error))
        ended.open()

    thread = ThreadThatStarts(
        lambda: _contain(note, "a job of the pool's own failed"), "safepool-pickler"
    )
    try:
        thread.start()
    except RuntimeError:  # the interpreter shuts down, or there are too many
        return run()
    used = math.nan  # which equals nothing
    while not ended.wait(patience_s / 2):
        # A call that has not begun only shows how busy the processors are.
        if clocks and used == (used := _busy_for(clocks[0])):
            raise LateError
    succeeded, found = done.pop()
    if not succeeded:
        raise found
    return found  # type: ignore[no-any-return]


class _Turn:
    """Something that one thread runs, and another may wait for at the place."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run
        self.ended: bool = False
        self.place: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(self, failed: str) -> None:
        """Run it once; ``failed`` is logged with its exception."""
        run, self._run = self._run, None
        assert run is not None
        _contain(run, failed)
        del run  # its references are dropped here, at once
        self.ended = True


class Job(_Turn):
    """A turn that the scheduler may wait for, and that it finishes once."""

    def __init__(self, run: Callable[[], None], finish: Callable[[], None]) -> None:
        super().__init__(run)
        self._finish: Callable[[], None] | None = finish
        self.begun_s: float = 0.0
        self._ident = 0
        # Clock of its thread's processor time; 0 if there is none.
        self._clock = 0
        self._used, self._rests_since_s = math.nan, 0.0
        self._may_be_passed = False
        # Who pops it decides: the thread that the job was in time, the scheduler that it is late.
        self._turn = [True]

    def do(self) -> bool:
        """Run it, and return whether the scheduler still waits."""
        self._ident = threading.get_ident()
        self._clock = _clock_of(self._ident)
        self.run("a job of the pool's own failed")
        return self._decide()

    def finish(self) -> None:
        """Finish it: what it refers to, such as arguments, is not kept by the thread that ran it.

        That thread may get no processor for long before it drops the job.
        """
        finish, self._finish = self._finish, None
        assert finish is not None
        finish()

    def await_end(self, patience_s: float) -> bool:
        """Return whether the job ended in time; if not, its end will be reported."""
        return (patience_s > 0 and arrives(self.place, patience_s)) or not self._decide()

    def rests_since(self, now_s: float) -> float:
        """Return the time since which the job has used no processor, as of the readings so far.

        If the processor time is unknown, or the job has ended, it counts as running.
        """
        used = _busy_for(self._clock) // _MOVES_MS if self._clock and not self.ended else math.nan
        if used != self._used:
            self._used, self._rests_since_s = used, now_s
        return self._rests_since_s

    def may_be_passed(self, now_s: float) -> bool:
        """Tell whether later work need not wait: it stands still, or submits to the pool."""
        if self.begun_s and not (self.ended or self._may_be_passed):
            since_s = self.rests_since(now_s) if self._clock else self.begun_s
            self._may_be_passed = now_s - since_s >= STANDS_S
        return self._may_be_passed

    def asks(self, ident: int) -> None:
        """Let others pass if this thread runs it, which is about to wait for the pool."""
        if self._ident == ident and not self.ended:
            self._may_be_passed = True

    def _decide(self) -> bool:
        try:
            self._turn.pop()
        except IndexError:
            return False
        return True


# By its clock, the time of its processor that a thread has used.
_used_ns: Any = getattr(time, "clock_gettime_ns", None)
# Clock of a thread, by its ident; missing on Windows and macOS.
_clock_of: Any = getattr(time, "pthread_getcpuclockid", lambda _: 0)


class Hands:
    """Threads that run several jobs at the same time, one each.

    Only the scheduler's thread calls the methods, but for `note_that_one_asks` and `has`.

    Args:
        name: Name of the threads.
        wake: Function that a thread calls when a late job has ended; it must not block.
        most: Jobs that run at a time, not counting those that take long.
        long_s: Seconds after which a job counts as long: it may wait for something.
    """

    def __init__(
        self, name: str, wake: Callable[[], None], most: int, long_s: float = _STUCK_S
    ) -> None:
        self._name = name
        self._wake = wake
        self._most, self._long_s = most, long_s
        self._given: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        # Begun, and not finished.
        self._active: list[Job] = []
        self._late: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._rests_since_s = 0.0

    @property
    def waiting(self) -> int:
        """Number of jobs that no thread has begun."""
        return len(self._waiting)

    def rests_since(self) -> float:
        """Return since when no job goes on, by the monotonic clock, as :meth:`Job.rests_since`."""
        now = time.monotonic()
        for job in self._active:
            self._rests_since_s = max(self._rests_since_s, job.rests_since(now))
        return self._rests_since_s

    def note_that_one_asks(self) -> None:
        """Note that the job of this thread, if it runs one, waits for the pool. In any thread."""
        if self._active:
            ident = threading.get_ident()
            for job in [*self._active]:
                job.asks(ident)

    def has(self, thread: threading.Thread) -> bool:
        """Tell whether this is one of the threads. From any thread."""
        return thread in self._threads

    def do(
        self, run: Callable[[], None], finish: Callable[[], None], patience_s: float
    ) -> Job | None:
        """Run a job, and wait for a short time for its end; return the job if it was not in time.

        ``run`` raises nothing. ``finish`` is called when the job has ended: before this returns,
        or by :meth:`come_back`.
        """
        job = Job(run, finish)
        self._waiting.append(job)
        behind = self._busy
        self.pump()
        if job.begun_s == 0.0:
            patience_s = 0.0
        elif behind and self._busy > 1:
            patience_s = min(patience_s, _BRIEF_S)
        if not job.await_end(patience_s):
            return job
        if job in self._active:
            self._active.remove(job)
        job.finish()
        return None

    def pump(self) -> None:
        """Begin jobs that wait, as far as there may be more."""
        if not self._waiting:
            return
        now = time.monotonic()
        while self._waiting and self._count(now) < self._most:
            job = self._waiting.popleft()
            job.begun_s = now
            self._active.append(job)
            if self._busy > len(self._threads):
                self._start()
            if self._threads:
                self._given.put(job)
            else:
                self._do(job)

    def next_pump(self) -> float | None:
        """Return when to ask again what may begin, by the monotonic clock."""
        if not self._waiting:
            return None
        now = time.monotonic()
        begun = [job.begun_s for job in self._active if not job.ended]
        fresh = [since for since in begun if now - since <= self._long_s]
        return min(fresh, default=now) + self._long_s

    def come_back(self, *, more: bool = True) -> None:
        """Finish late jobs that have ended; with ``more`` also begin waiting ones."""
        while self._late:
            try:
                job = self._late.popleft()
            except IndexError:  # emptied meanwhile
                break
            if job in self._active:
                self._active.remove(job)
            job.finish()
        if more and self._waiting:
            self.pump()

    def close(self, *, busy_too: bool = False) -> None:
        """Begin no more jobs; running ones are finished by their threads. May wait for that."""
        self._waiting.clear()
        self._closed = True
        self.come_back(more=False)
        for _ in self._threads:
            self._given.put(None)
        deadline = time.monotonic() + _ENDING_S
        for thread in self._threads:
            # If all threads are busy, this does not wait: they end by themselves.
            while thread.is_alive() and time.monotonic() < deadline:
                busy = self._busy
                if busy and not busy_too and sum(one.is_alive() for one in self._threads) <= busy:
                    return
                thread.join(_BRIEF_S)

    def let_go(self) -> bool:
        """End the threads if none has anything to do; return whether there were some."""
        if not self._threads or self._waiting or self._busy:
            return False
        left, self._threads = self._threads, []
        for _ in left:
            self._given.put(None)
        for thread in left:
            thread.join(_ENDING_S)
        # A thread is counted for some moments longer than it can be waited for.
        deadline = time.monotonic() + _ENDING_S
        while {thread.native_id for thread in left} & {*procfs.threads()}:
            if time.monotonic() >= deadline:
                break
            time.sleep(_BRIEF_S)
        return True

    @property
    def _busy(self) -> int:
        return sum(not job.ended for job in self._active)

    def _count(self, now: float) -> int:
        return sum(not job.ended and now - job.begun_s <= self._long_s for job in self._active)

    def _start(self) -> None:
        thread = ThreadThatStarts(self._run, f"{self._name}-{len(self._threads) + 1}")
        self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError:  # the interpreter shuts down, or there are too many
            self._threads.remove(thread)

    def _run(self) -> None:
        while (job := self._given.get()) is not None:
            self._do(job)
            del job

    def _do(self, job: Job) -> None:
        if job.do():
            job.place.put(None)
            return
        self._late.append(job)
        self._wake()
        if self._closed:  # no other code looks any more
            self.come_back(more=False)


class Teller:
    """Runs jobs in one thread, in their order. The thread is started with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._given: queue.SimpleQueue[_Turn | None] = queue.SimpleQueue()
        self._last: _Turn | None = None
        self._behind = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for their turn."""
        return self._given.qsize()

    def has(self, thread: threading.Thread) -> bool:
        """Tell whether this is its thread. From any thread."""
        return thread is self._thread

    def do(self, run: Callable[[], None], patience_s: float = 0.0) -> None:
        """Run a job soon, and wait a moment for its end, as :meth:`catch_up`."""
        turn = _Turn(run)
        if self._thread is None:
            thread = ThreadThatStarts(self._run, self._name)
            try:
                thread.start()
            except RuntimeError:  # the interpreter shuts down, or there are too many
                self._do(turn)
                return
            self._thread = thread
        if self._last is None or self._last.ended:
            self._behind = False
        self._last = turn
        self._given.put(turn)
        if patience_s:
            self.catch_up(patience_s)

    def catch_up(self, patience_s: float) -> None:
        """Wait until all was done; after a time in vain not again before it was."""
        last = self._last
        if last is None or last.ended:
            self._behind = False
        elif not self._behind:
            self._behind = not arrives(last.place, patience_s)

    def close(self) -> None:
        """End the thread after the jobs that it was given. Waits for nothing."""
        self._given.put(None)

    def join(self) -> None:
        """Wait until everything was done, unless this is its own thread."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while (turn := self._given.get()) is not None:
            self._do(turn)
            del turn

    def _do(self, turn: _Turn) -> None:
        turn.run("a callback of a future raised")
        turn.place.put(None)
