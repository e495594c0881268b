"""The scheduler: one thread that owns every worker of a pool.

                        submit(), map()             frames
    caller's threads  ------------>  scheduler  <------------>  worker 1   (one private
                      <------------   thread    <------------>  worker 2    channel and one
                        futures,                <------------>  ...         board each)
                        results

Data goes one way: what is submitted waits in the backlog (``backlog``), is taken by the
scheduler's thread, made into messages (``dispatch``) as far as a worker is to be sent ahead
(``pace``), belongs to exactly one worker until it is settled (``ledger``) or taken back
(``reclaim``), and ends (``settling``) by its future or among its map's results (``mapping``), or
with its worker (``losses``). Callers only append to the inbox or raise a flag, and then wake the
thread up. No lock is shared with them: a signal's handler may wait for the pool above any call.

Code of the program that may be slow, or wait, runs in other threads (``hands``):

    what                                             where
    pickling of arguments, functions, initializers   the dispatch's hands, if not ``trusted``
    unpickling of results and exceptions             the settling's hands, if not ``trusted``
    callbacks of futures                             one thread, in order (asyncio's: this one)
    handlers of log records and warnings             one thread, in order (``records``)
    items of a ``map`` that nobody looked at         the callbacks' thread

The workers themselves are the staff's (``staff``): started (``hiring``), listened to, seen to
their end. What a task is, and what its loss means, is decided here.

A worker is sent several short tasks at a time. What it has not begun can be had back at any time,
by the board that it shares with the pool (``workers.board``): when another worker is idle, when
one task turns out to be long, when a task's time is over, when the worker dies.

Races, each handled where its letter stands below (A to C: ``staff``):
    D  A callback of a future submits to, shuts down or breaks this pool: nobody waits for
       the thread that it runs in. A finalizer that the collector runs in the scheduler's thread
       and that waits for a call of the pool gets an error.
    E  The pool object is dropped by the garbage collector in any thread, under any lock:
       the weak reference's callback sets a flag and wakes the thread, nothing more. (That of
       the iterator of a ``map`` which nobody looked at takes what is left of its items.)
    F  The interpreter shuts down: it refuses new processes, so the first worker is started
       before submit() returns, and what cannot be run any more fails instead of waiting.
    G  The program forks: the child has no scheduler thread; its submit() says so.
    H  A worker is gone when a task is to be sent, or dies before it has begun: it goes to
       another. Only a large one that was sent in part is lost with its worker.
    I  A task ends while it is being ended for its timeout, or cancelled: everything behind it was
       taken back before, and it is left alone if the next had been claimed by then, so
       the signal meets this task or nothing; a result that was
       left on the board before counts. One that comes later does not: the signal for the stack
       may have cut short what the task was waiting for.
    J  A worker claims a task in the moment in which it is taken back: it finds so, says so
       (``SKIPPED``), and the task waits again.

Not covered:
    * What the collector runs in the scheduler's thread and waits for something else than the
      pool; functions that ``os.register_at_fork`` was given, with ``mp_context="fork"``.
    * Where there is no board (elsewhere than on Linux) a worker holds one task at a time, or
      as many calls of a map as its ``chunksize`` says.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from functools import partial
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from safepool.errors import PoolBrokenError, TaskTimeoutError, text_of
from safepool.machine import handlers_by
from safepool.pool import reclaim, refusals
from safepool.pool.core.backlog import Backlog
from safepool.pool.core.pace import Pace
from safepool.pool.dispatch import Dispatch, forget
from safepool.pool.exits import finish_at_exit, has_exited, last_uncaught
from safepool.pool.hands import Teller, ThreadThatStarts
from safepool.pool.latch import Latch
from safepool.pool.losses import Losses
from safepool.pool.mapping import MapRun, Results, Span
from safepool.pool.oom import OutOfMemoryWatch
from safepool.pool.records import Records
from safepool.pool.refused_calls import refused_call
from safepool.pool.settling import Settling
from safepool.pool.staff import Ended, Staff
from safepool.pool.tasks import PoolFuture, Task, begin, callbacks_by, cancel, fail, fresh, rebuild
from safepool.transport.frames import CorruptFrameError, Frame, Kind, encode
from safepool.workers.contained import ContainedLogger
from safepool.workers.identity import RightsWatch
from safepool.workers.loading import check_no_import
from safepool.workers.messages import read_values
from safepool.workers.plan import ScriptLostError
from safepool.workers.preload import learn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.pool.core.ending import Ending
    from safepool.pool.core.policy import Policy
    from safepool.pool.hiring import Hiring
    from safepool.pool.mapping import Item, ResultIterator
    from safepool.pool.trace import Trace
    from safepool.pool.worker import Worker

__all__ = ["Scheduler"]

_log = ContainedLogger()

# Between two readings of the limits.
_FOLLOW_S = 1.0
# Workers that cannot be ended, for each place of the pool, until it gives up: each is a process.
_MOST_LOST = 2
# What the kernel's out-of-memory killer leaves, and everybody else's SIGKILL.
_KILLED = -9


# From the end of the scheduler's work to that of its thread.
_ENDING_S = 1.0


class _Opening(Latch):
    """One start of the scheduler's thread. Opens when the pool has its thread, or cannot have one.

    Attributes:
        error: Why it has none.
    """

    __slots__ = ("error",)

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None


# In the place of the opening of a pool that was closed before it had a thread.
_NOBODY = _Opening()
_NOBODY.open()

# A closed pool waits for pickling and unpickling as long as that goes on, and then for so long.
_REST_S = 30.0
_RESTED = (
    f"the pool was closed, and pickling {{}} has waited for something for {_REST_S:.0f} s: a "
    "lock, an import, a connection. It is given up"
)


class _Items(NamedTuple):
    """Further calls of a map, from the thread that iterates."""

    run: MapRun
    items: list[Item]
    last: bool


Force = Literal["", "ask", "terminate", "kill"]
_SHARPER: tuple[Force, ...] = ("", "ask", "terminate", "kill")


class Scheduler:
    """Run tasks in worker processes; survive whatever they do.

    Args:
        workers: The most worker processes at a time.
        hiring: Starts them.
        tasks_per_worker: A worker is replaced after this many tasks; ``None`` is never.
        memory_per_worker: Bytes; a worker that holds more is replaced between two tasks.
        break_on_death: One dead worker ends the pool as a whole, as the standard pool.
        follow: Called at most once a second while there is work, in the thread that starts
            the workers, with the ids of those that have some; returns the most workers
            from now on. ``None`` keeps the number.
        trace: Told of all that happens. Closed with the pool.
    """

    def __init__(
        self,
        *,
        workers: int,
        hiring: Hiring,
        tasks_per_worker: int | None,
        memory_per_worker: int | None = None,
        break_on_death: bool = False,
        follow: Callable[[list[int]], int] | None = None,
        trace: Trace | None = None,
    ) -> None:
        # As many as fit, and what was said by hand.
        self._fitting = workers
        self._by_hand: int | None = None
        self._trace = trace
        self._follow = follow
        self._follow_at = 0.0
        self._break_on_death = break_on_death
        self._idle_s: float | None = None
        # Whether what runs is ended when the interpreter ends, as by multiprocessing.Pool.
        self.ends_at_exit = False
        # Opened when all workers were started, if that was asked for.
        self._filled: Latch | None = None

        # What callers bring: tasks, further calls of a map, futures whose task is to be ended.
        # Appended in one step, and no lock is held: a signal's handler may submit, or wait for
        # this pool, in the middle of a submit().
        self._inbox: deque[Task | PoolFuture | _Items] = deque()
        self._dropped_runs: deque[MapRun] = deque()
        # Flags, which callers only ever raise.
        self._closing = False
        self._cancelling = False
        self._exiting = False
        self._asked: list[Force] = []
        self._broken: PoolBrokenError | None = None
        self._begun = False
        self._thread: threading.Thread | None = None
        self._over = False
        self._ended_latch = Latch()
        self._pid = os.getpid()
        # By which a future knows whose it is, without holding on to it.
        self._me = weakref.ref(self)
        # Maps whose items have not all been taken from the caller's iterators.
        self._open: dict[weakref.ref[Any], Results] = {}
        # Filled by the scheduler's thread before it waits; emptied by whoever has woken it.
        self._bed: list[bool] = []

        # The scheduler's thread only; all of it but the staff's wake().
        self._staff: Staff | None = None
        self._backlog = Backlog()
        self._to_kill: list[PoolFuture] = []
        self._ended_runs: list[MapRun] = []
        self._callers = Teller("safepool-callbacks")
        self._records = Records()
        self._task: type[Task] = Task
        if trace is None:
            self._dispatch = Dispatch(self._settled, self.wake, hiring.names)
        else:
            self._task, self._dispatch = trace.measured(self._settled, self.wake, hiring.names)
        self._settings = self._dispatch.settings
        self._pace = Pace()
        self._settling = Settling(
            self._pace,
            self._settled,
            self.wake,
            tasks_per_worker=tasks_per_worker,
            memory_per_worker=memory_per_worker,
            trace=trace,
        )
        self._losses = Losses(self._settling, self._settled, self._wait_again)
        self._oom = OutOfMemoryWatch()
        self._rights = RightsWatch()
        self._hiring = hiring
        hiring.need = self._dispatch.need_first
        me = self._me
        hiring.given_up = lambda: (found := me()) is None or found._is_late()

    # What callers use, from any thread.

    @property
    def broken(self) -> PoolBrokenError | None:
        """Why the pool gave up as a whole; ``None`` while it works."""
        return self._broken

    def workers(self) -> list[Worker]:
        """Return the live workers."""
        return list(self._staff or ())

    def wait_for_a_worker(self) -> None:
        """Return when one has been started, or none will be; at once if nothing was submitted."""
        if self._begun and self._thread is not threading.current_thread():
            self._hiring.hired.wait()

    @property
    def size(self) -> int:
        """The most workers at a time."""
        return self._size

    @property
    def _size(self) -> int:
        return self._by_hand or self._fitting

    @property
    def _forced(self) -> Force:
        return max(self._asked, key=_SHARPER.index) if self._asked else ""

    def resize(self, workers: int, *, level: int = logging.INFO) -> None:
        """Keep at most so many workers from now on, and follow the limits no more.

        Args:
            workers: At least 1.
            level: Of the line in the log.
        """
        before, self._by_hand = self._size, workers
        if before != workers:
            _log.log(level, "resized by hand: %d workers instead of %d", workers, before)
            if self._trace is not None:
                self._trace.resized(before, workers, "by hand")
        self.wake()

    def staff_up(self) -> None:
        """Start as many workers as the pool may have, before calls need them; wait for that.

        Raises:
            BrokenProcessPool: The pool gave up as a whole.
            RuntimeError: The pool or the interpreter shuts down.
        """
        self._check_fork()
        self._check_open()
        filled = self._filled = Latch()
        self.wake()
        if not self._over and self._thread is not threading.current_thread():
            filled.wait()

    def let_go_after(self, idle_s: float) -> None:
        """Let workers end that have had nothing to do for so long, in seconds."""
        self._idle_s = idle_s

    def submit(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str,
        policy: Policy,
    ) -> PoolFuture:
        """Queue a call and return its future; an error calls it ``name``.

        Raises:
            BrokenProcessPool: The pool gave up as a whole.
            RuntimeError: The pool or the interpreter shuts down, or this process is a fork
                of the one that made the pool.
        """
        self._check_fork()
        future = PoolFuture(self._me)
        task = self._task(future, (function, args, kwargs), name, policy)
        self._settings.look_before(future)
        self._dispatch.names.look()
        self._dispatch.pickle_now(task)
        self._check_open()
        self._bring(task)
        self._wait_for_the_first_worker()
        return future

    def _bring(self, what: Task | PoolFuture | _Items) -> None:
        """Let the scheduler's thread have something.

        Raises:
            RuntimeError: It has ended meanwhile.
        """
        self._inbox.append(what)
        # The scheduler makes its bed first, then it looks.
        bed = self._bed
        if bed:
            self.wake()
            bed.clear()
        if self._over:
            self._refuse_late()
            if not (isinstance(what, _Items) and not what.items):
                self._check_open()

    def map(
        self,
        run: MapRun,
        items: Iterable[Item],
        ahead: int | None,
        deadline: float | None,
        keep: object,
    ) -> ResultIterator:
        """Queue the calls of a run, as :meth:`submit`, and return the iterator over its results.

        Args:
            run: Which.
            items: The arguments of each.
            ahead: As :class:`~safepool.pool.mapping.Results`.
            deadline: When waiting for a result ends, by the monotonic clock.
            keep: Held as long as there are items to take.
        """
        self._check_fork()
        self._settings.look()
        self._dispatch.names.look()
        self._dispatch.pickle_function_now(run)
        results = Results(run, iter(items), self, ahead, deadline)
        # With all calls queued the pool may go: what they return arrives without it.
        iterator = results.iterate(None if results.exhausted else keep)
        run.reader = weakref.ref(iterator, self._wake_when_gone)
        if not results.exhausted and ahead is None:
            # One that is dropped without a look is a map for the sake of what its calls do.
            self._open[weakref.ref(iterator, self._finish_unseen)] = results
        return iterator

    @property
    def _wake_when_gone(self) -> Callable[[object], None]:
        me = self._me

        def wake(_: object) -> None:  # race E
            found = me()
            if found is not None:
                found.wake()

        return wake

    def _finish_unseen(self, iterator: weakref.ref[Any]) -> None:
        results = self._open.pop(iterator, None)
        # Weak references may be told of an iterator's end before the iterator itself.
        if results is None or results.seen:
            return
        if threading.current_thread() is self._thread:  # by the collector
            self._callers.do(results.finish)
        else:
            results.finish()

    def add_items(self, run: MapRun, items: list[Item], *, last: bool) -> None:
        """Queue further calls of a run; ``last``: there will be no more."""
        self._check_fork()
        if items:
            self._check_open()
        if self._trace is not None:
            self._trace.queued(run, len(items))
        self._bring(_Items(run, items, last))
        if items:
            self._wait_for_the_first_worker()

    def check_may_wait(self) -> None:
        """Refuse that the scheduler's own thread waits for a result, in a finalizer."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "this thread runs the pool, and would wait for itself: a finalizer may not wait "
                "for a result of its pool"
            )

    def give_up(self, run: MapRun) -> None:
        """Drop the calls of a run that no worker has: nobody wants the rest (race E)."""
        self._dropped_runs.append(run)
        self.wake()

    def kill(self, future: Future[Any]) -> bool:
        """Cancel a task, and end the worker that runs it; ``False`` if it has ended.

        Raises:
            ValueError: It is not a future of this pool.
        """
        self._check_fork()
        if not isinstance(future, PoolFuture) or future.owner is not self._me:
            raise ValueError("this future is not one of this pool's submit()")
        if not future.cancel_running():
            return False
        if not self._over:
            self._inbox.append(future)
            self.wake()
        return True

    def shut_down(self, *, wait: bool, cancel: bool = False, end: Force = "") -> None:
        """Take no more tasks; finish those that were submitted, and end the workers.

        Args:
            wait: Return when all that is done.
            cancel: Cancel the tasks that no worker has taken.
            end: Do not wait for running tasks. ``"ask"`` sends their workers ``SIGTERM`` and
                lets them take their time, ``"terminate"`` does not for long, and ``"kill"``
                sends ``SIGKILL``.
        """
        if os.getpid() != self._pid:  # race G
            return
        # Not in the scheduler's own thread (race D), nor in one that it waits for in the end: the
        # items may be results of this pool.
        here = threading.current_thread()
        ours = (
            here is self._thread
            or self._dispatch.is_in(here)
            or self._settling.is_in(here)
            or self._callers.is_in(here)
            or self._records.teller.is_in(here)
        )
        if not (cancel or end or ours or self._closing):
            # What the standard pool has taken from its iterators by now.
            for results in [*self._open.values()]:
                results.finish()
        if cancel or end:
            self._cancelling = True
        if end:
            self._asked.append(end)
        self._closing = True
        if not self._begun and self._close_unused():
            return
        self.wake()
        if wait and not ours:  # race D
            self._await_the_end()

    def _await_the_end(self) -> None:
        try:
            self._ended_latch.wait()
        except KeyboardInterrupt:
            # Someone waits at the terminal; a second interrupt in here is theirs.
            self.shut_down(wait=True, end="terminate")
            raise
        if self._thread is not None:
            self._thread.join(_ENDING_S)
        self._callers.join()
        self._records.teller.join()

    def _close_unused(self) -> bool:
        """Close a pool that has no thread, and never will; ``False`` if it has one."""
        # All of it may be done twice: a signal's handler may close the pool in the middle.
        if vars(self).setdefault("_owner", _NOBODY) is not _NOBODY:
            return False
        self._end()
        return True

    def _end(self) -> None:
        try:
            self._hiring.close()
            if self._trace is not None:
                self._trace.close()
        finally:
            self._over = True
            if self._filled is not None:
                self._filled.open()
            self._refuse_late()
            self._ended_latch.open()

    def _refuse_late(self) -> None:
        """End what was brought when the scheduler's thread had ended. From any thread."""
        while self._inbox:
            try:
                late = self._inbox.popleft()
            except IndexError:
                return
            if isinstance(late, Task):
                if begin(late.future):
                    fail(late.future, self._refusal())
            elif isinstance(late, _Items):
                late.run.stop(self._refusal)

    def _refusal(self) -> BaseException:
        if self._broken is not None:
            return fresh(self._broken)
        return RuntimeError("cannot schedule new futures after shutdown")

    def exit(self) -> None:
        """Finish before the interpreter ends, as the standard pool does."""
        if os.getpid() != self._pid:
            return
        # An interrupt that nobody caught ends the program: its queued work is not wanted.
        ends = self.ends_at_exit or isinstance(last_uncaught(), KeyboardInterrupt)
        if not ends:
            for results in [*self._open.values()]:
                results.finish()
        self._exiting = True
        self.shut_down(wait=True, end="terminate" if ends else "")

    def abandon(self) -> None:
        """Finish without anybody waiting: nobody holds the pool any more (race E)."""
        self._closing = True
        if self._begun or not self._close_unused():
            self.wake()

    def wake(self) -> None:
        """Make the scheduler's thread look at what is shared. Never blocks, takes no lock."""
        staff = self._staff
        if staff is not None:
            staff.wake()

    def _check_fork(self) -> None:
        # Race G.
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this pool belongs to process {self._pid}, and this is its fork "
                f"{os.getpid()}: make a pool of its own here"
            )
        if not self._begun:
            self._hiring.pack_ahead()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise fresh(self._broken)
        # Until its own exit() a pool that runs can take what is left of its maps.
        if self._exiting or (not self._begun and has_exited()):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if not self._begun:
            self._start()

    def _wait_for_the_first_worker(self) -> None:
        if not self._hiring.started.is_open and threading.current_thread() is not self._thread:
            self._hiring.started.wait()

    # The scheduler's thread.

    def _start(self) -> None:
        check_no_import()
        finish_at_exit(self)
        opening = _Opening()
        try:
            with refusals.explained():
                # A daemon, so that a second interrupt at exit is not answered by another join.
                # Whoever is interrupted in here leaves a thread that runs, or that to the next.
                ThreadThatStarts(partial(self._own, opening), "safepool-scheduler").start()
                opening.wait()
                if opening.error is not None:
                    raise opening.error
        finally:
            del opening  # whose error holds this frame

    def _own(self, opening: _Opening) -> None:
        try:
            # Whose the pool is, is decided in one step: several threads may have been started.
            while (owner := vars(self).setdefault("_owner", opening)) is not opening:
                owner.wait()
                if owner.error is None:
                    return
            # Here no signal's handler runs: one that raised would lose what is being made.
            self._staff = staff = Staff(self._hiring.start)
            self._thread = threading.current_thread()
            self._begun = True
        except BaseException as error:  # noqa: BLE001 -- raised to the caller of submit()
            opening.error = error.with_traceback(None)
            del vars(self)["_owner"]  # the next submit() tries again
            if self._closing:  # by a thread that has seen an owner, and waits for the end
                self._close_unused()
            return
        finally:
            opening.open()
        self._run(staff)

    def _run(self, staff: Staff) -> None:
        handlers_by(self._records.call)
        callbacks_by(self._callers.do, self._me)
        try:
            if self._trace is not None:
                self._trace.start(self._look)
            while self._step(staff):
                self._listen(staff, self._patience(staff))
            self._cancel_waiting()  # the pool may have been ended in the middle of a step
            for entry in self._dispatch.take_aside():
                _fail(entry, lambda: PicklingError(_RESTED.format("this call")))
            self._stop_all(staff)
        except BaseException as error:  # noqa: BLE001 -- told to every future that is left
            # Nobody would ever end the futures that are left.
            _log.critical("the scheduler of a pool failed", exc_info=True)
            cause = refusals.explain(error)
            told = repr(error) if cause is error else text_of(cause)
            self._break(staff, PoolBrokenError(f"the scheduler failed: {told}"), cause)
        finally:
            self._staff = None
            # From the last to the first, each whatever another has raised: somebody waits for the
            # end.
            with ExitStack() as endings:
                endings.callback(self._records.teller.close)
                endings.callback(self._end)
                endings.callback(self._records.catch_up)
                endings.callback(self._callers.close)
                endings.callback(staff.close)
                endings.callback(self._settling.close)
                endings.callback(self._dispatch.close)

    def _look(self) -> tuple[int, int, int]:
        """Return how many calls wait, and how many workers run something and are there."""
        owed = [worker.ledger.owed for worker in self._staff or ()]
        waiting = len(self._dispatch.aside) + len(self._inbox)
        try:
            waiting += self._backlog.waiting()
        except RuntimeError:  # it has just been changed
            pass
        running = sum(map(bool, owed))
        return waiting + sum(owed) - running, running, len(owed)

    def _step(self, staff: Staff) -> bool:
        """Act on what is shared; return whether there is more to do."""
        # Before the look at what was brought: nothing is brought after it.
        closing, ending = self._closing, self._forced
        self._take_in()
        self._backlog.holds = not closing
        to_kill, self._to_kill = self._to_kill, []
        ended_runs, self._ended_runs = self._ended_runs, []
        if ending:
            for worker in staff:
                self._take_back(staff, worker)  # it has not begun, so it is cancelled
        self._cancel_waiting()
        if ending:
            return False
        while self._dropped_runs:
            run = self._dropped_runs.popleft()
            run.drop()
            ended_runs.append(run)
        self._send_packed(staff)
        for run in ended_runs:
            self._forget(staff, run)
        for future in to_kill:
            self._end_task(staff, future)
        if self._idle_s is not None:
            self._let_the_idle_go(staff, self._idle_s)
        self._fill_up(staff)
        working = any(worker.ledger.owed or worker.retiring for worker in staff)
        if not (working or self._backlog or len(staff) > self._size):
            # Nobody has or wants anything: after every lone task (benchmarks/dispatch.py,
            # round-trip).
            return self._is_awaited if closing or self._forced else True
        self._oom.look()
        self._follow_the_limits(staff)
        self._retire_strangers(staff)
        self._shrink(staff)
        self._end_the_overdue(staff)
        self._take_back_from_the_slow(staff)
        self._cancel_waiting()  # what was taken back above is not to be sent again
        self._hand_out(staff)
        if self._forced:  # broken meanwhile
            return False
        return (
            not closing
            or bool(self._backlog)
            or self._is_awaited
            or any(worker.ledger.owed for worker in staff)
        )

    @property
    def _is_awaited(self) -> bool:
        """Whether something is being pickled or unpickled, or may be when the pool is closed."""
        if not (self._dispatch.aside or self._settling.waits):
            return False
        return not (self._closing and self._rests)

    @property
    def _rests(self) -> bool:
        """Whether no pickling and unpickling goes on, and has not for long."""
        since = max(self._dispatch.rests_since(), self._settling.rests_since())
        return time.monotonic() - since >= _REST_S

    def _take_in(self) -> None:
        """Take what callers have brought."""
        while self._inbox:
            try:
                brought = self._inbox.popleft()
            except IndexError:
                return
            if isinstance(brought, _Items):
                run = brought.run
                self._backlog.add_items(run, brought.items, last=brought.last)
                if run.fed and not run.unsettled:
                    self._ended_runs.append(run)
            elif isinstance(brought, Task):
                self._backlog.add(brought)
            else:
                self._to_kill.append(brought)

    def _send_packed(self, staff: Staff) -> None:
        self._dispatch.unshare(staff)
        back = self._dispatch.send_packed(staff.send)
        if self._settling.waits:
            self._settling.come_back()
        if self._dispatch.waits:
            more = not len(staff) or any(worker.is_idle for worker in staff)
            back += self._dispatch.come_back(more=more)
        if back:
            self._wait_again(back)

    def _cancel_waiting(self) -> None:
        if not self._cancelling:
            return
        self._take_in()
        waiting = self._backlog.clear()
        for entry in [*waiting, *self._dispatch.take_aside()]:
            _cancel(entry)

    def _listen(self, staff: Staff, timeout_s: float | None) -> None:
        self._bed = [True]
        if self._inbox or self._ended_runs or self._to_kill:
            timeout_s = 0.0
        for worker, news in staff.listen(timeout_s, self._awake):
            if isinstance(news, Ended):
                self._ended(staff, worker, news.exitcode)
                continue
            if news.kind is Kind.LOG:
                worker.logged = True
                self._records.handle(news.segments)
                continue
            if news.kind is Kind.IMPORTED:
                learn(b"".join(news.segments))
                continue
            if worker.logged:
                worker.logged = False
                self._records.catch_up()
            if worker.condemned is not None:  # race I
                continue
            try:
                self._receive(staff, worker, news)
            except (CorruptFrameError, ValueError) as error:
                staff.distrust(worker, error)

    def _awake(self) -> None:
        self._bed = []

    def _patience(self, staff: Staff) -> float | None:
        """Return how long to listen at most; a pool without work only sleeps."""
        busy = [worker for worker in staff if worker.ledger.owed]
        now = time.monotonic()
        times = []
        if self._idle_s is not None:
            idle_since = [worker.idle_since for worker in staff if worker.idle_since is not None]
            times += [since + self._idle_s for since in idle_since]
        times += self._next_looks()
        if not (busy or self._backlog):
            return max(0.0, min(times) - now) if times else None
        if self._backlog and self._hiring.not_before > now:
            times.append(self._hiring.not_before)
        if self._follow is not None and self._by_hand is None:
            times.append(self._follow_at)
        if (look_at := self._oom.next_look) is not None:
            times.append(look_at)
        times += reclaim.next_looks(staff, now)
        for worker in busy:
            due_s = worker.due_in_s()
            if due_s is not None:
                times.append(now + due_s)
        return max(0.0, min(times) - now) if times else None

    def _next_looks(self) -> list[float]:
        """Return when to look after what is pickled and unpickled, by the monotonic clock."""
        looks = []
        if self._dispatch.waits:
            looks.append(self._dispatch.next_look())
        if self._settling.waits:
            looks.append(self._settling.next_look())
        if self._closing and (self._dispatch.waits or self._settling.waits):
            looks.append(time.monotonic() + _REST_S / 10)
        return [look for look in looks if look is not None]

    def _let_the_idle_go(self, staff: Staff, idle_s: float) -> None:
        now = time.monotonic()
        for worker in staff:
            if not worker.is_idle:
                worker.idle_since = None
            elif worker.idle_since is None:
                worker.idle_since = now
            elif now - worker.idle_since >= idle_s and not self._backlog:
                worker.idle_since = None
                staff.stop(worker)

    def _follow_the_limits(self, staff: Staff) -> None:
        follow, now = self._follow, time.monotonic()
        if follow is None or self._by_hand is not None or now < self._follow_at:
            return
        busy = [worker.pid for worker in staff if worker.ledger.owed]
        if not (busy or self._backlog):
            return
        self._follow_at = now + _FOLLOW_S
        try:
            size = follow(busy)
        except Exception:  # noqa: BLE001 -- a limit that cannot be read must not cost a pool
            _log.exception("the limits could not be read again; the pool keeps its size")
            self._follow = None
            return
        before, self._fitting = self._fitting, size
        if before == size or self._by_hand is not None:
            return
        _log.info("the limits have changed: %d workers instead of %d", size, before)
        if self._trace is not None:
            self._trace.resized(before, size, "limits")

    def _retire_strangers(self, staff: Staff) -> None:
        """Give nothing more to workers that have rights which this program has given up."""
        if self._rights.have_changed() and len(staff):
            _log.info("this program has other rights than before: its workers are replaced")
            for worker in staff:
                worker.retiring = True

    def _shrink(self, staff: Staff) -> None:
        """Let workers go that are too many or too large: between two tasks, never in one."""
        shrinking = (
            len(staff) > self._size and sum(not worker.leaving for worker in staff) > self._size
        )
        if not (shrinking or any(worker.retiring for worker in staff)):
            return
        for worker in staff:
            goes = worker.retiring or (shrinking and not worker.is_bound)
            if not worker.leaving and goes and worker.ledger.owed > 1:
                self._take_back(staff, worker)
            # Nothing that it owed may have begun; then no answer brings its end.
            if worker.retiring and worker.is_idle:
                staff.stop(worker)
        if not shrinking:
            return
        staying = [worker for worker in staff if not worker.leaving]
        idle = [worker for worker in staying if worker.is_idle]
        for worker in idle[: max(0, len(staying) - self._size)]:
            staff.stop(worker)

    # Tasks to workers.

    def _hand_out(self, staff: Staff) -> None:
        if not self._backlog:
            return
        staying = [worker for worker in staff if not worker.leaving]
        if staying and not self._dispatch.telling.may_be_told():
            return
        hungry = [worker for worker in staying if worker.ready and not worker.silent]
        # Who has nothing first, so that it does not wait while others are sent ahead.
        hungry.sort(key=lambda worker: worker.ledger.expected_ns if worker.ledger.owed else -1)
        among = max(1, min(self._size, len(staying)))
        del hungry[self._size :]
        while hungry and self._backlog:
            # One message each, and again: the first is not to get all there is.
            hungry = [worker for worker in hungry if self._fill(staff, worker, among)]
        if self._backlog:
            self._hire(staff, staying)

    def _fill(self, staff: Staff, worker: Worker, among: int) -> bool:
        """Send a worker what it has room for; return whether it may have room for more."""
        ledger = worker.ledger
        # A large task that was taken back is nobody's any more.
        worker.exclusive = worker.exclusive and ledger.owed > 0
        if worker.leaving or worker.retiring or self._dispatch.is_full or not self._backlog:
            return False
        if not worker.takes_more or (ledger.owed and worker.board is None):
            return False
        left = self._settling.tasks_left(worker)

        def room(name: str, more_ns: int) -> int:
            idle = not (ledger.owed or more_ns)
            if worker.board is None:
                return int(idle)
            return self._pace.room(name, ledger.expected_ns + more_ns, idle=idle)

        taken = self._backlog.take(room, self._pace.expected_ns, among, left)
        if not taken:
            return False
        self._bring_settings(staff, worker)
        back: Sequence[Task | Span]
        if isinstance(taken, Span):
            pieces, back = self._dispatch.pack_span(worker, taken)
        else:
            pieces, back = self._dispatch.pack_tasks(worker, taken)
        if back:
            self._backlog.put_back(back)
        if pieces:
            worker.sent_ns = time.monotonic_ns()
            if not staff.send(worker, pieces):  # race H: its end is at hand, and tells
                return False
        return not (back and ledger.owed)

    def _bring_settings(self, staff: Staff, worker: Worker) -> None:
        pieces = self._dispatch.bring_settings(worker)
        if pieces:
            staff.send(worker, pieces)

    def _hire(self, staff: Staff, staying: list[Worker]) -> None:
        """Start workers while tasks wait that no starting worker will take."""
        # Not in the place of one that cannot be ended: the next would hang in the same way.
        most = max(1, self._size - staff.lost) - len(staying)
        # One that fails to start may be the pool's end.
        fails = any(worker.fails_to_start for worker in staff)
        if most <= 0 or fails or time.monotonic() < self._hiring.not_before:
            return
        starting = sum(not worker.ready for worker in staying)
        # Whatever nobody wants is dropped here: without a worker nobody would take it, and
        # a pool that has something waiting does not end.
        if not self._backlog.is_wanted():
            return
        wanted = min(most, self._backlog.at_most(self._size) - starting)
        if wanted <= 0:
            return
        # As many may take their time to end as stay: if none ends by itself, all would pile up.
        staff.hurry(len(staff) + wanted - 2 * self._size)
        self._start_workers(staff, wanted)

    def _fill_up(self, staff: Staff) -> None:
        """Start the workers that are missing, if that was asked for."""
        filled = self._filled
        if filled is None:
            return
        missing = self._size - sum(not worker.leaving for worker in staff)
        if missing > 0:
            self._start_workers(staff, missing)
            if self._dispatch.waits and not self._forced:  # for the initializer
                return
        self._filled = None
        filled.open()

    def _start_workers(self, staff: Staff, count: int) -> None:
        try:
            self._hiring.prepare()
            if self._dispatch.pack_initializer(self._hiring):
                self._hiring.take_packed()
                for _ in range(count):
                    self._hire_one(staff)
            elif self._closing and self._rests:
                self._break(staff, PoolBrokenError(_RESTED.format("the initializer")))
        except PoolBrokenError as error:
            self._break(staff, error, error.__cause__)
        except ScriptLostError:  # nothing was sent by name yet, and nothing will be
            self.wake()
        except Exception as error:  # noqa: BLE001 -- OSError, or RuntimeError at exit (race F)
            if not (self._forced or isinstance(error, InterruptedError)):  # it was given up
                why = refusals.explain(error)
                broken = self._hiring.refused(why, alone=not len(staff))
                if broken is not None:
                    self._break(staff, broken, why)

    def _hire_one(self, staff: Staff) -> None:
        try:
            worker = staff.hire()
        except OSError:
            if not self._dispatch.let_go():
                raise
            worker = staff.hire()  # a thread that had nothing to do has made room
        try:
            staff.send(worker, encode(Kind.LOG, 0))
            staff.send(worker, self._dispatch.initialize(worker, self._hiring.inheritance))
        except BaseException:  # no memory for the initializer; without it nothing may run there
            staff.end(worker, at_once=True)
            raise

    def _is_late(self) -> bool:
        """Tell whether a worker that is being started comes too late for anybody."""
        if self._forced or self._cancelling:
            return True
        # The hands ask as well, and only this thread looks into the queue.
        if not self._closing or threading.current_thread() is not self._thread:
            return False
        self._take_in()
        return not (self._backlog.is_wanted() or self._dispatch.aside)

    # Tasks back from workers.

    def _take_back_from_the_slow(self, staff: Staff) -> None:
        for worker in reclaim.slow_workers(staff, nothing_waits=not self._backlog):
            self._take_back(staff, worker)

    def _take_back(self, staff: Staff, worker: Worker) -> None:
        """Read what a worker has left on its board, and have back what it has not begun."""
        board, ledger = worker.board, worker.ledger
        if board is None:
            return
        board.revoke(ledger.last)
        try:
            self._settling.settle_left(staff, worker, board.peek())
        except ValueError as error:
            staff.distrust(worker, error)
        claimed = board.claimed
        back = ledger.take_back(claimed)
        unsent = worker.packing
        if back and (unsent is None or unsent.position > claimed + 1):
            worker.awaited = claimed + 1  # it will come to it, and say so (race J)
        self._wait_again(back)

    def _wait_again(self, works: Sequence[Task | Span]) -> None:
        """Queue again what no worker has begun."""
        for work in works:
            if isinstance(work, Task):
                work.future.wait_again()
        self._backlog.put_back(works)

    def _receive(self, staff: Staff, worker: Worker, frame: Frame) -> None:
        """Act on what a worker says.

        Raises:
            CorruptFrameError: It says what no worker should.
            ValueError: Its records are not what they should be.
        """
        kind, position, segments = frame
        match kind:
            case Kind.RESULTS:
                self._settling.settle_records(staff, worker, b"".join(segments))
            case Kind.VALUES:
                size_bytes = sum(map(len, segments))
                values = read_values(segments)
                self._settling.settle_values(staff, worker, position, *values, size_bytes)
            case Kind.RESULT | Kind.EXCEPTION:
                run = self._settling.settle(staff, worker, position, kind, segments)
                if run is not None:
                    run.tell()
            case Kind.READY:
                self._welcome(worker, has_board=bool(segments))
            case Kind.TIMES:
                self._settling.time(worker, segments)
            case Kind.INITIALIZER_FAILED:
                staff.dismiss_failed(worker, rebuild(segments))
            case Kind.SKIPPED:  # race J
                self._return_skipped(worker, position)
            case Kind.UNREADABLE:
                self._return_unreadable(worker, position)
            case _:
                raise CorruptFrameError(f"{kind!r} was not asked for")

    def _welcome(self, worker: Worker, *, has_board: bool) -> None:
        worker.ready = True
        if not has_board:
            worker.drop_board()
        if self._trace is not None:
            self._trace.ready(worker)

    def _return_skipped(self, worker: Worker, position: int) -> None:
        if worker.awaited == position + 1:
            # Taken back from one further on; but it passes over the rest of a batch unseen.
            worker.awaited = 0
        head = worker.ledger.head
        if head is not None and head.position + head.done == position:
            # It alone, with what was to follow in the same message: what was sent since then
            # is not revoked, and may have begun.
            self._wait_again([worker.ledger.withdraw()])

    def _return_unreadable(self, worker: Worker, position: int) -> None:
        """A batch that cannot be unpickled: find out which call it is by sending each alone."""
        worker.awaited = 0  # it will come to nothing more of this batch
        head = worker.ledger.head
        if not isinstance(head, Span) or head.position != position or head.done:
            if worker.ledger.last >= position:
                return  # taken back meanwhile
            raise CorruptFrameError(f"position {position} was not sent")
        worker.ledger.withdraw()  # not what is behind it: the worker goes on with that
        self._wait_again([head.only(place) for place in range(head.count)])

    def _settled(self, run: MapRun, count: int) -> None:
        run.unsettled -= count
        if run.fed and not run.unsettled:
            self._ended_runs.append(run)

    def _forget(self, staff: Staff, run: MapRun) -> None:
        """Let the workers drop the function of a run that has ended."""
        if run.sent is None or run.sent.lasting:
            return
        for worker in staff:
            if not worker.leaving:
                forget(worker, run.sent, staff.send)

    # Workers and tasks that end otherwise.

    def _end_the_overdue(self, staff: Staff) -> None:
        for worker in staff:
            if worker.condemned is None and worker.due_in_s() == 0.0:
                work = worker.ledger.head
                assert work is not None
                assert work.policy.timeout_s is not None
                position = work.position + work.done
                if worker.overdue != position:
                    # Listened to once more: this program may have been stopped, and the
                    # result be here in time.
                    worker.overdue = position
                    continue
                self._condemn(
                    staff,
                    worker,
                    work,
                    TaskTimeoutError(worker.pid, work.policy.timeout_s, work.name, ""),
                )

    def _end_task(self, staff: Staff, future: PoolFuture) -> None:
        """End the worker that runs a task whose future was cancelled."""
        for worker in staff:
            for work in worker.ledger:
                if isinstance(work, Task) and work.future is future:
                    self._take_back(staff, worker)
                    if worker.ledger.head is work and worker.can_be_at(work.position):
                        worker.condemned = worker.condemned or RuntimeError("cancelled")
                        staff.end_with_descendants(worker)
                    elif any(owed is work for owed in [*worker.ledger][1:]):
                        # What was before it has ended, and its answers are on their way:
                        # only then is it sure that the signal meets this task.
                        self._to_kill.append(future)
                    return

    def _condemn(
        self, staff: Staff, worker: Worker, work: Task | Span, why: BaseException
    ) -> None:
        """End a worker for what it does now, and for that alone (race I)."""
        position = work.position + work.done
        self._take_back(staff, worker)
        head = worker.ledger.head
        if head is None or head.position + head.done != position:
            return  # it has ended meanwhile
        if not worker.can_be_at(position):
            return  # and so has this one, whose answer is on its way
        staff.condemn(worker, why)

    def _ended(self, staff: Staff, worker: Worker, exitcode: int | None) -> None:
        """A worker's process has ended: what did it leave behind?"""
        from_outside = exitcode == _KILLED and not worker.was_ours(exitcode)
        oom = self._oom.explain() if from_outside else None
        ending = self._losses.of(staff, worker, exitcode, oom, pool_ends=bool(self._forced))
        if self._trace is not None:
            self._trace.ended(worker, ending)
        if worker.failure is not None:
            raised = f"{type(worker.failure).__name__}: {text_of(worker.failure)}"
            problem = PoolBrokenError(f"a worker's initializer failed: {raised}")
            self._break(staff, problem, worker.failure)
        if staff.lost > _MOST_LOST * self._size:
            problem = PoolBrokenError(f"{staff.lost} workers could not be ended by SIGKILL")
            self._break(staff, problem)
        if self._break_on_death and ending.breaks:
            problem = PoolBrokenError(
                "A process in the process pool was terminated abruptly while the future was "
                f"running or pending: worker {ending.pid} {ending.how}"
            )
            self._break(staff, problem)
        level, text = ending.line
        _log.log(level, "%s", text)
        if ending.was_of_use:
            self._settling.patience.was_of_use()
        elif ending.was_for_nothing:
            self._bear(staff, ending)

    def _bear(self, staff: Staff, ending: Ending) -> None:
        """Wait before the next start, or give up if workers end in a row that were of no use."""
        patience = self._settling.patience
        pause_s = patience.after(ending.exitcode, ours=ending.by_pool)
        if pause_s is not None:
            self._hiring.pause(pause_s)
            return
        reason = f"{patience.in_a_row} workers in a row were of no use; the last, {ending.unasked}"
        refused = None
        if ending.oom is not None:
            reason += f": {ending.oom}"
        elif ending.by_pool or (ending.exitcode or 0) >= 0:  # else to try a call might kill
            refused = refused_call()
            reason += f": {refused}" if refused else ""
        self._break(staff, PoolBrokenError(reason), refused)

    def _break(
        self, staff: Staff, error: PoolBrokenError, cause: BaseException | None = None
    ) -> None:
        """Give up as a whole: every task fails, every worker ends."""
        error.__cause__ = cause
        self._broken = self._broken or error
        self._closing = True
        self._asked.append("terminate")
        self._take_in()
        failed: list[Task | Span | MapRun] = self._backlog.clear()
        failed += self._dispatch.take_aside()
        if self._trace is not None:
            self._trace.gave_up(str(error))
        for worker in staff:
            if self._trace is not None:
                self._trace.broken(worker)
            while worker.ledger.owed:
                work, place = worker.ledger.strike()
                failed.append(work.only(place) if isinstance(work, Span) else work)
        for entry in failed:
            _fail(entry, lambda: fresh(error))

    def _stop_all(self, staff: Staff) -> None:
        for worker in staff:
            if not (worker.dismissed or self._forced):
                staff.stop(worker)
        while len(staff):
            for worker in staff:
                if self._forced == "ask":
                    staff.ask(worker)
                elif self._forced:  # from the beginning, or while the workers stop
                    staff.end(worker, at_once=self._forced == "kill")
            self._listen(staff, None)
            self._cancel_waiting()  # what was sent ahead to a worker that was ended

    def descriptors(self) -> Iterable[int]:
        """Return what a worker that is forked while this pool works must not keep."""
        staff = self._staff
        traced = [] if self._trace is None else self._trace.descriptors()
        return traced if staff is None else [*staff.descriptors(), *traced]


def _fail(entry: Task | Span | MapRun, error: Callable[[], BaseException]) -> None:
    if isinstance(entry, MapRun):
        entry.stop(error)
    elif isinstance(entry, Span):
        entry.run.give_up(entry, error)
    elif entry.future.running() or begin(entry.future):
        fail(entry.future, error())


def _cancel(entry: Task | Span | MapRun) -> None:
    if isinstance(entry, Task):
        cancel(entry.future)
    elif isinstance(entry, Span):
        entry.run.give_up(entry, CancelledError)
    else:
        entry.stop(CancelledError)
