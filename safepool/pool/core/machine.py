"""The pool's decisions: an event comes in, actions come out (``events`` has the tables).

    decision                                     made by
    distribution of waiting calls                `HandOut`, and each `Sent`
    workers that callers may send calls          `Core.lend`, then `Turned`
    calls that an answer ends                    `Answered`
    calls to take back, and the workers          `Step`, `Seen`, `Revoked`
    timeouts and cancelled running calls         `Seen`, `Cancelled`, then `Revoked`
    workers to end for their memory              `Exceeded`, then `Revoked`
    calls of a dead worker                       `Died`: answers, calls for others, lost calls
    workers to start, and when (``starts``)      `HandOut`, `Fill`, `Refused`
    place of a worker                            `place_of_next`, before it is started
    workers to let go                            `Step`
    end of a pool that cannot work               `Died`, `Refused`
    end of a closed pool                         `Close`, then `may_end`

The caller executes actions in the order of return, and delivers the events that answer an action
before it executes the next. Letters name the scheduler's races.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

from safepool.errors import MemoryExceeded, TaskTimeoutError, text_of
from safepool.pool.core import events as e
from safepool.pool.core import reclaim
from safepool.pool.core.backlog import Backlog
from safepool.pool.core.ending import Ending, Lost, Stage
from safepool.pool.core.pace import Pace
from safepool.pool.core.starts import Starts
from safepool.pool.core.work import Call, Given, Span
from safepool.pool.core.worker import Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.core.work import Run
    from safepool.pool.core.worker import Member

MOST_LENT = 16
"""So many calls of a map a caller may send to workers itself."""
# Sixths of a task may add up to a little less than one.
_ROUNDING = 1e-6
# Nobody is lent so long after calls were sent several at a time: to send them ahead costs less for
# each (benchmarks/latency.py).
_PRESSED_NS = 5_000_000
_NOTHING = e.Then()
# Wishes for the end of a pool: the sharpest holds.
_SHARPER: tuple[e.Force, ...] = ("", "ask", "terminate", "kill")


class Core:
    """Knowledge and decisions of one pool.

    Args:
        size: The most workers at the same time.
        tasks_per_worker: Number of tasks after which a worker is replaced; ``None`` is no limit.
        break_on_death: Whether one dead worker breaks the pool as a whole, as in the standard
            pool.

    Attributes:
        force: The way to end the workers without waiting for their calls, once callers want that.
        idle_ns: Time after which an idle worker ends; ``None`` is never.
    """

    def __init__(
        self, size: int, tasks_per_worker: int | None = None, *, break_on_death: bool = False
    ) -> None:
        self.members: tuple[Member, ...] = ()
        self.backlog: Backlog = Backlog()
        self.pace: Pace = Pace()
        self.idle_ns: int | None = None
        self._starts = Starts(size, break_on_death=break_on_death)
        self._tasks_per_worker = tasks_per_worker
        self.force: e.Force = ""
        self._closing = self._cancelling = self._broken = False
        # Calls whose worker is to be ended as soon as it is sure that this meets them.
        self._unwanted: list[tuple[Member, Call | Run]] = []
        # Workers that may have room, idle ones first.
        self._hungry: deque[Member] = deque()
        # How many of them are kept from what came at this place or later.
        self._kept = self._before = 0
        # Number of workers that share the waiting work.
        self._among = 1
        # When calls were last sent several at a time, or waited.
        self._pressed_ns = 0
        self._actions: list[e.Action] = []
        self._now_ns = 0

    def handle(self, event: e.Event, now_ns: int) -> list[e.Action]:
        """Process an event, and return the actions."""
        self._now_ns = now_ns
        _HANDLERS[type(event)](self, event)
        actions = self._actions
        if actions:
            self._actions = []
        return actions

    @property
    def owes(self) -> bool:
        """Whether a worker owes a call."""
        # No generator here, nor below: after every lone call (benchmarks/dispatch.py, round-trip).
        for member in self.members:  # noqa: SIM110
            if member.ledger.owed:
                return True
        return False

    def is_busy(self, size: int, lost: int) -> bool:
        """Tell whether a `Step` is due: a call is owed, a worker is to go, or a number changed."""
        members, starts = self.members, self._starts
        if size != starts.size or lost != starts.lost or len(members) > size:
            return True
        for member in members:
            if (
                member.ledger.owed
                or member.claimed < member.awaited
                or member.phase is Phase.RETIRING
            ):
                return True
        return False

    def may_end(self, *, awaited: bool) -> bool:
        """Return whether a closed pool is done; ``awaited``: further work is being pickled."""
        if self.force:
            return True
        return self._closing and not (self.backlog or awaited or self.owes)

    @property
    def lacks_workers(self) -> bool:
        """Whether the pool may have more workers than it has."""
        return self._starts.missing(self.members) > 0

    def next_look(self, now_ns: int) -> int | None:
        """Return when a `Step` is due at the latest; ``None`` if only an event brings one."""
        members, looks = self.members, list[int]()
        if self.idle_ns is not None:
            idle_since = [one.idle_since_ns for one in members if one.idle_since_ns is not None]
            looks += [since + self.idle_ns for since in idle_since]
        if self.backlog:
            looks += self._starts.next_looks(members, now_ns)
        if self.owes:
            looks += reclaim.next_looks(members, now_ns)
            for member in members:
                if (due_ns := self._due_ns(member)) is not None:
                    looks.append(due_ns)
        return min(looks) if looks else None

    def lend(self, now_ns: int) -> list[Member]:
        """Return the workers that callers may send a call themselves, until the next event.

        The result is empty while earlier calls wait, or calls arrive several at a time.
        """
        if (
            self.backlog
            or self._cancelling
            or self._broken
            or self._tasks_per_worker is not None
            or len(self.members) > self._starts.size
            or now_ns - self._pressed_ns < _PRESSED_NS
        ):
            return []
        return [
            one
            for one in self.members
            if one.phase is Phase.READY and one.is_idle and one.has_board and not one.unsent
        ]

    # New workers, and the work that waits for them.

    def _hired(self, event: e.Hired) -> None:
        event.worker.has_board = event.has_board
        self.members = (*self.members, event.worker)
        self._starts.was_started()

    def place_of_next(self) -> int:
        """Return the place of a worker that is started now."""
        return self._starts.place_of_next(self.members)

    def _fill(self, _: e.Fill) -> None:
        self._actions += self._starts.for_all_places(self.members, self._now_ns)

    def _refused(self, event: e.Refused) -> None:
        alone = not self.members
        self._actions.append(self._starts.refused(event, self._now_ns, alone=alone))

    def _ready(self, event: e.Ready) -> None:
        member = event.worker
        member.ready = True
        member.has_board = event.has_board
        self._move(member, Phase.READY)

    def _init_failed(self, event: e.InitFailed) -> None:
        event.worker.failure = event.error
        self._move(event.worker, Phase.FAILED)
        self._actions.append(e.Stop(event.worker))

    def _queued(self, event: e.Queued) -> None:
        for call in event.calls:
            self.backlog.add(call)
        self._drop_waiting()

    def _fed(self, event: e.Fed) -> None:
        if len(event.items) > MOST_LENT:
            self._pressed_ns = self._now_ns
        self.backlog.add_items(event.run, event.items, last=event.last)
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        if (self._broken or self._cancelling) and self.backlog:
            waiting = self.backlog.clear()
            self._actions.append(e.Fail(waiting) if self._broken else e.Cancel(waiting))

    def _queue_again(self, works: Sequence[Given]) -> None:
        """Let work wait again that no worker has begun, or that is run again."""
        if not works:
            return
        calls = [work for work in works if isinstance(work, Call)]
        if calls:
            self._actions.append(e.Wait(calls))
        self.backlog.put_back(works)
        self._drop_waiting()

    def _returned(self, event: e.Returned) -> None:
        self._queue_again(event.works)

    # Work to workers.

    def _hand_out(self, event: e.HandOut) -> None:
        if not (self.backlog and event.told):
            return
        size, staying = self._starts.size, [one for one in self.members if not one.leaving]
        self._among = min(size, len(staying))
        hungry = [
            one
            for one in staying
            if one.phase is Phase.READY and not (one.silent or one.may_pass_over)
        ]
        if len(staying) > size:  # it has become smaller: some that are to go are busy
            busy = [one for one in hungry if one.ledger.owed]
            idle = [one for one in hungry if not one.ledger.owed]
            room = size - sum(one.ledger.owed > 0 for one in staying)
            hungry = [*idle[: max(0, room)], *busy]
        # Idle workers first, so that none waits while others are sent more ahead.
        hungry.sort(key=lambda one: (one.ledger.owed > 0, one.ledger.expected_ns))
        self._hungry = deque(hungry[:size])
        self._kept, self._before = event.kept, event.before
        self._offer()

    def _offer(self) -> None:
        """Give the next worker the work that it has room for, or hire if work is left."""
        hungry, backlog = self._hungry, self.backlog
        # One message each, and again: the first is not to get all there is.
        while hungry and backlog:
            if self._kept and backlog.first >= self._before:
                free = sum(not one.ledger.owed for one in hungry)
                for _ in range(self._kept if free > self._kept else len(hungry)):
                    hungry.popleft()
                self._kept = 0
                continue
            member = hungry.popleft()
            # A large call that was taken back no longer occupies the worker.
            member.exclusive = member.exclusive and member.ledger.owed > 0
            if member.phase is Phase.READY and member.takes_more:
                work = self._take_for(member)
                if work:
                    self._actions.append(e.Send(member, work))
                    return  # `Sent` goes on
        hungry.clear()
        if backlog:
            self._pressed_ns = self._now_ns
            self._actions += self._starts.for_waiting(self.members, backlog, self._now_ns)

    def _take_for(self, member: Member) -> Span | list[Any]:
        ledger, pace = member.ledger, self.pace

        def room(name: str, more_ns: int) -> int:
            idle = not (ledger.owed or more_ns)
            if not member.has_board:
                return int(idle)
            return pace.room(name, ledger.expected_ns + more_ns, idle=idle)

        left = self._tasks_left(member)
        before = self._before if self._kept else sys.maxsize
        return self.backlog.take(room, pace.expected_ns, self._among, left, before)

    def _tasks_left(self, member: Member) -> int:
        """Return how many more tasks a worker may be sent before it is replaced."""
        if self._tasks_per_worker is None:
            return sys.maxsize
        owed: float = sum(work.tasks_in(work.count - work.done) for work in member.ledger)
        left = self._tasks_per_worker - member.tasks_done - owed
        return math.ceil(left - _ROUNDING)

    def _sent(self, event: e.Sent) -> None:
        member = event.worker
        for work in event.given:
            member.ledger.give(work)
        if event.given:
            member.sent_ns = self._now_ns
            if member.ledger.owed > event.given[-1].count:
                self._pressed_ns = self._now_ns
            member.exclusive, member.unsent = event.exclusive, event.unsent
        if event.back:
            self._queue_again(event.back)
        if not self.backlog:
            self._hungry.clear()
            return
        if event.full:
            self._hungry.clear()
        elif not (event.back and member.ledger.owed):
            self._hungry.append(member)
        self._offer()

    def _turned(self, event: e.Turned) -> None:
        member, call = event.worker, event.call
        if event.answered:
            member.ledger.skip(event.answered)
            member.done += event.answered
            member.tasks_done += event.answered
            self._starts.was_of_use()
        if event.spent is not None:
            self.pace.note(*event.spent)
        member.idle_since_ns = None
        if call is not None:
            call.expected_ns = self.pace.expected_ns(call.name)
            self.backlog.number(call)
            member.ledger.give(call)
            member.sent_ns = self._now_ns

    def _copied(self, event: e.Copied) -> None:
        member = event.worker
        member.unsent = 0
        member.sent_ns = self._now_ns

    def _not_sent(self, event: e.NotSent) -> None:
        member = event.worker
        member.exclusive, member.unsent = False, 0
        member.ledger.take_back(event.position - 1)
        self._queue_again(event.again)

    # Answers.

    def _answered(self, event: e.Answered) -> None:
        member = event.worker
        if member.phase is Phase.CONDEMNED:  # race I
            return
        error = self._settle(event)
        if error is not None:
            self._actions.append(e.Distrust(member, error))
        if self._unwanted:
            self._end_unwanted(member)

    def _settle(self, event: e.Answered) -> ValueError | None:
        """Remove answered calls; return a description of a protocol error."""
        member, error = event.worker, None
        settled: list[tuple[Given, int, int, int]] = []
        spent: dict[str, tuple[float, int]] = {}
        try:
            self._cross_out(event, settled, spent)
        except ValueError as problem:
            error = problem
        for name, (microseconds, count) in spent.items():
            self.pace.note(name, microseconds * 1000, count)
        if settled:
            self._actions.append(e.Settle(member, settled, event.payload, event.plain))
            self._count(member, settled)
        return error

    def _cross_out(
        self,
        event: e.Answered,
        settled: list[tuple[Given, int, int, int]],
        spent: dict[str, tuple[float, int]],
    ) -> None:
        _, answers, _, plain, peeked = event
        ledger, at = event.worker.ledger, 0
        for position, count, microseconds in answers:
            # Of each answer: `at` is the place of its end in the payload.
            here, end, at = position, position + count, at + count
            while here < end:
                head = ledger.head
                due = 0 if head is None else head.position + head.done
                if here != due:
                    if here < due:  # read from the board before
                        here = due
                        continue
                    if peeked:
                        return  # an earlier message has not been read; that will bring these too
                elif plain and isinstance(head, Call):
                    raise ValueError(f"several answers for position {here}, which has one call")
                found = ledger.settle(here, end - here)
                if found is None:
                    return  # given up
                work, place, many = found
                settled.append((work, place, many, at - end + here))
                here += many
                if microseconds is not None:
                    took, calls = spent.get(work.name, (0.0, 0))
                    spent[work.name] = took + microseconds * many / count, calls + many

    def _count(self, member: Member, settled: list[tuple[Given, int, int, int]]) -> None:
        member.exclusive = False
        most = self._tasks_per_worker
        for work, _, calls, _ in settled:
            member.done += calls
            if most is not None:
                member.tasks_done += work.tasks_in(calls)
        member.claimed = max(member.claimed, member.next - 1)
        self._starts.was_of_use()
        if most is not None and member.tasks_done > most - _ROUNDING:
            self._move(member, Phase.RETIRING)
        if member.phase is Phase.RETIRING:
            self._stop_the_retired(member)

    def _outgrown(self, event: e.Outgrown) -> None:
        self._move(event.worker, Phase.RETIRING)
        self._stop_the_retired(event.worker)

    def _stop_the_retired(self, member: Member) -> None:
        if member.phase is Phase.RETIRING and not member.ledger.owed:
            self._stop(member)

    def _stop(self, member: Member) -> None:
        self._move(member, Phase.STOPPING)
        self._actions.append(e.Stop(member))

    def _skipped(self, event: e.Skipped) -> None:  # race J
        member, position = event.worker, event.position
        member.claimed = max(member.claimed, position)
        if member.awaited == position + 1:
            # Taken back from one further on; but it passes over the rest of a batch unseen.
            member.awaited = 0
        if member.phase is not Phase.CONDEMNED and member.next == position:
            # It alone, with the calls behind it in the same message: later messages are not
            # revoked, and may have begun.
            self._queue_again([member.ledger.withdraw()])
            self._end_unwanted(member)

    def _unreadable(self, event: e.Unreadable) -> None:
        """Send each call of a batch alone, to find the unreadable one."""
        member, position = event.worker, event.position
        if member.phase is Phase.CONDEMNED:
            return
        member.awaited = 0  # it will come to nothing more of this batch
        head = member.ledger.head
        if isinstance(head, Span) and head.position == position and not head.done:
            member.ledger.withdraw()  # not what is behind it: the worker goes on with that
            self._queue_again([head.only(place) for place in range(head.count)])
            self._end_unwanted(member)
        elif member.ledger.last < position:  # else it was taken back meanwhile
            self._actions.append(
                e.Distrust(
                    member, ValueError(f"answer for position {position}, which was not sent")
                )
            )

    # The check of all workers: surplus ones, slow ones, and calls that exceed their timeout.

    def _step(self, event: e.Step) -> None:
        members, size = self.members, event.size
        self._starts.size = size
        self._starts.note_lost(event.lost)
        if self.idle_ns is not None:
            self._let_the_idle_go(self.idle_ns)
        for member in members:
            too_many = member.index >= size
            if too_many:
                self._move(member, Phase.RETIRING)
            if member.phase is not Phase.RETIRING:
                continue
            if member.ledger.owed > 1 and not (too_many and member.is_bound):
                self._revoke(member)  # the rest follows in `Revoked`, and in `HandOut`
            elif member.is_idle:
                self._stop(member)
        looked_at = [*reclaim.to_look_at(members, nothing_waits=not self.backlog)]
        if looked_at:
            self._actions.append(e.Look(looked_at))
        else:
            self._look_after()

    def _let_the_idle_go(self, idle_ns: int) -> None:
        for member in self.members:
            if not member.is_idle:
                member.idle_since_ns = None
            elif member.idle_since_ns is None:
                member.idle_since_ns = self._now_ns
            elif self._now_ns - member.idle_since_ns >= idle_ns and not self.backlog:
                member.idle_since_ns = None
                self._stop(member)

    def _seen(self, event: e.Seen) -> None:
        for member, claimed, since_ns in event.boards:
            member.claimed, member.since_ns = max(member.claimed, claimed), since_ns
        self._look_after()

    def _look_after(self) -> None:
        for member in self.members:
            due_ns = self._due_ns(member)
            if due_ns is not None and due_ns <= self._now_ns:
                if member.overdue == member.next:
                    self._revoke(member, e.Then(overdue=member.next))
                # Else listened to once more: this program may have been stopped, and the result
                # be here in time.
                member.overdue = member.next
        for member in reclaim.slow_workers(
            self.members, self._now_ns, nothing_waits=not self.backlog
        ):
            self._revoke(member)

    def _due_ns(self, member: Member) -> int | None:
        """Return the time at which the running call exceeds its timeout; ``None`` without one."""
        head = member.ledger.head
        if head is None or head.policy.timeout_s is None or member.phase >= Phase.CONDEMNED:
            return None
        since_ns = member.sent_ns
        if member.has_board:
            since_ns = self._now_ns if member.claimed < member.next else member.since_ns
        return since_ns + int(head.policy.timeout_s * 1e9)

    # Answers to a request to give calls back.

    def _revoke(self, member: Member, then: e.Then = _NOTHING) -> None:
        """Take back the calls that a worker has not begun, then go on with ``then``."""
        if member.has_board:
            self._actions.append(e.Revoke(member, member.ledger.last, then))
        else:
            self._go_on(member, then)

    def _revoked(self, event: e.Revoked) -> None:
        member, claimed = event.worker, event.claimed
        for results in event.results:
            self._answered(results)
        member.claimed = max(member.claimed, claimed)
        if event.began < claimed:
            member.doubted = claimed  # race J
        back = member.ledger.take_back(claimed)
        if back and not 0 < member.unsent <= claimed + 1:
            member.awaited = claimed + 1  # it will come to it, and say so (race J)
        self._queue_again(back)
        self._go_on(member, event.then)
        # Perhaps no call that it was sent has begun; then no answer comes to bring its end.
        if member.is_idle:
            self._stop_the_retired(member)

    def _go_on(self, member: Member, then: e.Then) -> None:
        head: Given = member.ledger.head
        if then.overdue and member.next == then.overdue and member.can_be_at(then.overdue):
            # Otherwise it has ended meanwhile (race I), or its answer is on its way.
            why = TaskTimeoutError(member.pid, head.policy.timeout_s, head.name)
            self._condemn(member, why, stack=True)
        unwanted = then.cancelled
        if unwanted is not None:
            # All that is left of a span has begun, or ended.
            if _is_of(head, unwanted) and member.can_be_at(head.position + head.count - 1):
                cancelled = RuntimeError("the program cancelled the call")
                self._condemn(member, cancelled, stack=False)
            elif any(_is_of(work, unwanted) for work in member.ledger if work is not head):
                # The calls before it have ended, and their answers are on their way: only then the
                # signal is sure to meet this call.
                self._unwanted.append((member, unwanted))
        if then.exceeded is not None and member.is_in_a_call:
            self._condemn(member, then.exceeded, stack=True)

    def _condemn(
        self, member: Member, why: BaseException | MemoryExceeded, *, stack: bool
    ) -> None:
        if member.phase < Phase.CONDEMNED:
            member.condemned = why
            self._move(member, Phase.CONDEMNED)
            self._actions.append(e.Condemn(member, stack))

    def _exceeded(self, event: e.Exceeded) -> None:
        if event.worker.phase < Phase.CONDEMNED:
            self._revoke(event.worker, e.Then(exceeded=event.what))

    def _cancelled(self, event: e.Cancelled) -> None:
        self._revoke(event.worker, e.Then(cancelled=event.call))

    def _end_unwanted(self, member: Member) -> None:
        """Look again after calls that were to be ended behind those that are answered now."""
        if self._unwanted:
            found = [call for one, call in self._unwanted if one is member]
            self._unwanted = [entry for entry in self._unwanted if entry[0] is not member]
            for call in found:
                self._revoke(member, e.Then(cancelled=call))

    # Workers go.

    def _move(self, member: Member, phase: Phase) -> None:
        if phase >= Phase.DYING and not member.leaving:
            member.leaving_since_ns = self._now_ns
        member.phase = max(member.phase, phase)

    def _strangers(self, _: e.Strangers) -> None:
        for member in self.members:
            if member.phase is Phase.STARTING:
                self._stop(member)
            else:
                self._move(member, Phase.RETIRING)
                self._stop_the_retired(member)

    def _parted(self, event: e.Parted) -> None:
        self._move(event.worker, Phase.DYING)

    def _died(self, event: e.Died) -> None:
        """Find out what a worker leaves: answers, calls for others, and calls that are lost."""
        member, ledger = event.worker, event.worker.ledger
        self._starts.note_lost(event.lost, member.index)
        fault = event.fault
        if member.has_board and member.phase is not Phase.CONDEMNED:  # race I
            for results in event.results:
                fault = fault or self._settle(results)
        back, choked_on = self._have_back(event)
        lost = [(*ledger.strike(), True) for _ in range(ledger.owed)]
        # A large call was not kept: objects that it refers to may have changed since (race H).
        lost += [(work, 0, False) for work in back if not _can_wait_again(work)]
        self._queue_again([work for work in back if _can_wait_again(work)])
        # A worker that the kernel kills for its memory and one that the pool kills count the same.
        said = member.condemned
        exceeded, condemned = (said, None) if isinstance(said, MemoryExceeded) else (None, said)
        is_last = condemned is not None or bool(self.force)
        ending = Ending(
            pid=member.pid,
            exitcode=event.exitcode,
            by_pool=event.by_pool,
            oom=event.oom,
            stage=_stage_of(member, choked_on),
            reading="" if choked_on is None else choked_on.name,
            dismissed=member.dismissed,
            pool_ends=bool(self.force),
            condemned=condemned,
            exceeded=exceeded,
            fault=fault,
            stack=event.stack,
            lost=tuple(
                Lost(work, place, begun, None if is_last else _again(work, place))
                for work, place, begun in lost
            ),
        )
        failed_to_start = member.phase is Phase.FAILED
        self._move(member, Phase.ENDED)
        self.members = tuple(one for one in self.members if one is not member)
        self._unwanted = [entry for entry in self._unwanted if entry[0] is not member]
        self._actions.append(e.Bury(member, ending))
        self._queue_again([one.again for one in ending.lost if one.again is not None])
        if failed_to_start:
            why = "the initializer raised an exception in a worker"
            if (error := member.failure) is not None:
                why += f": {type(error).__name__}: {text_of(error)}"
            self._actions.append(e.GiveUp(why, error))
        self._actions += self._starts.after(ending, self._now_ns)

    def _have_back(self, event: e.Died) -> tuple[list[Given], Span | None]:
        """Take the calls that an ended worker had not begun.

        Returns:
            The calls that it had not begun, and the calls whose arguments it read when it ended,
            which fail at once.
        """
        member, ledger = event.worker, event.worker.ledger
        if not member.has_board:
            # The worker answers each call before it begins the next; it may have begun this one.
            return ledger.take_back(member.next), None
        if member.condemned is not None:  # race I
            return ledger.take_back(event.claimed), None  # begun, also if it was still reading
        back = ledger.take_back(event.began)
        if back and back[0].position == event.claimed and isinstance(back[0], Span):
            # It died of what it read for several calls: which one's is found out by sending
            # each alone.
            alone = [back[0].only(place) for place in range(back[0].count)]
            return [*alone, *back[1:]], back[0]
        return back, None

    # The pool ends.

    def _close(self, event: e.Close) -> None:
        waits, self.force = not self.force, _sharpest(self.force, *event.forces)
        self._closing, self.backlog.holds = True, False
        self._cancelling = self._cancelling or event.cancel
        if waits and self.force:
            for member in self.members:
                self._revoke(member)
        self._drop_waiting()

    def _break(self, _: e.Break) -> None:
        self._broken = self._closing = True
        self.force, self.backlog.holds = _sharpest(self.force, "terminate"), False
        failed = self.backlog.clear()
        for member in self.members:
            while member.ledger.owed:
                work, place = member.ledger.strike()
                failed.append(work.only(place) if isinstance(work, Span) else work)
        self._actions.append(e.Fail(failed))

    def _end(self, event: e.End) -> None:
        for member in self.members if event.worker is None else (event.worker,):
            if event.force:
                self._move(member, Phase.STOPPING)
                self._actions.append(e.EndNow(member, event.force))
            elif member.phase < Phase.STOPPING:
                self._stop(member)


def _sharpest(*forces: e.Force) -> e.Force:
    return max(forces, key=_SHARPER.index)


def _stage_of(member: Member, choked_on: Span | None) -> Stage:
    if choked_on is not None:
        return Stage.READING
    if member.done:
        return Stage.USED
    return Stage.READY if member.ready else Stage.STARTING


def _is_of(work: Given, unwanted: Call | Run) -> bool:
    return work is unwanted or (isinstance(work, Span) and work.run is unwanted)


def _can_wait_again(work: Given) -> bool:
    return isinstance(work, Span) or work.pickled is not None


def _again(work: Given, place: int) -> Given | None:
    """Return a lost call in the form to queue again, if it may run again."""
    retries = work.policy.retries or 0
    again = work.only(place) if isinstance(work, Span) else work
    if again.attempts >= retries or (again is work and work.pickled is None):
        return None
    again.attempts += 1
    return again


_HANDLERS: dict[type[e.Event], Callable[[Core, Any], None]] = {
    e.Hired: Core._hired,
    e.Refused: Core._refused,
    e.Ready: Core._ready,
    e.InitFailed: Core._init_failed,
    e.Queued: Core._queued,
    e.Fed: Core._fed,
    e.Answered: Core._answered,
    e.Revoked: Core._revoked,
    e.Seen: Core._seen,
    e.Skipped: Core._skipped,
    e.Unreadable: Core._unreadable,
    e.Sent: Core._sent,
    e.Turned: Core._turned,
    e.Copied: Core._copied,
    e.NotSent: Core._not_sent,
    e.Returned: Core._returned,
    e.Cancelled: Core._cancelled,
    e.Outgrown: Core._outgrown,
    e.Exceeded: Core._exceeded,
    e.Strangers: Core._strangers,
    e.Parted: Core._parted,
    e.Died: Core._died,
    e.Step: Core._step,
    e.HandOut: Core._hand_out,
    e.Fill: Core._fill,
    e.Close: Core._close,
    e.Break: Core._break,
    e.End: Core._end,
}
