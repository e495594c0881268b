"""The shortest way for one call, or a few: the caller sends the calls and reads the answer.

While the scheduler's thread sleeps, each idle worker has a *lane*, and each lane has a *turn*: one
call that any thread may make. A caller holds no lock and changes nothing of the scheduler's. The
caller leaves notes in the turn, and the scheduler's thread copies them into its records when it
wakes up: after :data:`TICK_S` at the latest. From then on the call is like any other. The calls of
a short map travel together; if several workers are idle, the calls are divided among them.

    caller's thread                              scheduler's thread
    call(),    pop `free`, send, note that       park()   make lanes, listen no more to their
                                                          workers, sleep for a tick
    share()
    collect()  poll the channel,                 awake()  close the last turn of each lane: pop
               pop `reader`, read, note that              `free`, or the call is the ledger's;
               end the future                             pop `reader`, or what was read goes to
               make the next turn                         the frame reader

Each note is written in one step of the interpreter together with the recorded action:
``list.extend`` over ``map(operator.call, ...)`` calls functions written in C one after the other
and stores their results. No signal handler runs in between, with or without a GIL. Hence an
interrupted thread leaves nothing, or a complete note. Only before Python 3.12 the collector may
run there, and may call code that waits: if that takes long, the pool ends the worker before any
decision (`_close`).

    What is decided                              by
    who has the turn: a caller or the scheduler  ``free.pop()``
    who reads the answer                         ``reader.pop()``
    whether another turn follows                 ``marks.setdefault("next", ...)``
    whether the call was sent                    ``marks.setdefault("sent", ...)``

A caller wakes the scheduler if it uses the future in another way than by ``result()`` in one
thread (``tasks.PoolFuture``), or if it finds anything but a plain answer. After a few such calls,
or the first one of an event loop, the lanes are *watched*: the scheduler listens to them, ends the
calls whose plain answers arrive, and makes the next turns, without taking the lanes back. After a
few calls whose callers wait by ``result()`` the lanes are theirs again.

Not covered, because the scheduler sends these calls:
    * Calls with a timeout, and calls of a pool with a trace, or with replacement of workers after
      some tasks or by their memory.
    * Calls whose worker needs another message first, or whose pickling runs code of the program.
      After a few of them in a row, no lanes are made for a while.
    * Maps of many items, with a chunk size or unordered, and maps that need more workers than are
      idle.
    * Calls on systems without eventfd(2), poll(2) or a board (all but Linux).
"""

from __future__ import annotations

import operator
import os
import select
import sys
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from safepool.errors import let_handlers_pass
from safepool.pool.calls.tasks import Task, finish
from safepool.pool.core.events import Turned
from safepool.pool.core.machine import MOST_LENT
from safepool.transport import trusted
from safepool.transport.channel import NO_SIGPIPE
from safepool.transport.growing import OBJECTS
from safepool.workers.messages import batch_frame, call_frame, read_answer, read_answers
from safepool.workers.tree import KILL

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from safepool.pool.calls.mapping import Item, MapRun
    from safepool.pool.core.pace import Pace
    from safepool.pool.core.work import Span
    from safepool.pool.shell.settling import Settling
    from safepool.pool.shell.size import Size
    from safepool.pool.shell.staff import Staff
    from safepool.pool.shell.worker import Worker

TICK_S = 0.05
"""So long a call may be unknown to the scheduler's thread, in seconds."""
# Lanes are made for so long after the last call that could use one. An idle pool sleeps.
_WARM_S = 1.0
# The scheduler listens for that time after it had to take over so many calls in a row, because
# callers waited for their futures in another way.
_MOST_MISSED = 3
# More callers at a time are better off if their calls are sent ahead; and each lane costs the
# scheduler's thread two system calls whenever it wakes up.
_MOST_LANES = 4
# Calls of a map. If all calls together take less time, one worker gets all of them. A worker is
# sent several calls only if they are known to take no longer than that: each answer waits for the
# last.
_LITTLE_NS, _MOST_NS = 100_000, 500_000
# After so many calls in a row that could not be sent from a lane, none is made: it costs the
# scheduler's thread 30 us. After so many more the next is tried.
_MOST_UNFIT, _TRIED_AGAIN = 8, 64
# A larger pickle may not go at once.
_MOST_BYTES = 32 * 1024
_READ_BYTES = 64 * 1024
# Pickles that were read here since the scheduler has last looked at the memory that is left; and
# how large one is to count. The same as in `settling`.
_ARRIVED_BYTES, _COUNTED_BYTES = 128 * 1024, 128
# The number of a descriptor may be another's by now if its pool has ended: look again.
_LOOK_MS = 250
# For another thread that is in the middle of a system call that does not wait.
_MOMENT_S, _MOMENT_LOOKS = 1.0, 2000
# Bells that interrupts may cost a pool.
_MOST_LOST = 64

