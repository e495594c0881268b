"""The scheduler: one thread that owns every worker of a pool.

                        submit()                    frames
    caller's threads  ------------>  scheduler  <------------>  worker 1   (one private
                      <------------   thread    <------------>  worker 2    channel each)
                         futures                <------------>  ...

Data goes one way: a task waits in ``_waiting``, is taken by the scheduler's thread, belongs
to exactly one worker, and ends by its future. Callers only append to ``_waiting`` or raise a
flag, under ``_lock`` (but race E), and then wake the thread up. The lock is never held across
input, output, pickling or a future's callbacks.

The workers themselves are the staff's (``staff``): started, listened to, seen to their end.
What a task is, and what its loss means, is decided here.

Races, each handled where its letter stands below (A to C: ``staff``):
    D  A callback of a future submits to, shuts down or breaks this pool: no lock is held,
       and the scheduler's thread never waits for itself.
    E  The pool object is dropped by the garbage collector in any thread, under any lock:
       the weak reference's callback sets a flag and wakes the thread, nothing more.
    F  The interpreter shuts down: it refuses new processes, so the first worker is started
       before submit() returns, and what cannot be run any more fails instead of waiting.
    G  The program forks: the child has no scheduler thread; its submit() says so.
    H  A worker is gone when a task is to be sent: the task has not begun, and goes to
       another. One that was sent in part is lost with its worker.

Not covered:
    * Tasks sent ahead to a busy worker: a worker holds one task at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from safepool.errors import PoolBrokenError, WorkerDiedError, describe_exit
from safepool.pool.exits import finish_at_exit, has_exited, last_uncaught, working
from safepool.pool.staff import Ended, Staff, Worker
from safepool.pool.tasks import PoolFuture, Task, begin, cancel, fail, finish, fresh, rebuild
from safepool.transport import payloads
from safepool.transport.frames import CorruptFrameError, Frame, Kind, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from multiprocessing.context import BaseContext

__all__ = ["Scheduler"]

_log = logging.getLogger("safepool")
# What happens to a worker is told by its task's future; a program that wants to read it in
# its log as well configures logging.
_log.addHandler(logging.NullHandler())

# One worker killed while it starts is bad luck; so many in a row are a cause, such as an
# initializer that crashes, and would go on for ever.
_MOST_FAILED_STARTS = 3
# Between two readings of the limits.
_FOLLOW_S = 1.0
# Between two attempts to start a worker when the system refuses.
_RETRY_S = 1.0


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
        environment: Mapping[str, str | None],
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

        # The scheduler's thread only; all of it but the staff's wake().
        self._staff: Staff | None = None
        self._hire_not_before = 0.0
        self._failed_starts = 0
        # Set when the first worker was started, or never will be (race F).
        self._started = threading.Event()

    # What callers use, from any thread.

    @property
    def broken(self) -> PoolBrokenError | None:
        """Why the pool gave up as a whole; ``None`` while it works."""
        return self._broken

    def processes(self) -> dict[int, Any]:
        """Return the live workers' processes by process id."""
        return {worker.pid: worker.process for worker in self._staff or ()}

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
                raise fresh(self._broken)
            if self._exiting or has_exited():
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
        interrupted = isinstance(last_uncaught(), KeyboardInterrupt)
        self.shut_down(wait=True, end=interrupted)

    def abandon(self) -> None:
        """Finish without anybody waiting: nobody holds the pool any more (race E)."""
        self._closing = True
        self.wake()

    def wake(self) -> None:
        """Make the scheduler's thread look at what is shared. Never blocks, takes no lock."""
        staff = self._staff
        if staff is not None:
            staff.wake()

    # The scheduler's thread.

    def _start(self) -> None:
        finish_at_exit(self)
        staff = Staff(self._start_worker)
        # A daemon, so that a second interrupt at exit is not answered by another join.
        thread = threading.Thread(
            target=self._run, args=(staff,), name="safepool-scheduler", daemon=True
        )
        # Before it starts: an interrupt inside start() leaves a thread that runs.
        self._staff, self._thread = staff, thread
        try:
            thread.start()
        except RuntimeError:  # no thread could be started
            self._staff = self._thread = None
            staff.close()
            raise

    def _start_worker(self) -> Worker:
        return Worker(
            self._context,
            environment=self._environment,
            threads=self._threads,
            foreign_descriptors=list(_descriptors_of_all_pools()),
        )

    def _run(self, staff: Staff) -> None:
        try:
            while self._step(staff):
                self._listen(staff, self._patience(staff))
            self._stop_all(staff)
        except BaseException as error:  # noqa: BLE001 -- told to every future that is left
            # Nobody would ever end the futures that are left.
            _log.critical("the scheduler of a pool failed", exc_info=True)
            self._break(staff, PoolBrokenError(f"the scheduler failed: {error!r}"), error)
        finally:
            self._staff = None
            staff.close()
            self._started.set()

    def _step(self, staff: Staff) -> bool:
        """Act on what is shared; return whether there is more to do."""
        with self._lock:
            closing, ending = self._closing, self._ending
            cancelled = list(self._waiting) if self._cancelling else []
            if cancelled:
                self._waiting.clear()
        for task in cancelled:
            cancel(task.future)
        if ending:
            return False
        self._follow_the_limits(staff)
        self._shrink(staff)
        self._hand_out(staff)
        if self._ending:  # broken meanwhile
            return False
        return not closing or bool(self._waiting) or any(worker.task for worker in staff)

    def _listen(self, staff: Staff, timeout_s: float | None) -> None:
        for worker, news in staff.listen(timeout_s):
            if isinstance(news, Ended):
                self._ended(staff, worker, news.exitcode)
                continue
            try:
                self._receive(staff, worker, news)
            except CorruptFrameError as error:
                staff.distrust(worker, error)

    def _patience(self, staff: Staff) -> float | None:
        """Return how long to listen at most; a pool without work only sleeps."""
        now = time.monotonic()
        times = []
        if self._waiting and self._hire_not_before > now:
            times.append(self._hire_not_before)
        if self._follow is not None and (self._waiting or any(w.task for w in staff)):
            times.append(self._follow_at)
        return max(0.0, min(times) - now) if times else None

    def _follow_the_limits(self, staff: Staff) -> None:
        follow, now = self._follow, time.monotonic()
        if follow is None or now < self._follow_at:
            return
        busy = [worker.pid for worker in staff if worker.task is not None]
        if not (busy or self._waiting):
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

    def _shrink(self, staff: Staff) -> None:
        """Let workers go that are too many: between two tasks, never in one."""
        staying = [worker for worker in staff if not worker.leaving]
        idle = [worker for worker in staying if worker.ready and worker.task is None]
        for worker in idle[: max(0, len(staying) - self._size)]:
            staff.stop(worker)

    def _hand_out(self, staff: Staff) -> None:
        for worker in staff:
            while worker.ready and not worker.leaving and worker.task is None:
                task = self._next_task()
                if task is None:
                    return
                self._give(staff, worker, task)
        self._hire(staff)

    def _next_task(self) -> Task | None:
        while True:
            with self._lock:
                if not self._waiting:
                    return None
                task = self._waiting.popleft()
            if begin(task.future):
                return task

    def _give(self, staff: Staff, worker: Worker, task: Task) -> None:
        call, task.call = task.call, None
        try:
            of_main = task.name.startswith("__main__.")
            segments = payloads.dumps(call, into_main=True, by_value=of_main)
        except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
            del call
            fail(task.future, error)
            return
        worker.task = task
        if not staff.send(worker, encode(Kind.TASK, task.number, segments)):  # race H
            worker.task, task.call = None, call
            with self._lock:
                self._waiting.appendleft(task)

    def _hire(self, staff: Staff) -> None:
        """Start workers while tasks wait that no starting worker will take."""
        staying = [worker for worker in staff if not worker.leaving]
        starting = sum(not worker.ready for worker in staying)
        wanted = min(self._size - len(staying), len(self._waiting) - starting)
        if wanted <= 0 or time.monotonic() < self._hire_not_before:
            return
        try:
            initialize = payloads.dumps(self._initialize, into_main=True)
        except BaseException as error:  # noqa: BLE001 -- user code
            self._break(
                staff, PoolBrokenError(f"the initializer cannot be pickled: {error!r}"), error
            )
            return
        for _ in range(wanted):
            try:
                worker = staff.hire()
            except Exception as error:  # noqa: BLE001 -- OSError, or RuntimeError at exit (race F)
                if len(staff):
                    _log.warning("no further worker could be started: %s", error)
                    self._hire_not_before = time.monotonic() + _RETRY_S
                else:
                    problem = PoolBrokenError(f"no worker could be started: {error}")
                    self._break(staff, problem, error)
                return
            self._started.set()
            staff.send(worker, encode(Kind.INITIALIZE, 0, initialize))

    def _receive(self, staff: Staff, worker: Worker, frame: Frame) -> None:
        """Act on what a worker says.

        Raises:
            CorruptFrameError: It says what no worker should.
        """
        match frame.kind:
            case Kind.READY:
                worker.ready = True
                self._failed_starts = 0
                return
            case Kind.INITIALIZER_FAILED:
                problem = PoolBrokenError("a worker's initializer failed")
                self._break(staff, problem, rebuild(frame.segments))
                return
            case Kind.RESULT | Kind.EXCEPTION if (
                worker.task is not None and worker.task.number == frame.task
            ):
                task, worker.task = worker.task, None
            case _ if worker.dismissed or self._ending:
                return  # its task was given up
            case _:
                raise CorruptFrameError(f"{frame.kind!r} was not asked for")
        worker.done += 1
        if worker.done == self._tasks_per_worker:
            staff.stop(worker)
        future = task.future
        del task
        if frame.kind is Kind.EXCEPTION:
            try:
                error = rebuild(frame.segments)
            except BaseException as problem:  # noqa: BLE001 -- user code, or no memory
                error = problem
            fail(future, error)
            return
        try:
            result = payloads.loads(frame.segments)
        except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
            fail(future, error)
        else:
            finish(future, result)

    def _ended(self, staff: Staff, worker: Worker, exitcode: int | None) -> None:
        """A worker's process has ended: what did it leave behind?"""
        if worker.task is not None:
            task, worker.task = worker.task, None
            error = WorkerDiedError(worker.pid, exitcode, task.name)
            error.__cause__ = worker.fault
            _log.log(logging.DEBUG if self._ending else logging.WARNING, "%s", error)
            fail(task.future, error)
        elif worker.ready or worker.dismissed:
            _log.debug("worker %d %s", worker.pid, describe_exit(exitcode))
        else:
            ending = f"{worker.pid} {describe_exit(exitcode)}"
            _log.warning("worker %s before it was initialized", ending)
            self._failed_starts += 1
            if self._failed_starts == _MOST_FAILED_STARTS:
                reason = (
                    f"{_MOST_FAILED_STARTS} workers in a row ended before they were "
                    f"initialized; the last, {ending}"
                )
                self._break(staff, PoolBrokenError(reason))

    def _break(
        self, staff: Staff, error: PoolBrokenError, cause: BaseException | None = None
    ) -> None:
        """Give up as a whole: every task fails, every worker ends."""
        error.__cause__ = cause
        with self._lock:
            self._broken = self._broken or error
            self._closing = self._ending = True
            failed = [*self._waiting]
            self._waiting.clear()
        for worker in staff:
            if worker.task is not None:
                failed.append(worker.task)
                worker.task = None
        for task in failed:
            if begin(task.future):
                fail(task.future, fresh(error))

    def _stop_all(self, staff: Staff) -> None:
        for worker in staff:
            if not (worker.dismissed or self._ending):
                staff.stop(worker)
        while len(staff):
            if self._ending:  # from the beginning, or while the workers stop
                for worker in staff:
                    staff.end(worker)
            self._listen(staff, None)

    def descriptors(self) -> Iterable[int]:
        """Return what a worker that is forked while this pool works must not keep."""
        staff = self._staff
        return [] if staff is None else staff.descriptors()


def _descriptors_of_all_pools() -> Iterable[int]:
    for pool in working():
        yield from pool.descriptors()
