"""The scheduler: one thread that owns every worker of a pool.

                        submit(), map()             frames
    caller's threads  ------------>  scheduler  <------------>  worker 1   (one private
                      <------------   thread    <------------>  worker 2    channel and one
                        futures,                <------------>  ...         board each)
                        results

The core (``core.machine``) decides about calls and workers: it gets events and returns actions.
The scheduler's thread (``loop``) delivers the events and executes the actions. A submitted call
waits in the core, then becomes a message (``dispatch``). The message belongs to exactly one worker
until the call is settled or taken back. The call ends (``settling``) by its future or among its
map's results (``mapping``). Callers (here) only append to the inbox or raise a flag, and then wake
the thread. Callers share no lock with the thread: a signal handler may wait for the pool during
any call.

Code of the program that may be slow or wait runs in other threads (``hands``):

    code                                             thread
    pickling of arguments, functions, initializers   the dispatch's hands, if not ``trusted``
    unpickling of results and exceptions             the settling's hands, if not ``trusted``
    callbacks of futures                             one thread, in order (asyncio's: this one)
    handlers of log records and warnings             one thread, in order (``records``)
    items of a ``map`` whose results were not used   the callbacks' thread

The staff (``staff``) owns the processes of the workers: it starts workers (``hiring``), reads
their messages and waits for their end.

A worker is sent several short tasks at a time. The pool can take back tasks that have not begun,
by the board that it shares with the worker (``workers.board``). The pool takes tasks back when
another worker is idle, a task turns out to be long, a task exceeds its timeout, or the worker
dies.

Races, each handled at its letter, here or in the core (A to C: ``staff``):
    D  A callback of a future submits to, shuts down or breaks this pool: no thread waits for
       its thread. A finalizer that the collector runs in the scheduler's thread and that waits
       for a call of the pool gets an error.
    E The pool object is dropped by the garbage collector in any thread, under any lock: the weak
       reference's callback sets a flag and wakes the thread, nothing more. (The callback of an
       unused iterator of a ``map`` takes the remaining items.)
    F  The interpreter shuts down and refuses new processes: the first worker is started before
       submit() returns, and later calls fail instead of waiting.
    G  The program forks: the child has no scheduler thread. There submit() raises, and so do
       unfinished futures and maps.
    H  A worker has ended when a task is to be sent, or dies before the task has begun: the task
       goes to another worker. Only a large task that was sent in part is lost with its worker.
    I  A task ends while it is being ended for its timeout, or cancelled: everything behind it was
       taken back before, and it is left alone if the next had been claimed by then, so the signal
       meets this task or nothing; a result that was left on the board before counts. A later
       result does not count: the signal for the stack may have interrupted what the task was
       waiting for.
    J  A worker claims a task in the moment in which the pool takes it back: the worker notices,
       sends ``SKIPPED``, and the task waits again.

Not covered:
    * A finalizer that the collector runs in the scheduler's thread, and that waits for anything
      but the pool; functions of ``os.register_at_fork``, with ``mp_context="fork"``.
    * Systems without a board (all but Linux): a worker holds one task at a time, or ``chunksize``
      calls of a map.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from safepool.pool.calls.mapping import Coming, MapRun
from safepool.pool.calls.results import Results
from safepool.pool.calls.tasks import PoolFuture, Task, here
from safepool.pool.core import events as e
from safepool.pool.hands import ThreadThatStarts
from safepool.pool.latch import Latch
from safepool.pool.shell import refusals
from safepool.pool.shell.exits import finish_at_exit, last_uncaught
from safepool.pool.shell.loop import Loop
from safepool.pool.shell.staff import Staff
from safepool.pool.shell.turns import runs_a_loop
from safepool.workers.loading import check_no_import

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from safepool.pool.calls.mapping import Item
    from safepool.pool.calls.results import ResultIterator
    from safepool.pool.core.policy import Policy

# From the end of the scheduler's work to that of its thread.
_ENDING_S = 1.0


class _Opening(Latch):
    """A life of the scheduler's thread. Opens when the pool has its thread, or cannot have one."""

    __slots__ = ("error",)

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None