# Functions written in C, which are called one after the other in one step.
_Steps: TypeAlias = "tuple[Callable[[], object], ...]"
_call: Callable[[Callable[[], object]], object] = operator.call
_poll: Any = getattr(select, "poll", None)
_POLLIN: int = getattr(select, "POLLIN", 0)


class _Lane:
    """One worker that any thread may send calls, until the scheduler wakes up.

    Attributes:
        watched: Whether the scheduler listens to the worker, and its thread alone reads the
            answers.
        first: Position of the first turn.
        turn: The last turn; an earlier one if a caller was interrupted.
    """

    __slots__ = ("fileno", "first", "read", "send", "spent", "turn", "turns", "watched", "worker")

    def __init__(self, turns: Turns, worker: Worker, *, watched: bool = False) -> None:
        self.turns: Turns = turns
        self.worker: Worker = worker
        self.watched: bool = watched
        self.fileno: int
        self.send: Callable[..., int]
        self.fileno, self.send, recv = worker.channel.ends()
        self.read: Callable[[], bytes] = partial(recv, _READ_BYTES)
        self.first: int = worker.ledger.last + 1
        self.spent: tuple[str, int] | None = None
        self.turn: Turn = Turn(self, self.first)

    @property
    def done(self) -> int:
        """Number of calls that were ended here."""
        return self.turn.position - self.first

    @property
    def work(self) -> Task | Span | None:
        """Work that is under way, if any."""
        turn = self.turn
        return turn.work if turn.record else None


