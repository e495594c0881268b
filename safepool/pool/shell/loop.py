"""The loop of the scheduler's thread: it brings the core its events, and does its actions.

Callers (``scheduler``) append to the inbox or raise a flag, and then wake the thread. All else
belongs to the thread alone. Letters name the scheduler's races.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from concurrent.futures import CancelledError
from contextlib import ExitStack
from functools import partial
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

from safepool.errors import PoolBrokenError, text_of
from safepool.machine import handlers_by
from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.calls.results import OpenMaps
from safepool.pool.calls.tasks import (
    OwnerRef,
    PoolFuture,
    Task,
    callbacks_by,
    cancel,
    fail,
    fresh,
    rebuild,
)
from safepool.pool.core import events as e
from safepool.pool.core.machine import Core
from safepool.pool.hands import Teller
from safepool.pool.latch import Latch
from safepool.pool.shell import refusals
from safepool.pool.shell.dispatch import Dispatch, forget
from safepool.pool.shell.exits import has_exited
from safepool.pool.shell.listener import Listener
from safepool.pool.shell.oom import OutOfMemoryWatch
from safepool.pool.shell.records import Records
from safepool.pool.shell.refused_calls import refused_call
from safepool.pool.shell.settling import Settling, answers_of, left_by, values_of
from safepool.pool.shell.turns import TICK_S, Turns
from safepool.transport.frames import CorruptFrameError, Frame, Kind, encode
from safepool.transport.room import make_room
from safepool.workers.contained import ContainedLogger
from safepool.workers.identity import RightsWatch
from safepool.workers.messages import read_values
from safepool.workers.plan import ScriptFailedError, ScriptLostError
from safepool.workers.preload import learn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.pool.shell.hiring import Hiring
    from safepool.pool.shell.memory import MemoryWatch
    from safepool.pool.shell.size import Size
    from safepool.pool.shell.staff import Staff
    from safepool.pool.shell.worker import Worker

_log = ContainedLogger()

# Signal of the kernel's out-of-memory killer, and of any other SIGKILL.
_KILLED = -9

# A closed pool waits for pickling and unpickling as long as that goes on, and then for so long.
_REST_S = 30.0
_RESTED = (
    f"the pool was closed, and the pickling of {{}} has stood still for {_REST_S:.0f} s: it waits "
    "for a lock, an import or a connection. Let it end before the pool is shut down"
)


class Loop:
    """The state of a pool, and the part that its thread runs.

    Args:
        tasks_per_worker: Number of tasks after which a worker is replaced; ``None`` is no limit.
        memory: Checks of the memory of workers; ``None`` sets no limit.
        break_on_death: ``True`` if one dead worker ends the whole pool, as in the standard pool.
        listener: Listener of the pool, closed with the pool.
    """

    def __init__(
        self,
        *,
        size: Size,
        hiring: Hiring,
        tasks_per_worker: int | None,
        memory: MemoryWatch | None = None,
        break_on_death: bool = False,
        listener: Listener,
    ) -> None:
        self.size: Size = size
        self._listener = listener
        self._core = Core(size.now, tasks_per_worker, break_on_death=break_on_death)
        self._handle = listener.of_events(self._core.handle)
        self._do = listener.of_actions(_DO)
        self._bring = listener.of_calls(self._bring_in)
        # Whether what runs is ended when the interpreter ends, as by multiprocessing.Pool.
        self.ends_at_exit = False
        # Opened when all workers were started, if that was asked for.
        self._filled: Latch | None = None

        # What callers bring: tasks, further calls of a map; futures and maps whose calls are to be
        # ended.
        # Appended in one step, and no lock is held: a signal's handler may submit, or wait for
        # this pool, in the middle of a submit().
        self._inbox: deque[Task | e.Fed | PoolFuture | MapRun] = deque()
        self._dropped_runs: deque[MapRun] = deque()
        # Flags, which callers only ever raise.
        self._closing = False
        self._cancelling = False
        self._exiting = False
        self._asked: list[e.Force] = []
        # Why the pool gave up as a whole.
        self.broken: PoolBrokenError | None = None
        self._begun = False
        self._thread: threading.Thread | None = None
        self._over = False
        self._ended_latch = Latch()
        self._pid = os.getpid()
        # By which a future knows whose it is, without holding on to it.
        self._me = OwnerRef(self)
        # Maps whose items have not all been taken from the caller's iterators.
        self._open = OpenMaps()
        # Filled by the scheduler's thread before it waits; emptied by the thread that wakes it.
        self._bed: list[bool] = []

        # For the scheduler's thread only, except the staff's wake().
        self._staff: Staff | None = None
        self._ended_runs: list[MapRun] = []
        # Futures and runs whose calls are to be ended.
        self._unwanted: list[PoolFuture | MapRun] = []
        self._callers = Teller("safepool-callbacks")
        self._records = Records()
        self._dispatch = Dispatch(self._settled, self.wake, hiring.names, listener)
        self._settings = self._dispatch.settings
        self._settling = Settling(self._settled, self.wake)
        self._hands = (self._dispatch.hands, self._settling.hands)
        self._settle_calls = listener.of_answers(self._settling.settle)
        self._memory = memory
        self._oom = OutOfMemoryWatch()
        self._rights = RightsWatch()
        self._turns = Turns(
            self._dispatch.pack_alone,
            self._inbox,
            self.wake,
            self._rights.is_same_user,
            settling=self._settling,
            pace=self._core.pace,
            size=size,
            allowed=type(listener) is Listener and memory is None,
        )
        self._hiring = hiring
        hiring.need = self._dispatch.need_first
        me = self._me
        hiring.given_up = lambda: (found := me()) is None or found._is_late()

    # From any thread.

    def workers(self) -> list[Worker]:
        """Return the live workers."""
        return list(self._staff or ())

    def wake(self) -> None:
        """Wake the scheduler's thread. Never blocks, takes no lock."""
        staff = self._staff
        if staff is not None:
            staff.wake()

    def descriptors(self) -> Iterable[int]:
        """Return the descriptors that a worker forked while this pool works must close."""
        staff = self._staff
        ours = [*self._turns.descriptors(), *self._listener.descriptors()]
        return ours if staff is None else [*staff.descriptors(), *ours]

    def _bring_in(self, what: Task | e.Fed) -> None:
        """Queue a task or an event for the scheduler's thread."""
        self._inbox.append(what)
        self._dispatch.hands.note_that_one_asks()
        # The scheduler makes its bed first, then it looks.
        bed = self._bed
        if bed:
            self.wake()
            bed.clear()
        if self._over:
            self._refuse_late()
            if not (isinstance(what, e.Fed) and not what.items):
                self._check_open()

    def _check_open(self) -> None:
        if self.broken is not None:
            raise fresh(self.broken)
        # Until its own exit() a running pool can take the remaining items of its maps.
        if self._exiting or (not self._begun and has_exited()):
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _end(self) -> None:
        try:
            self._hiring.close()
            self._listener.close()
        finally:
            self._over = True
            if self._filled is not None:
                self._filled.open()
            self._refuse_late()
            self._ended_latch.open()

    def _refuse_late(self) -> None:
        """End calls that came after the end of the scheduler's thread. From any thread."""
        while self._inbox:
            try:
                late = self._inbox.popleft()
            except IndexError:  # emptied meanwhile
                return
            if isinstance(late, Task):
                fail(late.future, self._refusal())
            elif isinstance(late, e.Fed):
                run: Any = late.run
                run.stop(self._refusal)

    def _refusal(self) -> BaseException:
        if self.broken is not None:
            return fresh(self.broken)
        return RuntimeError("cannot schedule new futures after shutdown")

    # The thread.

    def _run(self, staff: Staff) -> None:
        handlers_by(self._records.call)
        callbacks_by(self._callers.do, self._me)
        try:
            self._listener.start(self._look)
            while self._step(staff):
                self._listen(staff, self._patience())
            self._close(staff)  # the pool may have been ended in the middle of a step
            for entry in self._dispatch.take_aside():
                _fail(entry, lambda: PicklingError(_RESTED.format("this call")))
            self._stop_all(staff)
        except BaseException as error:  # noqa: BLE001 -- told to every future that is left
            # No other code would end the remaining futures.
            self._awake()
            _log.critical("the scheduler of a pool failed", exc_info=True)
            cause = refusals.explain(error)
            told = repr(error) if cause is error else text_of(cause)
            self._break(
                staff,
                PoolBrokenError(
                    f"internal error in the pool's scheduler: {told}. Report it with the log's "
                    "traceback"
                ),
                cause,
            )
        finally:
            self._staff = None
            # From the last to the first, each whatever another has raised: somebody waits for the
            # end.
            with ExitStack() as endings:
                endings.callback(self._records.teller.close)
                endings.callback(self._end)
                endings.callback(self._records.catch_up)
                endings.callback(self._callers.close)
                endings.callback(self._turns.close)
                endings.callback(staff.close)
                endings.callback(self._settling.hands.close)
                endings.callback(self._dispatch.close)

    def _look(self) -> tuple[int, int, int]:
        """Return how many calls wait, and how many workers run something and are there."""
        owed = [worker.ledger.owed for worker in self._staff or ()]
        waiting = len(self._dispatch.aside) + len(self._inbox)
        try:
            waiting += self._core.backlog.waiting()
        except RuntimeError:  # changed meanwhile
            pass
        running = sum(map(bool, owed))
        return waiting + sum(owed) - running, running, len(owed)

    def _step(self, staff: Staff) -> bool:
        """Process shared state; return whether there is more to do."""
        # Before the look at what was brought: nothing is brought after it.
        self._close(staff)
        self._take_in(staff)
        if self._core.force:
            return False
        unwanted, self._unwanted = self._unwanted, []
        ended_runs, self._ended_runs = self._ended_runs, []
        while self._dropped_runs:
            run = self._dropped_runs.popleft()
            run.drop()
            ended_runs.append(run)
        self._send_packed(staff)
        for run in ended_runs:
            self._forget(staff, run)
        for whose in unwanted:
            self._end_calls(staff, whose)
        core, size = self._core, self.size.now
        worked = self._turns.worked
        if worked:
            self._turns.worked = set()
        if worked or core.backlog or core.is_busy(size, staff.lost):
            self._look_around(staff, worked)
            size = self.size.now
        elif core.idle_ns is None and self._filled is None:
            # Nobody has or wants anything: after every lone task (benchmarks/dispatch.py,
            # round-trip).
            return not (self._closing and core.may_end(awaited=self._is_awaited))
        if core.idle_ns is not None or core.is_busy(size, staff.lost):
            self._tell(staff, e.Step(size, staff.lost))
        self._fill_up(staff)
        if core.backlog:
            told = not len(staff) or self._dispatch.telling.may_be_told()
            self._tell(staff, e.HandOut(told, *self._dispatch.kept()))
        return not (self._closing and core.may_end(awaited=self._is_awaited))

    def _look_around(self, staff: Staff, worked: set[int]) -> None:
        """Check the conditions outside of the pool that change while it works."""
        self._oom.look()
        self.size.follow(staff, worked, more=bool(self._core.backlog))
        if self._memory is not None:
            for exceeded in self._memory.look(staff):
                self._tell(staff, exceeded)
        if self._rights.have_changed() and len(staff):
            _log.info("the program's user or rights have changed: the pool replaces its workers")
            self._tell(staff, e.Strangers())

    @property
    def _is_awaited(self) -> bool:
        """Whether something is being pickled or unpickled, or may be when the pool is closed."""
        if not (self._dispatch.aside or self._settling.waits):
            return False
        return not (self._closing and self._rests)

    @property
    def _rests(self) -> bool:
        """Whether no pickling and unpickling goes on, and has not for long."""
        since = max(hands.rests_since() for hands in self._hands)
        return time.monotonic() - since >= _REST_S

    def _take_in(self, staff: Staff) -> None:
        """Process the tasks and events that callers have queued."""
        tasks: list[Task] = []
        while self._inbox:
            try:
                brought = self._inbox.popleft()
            except IndexError:  # emptied meanwhile
                break
            if isinstance(brought, Task):
                tasks.append(brought)
                continue
            if tasks:
                self._tell(staff, e.Queued(tasks))
                tasks = []
            if isinstance(brought, e.Fed):
                run: Any = brought.run
                self._tell(staff, brought)
                if run.fed and not run.unsettled:
                    self._ended_runs.append(run)
            else:
                brought.tell()
                self._unwanted.append(brought)
        if tasks:
            self._tell(staff, e.Queued(tasks))

    def _send_packed(self, staff: Staff) -> None:
        self._dispatch.unshare(staff)
        for event in self._dispatch.send_packed(staff.send):
            self._tell(staff, event)
        if self._settling.waits:
            self._settling.hands.come_back()
        if self._dispatch.waits:
            more = not len(staff) or any(worker.is_idle for worker in staff)
            self._tell(staff, e.Returned(self._dispatch.come_back(more=more)))

    def _close(self, staff: Staff) -> None:
        """Tell the core how callers want the pool to end; cancel what it does not have."""
        if not self._closing:
            return
        cancel = self._cancelling
        self._tell(staff, e.Close(cancel, self._asked))
        if cancel:
            self._take_in(staff)
            for entry in self._dispatch.take_aside():
                _cancel(entry)

    def _listen(self, staff: Staff, timeout_s: float | None) -> None:
        self._bed = [True]
        if self._inbox or self._ended_runs or self._unwanted:
            timeout_s = 0.0
        elif self._turns.wanted and timeout_s != 0.0:
            timeout_s = self._lend(staff, timeout_s)
        for worker, news in staff.listen(timeout_s, self._turns.hear, self._awake):
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
            try:
                self._receive(staff, worker, news)
            except (CorruptFrameError, ValueError) as error:
                staff.distrust(worker, error)

    def _lend(self, staff: Staff, timeout_s: float | None) -> float | None:
        """Let callers use idle workers while this thread sleeps; return for how long at most."""
        if self._closing or self._dispatch.waits or self._settling.waits:
            return timeout_s  # none is to come before those
        if not self._turns.park(staff, self._core.lend):
            return timeout_s
        return TICK_S if timeout_s is None else min(timeout_s, TICK_S)

    def _awake(self) -> Sequence[Worker]:
        """Be awake; return the workers whose calls were sent by callers, and are to be heard."""
        self._bed = []
        staff = self._staff
        if staff is None or not self._turns.lanes:
            return ()
        return self._turns.awake(staff, partial(self._tell, staff))

    def _patience(self) -> float | None:
        """Return how long to listen at most; a pool without work only sleeps."""
        core, packs, reads = self._core, self._dispatch.waits, self._settling.waits
        waits, owes = bool(core.backlog), core.owes
        if not (waits or owes or packs or reads or core.idle_ns is not None):
            return None  # as after every lone task
        now, look_ns = time.monotonic(), core.next_look(time.monotonic_ns())
        looks = [None if look_ns is None else look_ns / 1e9]
        if packs:
            looks.append(self._dispatch.next_look())
        if reads:
            looks.append(self._settling.hands.next_pump())
        if self._closing and (packs or reads):
            looks.append(now + _REST_S / 10)
        if waits or owes:
            looks += [self.size.next_look, self._oom.next_look]
            if self._memory is not None:
                looks.append(self._memory.next_look(self.workers()))
        times = [look for look in looks if look is not None]
        return max(0.0, min(times) - now) if times else None

    # Events for the core, and its actions.

    def _tell(self, staff: Staff, event: e.Event) -> None:
        """Deliver an event to the core, execute its actions, and deliver further events."""
        handle = self._handle
        todo = handle(event, time.monotonic_ns())
        todo.reverse()
        while todo:
            action = todo.pop()
            answer = self._do[type(action)](self, staff, action)
            if answer is not None:
                todo += reversed(handle(answer, time.monotonic_ns()))

    def _send(self, staff: Staff, action: e.Send) -> e.Sent:
        worker: Worker = action.worker
        make_room()
        settings = self._dispatch.bring_settings(worker)
        if settings:
            staff.send(worker, settings)
        pieces, sent = self._dispatch.pack(worker, action.work)
        if pieces:
            staff.send(worker, pieces)  # race H: its end is at hand, and tells
        return sent

    def _look_at_boards(self, _: Staff, action: e.Look) -> e.Seen:
        boards = [(worker, worker.board) for worker in action.workers]
        return e.Seen(
            [(worker, board.claimed, board.since_ns) for worker, board in boards if board]
        )

    def _revoke(self, staff: Staff, action: e.Revoke) -> e.Revoked:
        worker: Worker = action.worker
        board = worker.board
        board.revoke(action.last)
        left: Sequence[e.Answered] = ()
        try:
            left = left_by(worker, board.peek())
        except ValueError as error:
            staff.distrust(worker, error)
        return e.Revoked(worker, board.claimed, board.began, left, action.then)

    def _settle(self, _: Staff, action: e.Settle) -> e.Outgrown | None:
        self._settle_calls(action)
        worker: Worker = action.worker
        outgrown = self._memory is not None and self._memory.has_outgrown(worker)
        return e.Outgrown(worker) if outgrown else None

    def _wait(self, _: Staff, action: e.Wait) -> None:
        for task in action.works:
            task.future.wait_again()

    def _cancel(self, _: Staff, action: e.Cancel) -> None:
        for entry in action.works:
            _cancel(entry)

    def _fail(self, _: Staff, action: e.Fail) -> None:
        error = self.broken
        assert error is not None
        for entry in action.works:
            _fail(entry, lambda: fresh(error))

    def _fill_up(self, staff: Staff) -> None:
        """Start the workers that are missing, if that was asked for."""
        filled = self._filled
        if filled is None:
            return
        self._tell(staff, e.Fill())
        starting = self._dispatch.waits and self._core.lacks_workers  # for the initializer
        if starting and not self._core.force:
            return
        self._filled = None
        filled.open()

    # New workers.

    def _hire(self, staff: Staff, action: e.Hire) -> e.Refused | None:
        staff.hurry(action.hurry)
        try:
            self._hiring.prepare()
            if self._dispatch.pack_initializer(self._hiring):
                self._hiring.take_packed()
                for _ in range(action.workers):
                    self._hire_one(staff)
            elif self._closing and self._rests:
                self._break(staff, PoolBrokenError(_RESTED.format("the initializer")))
        except PoolBrokenError as error:
            self._break(staff, error, error.__cause__)
        except ScriptLostError:  # nothing was sent by name yet, and nothing will be
            self.wake()
        except Exception as error:  # noqa: BLE001 -- OSError, or RuntimeError at exit (race F)
            if not (self._asked or isinstance(error, InterruptedError)):  # it was given up
                if isinstance(error, ScriptFailedError):
                    return e.Refused(error.with_traceback(None), by_script=True)
                return e.Refused(refusals.explain(error))
        return None

    def _hire_one(self, staff: Staff) -> None:
        place = self._core.place_of_next()
        try:
            worker = staff.hire(place)
        except OSError:
            if not self._dispatch.hands.let_go():
                raise
            worker = staff.hire(place)  # a thread that had nothing to do has made room
        self._hiring.hired.open()
        if self._memory is not None:
            self._memory.meet(worker)
        self._tell(staff, e.Hired(worker, bool(worker.board)))
        try:
            staff.send(worker, [*self._listener.greeting, *encode(Kind.LOG, 0)])
            staff.send(worker, self._dispatch.initialize(worker, self._hiring.inheritance))
        except BaseException:  # no memory for the initializer; without it nothing may run there
            self._tell(staff, e.End("kill", worker))
            raise

    def _is_late(self) -> bool:
        """Tell whether the pool no longer needs the worker that is being started."""
        if self._asked or self._cancelling:
            return True
        # The hands ask as well, and only this thread looks into the queue.
        if not self._closing or threading.current_thread() is not self._thread:
            return False
        if (staff := self._staff) is not None:
            self._take_in(staff)
        return not (self._core.backlog.is_wanted() or self._dispatch.aside)

    # News from workers.

    def _receive(self, staff: Staff, worker: Worker, frame: Frame) -> None:
        """Process a message of a worker."""
        kind, position, segments = frame
        match kind:
            case Kind.RESULTS:
                self._tell(staff, answers_of(worker, b"".join(segments)))
            case Kind.VALUES:
                size_bytes = sum(map(len, segments))
                values = read_values(segments)
                self._tell(staff, values_of(worker, position, *values, size_bytes))
            case Kind.RESULT | Kind.EXCEPTION:
                answer = [(position, 1, None)], [(kind, segments)]
                self._tell(staff, e.Answered(worker, *answer))
            case Kind.READY:
                if not segments:
                    worker.drop_board()
                self._tell(staff, e.Ready(worker, bool(worker.board)))
            case Kind.TIMES:
                self._listener.timed(worker, segments)
            case Kind.INITIALIZER_FAILED:
                self._tell(staff, e.InitFailed(worker, rebuild(segments)))
            case Kind.SKIPPED:  # race J
                self._tell(staff, e.Skipped(worker, position))
            case Kind.UNREADABLE:
                self._tell(staff, e.Unreadable(worker, position))
            case _:
                raise CorruptFrameError(f"message {kind!r} was not requested")

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

    def _end_calls(self, staff: Staff, whose: PoolFuture | MapRun) -> None:
        """End the workers that run the task of a future that was cancelled, or calls of a map."""
        for worker in [*staff]:
            for work in worker.ledger:
                if (work.future if isinstance(work, Task) else work.run) is whose:
                    call = work if isinstance(work, Task) else work.run
                    self._tell(staff, e.Cancelled(worker, call))
                    break  # the ledger is another now

    def _ended(self, staff: Staff, worker: Worker, exitcode: int | None) -> None:
        """Process the end of a worker's process, and what the worker left behind."""
        self._close(staff)
        by_pool, board, left = worker.was_ours(exitcode), worker.board, []
        try:
            left = left_by(worker, board.left())
        except ValueError as error:
            worker.fault = worker.fault or error
        self._tell(
            staff,
            e.Died(
                worker,
                exitcode,
                by_pool=by_pool,
                lost=staff.lost,
                claimed=board.claimed,
                began=board.began,
                results=left,
                oom=self._oom.explain() if exitcode == _KILLED and not by_pool else None,
                fault=worker.fault,
                stack=worker.stack(exitcode),
            ),
        )

    def _bury(self, _: Staff, action: e.Bury) -> None:
        ending = action.ending
        for lost in ending.lost:
            error = None if lost.again is not None else ending.error_of(lost)
            level, text = ending.line_of(lost, error)
            _log.log(level, text)  # no argument, whose lines would become one: the stack has many
            if error is not None:
                work = lost.work
                self._dispatch.fail(
                    work.only(lost.place) if isinstance(work, Span) else work, error
                )
        level, text = ending.line
        _log.log(level, "%s", text)

    def _give_up(self, staff: Staff, action: e.GiveUp) -> None:
        reason, cause, ask = action
        if ask and (cause := refused_call() or self._hiring.script_error) is not None:
            reason += f": {cause}"
        self._break(staff, PoolBrokenError(reason), cause)

    def _break(
        self, staff: Staff, error: PoolBrokenError, cause: BaseException | None = None
    ) -> None:
        """Break the pool: every task fails, every worker ends."""
        error.__cause__ = cause
        self.broken = self.broken or error
        self._closing = True
        self._asked.append("terminate")
        self._take_in(staff)
        self._tell(staff, e.Break(str(error)))
        for entry in self._dispatch.take_aside():
            _fail(entry, lambda: fresh(error))

    def _stop_all(self, staff: Staff) -> None:
        while len(staff):
            self._close(staff)  # by force, perhaps, while the workers stop
            self._tell(staff, e.End(self._core.force))
            self._listen(staff, None)