# In the place of the opening of a pool that was closed before it had a thread.
_NOBODY = _Opening()
_NOBODY.open()


def _wake(scheduler: Callable[[], Loop | None], _: object) -> None:  # race E
    found = scheduler()
    if found is not None:
        found.wake()


class Scheduler(Loop):
    """Runs tasks in worker processes, and survives any effect of a task on its worker.

    These are the methods for callers, from any thread; arguments as of `Loop`.
    """

    _served: weakref.finalize[..., object] | None = None

    @property
    def state(self) -> str:
        """``"closed "`` or ``"broken "``, empty for a pool that takes tasks."""
        return "broken " if self.broken is not None else "closed " if self._closing else ""

    def wait_for_a_worker(self) -> None:
        """Return when one has been started, or none will be; at once if nothing was submitted."""
        if self._begun and self._thread is not threading.current_thread():
            self._hiring.hired.wait()

    def resize(self, workers: int, *, level: int = logging.INFO) -> None:
        """Keep at most ``max_workers`` workers from now on; see :meth:`Size.keep`."""
        self.size.keep(workers, level=level)
        self.wake()

    def staff_up(self) -> None:
        """Start as many workers as the pool may have, before calls need them; wait for that.

        Raises:
            BrokenProcessPool: The pool gave up as a whole.
            RuntimeError: The pool or the interpreter shuts down.
        """
        self._check_fork()
        self._open_up()
        filled = self._filled = Latch()
        self.wake()
        if not self._over and self._thread is not threading.current_thread():
            filled.wait()

    def let_go_after(self, idle_s: float) -> None:
        """Let workers end that have had nothing to do for so long, in seconds."""
        self._core.idle_ns = int(idle_s * 1e9)

    def hold_ahead(self, work_s: float) -> None:
        """Set how much work, in seconds, each worker may hold beside the call that it runs."""
        self._core.pace.ahead_ns = int(work_s * 1e9)

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
        if not self._begun or os.getpid() != self._pid:
            self._check_fork()
        self._meet(function)
        future = PoolFuture(self._me)
        task = Task(future, (function, args, kwargs), name, policy)
        self._settings.look_before(future)
        self._dispatch.names.look()
        self._dispatch.pickling.task_now(task)
        if not self._begun or self._closing or self._exiting:  # a broken pool is closing
            self._open_up()
        if not self._turns.call(task):
            self._bring(task)
            self._wait_for_the_first_worker()
        return future

    def _meet(self, function: Callable[..., Any]) -> None:
        """Look at a function before calls of it are queued; nothing is done by default."""

    def map(
        self,
        run: MapRun,
        items: Iterable[Item],
        ahead: int | None,
        deadline: float | None,
        keep: object,
    ) -> ResultIterator:
        """Queue the calls of a run and return the iterator over its results."""
        self._check_fork()
        self._meet(run.function)
        if isinstance(items, Coming):  # of others the first are queued at once, or refused
            self._open_up()
        self._settings.look()
        self._dispatch.names.look()
        self._dispatch.pickling.function_now(run)
        results = Results(run, iter(items), self, ahead, deadline)
        # Once all calls are queued the pool may be dropped: results arrive without it.
        iterator = results.iterate(None if results.exhausted else keep)
        run.reader = weakref.ref(iterator, partial(_wake, self._me))
        if not results.exhausted and ahead is None:
            self._open.add(iterator, results, self._do_elsewhere)
        return iterator

    def _do_elsewhere(self, function: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            self._callers.do(function)
        else:
            function()

    def add_items(self, run: MapRun, items: list[Item], *, last: bool) -> None:
        """Queue further calls of a run; ``last``: there will be no more."""
        self._check_fork()
        if items:
            self._open_up()
        rest = self._turns.share(run, items) if items and last else items
        if rest or not items:
            self._bring(e.Fed(run, rest, last))
        if items:
            self._wait_for_the_first_worker()

    def check_may_wait(self) -> None:
        """Refuse that the scheduler's own thread waits for a result, in a finalizer; or a fork."""
        if here.pid != self._pid:
            self._check_fork()
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "the pool's own thread would wait for itself. Do not wait for a result of a pool "
                "in a finalizer (__del__)"
            )
        self._dispatch.hands.note_that_one_asks()

    def give_up(self, run: MapRun) -> None:
        """Drop the calls of a run that no worker has: they are not needed (race E)."""
        self._dropped_runs.append(run)
        self.wake()

    def end_calls(self, run: MapRun) -> None:
        """End the workers that run calls of a run that was given up."""
        if not self._over:
            self._inbox.append(run)
            self.wake()

    def kill(self, future: Future[Any]) -> bool:
        """Cancel a task, and end the worker that runs it; ``False`` if it has ended.

        Raises:
            ValueError: The future is not one of this pool.
        """
        self._check_fork()
        if not isinstance(future, PoolFuture) or future.owner is not self._me:
            raise ValueError(
                "this future does not belong to this pool: pass a future of its submit()"
            )
        if not future.cancel_running():
            return False
        if not self._over:
            self._inbox.append(future)
            self.wake()
        if self._over:  # by now, perhaps
            future.tell()
        return True

    def shut_down(self, *, wait: bool, cancel: bool = False, end: e.Force = "") -> None:
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
        # The scheduler's own thread must not run this (race D), nor a thread for which it waits:
        # the items may be results of this pool.
        here = threading.current_thread()
        others = (*self._hands, self._callers, self._records.teller)
        ours = here is self._thread or any(one.has(here) for one in others)
        if not (cancel or end or ours or self._closing):
            # Items that the standard pool would have taken from its iterators by now.
            self._open.finish()
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

    def exit(self) -> None:
        """Finish before the interpreter ends, as the standard pool does."""
        if os.getpid() != self._pid:
            return
        # An interrupt that nobody caught ends the program: its queued work is not wanted.
        ends = self.ends_at_exit or isinstance(last_uncaught(), KeyboardInterrupt)
        if not ends:
            self._open.finish()
        self._exiting = True
        self.shut_down(wait=True, end="terminate" if ends else "")

    def serve(self, pool: object) -> None:
        """Finish in the background when the pool object is gone."""
        self._served = weakref.finalize(pool, self._abandon)
        self._served.atexit = False

    def _end(self) -> None:
        # The list of finalizers holds the scheduler, which knows functions of the script, whose
        # globals may hold the pool: nothing of them would end with the interpreter.
        if self._served is not None:
            self._served.detach()
        super()._end()

    def _abandon(self) -> None:  # race E
        self._closing = True
        if self._begun or not self._close_unused():
            self.wake()

    def _check_fork(self) -> None:
        # Race G.
        self._me.check()
        if not self._begun:
            self._hiring.pack_ahead()

    def _open_up(self) -> None:
        """Start the thread of a pool that has none; refuse calls of a pool that has ended."""
        self._check_open()
        if not self._begun:
            self._start()

    def _wait_for_the_first_worker(self) -> None:
        if self._hiring.started.is_open or threading.current_thread() is self._thread:
            return
        if not runs_a_loop():  # which has others to look after
            self._hiring.started.wait()

    # The scheduler's thread.

    def _start(self) -> None:
        check_no_import()
        finish_at_exit(self)
        opening = _Opening()
        try:
            with refusals.explained():
                # A daemon, so that a second interrupt at exit is not answered by another join. A
                # caller that is interrupted in here leaves a running thread, or leaves the start
                # to the next caller.
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
            # No signal handler runs here: one that raised would lose the object that is being
            # made.
            self._staff = staff = Staff(
                self._hiring.start,
                lambda staff, worker: self._tell(staff, e.Parted(worker)),
                self._ended,
            )
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