class Turn:
    """One call in a lane, or several calls of a map that travel together.

    Attributes:
        position: Position of the first call, for the worker and its ledger.
        work: The calls; valid if they were sent.
        free: List with one entry. The thread that pops it has the turn.
        record: Record that ``free`` gave, and the number of bytes that were sent.
        reader: List with one entry. The thread that pops it reads the answer.
        answer: Answer that ``reader`` gave, and the bytes that were read.
        seat: List with one entry. The thread that pops it may wait for the answer.
        bells: The descriptor that wakes the waiting thread.
        marks: Decisions, by name.
    """

    __slots__ = (
        "answer",
        "bells",
        "frame",
        "free",
        "lane",
        "marks",
        "position",
        "reader",
        "record",
        "seat",
        "work",
    )

    def __init__(self, lane: _Lane, position: int) -> None:
        self.lane: _Lane = lane
        self.position: int = position
        self.work: Task | Span | None = None
        self.frame: bytes = b""
        self.free: list[bool] = [True]
        self.reader: list[bool] = [True]
        self.seat: list[bool] = [True]
        self.record: list[Any] = []
        self.answer: list[Any] = []
        self.bells: list[int] = []
        self.marks: dict[str, object] = {}

    # For its caller's thread.

    def send(self, work: Task | Span, frame: bytes) -> bool:
        """Send the calls; ``False`` if another thread has the turn, or the worker is gone."""
        self.work = work
        self.frame = frame
        work.position = self.position
        steps: _Steps = (self.free.pop, partial(self.lane.send, frame, NO_SIGPIPE))
        try:
            self.record.extend(map(_call, steps))
        except (IndexError, OSError) as error:
            if self.record == [True]:
                self.marks["sent"] = False
            let_handlers_pass(error)
        return len(self.record) == 2 and self.marks.setdefault("sent", True) is True

    @property
    def is_over(self) -> bool:
        """Whether the calls were ended here, or are the scheduler's."""
        return "next" in self.marks

    def ask(self) -> None:
        """Give the calls to the scheduler: a thread asks in another way than `collect`."""
        if not (self.lane.watched or "asked" in self.marks):
            self.lane.turns.wake()
            self.marks["asked"] = True

    def collect(self, timeout_s: float | None) -> None:
        """Wait for the answer, and end the calls by it.

        The method may also return because the scheduler takes over, or because the time is over.
        """
        turns = self.lane.turns
        if self.lane.watched:
            self.marks["collects"] = True
            return
        if turns.pid != os.getpid() or (timeout_s is not None and timeout_s < 2 * TICK_S):
            return
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not (self.seat and turns.bells):
            return
        try:
            self.seat.pop()
            bell = turns.bells.pop()
        except IndexError as error:  # taken meanwhile
            let_handlers_pass(error)
            return
        try:
            # First this, then the look: the scheduler pops the reader, then it rings.
            self.bells.append(bell)
            work = self.work
            assert work is not None
            # Made while the worker is at work: afterwards the caller would wait for it.
            after = Turn(self.lane, self.position + work.count)
            if self._await(bell, deadline):
                self._end(work, after)
        finally:
            turns.bells.append(bell)

    def _await(self, bell: int, deadline: float | None) -> bool:
        """Wait, and read the answer; ``False`` if another thread does, or the time is over."""
        poll = _poll()
        poll.register(self.lane.fileno, _POLLIN)
        poll.register(bell, _POLLIN)
        arrived = [(self.lane.fileno, _POLLIN)]
        while self.reader:
            left_ms = _LOOK_MS if deadline is None else (deadline - time.monotonic()) * 1000
            events = poll.poll(max(0, min(_LOOK_MS, left_ms)))
            if events == arrived:
                try:
                    steps: _Steps = (self.reader.pop, self.lane.read)
                    self.answer.extend(map(_call, steps))
                except (IndexError, OSError) as error:
                    if self.answer == [True]:
                        self.answer.append(b"")  # nothing was read
                        self.ask()
                    let_handlers_pass(error)
                    return False
                return True
            if (bell, _POLLIN) in events:
                if self.reader:  # otherwise another pool may use this bell by now
                    _silence(bell)  # the former owner's wake-up
            elif events:  # the worker is gone
                self.ask()
                return False
            elif left_ms <= 0:
                return False
        return False

    def _end(self, work: Task | Span, after: Turn) -> None:
        """End the calls by the answer, or leave that to the scheduler."""
        lane, data = self.lane, self.answer[1]
        read = self._read(work, data)
        if read is None:
            self.ask()
            return
        microseconds, values = read
        if isinstance(work, Task):
            if not work.future.end_alone(values[0]):
                self.ask()  # cancelled, or another thread waits for it as well
                return
        else:
            work.run.put(work.start, values, OBJECTS * len(data))
            work.run.tell()
        lane.spent = work.name, microseconds * 1000 // work.count
        # Unless the scheduler has closed this lane; then they are calls of the ledger's.
        if self.marks.setdefault("next", after) is after:
            if isinstance(work, Task):
                work.pickled = None
                work.future.forget_turn()
            lane.turn = after
            lane.turns.idle.append(after)

    def _read(self, work: Task | Span, data: bytes) -> tuple[int, list[Any]] | None:
        """Return microseconds and results of an answer; ``None`` leaves it to the scheduler.

        The scheduler reads again what cannot be read here: there it may run any code.
        """
        try:
            if work.count == 1:
                found = read_answer(data, self.position)
                read = found and (found[0], [trusted.loads_small(found[1])])
            else:
                read = read_answers(data, self.position, work.count, trusted.loads)
        except Exception as error:  # noqa: BLE001 -- as above
            let_handlers_pass(error)
            return None
        if len(data) >= _COUNTED_BYTES and self.lane.turns.is_full(len(data)):
            return None
        return read

    # The scheduler's thread.

    def hear(self) -> bool:
        """Read the answer in a watched lane, and end the calls by it.

        Returns:
            ``False`` if that needs more. What was read is left to the channel.
        """
        lane, work = self.lane, self.work
        if work is None or not self.record:
            return False
        try:
            data = lane.read()
        except OSError:
            return False
        read = self._read(work, data)
        # The caller's thread may still be in the call that has sent it.
        if read is None or self.marks.setdefault("sent", True) is not True:
            lane.worker.channel.feed(data)
            return False
        microseconds, values = read
        lane.spent = work.name, microseconds * 1000 // work.count
        # First the next turn: whoever waits for this one may submit again at once.
        lane.turn = after = self.marks["next"] = Turn(lane, self.position + work.count)
        lane.turns.heard(after, collects="collects" in self.marks)
        if isinstance(work, Task):
            work.pickled = None
            work.future.forget_turn()
            finish(work.future, values[0])
        else:
            work.run.put(work.start, values, OBJECTS * len(data))
            work.run.tell()
        return True

    def last(self) -> Turn:
        """Return the last turn of the lane, after which no other can follow any more."""
        turn: Any = self
        while (after := turn.marks.setdefault("next", None)) is not None:
            turn = after
        found: Turn = turn
        return found

    def is_mine(self) -> bool:
        """Take this turn; ``False`` if a caller has it."""
        try:
            self.free.pop()
        except IndexError:
            return False
        return True

    def is_decided(self) -> bool:
        """Return whether it is known if the call was sent; wait a moment for a sending thread."""
        return _soon(lambda: len(self.record) == 2 or "sent" in self.marks)

    def has_begun(self) -> bool:
        """Tell whether the worker has come to the call."""
        return self.lane.worker.board.claimed >= self.position

    def rest(self) -> bytes:
        """Return what could not be sent at once."""
        return self.frame[self.record[1] :] if len(self.record) == 2 else b""

    def take_answer(self) -> bytes | None:
        """Take over the reading; return the bytes that were read, ``None`` if that is unknown.

        The reader reads without waiting.
        """
        if self.lane.watched:
            return b""
        try:
            self.reader.pop()
        except IndexError:
            if not _soon(lambda: len(self.answer) == 2):
                return None
            data: bytes = self.answer[1]
            return data
        return b""

    def ring(self) -> None:
        """Wake the thread that waits for the answer."""
        for bell in self.bells:
            _ring(bell)