def _fail(entry: Task | Span | MapRun, error: Callable[[], BaseException]) -> None:
    if isinstance(entry, MapRun):
        entry.stop(error)
    elif isinstance(entry, Span):
        entry.run.give_up(entry, error)
    else:
        fail(entry.future, error())


def _cancel(entry: Task | Span | MapRun) -> None:
    if isinstance(entry, Task):
        cancel(entry.future)
    else:
        _fail(entry, CancelledError)


_DO: dict[type[e.Action], Callable[[Loop, Staff, Any], e.Event | None]] = {
    e.Send: Loop._send,
    e.Hire: Loop._hire,
    e.Look: Loop._look_at_boards,
    e.Revoke: Loop._revoke,
    e.Settle: Loop._settle,
    e.Wait: Loop._wait,
    e.Cancel: Loop._cancel,
    e.Fail: Loop._fail,
    e.Bury: Loop._bury,
    e.Stop: lambda _, staff, do: staff.stop(do.worker),
    e.Condemn: lambda _, staff, do: staff.condemn(do.worker, stack=do.stack),
    e.EndNow: lambda _, staff, do: staff.end(do.worker, do.force),
    e.Distrust: lambda _, staff, do: staff.distrust(do.worker, do.error),
    e.PutOff: lambda _, __, do: _log.warning(
        "cannot start another worker: %s. The pool tries again, with the workers that it has",
        text_of(do.why),
    ),
    e.GiveUp: Loop._give_up,
}
