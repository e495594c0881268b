"""The scheduler: one thread that owns every worker of a pool.

                        submit()                    frames
    caller's threads  ------------>  scheduler  <------------>  worker 1   (one private
                      <------------   thread    <------------>  worker 2    channel each)
                         futures                <------------>  ...

Data goes one way: a task waits in ``_waiting``, is taken by the scheduler's thread, belongs
to exactly one worker, and ends by its future. Callers only append to ``_waiting`` or raise a
flag, under ``_lock``, and then wake the thread up; nothing else is shared with them. The
lock is never held across input, output, pickling or a future's callbacks.

Races, each handled where its letter stands below:
    A  A worker's channel closes before the system tells how it ended: wait for the ending.
    B  A worker ends, its result already on the way: read the channel dry before judging.
    C  A worker ends, a program it started holds its channel open: the pidfd tells anyway.
    D  A callback of a future submits to, shuts down or breaks this pool: no lock is held,
       and the scheduler's thread never waits for itself.
    E  The pool object is dropped by the garbage collector in any thread, under any lock:
       the weak reference's callback sets a flag and wakes the thread, nothing more.
    F  The interpreter shuts down: it refuses new processes, so the first worker is started
       before submit() returns, and what cannot be run any more fails instead of waiting.
    G  The program forks: the child has no scheduler thread; its submit() says so.

Not covered:
    * Tasks sent ahead to a busy worker: a worker holds one task at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, InvalidStateError
from concurrent.futures.process import _RemoteTraceback
from typing import TYPE_CHECKING, Any

from safepool.errors import (
    PoolBrokenError,
    RemoteTaskError,
    WorkerDiedError,
    describe_exit,
)
from safepool.pool.tasks import PoolFuture, Task
from safepool.transport import payloads
from safepool.transport.channel import ChannelClosedError
from safepool.transport.frames import CorruptFrameError, Frame, Kind, encode
from safepool.workers.process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.context import BaseContext

__all__ = ["Scheduler"]

_log = logging.getLogger("safepool")
# What happens to a worker is told by its task's future; a program that wants to read it in
# its log as well configures logging.
_log.addHandler(logging.NullHandler())

# A worker whose channel is closed and that has not ended by then is ended (race A).
_ENDING_S = 1.0
# A worker that was told to stop may flush, run its atexit functions, join its threads.
_STOPPING_S = 30.0
# One worker killed while it starts is bad luck; so many in a row are a cause, such as an
# initializer that crashes, and would go on for ever.
_MOST_FAILED_STARTS = 3
# Between two readings of the limits.
_FOLLOW_S = 1.0
# Between two attempts to start a worker when the system refuses.
_RETRY_S = 1.0
# Between SIGTERM and SIGKILL when workers are ended at once: a prompt is to be back
# within a second of Ctrl-C.
_TERMINATING_S = 0.4


class _Worker(WorkerProcess):
    """A worker process with what the scheduler knows about it.

    Attributes:
        ready: Its initializer has ended well.
        task: The task it holds.
        done: How many tasks it has finished.
        leaving: It gets no more tasks.
        dismissed: It was told to stop or was ended by the pool.
        deadline: When, by the monotonic clock, it is ended by ``SIGKILL``.
        events: What the selector watches its channel for.
    """

    ready: bool = False
    task: Task | None = None
    done: int = 0
    leaving: bool = False
    dismissed: bool = False
    deadline: float | None = None
    events: int = selectors.EVENT_READ


class Scheduler:
    """Run tasks in worker processes; survive whatever they do.

    Args:
        workers: The most worker processes at a time.
        context: How to start them.
        environment: Variables they are born with.
        threads: Threads for each of their native pools.
        initializer: Run once in each worker before its first task.
        initargs: Its arguments.
        tasks_per_worker: A worker is replaced after this many tasks; ``None`` is never.
        follow: Called at most once a second while there is work, in the thread that starts
            the workers, with the ids of those that have some; returns the most workers
            from now on. ``None`` keeps the number.
    """

    def __init__(
        self,
        *,
        workers: int,
        context: BaseContext,
        environment: dict[str, str],
        threads: int,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        tasks_per_worker: int | None,
        follow: Callable[[list[int]], int] | None = None,
    ) -> None:
        self._size = workers
        self._follow = follow
        self._follow_at = 0.0
        self._context = context
        self._environment = environment
        self._threads = threads
        self._initialize = (initializer, initargs)
        self._tasks_per_worker = tasks_per_worker

        # Shared with callers, under the lock.
        self._lock = threading.Lock()
        self._waiting: deque[Task] = deque()
        self._numbers = itertools.count(1)
        self._closing = False
        self._cancelling = False
        self._ending = False
        self._exiting = False
        self._broken: PoolBrokenError | None = None
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

        # The scheduler's thread only.
        self._workers: dict[int, _Worker] = {}
        self._hire_not_before = 0.0
        self._failed_starts = 0
        self._selector: selectors.BaseSelector
        self._wake_receiver: socket.socket
        self._wake_sender: socket.socket | None = None
        # Set when the first worker was started, or never will be (race F).
        self._started = threading.Event()

    # What callers use, from any thread.

    @property
    def broken(self) -> PoolBrokenError | None:
        """Why the pool gave up as a whole; ``None`` while it works."""
        return self._broken

    def processes(self) -> dict[int, Any]:
        """Return the live workers' processes by process id."""
        return {worker.pid: worker.process for worker in list(self._workers.values())}

    @property
    def size(self) -> int:
        """The most workers at a time."""
        return self._size

    def resize(self, workers: int) -> None:
        """Keep at most so many workers from now on, and follow the limits no more."""
        with self._lock:
            self._follow = None
            self._size = workers
        self.wake()

    def submit(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str,
    ) -> PoolFuture:
        """Queue a call and return its future; an error calls it ``name``.

        Raises:
            BrokenProcessPool: The pool gave up as a whole.
            RuntimeError: The pool or the interpreter shuts down, or this process is a fork
                of the one that made the pool.
        """
        if os.getpid() != self._pid:  # race G
            raise RuntimeError(
                f"this pool belongs to process {self._pid}, and this is its fork "
                f"{os.getpid()}: make a pool of its own here"
            )
        future = PoolFuture()
        with self._lock:
            if self._broken is not None:
                raise _fresh(self._broken)
            if self._exiting:
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._thread is None:
                self._start()
            self._waiting.append(Task(next(self._numbers), future, (function, args, kwargs), name))
        self.wake()
        if not self._started.is_set() and threading.current_thread() is not self._thread:
            self._started.wait()
        return future

    def shut_down(self, *, wait: bool, cancel: bool = False, end: bool = False) -> None:
        """Take no more tasks; finish those that were submitted, and end the workers.

        Args:
            wait: Return when all that is done.
            cancel: Cancel the tasks that no worker has taken.
            end: Do not wait for running tasks: end their workers at once.
        """
        if os.getpid() != self._pid:  # race G: the lock may be held for ever here
            return
        with self._lock:
            self._closing = True
            self._cancelling |= cancel or end
            self._ending |= end
            thread = self._thread
        if thread is None:
            return
        self.wake()
        if not wait or thread is threading.current_thread():  # race D
            return
        try:
            thread.join()
        except KeyboardInterrupt:
            # Someone waits at the terminal; a second interrupt in the join below is theirs.
            self.shut_down(wait=True, end=True)
            raise

    def exit(self) -> None:
        """Finish before the interpreter ends, as the standard pool does."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._exiting = True
        # An interrupt that nobody caught ends the program: its queued work is not wanted.
        interrupted = isinstance(_last_uncaught(), KeyboardInterrupt)
        self.shut_down(wait=True, end=interrupted)

    def abandon(self) -> None:
        """Finish without anybody waiting: nobody holds the pool any more (race E)."""
        self._closing = True
        self.wake()

    def wake(self) -> None:
        """Make the scheduler's thread look at what is shared. Never blocks, takes no lock."""
        sender = self._wake_sender
        if sender is not None:
            try:
                sender.send(b"\0")
            except OSError:
                pass  # a wake-up is already under way, or the thread has ended

    # The scheduler's thread.

    def _start(self) -> None:
        _finish_at_exit(self)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        # A daemon, so that a second interrupt at exit is not answered by another join.
        thread = threading.Thread(target=self._run, name="safepool-scheduler", daemon=True)
        thread.start()
        self._thread = thread

    def _run(self) -> None:
        self._selector = selectors.DefaultSelector()
        try:
            self._selector.register(self._wake_receiver, selectors.EVENT_READ)
            while self._step():
                for key, _ in self._selector.select(self._patience()):
                    self._handle(key)
                self._end_the_late()
            self._stop_all()
        except BaseException as error:  # noqa: BLE001 -- told to every future that is left
            # Nobody would ever end the futures that are left.
            _log.critical("the scheduler of a pool failed", exc_info=True)
            self._break(PoolBrokenError(f"the scheduler failed: {error!r}"), error)
        finally:
            self._close()

    def _step(self) -> bool:
        """Act on what is shared; return whether there is more to do."""
        with self._lock:
            closing, ending = self._closing, self._ending
            cancelled = list(self._waiting) if self._cancelling else []
            if cancelled:
                self._waiting.clear()
        for task in cancelled:
            if task.future.cancel():
                task.future.set_running_or_notify_cancel()
            else:  # taken once, and given back because its worker was gone
                _fail(task.future, CancelledError())
        if ending:
            return False
        self._follow_the_limits()
        self._shrink()
        self._hand_out()
        return not closing or bool(self._waiting) or any(w.task for w in self._workers.values())

    def _follow_the_limits(self) -> None:
        follow, now = self._follow, time.monotonic()
        busy = [worker.pid for worker in self._workers.values() if worker.task is not None]
        if follow is None or now < self._follow_at or not (busy or self._waiting):
            return
        self._follow_at = now + _FOLLOW_S
        try:
            size = follow(busy)
        except Exception:  # noqa: BLE001 -- a limit that cannot be read must not cost a pool
            _log.exception("the limits could not be read again; the pool keeps its size")
            self._follow = None
            return
        with self._lock:
            if self._follow is None or size == self._size:  # resized by hand meanwhile
                return
            before, self._size = self._size, size
        _log.info("the limits have changed: %d workers instead of %d", size, before)

    def _shrink(self) -> None:
        """Let workers go that are too many: between two tasks, never in one."""
        staff = [worker for worker in self._workers.values() if not worker.leaving]
        idle = [worker for worker in staff if worker.ready and worker.task is None]
        for worker in idle[: max(0, len(staff) - self._size)]:
            self._stop(worker)

    def _hand_out(self) -> None:
        for worker in list(self._workers.values()):
            while worker.ready and not worker.leaving and worker.task is None:
                task = self._next_task()
                if task is None:
                    return
                self._give(worker, task)
        self._hire()

    def _next_task(self) -> Task | None:
        while True:
            with self._lock:
                if not self._waiting:
                    return None
                task = self._waiting.popleft()
            if task.future.running() or task.future.set_running_or_notify_cancel():
                return task

    def _give(self, worker: _Worker, task: Task) -> None:
        call, task.call = task.call, None
        try:
            segments = payloads.dumps(call)
        except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
            del call
            _fail(task.future, error)
            return
        worker.task = task
        if not self._send(worker, encode(Kind.TASK, task.number, segments)):
            # The worker was gone before it had the whole task, so it has not begun it.
            worker.task, task.call = None, call
            with self._lock:
                self._waiting.appendleft(task)

    def _hire(self) -> None:
        """Start workers while tasks wait that no starting worker will take."""
        staff = [worker for worker in self._workers.values() if not worker.leaving]
        starting = sum(not worker.ready for worker in staff)
        wanted = min(self._size - len(staff), len(self._waiting) - starting)
        if wanted <= 0 or time.monotonic() < self._hire_not_before:
            return
        for _ in range(wanted):
            try:
                worker = _Worker(
                    self._context,
                    environment=self._environment,
                    threads=self._threads,
                    foreign_descriptors=list(self._descriptors()),
                )
            except Exception as error:  # noqa: BLE001 -- OSError, or RuntimeError at exit (race F)
                if self._workers:
                    _log.warning("no further worker could be started: %s", error)
                    self._hire_not_before = time.monotonic() + _RETRY_S
                    return
                self._break(PoolBrokenError(f"no worker could be started: {error}"), error)
                return
            self._workers[worker.pid] = worker
            self._selector.register(worker.channel, selectors.EVENT_READ, worker)
            if worker.sentinel is not None:
                self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)
            _log.debug("worker %d started", worker.pid)
            self._started.set()
            try:
                segments = payloads.dumps(self._initialize)
            except Exception as error:  # noqa: BLE001 -- user code
                self._break(
                    PoolBrokenError(f"the initializer cannot be pickled: {error!r}"), error
                )
                return
            self._send(worker, encode(Kind.INITIALIZE, 0, segments))

    def _handle(self, key: selectors.SelectorKey) -> None:
        worker: _Worker | None = key.data
        if worker is None:
            self._wake_receiver.recv(4096)
        elif worker.pid not in self._workers:
            pass  # ended by an earlier event of the same round
        elif key.fd == worker.sentinel:
            self._ended(worker)
        else:
            self._talk(worker)

    def _talk(self, worker: _Worker) -> None:
        try:
            worker.channel.flush()
            for frame in worker.channel.receive():
                self._receive(worker, frame)
        except (ChannelClosedError, CorruptFrameError, MemoryError) as error:
            self._lost(worker, error)
        else:
            self._watch(worker)

    def _send(self, worker: _Worker, pieces: list[bytes | memoryview]) -> bool:
        """Send a frame, or as much as goes now; return whether the worker is still there."""
        try:
            worker.channel.send(pieces)
        except ChannelClosedError as error:
            self._lost(worker, error)
            return False
        self._watch(worker)
        return True

    def _watch(self, worker: _Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.unsent else 0)
        if events != worker.events and worker.channel.fileno() >= 0:
            worker.events = events
            self._selector.modify(worker.channel, events, worker)

    def _lost(self, worker: _Worker, error: BaseException) -> None:
        """The channel is of no more use; how the worker ends is still to come (race A)."""
        if not isinstance(error, ChannelClosedError):
            _log.error("worker %d sent what cannot be read and is ended: %s", worker.pid, error)
            worker.end(signal.SIGTERM)
        worker.leaving = True
        self._selector.unregister(worker.channel)
        worker.channel.close()
        if worker.sentinel is None:
            self._ended(worker)
        else:
            worker.deadline = time.monotonic() + _ENDING_S

    def _receive(self, worker: _Worker, frame: Frame) -> None:
        match frame.kind:
            case Kind.READY:
                worker.ready = True
                self._failed_starts = 0
                return
            case Kind.INITIALIZER_FAILED:
                cause = _rebuild(frame)
                self._break(PoolBrokenError("a worker's initializer failed"), cause)
                return
            case Kind.RESULT | Kind.EXCEPTION if (
                worker.task is not None and worker.task.number == frame.task
            ):
                task, worker.task = worker.task, None
            case _ if worker.dismissed or self._ending:
                return  # its task was given up
            case _:
                raise CorruptFrameError(f"worker {worker.pid} sent {frame.kind!r} unasked")
        worker.done += 1
        if worker.done == self._tasks_per_worker:
            self._stop(worker)
        future = task.future
        del task
        if frame.kind is Kind.EXCEPTION:
            _fail(future, _rebuild(frame))
            return
        try:
            result = payloads.loads(frame.segments)
        except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
            _fail(future, error)
        else:
            _finish(future, result)

    def _ended(self, worker: _Worker) -> None:
        """The process has ended: what did it leave behind?"""
        if worker.channel.fileno() >= 0:
            try:
                for frame in worker.channel.receive(everything=True):  # races B and C
                    self._receive(worker, frame)
            except (ChannelClosedError, CorruptFrameError, MemoryError):
                pass
        exitcode = self._forget(worker)
        if worker.task is not None:
            task, worker.task = worker.task, None
            error = WorkerDiedError(worker.pid, exitcode, task.name)
            _log.log(logging.DEBUG if self._ending else logging.WARNING, "%s", error)
            _fail(task.future, error)
        elif not worker.ready and not worker.dismissed:
            self._failed_starts += 1
            _log.warning(
                "worker %d %s before it was initialized", worker.pid, describe_exit(exitcode)
            )
            if self._failed_starts == _MOST_FAILED_STARTS:
                self._break(
                    PoolBrokenError(
                        f"{_MOST_FAILED_STARTS} workers in a row ended before they were "
                        f"initialized; the last, {worker.pid}, {describe_exit(exitcode)}"
                    )
                )
        else:
            _log.debug("worker %d %s", worker.pid, describe_exit(exitcode))

    def _forget(self, worker: _Worker) -> int | None:
        del self._workers[worker.pid]
        if worker.channel.fileno() >= 0:
            self._selector.unregister(worker.channel)
        if worker.sentinel is not None:
            self._selector.unregister(worker.sentinel)
        exitcode = worker.wait(1.0)
        worker.close()
        return exitcode

    def _break(self, error: PoolBrokenError, cause: BaseException | None = None) -> None:
        """Give up as a whole: every task fails, every worker ends."""
        error.__cause__ = cause
        with self._lock:
            self._broken = self._broken or error
            self._closing = self._ending = True
            failed = [*self._waiting]
            self._waiting.clear()
        for worker in self._workers.values():
            if worker.task is not None:
                failed.append(worker.task)
                worker.task = None
        for task in failed:
            if task.future.running() or task.future.set_running_or_notify_cancel():
                _fail(task.future, _fresh(error))

    # Ending.

    def _stop(self, worker: _Worker) -> None:
        worker.leaving = worker.dismissed = True
        worker.deadline = time.monotonic() + _STOPPING_S
        self._send(worker, encode(Kind.STOP, 0))

    def _stop_all(self) -> None:
        if self._ending:
            for worker in self._workers.values():
                worker.leaving = worker.dismissed = True
                worker.deadline = time.monotonic() + _TERMINATING_S
                worker.end(signal.SIGTERM)
        else:
            for worker in list(self._workers.values()):
                if not worker.leaving:
                    self._stop(worker)
        while self._workers:
            for key, _ in self._selector.select(self._patience()):
                self._handle(key)
            self._end_the_late()
            if self._ending:
                # Asked for while the workers were stopping.
                soon = time.monotonic() + _TERMINATING_S
                for worker in self._workers.values():
                    worker.deadline = min(worker.deadline or soon, soon)

    def _patience(self) -> float | None:
        deadlines = [w.deadline for w in self._workers.values() if w.deadline is not None]
        if self._waiting:
            # Without tasks that wait nothing is to be started, and an idle pool only sleeps.
            if self._hire_not_before > time.monotonic():
                deadlines.append(self._hire_not_before)
            if self._follow is not None:
                deadlines.append(self._follow_at)
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _end_the_late(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.deadline is not None and worker.deadline <= now:
                worker.deadline = None
                if not self._ending:
                    _log.warning("worker %d did not end in time and is killed", worker.pid)
                worker.end(_KILL)

    def _close(self) -> None:
        for worker in list(self._workers.values()):
            try:
                worker.end(_KILL)
                self._forget(worker)
            except Exception:  # noqa: BLE001 -- one that resists must not keep the others
                _log.exception("worker %d could not be ended", worker.pid)
        with self._lock:
            sender, self._wake_sender = self._wake_sender, None
        self._selector.close()
        self._wake_receiver.close()
        if sender is not None:
            sender.close()
        self._started.set()

    def _descriptors(self) -> Iterable[int]:
        """What a forked worker must not keep: of this pool, and of every other."""
        for scheduler in list(_live):
            yield from scheduler._own_descriptors()

    def _own_descriptors(self) -> Iterable[int]:
        if self._wake_sender is None:
            return
        yield self._wake_receiver.fileno()
        yield self._wake_sender.fileno()
        for worker in list(self._workers.values()):
            if worker.channel.fileno() >= 0:
                yield worker.channel.fileno()


if sys.platform == "win32":
    _KILL = signal.SIGTERM  # TerminateProcess; there is no SIGKILL
else:
    _KILL = signal.SIGKILL


def _finish(future: PoolFuture, result: object) -> None:
    try:
        future.set_result(result)
    except InvalidStateError:
        pass  # somebody else ended it


def _fail(future: PoolFuture, error: BaseException) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass


def _fresh(error: PoolBrokenError) -> PoolBrokenError:
    """Return an error of its own for each future (gh-101267), with the same cause."""
    fresh = PoolBrokenError(*error.args)
    fresh.__cause__ = error.__cause__
    return fresh


def _rebuild(frame: Frame) -> BaseException:
    """Return the exception that a worker described, its remote traceback as the cause."""
    pickled, name, text, trace, reason = payloads.loads(frame.segments)
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = payloads.loads(pickled)
        except BaseException as problem:  # noqa: BLE001 -- user code
            reason = f"{type(problem).__name__}: {problem}"
    if not isinstance(error, BaseException):
        error = RemoteTaskError(name, text, reason)
    error.__cause__ = _RemoteTraceback(trace)
    return error


def _last_uncaught() -> BaseException | None:
    """Return the exception that ends the program; ``None`` also at a prompt, which goes on."""
    if hasattr(sys, "ps1"):
        return None
    error: BaseException | None = getattr(sys, "last_value", None)
    return error


# Interpreter exit. threading runs these functions before it joins the other threads and
# before daemon threads are frozen; atexit runs after both (H10). Private, and used by the
# standard pool itself from Python 3.9 to this day.
_live: weakref.WeakSet[Scheduler] = weakref.WeakSet()
_registered = False


def _finish_at_exit(scheduler: Scheduler) -> None:
    global _registered  # noqa: PLW0603 -- one registration per interpreter
    if not _registered:
        threading._register_atexit(_exit_all)  # type: ignore[attr-defined]
        _registered = True
    _live.add(scheduler)


def _exit_all() -> None:
    for scheduler in list(_live):
        scheduler.exit()