class Turns:
    """Lanes of one pool.

    Args:
        pack: Function that returns number and pickle of calls, if a worker needs nothing else for
            them.
        is_same_user: Function that returns whether the program still has the user for whom workers
            were started.
        settling: Object that counts the calls that ended here.
        pace: Expected times of calls.
        size: Size of the pool. A pool with more workers than that lends none.
        allowed: Whether the pool's options allow lanes.

    Attributes:
        idle: Turns that callers may take.
        bells: Descriptors of eventfd(2): one for each thread that waits.
        wanted: ``True`` if callers may use lanes.
        lanes: The turn of each open lane.
        worked: Ids of workers that callers have sent something since the scheduler last looked.
    """

    def __init__(
        self,
        pack: Callable[[Worker, Task | Span], tuple[int, bytes | memoryview] | None],
        queued: Collection[object],
        wake: Callable[[], None],
        is_same_user: Callable[[], bool],
        *,
        settling: Settling,
        pace: Pace,
        size: Size,
        allowed: bool,
    ) -> None:
        self.pid: int = os.getpid()
        self.wake = wake
        self.idle: deque[Turn] = deque()
        self.bells: deque[int] = deque()
        self.worked: set[int] = set()
        self._pack = pack
        self._settling = settling
        self._pace = pace
        self._size = size
        self._queued = queued
        self._is_same_user = is_same_user
        self._allowed = allowed and _HAS_BELLS and _poll is not None
        # Whether calls came that could have used a lane, and how large their results were.
        self.wanted: bool = False
        self._asked = False
        self._arrived_bytes = 0
        # Calls in a row that could not be sent from a lane, such as those with large arguments.
        self._unfit = 0
        # The scheduler's thread only.
        self.lanes: list[_Lane] = []
        self._made: list[int] = []
        self._until = self._watched_until = 0.0
        # Calls in a row whose answers were asked for otherwise.
        self._missed = 0
        # Whether lanes are watched, or are to be because an event loop asks; those lanes, by their
        # descriptor; and calls in a row that were ended there: above 0 those that nobody waited
        # for by `collect`, below 0 the others.
        self._watching = self._loops = False
        self._watched: dict[int, _Lane] = {}
        self._heard = 0

    # Any thread.

    def call(self, task: Task) -> bool:
        """Send a call to an idle worker; ``False`` if the call must be queued."""
        if not self.idle and self._asked and self.wanted:
            return False  # as of each of many that are submitted at once
        if task.pickled is not None or task.policy.timeout_s is not None or not self._may_send():
            return False
        if self._send(task) is None:
            return False
        task.call = None
        return True

    def share(self, run: MapRun, items: list[Item]) -> list[Item]:
        """Send the calls of a map to idle workers; return the items of those to be queued."""
        count = len(items)
        each_ns = self._pace.expected_ns(run.name) or _MOST_NS
        most = max(1, _MOST_NS // each_ns)
        if count > min(MOST_LENT, _MOST_LANES * most):
            return items
        if not (run.may_go_alone and self._may_send()):
            return items
        lanes = 1 if each_ns * count <= _LITTLE_NS else max(1, min(count, len(self.idle)))
        many = -(-count // lanes)
        if many > most:
            return items
        while items:
            span = run.draw(items[:many])
            turn = self._send(span)
            if turn is None:
                run.undraw(span)
                return items
            run.turns.append(turn)
            items = items[many:]
        run.fed = True
        return items

    def _may_send(self) -> bool:
        """Tell whether an idle worker may be sent something now; if not, whether soon."""
        if self._unfit >= _MOST_UNFIT:
            self._unfit += 1
            if self._unfit >= _MOST_UNFIT + _TRIED_AGAIN:
                self._unfit = _MOST_UNFIT - 1
            return False
        unheard = runs_a_loop() and not self._watching
        if unheard:  # nobody reads for it
            self._loops = True
        if unheard or not self.idle:
            if self._allowed:
                self._asked = self.wanted = True
            return False
        self._asked = True
        # With one worker calls begin in their order, from resize(1) on.
        lent = len(self.lanes)
        return not self._queued and (lent <= 1 or lent <= self._size.now)

    def _send(self, work: Task | Span) -> Turn | None:
        """Send calls to an idle worker; return the turn, ``None`` if they must be queued."""
        try:
            turn = self.idle.pop()
        except IndexError as error:
            let_handlers_pass(error)
            return None
        packed = self._pack(turn.lane.worker, work)
        if packed is None or len(packed[1]) > _MOST_BYTES or not self._is_same_user():
            self._unfit += 1
            return None
        self._unfit = 0
        if work.count == 1:
            frame = call_frame(turn.position, *packed)
        else:
            frame = _batch(turn.position, work, *packed)
        if isinstance(work, Task):
            work.future.begin_alone(turn)
        if not turn.send(work, frame):
            if isinstance(work, Task):
                work.future.forget_turn()
                work.future.wait_again()
            return None
        if turn.record[1] < len(frame):
            self.wake()
        return turn

    def is_full(self, size_bytes: int) -> bool:
        """Tell whether the scheduler is to look at the memory that is left for results."""
        self._arrived_bytes += size_bytes
        return self._arrived_bytes > _ARRIVED_BYTES

    # The scheduler's thread.

    def park(self, staff: Staff, lend: Callable[[int], Sequence[Any]]) -> bool:
        """Make lanes for some workers, if callers may use them; return whether it did."""
        now = time.monotonic()
        if self._asked:
            self._asked, self._until = False, now + _WARM_S
        if self._loops or max(self._missed, self._heard) >= _MOST_MISSED:
            self._watched_until, self._loops = now + _WARM_S, False
            self._missed = self._heard = 0
        self.wanted = self._unfit < _MOST_UNFIT and (self._asked or now < self._until)
        if not self.wanted:
            return False
        watched = self._watching = now < self._watched_until
        idle: list[Worker] = [one for one in lend(time.monotonic_ns()) if one.is_plain]
        del idle[_MOST_LANES:]
        if not (watched or self._make_bells(len(idle))):
            return False
        for worker in idle:
            worker.lane = lane = _Lane(self, worker, watched=watched)
            self.lanes.append(lane)
        if watched:
            self._watched = {lane.fileno: lane for lane in self.lanes}
        # The last is taken first: the worker that the scheduler would take, too.
        self.idle.extend(lane.turn for lane in reversed(self.lanes))
        if not watched:
            # After that: a system call lets another thread run, such as the caller of the call
            # that has just ended. Its next call finds a turn.
            for worker in idle:
                staff.look_away(worker)
        return bool(idle)

    def _make_bells(self, count: int) -> bool:
        try:
            while len(self.bells) < count and len(self._made) < count + _MOST_LOST:
                bell = _make_bell()
                self._made.append(bell)
                self.bells.append(bell)
        except OSError:
            return False  # no descriptor is left
        return True

    def hear(self, filenos: Sequence[int]) -> bool:
        """End the calls of watched lanes whose answers have arrived, if nothing else has.

        Args:
            filenos: Descriptors that have news.

        Returns:
            ``False`` if the scheduler is to be awake.
        """
        if not (self._watching and filenos):
            return False
        lanes = [*map(self._watched.get, filenos)]
        if None in lanes:
            return False
        heard = [lane.turn.hear() for lane in lanes if lane]  # each of them
        return all(heard) and self._watching

    def heard(self, after: Turn, *, collects: bool) -> None:
        """Let callers have the turn after one whose calls end now."""
        self.idle.append(after)
        self._heard = min(self._heard, 0) - 1 if collects else max(self._heard, 0) + 1
        if self._heard <= -_MOST_MISSED:
            self._watching, self._watched_until = False, 0.0

    def awake(self, staff: Staff, tell: Callable[[Turned], None]) -> Sequence[Worker]:
        """Take the lanes back: no caller sends anything from now on. Twice is once.

        Args:
            staff: The workers.
            tell: Called with the work of each lane.

        Returns:
            Workers with a call under way, which has become one of their ledger.
        """
        lanes, self.lanes, self._watched = self.lanes, [], {}
        self.idle.clear()
        arrived_bytes, self._arrived_bytes = self._arrived_bytes, 0
        self._settling.arrived(arrived_bytes)
        found = [(lane, self._close(staff, lane)) for lane in lanes]
        for lane, call in found:
            lane.worker.lane = None
            if lane.done or call is not None:
                tell(Turned(lane.worker, lane.done, lane.spent, call))
        return [lane.worker for lane, call in found if call is not None and not lane.watched]

    def _close(self, staff: Staff, lane: _Lane) -> Task | Span | None:
        """Take a lane back; return its calls in transit for the ledger."""
        worker = lane.worker
        turn = lane.turn = lane.turn.last()
        if not lane.watched:
            staff.look_again(worker)
        if lane.done:
            self._missed = 0
            self._was_used(worker)
        if turn.is_mine():
            return None
        self._was_used(worker)
        self._missed = self._missed + 1 if "asked" in turn.marks else 0
        if not turn.is_decided():
            # Other threads, or a finalizer, hold up the caller's thread in the middle of the step.
            # Prevent new calls first, then look at the calls that have begun.
            self._kill(staff, worker)
            turn.marks.setdefault("sent", turn.has_begun())
        if turn.marks.get("sent", True) is not True:
            if worker.deadline is None:
                staff.send_no_more(worker)
            return None
        work = turn.work
        assert work is not None
        read = turn.take_answer()
        if read is None:
            self._kill(staff, worker)
        else:
            worker.channel.feed(read)
        if isinstance(work, Task):
            work.future.forget_turn()
        turn.ring()
        if rest := turn.rest():
            staff.send(worker, [rest])
        return work

    def _kill(self, staff: Staff, worker: Worker) -> None:
        worker.end(KILL)
        worker.wait(_MOMENT_S)
        staff.send_no_more(worker)

    def _was_used(self, worker: Worker) -> None:
        self.worked.add(worker.pid)
        self._until = time.monotonic() + _WARM_S

    def descriptors(self) -> list[int]:
        """Return the descriptors that a forked worker must close. From any thread."""
        return [*self._made]

    def close(self) -> None:
        """Give back every descriptor. All waiting threads have been woken."""
        self._allowed = False
        self.bells.clear()
        made, self._made = self._made, []
        for bell in made:
            os.close(bell)


def runs_a_loop() -> bool:
    """Tell whether this thread runs an event loop of asyncio's."""
    events = sys.modules.get("asyncio.events")
    running = getattr(events, "_get_running_loop", None)
    return running is not None and running() is not None


def _batch(position: int, span: Any, number: int, pickled: bytes | memoryview) -> bytes:
    """Return the frame of several calls of the function with this number."""
    starred, apart = span.run.starred, span.apart
    batch = batch_frame(position, number, [pickled], starred=starred, timed=False, apart=apart)
    return b"".join(batch)


def _soon(is_true: Callable[[], bool]) -> bool:
    """Tell whether something is true within a moment."""
    # Looks are counted: the clock goes on while the program is stopped, and its threads do not.
    for _ in range(_MOMENT_LOOKS):
        if is_true():
            return True
        time.sleep(_MOMENT_S / _MOMENT_LOOKS)
    return is_true()


if sys.platform == "linux":
    # Some C libraries lack it.
    _HAS_BELLS = hasattr(os, "eventfd")

    def _make_bell() -> int:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def _ring(bell: int) -> None:
        try:
            os.eventfd_write(bell, 1)
        except OSError:  # it was rung often enough
            pass

    def _silence(bell: int) -> None:
        try:
            os.eventfd_read(bell)
        except OSError as error:  # by another thread
            let_handlers_pass(error)

else:  # not Linux
    _HAS_BELLS = False

    def _make_bell() -> int:
        raise NotImplementedError

    def _ring(_bell: int) -> None: ...

    def _silence(_bell: int) -> None: ...
