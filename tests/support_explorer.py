"""A pool without processes: the core between made-up callers, workers and a clock.

`World` does the core's actions at once, as the scheduler does, and notes how often each call was
started and how it ended. `support_orders` goes through every order of the steps that the others
may take. After each one it is checked what must hold, and in each last state that every call has
ended.

    step            who
    init            worker k tells that it is ready
    claim, look     it claims the next call that it was sent; sees whether that was taken back
    begin, end      it has read the arguments of a batch; the call ends
    flush           it sends what it has answered
    die             it is killed, at whatever point; `slain`: by the pool
    exceed          a look finds that it holds too much
    deliver         the pool reads the next message of worker k; `notice`: its end
    copied, failed  a large call for worker k is on its way, or could not be copied
    pickled         a call that was aside comes back; `passed`: what came after it waits no longer
    tick            time passes
    drop            a caller cancels a call, whatever it does
    submit          a caller queues a call that comes late; `turn`: it sends it itself to worker k
    collect         it reads the answer of worker k; the pool learns of these when it next awakes
    fill            all workers are to be started
    refuse, retry   the system refuses the next start; the time of another attempt has come
    spoil           the script raises an error when it is run for the next start
    resize, cancel, close, terminate   of the pool
"""

from __future__ import annotations

import hashlib
import marshal
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support_books import check_books
from support_orders import BadStateError, must

from safepool.errors import MemoryExceeded, TaskTimeoutError
from safepool.pool.core import events as e
from safepool.pool.core.backlog import kept_for
from safepool.pool.core.policy import Policy
from safepool.pool.core.work import Call, Span
from safepool.pool.core.worker import Member, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support_orders import Step

    from safepool.pool.core.machine import Core

MS = 1_000_000
_scenarios: dict[int, Scenario] = {}
# What the scheduler's thread sleeps through.
UNHEARD = {"init", "read", "claim", "look", "begin", "end", "flush", "die", "slain"}
UNHEARD |= {"turn", "collect"}


class Given(Call):
    """A call of its own, by its name."""

    __slots__ = ("dropped", "key")

    def __init__(self, key: str, policy: Policy) -> None:
        super().__init__("f", policy)
        self.key = key
        self.pickled = True
        self.dropped = False

    def is_wanted(self) -> bool:
        return not self.dropped


@dataclass
class FakeRun:
    """A map, as far as the core knows it."""

    keys: list[str]
    policy: Policy
    at_once: int | None = None
    name: str = "f"
    most_at_once: int = 1000
    number: int = 0
    waiting: list[str] = field(default_factory=list)
    stopped: bool = False
    dropped: bool = False
    queued: bool = False
    held: bool = False
    is_full: bool = False
    sent: int = 0

    def add(self, items: list[str], *, last: bool) -> None:
        del last
        self.waiting += items

    def cut(self, count: int) -> Span:
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.sent += len(taken)
        return Span(self, self.sent - len(taken), taken)


@dataclass(frozen=True)
class Scenario:
    """What there is at the beginning, and what may happen how often.

    Attributes:
        calls: Name --> its letters: l: large, so nothing follows it, and copied; h: hangs until it
            is killed; a: aside until it was pickled; p: its worker dies of reading it.
        maps: Names of the calls of each.
        unread: Two workers may take calls from each other without end, if neither comes to what
            was taken back from it. Where one has more of that before it, nothing more is tried.
        budget: How often each step of a caller, of the clock or of death may come.
        late: Calls that come when workers may be idle.
        together: Those are the calls of one map.
    """

    calls: dict[str, str] = field(default_factory=dict)
    maps: tuple[tuple[str, ...], ...] = ()
    poison: dict[str, str] = field(default_factory=dict)
    size: int = 2
    retries: int = 0
    timeout_s: float | None = None
    boards: bool = True
    known: bool = True
    at_once: int | None = None
    bound: bool = False
    tasks_per_worker: int | None = None
    break_on_death: bool = False
    unread: int | None = None
    budget: dict[str, int] = field(default_factory=dict)
    late: tuple[str, ...] = ()
    together: bool = False

    def __post_init__(self) -> None:
        _scenarios[id(self)] = self

    @property
    def is_queue(self) -> bool:
        """Whether calls begin in their order: there is never a second worker."""
        return self.size == 1 and "resize" not in self.budget

    def __reduce__(self) -> tuple[Callable[[int], Scenario], tuple[int]]:
        """Be the same one in each state."""
        return _scenario, (id(self),)


def _scenario(number: int) -> Scenario:
    return _scenarios[number]


class Worker(Member):
    """A worker with its board and its channel."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self.pid = pid
        self.alive, self.exitcode, self.by_pool, self.doomed = True, 0, False, False
        self.inbox: deque[tuple[str, list[int]]] = deque()
        self.outbox: deque[tuple[str, list[int]]] = deque()
        self.todo: list[int] = []
        self.is_batch = self.is_read = False
        self.state = "born"
        self.at = self.b_claimed = self.b_began = self.b_revoked = self.b_since = 0
        self.left: list[int] = []
        self.keys: dict[int, str] = {}
        self.condemned_for = ""
        # Of the calls that callers have sent it themselves: how many were answered, and the last.
        self.lent, self.answered = False, 0
        self.under_way: Given | Span | None = None

    @property
    def coming(self) -> list[int]:
        """The positions of what it has not claimed."""
        return [*self.todo, *(position for _, positions in self.inbox for position in positions)]


class World:
    """The core, and all around it."""

    at_will = ()

    def __init__(self, core: type[Core], scenario: Scenario) -> None:
        self.scenario = scenario
        self.core = core(
            scenario.size, scenario.tasks_per_worker, break_on_death=scenario.break_on_death
        )
        if scenario.known:
            self.core.pace.note("f", MS)
        self.now_ns = 10_000 * MS
        self.size = scenario.size
        self.budget = {**scenario.budget}
        self.workers: list[Worker] = []
        self.hired = 0
        self.closing = self.stopped = self.broken = False
        self.filling = False
        # Who refuses the next start, and how often the script has in a row.
        self.refusing = ""
        self.spoilt = 0
        self.letters = {**scenario.calls, **scenario.poison, **dict.fromkeys(scenario.late, "")}
        self.late = scenario.late
        policy = self.policy = Policy(timeout_s=scenario.timeout_s, retries=scenario.retries)
        self.aside: list[Given] = []
        self.outcomes: dict[str, str] = {}
        self.starts: dict[str, int] = {}
        self.dropped: set[str] = set()
        # Calls as they came, and those that later ones may begin before.
        self.order: list[str] = []
        self.behind: set[str] = set()
        self.passes = False
        self.calls = {key: Given(key, policy) for key in (*scenario.calls, *scenario.late)}
        self.runs: list[FakeRun] = []
        for key in scenario.calls:
            self.order.append(key)
            self.tell(e.Queued([self.calls[key]]))
        for keys in scenario.maps:
            self.order += keys
            for key in keys:
                self.letters.setdefault(key, "")
            self.tell(e.Fed(self.run_of([*keys]), [*keys], last=True))
        self.turn()

    # The scheduler.

    def tell(self, event: e.Event) -> None:
        todo = deque(self.core.handle(event, self.now_ns))
        while todo:
            action = todo.popleft()
            answer = getattr(self, f"do_{type(action).__name__.lower()}")(action)
            if answer is not None:
                todo.extendleft(reversed(self.core.handle(answer, self.now_ns)))

    def turn(self) -> None:
        """One turn of the scheduler's loop, and what must hold after it."""
        core = self.core
        if not self.stopped:
            if core.is_busy(self.size, 0):
                self.tell(e.Step(self.size))
            if self.filling:
                self.filling = False
                self.tell(e.Fill())
                must(not core.lacks_workers or self.waits, "not all workers were started")
            aside = [work.number for work in self.aside]
            kept, before = kept_for(aside, full=False, passed=[self.passes], fresh=[])
            self.tell(e.HandOut(kept=kept, before=before))
            if core.may_end(awaited=bool(self.aside)):
                self.stopped = True
                self.tell(e.End(core.force))
            must(self.stopped or not core.force, "a pool that is to end by force goes on")
        self.check()
        if self.late and not (self.closing or self.broken or self.aside):
            for worker in core.lend(self.now_ns + 10 * MS):  # nothing is pressing any more
                must(not worker.ledger.owed, "a worker is lent that owes a call")
                must(not core.backlog, "a worker is lent while a call waits")
                worker.lent = True  # type: ignore[attr-defined]

    def awake(self) -> None:
        """Let the core know of what callers have done themselves."""
        for worker in self.workers:
            worker.lent, answered, worker.answered = False, worker.answered, 0
            call, worker.under_way = worker.under_way, None
            if answered or call is not None:
                self.tell(e.Turned(worker, answered, ("f", MS), call))
                if call is not None:
                    at, key = call.position, call.items[0] if isinstance(call, Span) else call.key
                    must(worker.keys[at] == key, f"{key} is not at {at}")

    def check(self) -> None:
        core = self.core
        check_books(core)
        staying = [one for one in core.members if not one.leaving]
        # While it becomes smaller some that are to go are busy, and those that stay may wait.
        full = len(staying) > self.size
        if core.backlog.is_wanted() and not (self.stopped or full):
            idle = [
                one
                for one in staying
                if one.is_idle and one.takes_more and one.phase is Phase.READY
            ]
            kept = 0 if self.passes else len(self.aside)
            must(
                len(idle) <= kept, f"a call waits while worker {[one.pid for one in idle]} is idle"
            )
            fails = any(one.fails_to_start for one in core.members)
            # The next one waits for a place.
            ends = any(one.leaving for one in core.members)
            must(staying or fails or ends or self.waits, "a call waits, and no worker is hired")
        must(len(staying) <= max(self.scenario.size, self.size), "more workers than may be")
        for key, count in self.starts.items():
            must(count <= 1 + self.scenario.retries, f"{key} was started {count} times")
        self.passes = self.passes and bool(self.aside)
        running = [one.keys[one.at] for one in self.workers if one.alive and one.state == "runs"]
        must(len(running) == len({*running}), "a call runs twice at a time")

    @property
    def waits(self) -> bool:
        """Whether a start was refused: the pool is to try again later."""
        not_before_ns: int = vars(self.core)["_starts"].not_before_ns
        return not_before_ns > self.now_ns

    def check_order(self, key: str) -> None:
        """Check that the only worker has done all that came before a call that begins."""
        if not self.scenario.is_queue:
            return
        answered = {
            worker.keys[position]
            for worker in self.workers
            for positions in (
                worker.left,
                *(some for what, some in worker.outbox if what == "answers"),
            )
            for position in positions
        }
        before = {*self.order[: self.order.index(key)]} - answered - self.behind
        before -= self.outcomes.keys()
        must(not before, f"{key} begins before {sorted(before)}")

    def end_call(self, key: str, outcome: str) -> None:
        if key not in self.dropped:
            before = self.outcomes.get(key)
            must(before is None, f"{key} ends twice: {before}, {outcome}")
            self.outcomes[key] = outcome

    def end_entry(self, entry: Any, outcome: str) -> None:
        if isinstance(entry, Given):
            self.end_call(entry.key, outcome)
            return
        keys = entry.items[entry.done :] if isinstance(entry, Span) else entry.waiting
        for key in keys:
            self.end_call(key, outcome)
        run = entry.run if isinstance(entry, Span) else entry
        waiting, run.waiting, run.stopped = run.waiting, [], True
        for key in waiting if run is not entry else []:
            self.end_call(key, outcome)

    # Actions.

    def do_send(self, action: e.Send) -> e.Sent:
        worker: Worker = action.worker
        must(not worker.leaving, "work for one that leaves")
        position, given, back = worker.ledger.last + 1, [], []
        exclusive = unsent = 0
        full = False
        if isinstance(action.work, Span):
            span = action.work
            span.bound = self.scenario.bound and span.count > 1
            given = [span]
            names = span.items
            worker.inbox.append(("batch", [*range(position, position + span.count)]))
        else:
            names = []
            for place, call in enumerate(action.work):
                letters = self.letters[call.key]
                if call.key in self.dropped:
                    continue
                if "a" in letters:
                    self.letters[call.key] = letters.replace("a", "")
                    self.aside.append(call)
                    if self.passes:
                        self.behind.add(call.key)
                        continue
                    back, full = action.work[place + 1 :], True
                    break
                if "l" in letters and (worker.ledger.owed or given):
                    back = action.work[place:]
                    break
                given.append(call)
                names.append(call.key)
                if "l" in letters:
                    back, exclusive, unsent = action.work[place + 1 :], 1, position
                    break
            if given and not unsent:
                worker.inbox.append(("tasks", [*range(position, position + len(given))]))
        worker.keys.update(zip(range(position, position + len(names)), names, strict=True))
        if not worker.alive and given:
            worker.inbox.clear()
            self.tell(e.Parted(worker))
        return e.Sent(worker, given, back, bool(exclusive), unsent, full)

    def do_hire(self, action: e.Hire) -> e.Refused | None:
        must(not self.waits, "a worker is started before the time of the next attempt")
        if self.refusing:
            by_script = self.refusing == "script"
            self.spoilt += by_script
            self.refusing = ""
            return e.Refused(RuntimeError() if by_script else OSError("refused"), by_script)
        self.spoilt = 0
        # The others take so long to end that their place is given away.
        owed = [work for one in self.workers if one.leaving for work in one.ledger]
        for work in owed:
            self.behind.update(work.items if isinstance(work, Span) else [work.key])
        for _ in range(action.workers):
            self.hired += 1
            worker = Worker(self.hired)
            worker.index = self.core.place_of_next()
            must(worker.index < self.size, "a worker has a place beyond the pool's size")
            others = [one.index for one in self.workers if one.alive]
            if "tick" not in self.scenario.budget:
                must(worker.index not in others, "two processes have one place")
            self.workers.append(worker)
            self.tell(e.Hired(worker, self.scenario.boards))
        return None

    def do_look(self, action: e.Look) -> e.Seen:
        return e.Seen([(one, one.b_claimed, one.b_since) for one in action.workers])

    def do_revoke(self, action: e.Revoke) -> e.Revoked:
        worker: Worker = action.worker
        worker.b_revoked = action.last
        claimed, began = worker.b_claimed, worker.b_began
        return e.Revoked(worker, claimed, began, self.left_by(worker), action.then)

    def left_by(self, worker: Worker) -> list[e.Answered]:
        answers = [(position, 1, None) for position in worker.left]
        payload = [worker.keys[position] for position in worker.left]
        return [e.Answered(worker, answers, payload, peeked=True)] if answers else []

    def do_settle(self, action: e.Settle) -> None:
        for work, place, count, at in action.settled:
            for number in range(count):
                key = work.key if isinstance(work, Given) else work.items[place + number]
                must(action.payload[at + number] == key, f"{key} gets another's answer")
                self.end_call(key, "returned")

    def do_wait(self, _: e.Wait) -> None:
        pass

    def do_cancel(self, action: e.Cancel) -> None:
        for entry in action.works:
            self.end_entry(entry, "cancelled")

    def do_fail(self, action: e.Fail) -> None:
        for entry in action.works:
            self.end_entry(entry, "broken")

    def do_bury(self, action: e.Bury) -> None:
        worker, ending = action.worker, action.ending
        must(not worker.ledger.owed, "the dead owe")
        for lost in ending.lost:
            key = lost.work.key if isinstance(lost.work, Given) else lost.work.items[lost.place]
            if worker.condemned is None and self.scenario.boards:
                must(self.starts.get(key) or "l" in self.letters[key], f"{key} is lost, unbegun")
            if worker.condemned is not None:
                nobodys = key in self.dropped
                must(key == worker.condemned_for or nobodys, f"{key} is lost with another")
            if ending.exceeded is not None and lost.again is None:
                tried = lost.work.attempts >= self.scenario.retries
                must(tried, f"{key} may run again, and does not")
            if ending.condemned is not None:
                must(lost.again is None, f"{key} is run again, though the pool has ended it")
            if lost.again is None:
                late = isinstance(ending.condemned, TaskTimeoutError)
                self.end_call(key, "timed out" if late else "lost")

    def do_stop(self, action: e.Stop) -> None:
        if action.worker.alive:
            action.worker.inbox.append(("stop", []))

    def do_condemn(self, action: e.Condemn) -> None:
        worker: Worker = action.worker
        worker.doomed, worker.condemned_for = True, worker.keys[worker.next]
        begun = worker.b_claimed >= worker.next or not self.scenario.boards
        must(begun, "a call is ended that has not begun")

    def do_endnow(self, action: e.EndNow) -> None:
        action.worker.doomed = True

    def do_distrust(self, action: e.Distrust) -> None:
        raise BadStateError(f"a worker that does no wrong is distrusted: {action.error}")

    def do_putoff(self, _: e.PutOff) -> None:
        must(self.hired, "a pool that never had a worker goes on without")
        goes_on = self.spoilt < 3 or self.core.members
        must(goes_on, "a pool without workers runs the script a fourth time")

    def do_giveup(self, action: e.GiveUp) -> None:
        refused = action.reason == "cannot start a worker: refused"
        must(not (refused and self.hired), "a pool that had a worker gives up at once")
        early = self.hired and self.spoilt in (1, 2)
        must(not early, "a pool gives up before the script has failed three times")
        if not self.broken:
            self.broken = True
            self.tell(e.Break())
            for call in self.aside:
                self.end_entry(call, "broken")
            self.aside.clear()

    # What may happen.

    def steps(self) -> Iterator[Step]:
        """Yield what may happen next."""
        for worker in self.workers:
            yield from ((name, worker.pid) for name in self.steps_of(worker))
        yield from (("pickled", number) for number in range(len(self.aside)))
        if self.aside and not self.passes:
            yield ("passed",)
        if self.late and not (self.closing or self.broken):
            yield ("submit",)
        if self.waits and self.core.backlog:
            yield ("retry",)
        for name, left in self.budget.items():
            if left <= 0 or (name in ("cancel", "close", "terminate") and self.stopped):
                continue
            if name == "drop":
                open_ = (key for key in self.calls if key not in self.outcomes)
                yield from (("drop", key) for key in open_)
            elif name == "tick":
                yield from [(name,)] if self.may_tick() else []
            elif name not in ("die", "exceed", "fail", "failed"):
                yield (name,)

    def may_tick(self) -> bool:
        """Whether time matters: it is not to run out before a call that hangs has begun."""
        hangs = [key for key, letters in self.letters.items() if "h" in letters]
        running = [
            one.keys[one.at]
            for one in self.workers
            if one.state == "runs" and not (one.left or one.outbox)
        ]
        return not hangs or any(key in running for key in hangs)

    def steps_of(self, worker: Worker) -> Iterator[str]:
        if worker.outbox:
            yield "deliver"
        if worker.alive:
            yield from self.steps_of_the_living(worker)
        elif not worker.outbox:
            yield "notice"
        if worker.lent and self.late and worker.under_way is None:
            yield "turn"
        if worker.under_way is not None:
            yield "wake"
            if worker.outbox and worker.outbox[0][0] == "answers":
                yield "collect"
        elif worker.answered:
            yield "wake"

    def steps_of_the_living(self, worker: Worker) -> Iterator[str]:
        if (name := self.step_of_its_own(worker)) is not None:
            yield name
        if worker.state == "born" and self.budget.get("fail", 0):
            yield "fail"
        if worker.left:
            yield "flush"
        if worker.doomed:
            yield "slain"
        else:
            yield from ("die" for _ in range(min(1, self.budget.get("die", 0))))
            if worker.ready and worker.ledger.owed and self.budget.get("exceed", 0):
                yield "exceed"
        if worker.unsent:
            yield "copied"
            if self.budget.get("failed", 0):
                yield "failed"

    def step_of_its_own(self, worker: Worker) -> str | None:
        if worker.state == "idle":
            return "claim" if worker.todo or worker.inbox else None
        if worker.state == "runs" and "h" in self.letters[worker.keys[worker.at]]:
            return None
        return {"born": "init", "claims": "look", "reads": "begin", "runs": "end"}[worker.state]

    def do(self, step: Step) -> None:
        """Let something happen, and the pool act on it."""
        name, *about = step
        if name in self.budget:
            self.budget[name] -= 1
        if name not in UNHEARD:
            self.awake()
        if about and name not in ("drop", "pickled"):
            (worker,) = (one for one in self.workers if one.pid == about[0])
            if not getattr(self, f"on_{name}")(worker):
                self.check()
                return
        else:
            getattr(self, f"on_{name}")(*about)
        if name not in UNHEARD or not any(one.lent for one in self.workers):
            self.turn()

    def on_init(self, worker: Worker) -> None:
        worker.state = "idle"
        worker.outbox.append(("ready", []))

    def on_fail(self, worker: Worker) -> None:
        worker.state = "idle"
        worker.outbox.append(("failed", []))

    def on_claim(self, worker: Worker) -> None:
        if not worker.todo:
            kind, worker.todo = worker.inbox.popleft()
            worker.is_batch, worker.is_read = kind == "batch", False
            if kind == "stop":
                self.on_flush(worker)
                worker.alive = False
                return
        worker.at = worker.b_claimed = worker.todo.pop(0)
        worker.b_since, worker.state = self.now_ns, "claims"

    def on_look(self, worker: Worker) -> None:
        if worker.b_revoked >= worker.at and self.scenario.boards:
            self.on_flush(worker)
            worker.outbox.append(("skipped", [worker.at]))
            worker.state = "idle"
            if worker.is_batch:
                worker.todo = []
        elif worker.is_batch and not worker.is_read:
            worker.is_read, worker.state = True, "reads"
        else:
            self.on_begin(worker)

    def on_begin(self, worker: Worker) -> None:
        if worker.state == "reads" and len(worker.todo) and self.poisoned(worker):
            if "u" in self.poisoned(worker):
                self.on_flush(worker)
                self.behind.update(worker.keys[at] for at in (worker.at, *worker.todo))
                worker.outbox.append(("unreadable", [worker.at]))
                worker.todo, worker.state = [], "idle"
            else:
                worker.alive, worker.exitcode = False, -11
            return
        key = worker.keys[worker.at]
        self.check_order(key)
        worker.b_began, worker.state = worker.at, "runs"
        self.starts[key] = self.starts.get(key, 0) + 1

    def poisoned(self, worker: Worker) -> str:
        keys = [worker.keys[at] for at in (worker.at, *worker.todo)]
        return "".join(letter for key in keys for letter in self.letters[key] if letter in "pu")

    def on_end(self, worker: Worker) -> None:
        worker.left.append(worker.at)
        worker.state = "idle"
        if not self.scenario.boards:
            self.on_flush(worker)

    def on_flush(self, worker: Worker) -> None:
        if worker.left:
            worker.outbox.append(("answers", worker.left))
            worker.left = []

    def on_die(self, worker: Worker) -> None:
        worker.alive, worker.exitcode = False, -11

    def on_exceed(self, worker: Worker) -> bool:
        facts = {"limit_bytes": 1, "held_bytes": 2, "born_bytes": 0}
        self.tell(e.Exceeded(worker, MemoryExceeded(**facts, source="statm")))
        return True

    def on_slain(self, worker: Worker) -> None:
        worker.alive, worker.exitcode, worker.by_pool = False, -9, True

    def on_deliver(self, worker: Worker) -> bool:
        kind, positions = worker.outbox.popleft()
        event: e.Event
        if kind == "ready":
            event = e.Ready(worker, self.scenario.boards)
        elif kind == "failed":
            event = e.InitFailed(worker)
        elif kind == "skipped":
            event = e.Skipped(worker, positions[0])
        elif kind == "unreadable":
            event = e.Unreadable(worker, positions[0])
        else:
            answers = [(position, 1, None) for position in positions]
            event = e.Answered(worker, answers, [worker.keys[one] for one in positions])
        self.tell(event)
        return True

    def on_notice(self, worker: Worker) -> bool:
        self.workers.remove(worker)
        self.tell(e.Parted(worker))
        self.tell(
            e.Died(
                worker,
                worker.exitcode,
                by_pool=worker.by_pool,
                claimed=worker.b_claimed,
                began=worker.b_began,
                results=self.left_by(worker),
            )
        )
        return True

    def on_copied(self, worker: Worker) -> bool:
        if worker.ledger.owed and not worker.leaving:
            worker.inbox.append(("tasks", [worker.unsent]))
        self.tell(e.Copied(worker))
        return True

    def on_failed(self, worker: Worker) -> bool:
        key = worker.keys[worker.unsent]
        if worker.ledger.owed:
            self.tell(e.NotSent(worker, worker.unsent, []))
            self.end_call(key, "not sent")
        else:
            self.tell(e.Copied(worker))
        return True

    def on_pickled(self, number: int) -> None:
        self.tell(e.Returned([self.aside.pop(number)]))

    def on_passed(self) -> None:
        self.passes = True
        self.behind.update(call.key for call in self.aside)

    def on_tick(self) -> None:
        self.now_ns += 2000 * MS
        self.turn()  # what is over is looked at twice

    def on_drop(self, key: str) -> None:
        if key not in self.outcomes:
            self.outcomes[key] = "dropped"
            self.dropped.add(key)
            self.calls[key].dropped = True
            for worker in self.workers:
                for work in worker.ledger:
                    if isinstance(work, Given) and work.key == key:
                        self.tell(e.Cancelled(worker, work))
                        return

    def on_leave(self) -> None:
        """The maps are left, and what they run is to end."""
        for run in self.runs:
            run.dropped, run.stopped, run.waiting = True, True, []
            late = [key for key in run.keys if key not in self.outcomes]
            self.outcomes.update(dict.fromkeys(late, "dropped"))
            self.dropped.update(late)
            for worker in self.workers:
                if any(isinstance(work, Span) and work.run is run for work in worker.ledger):
                    self.tell(e.Cancelled(worker, run))

    def on_submit(self) -> None:
        if self.scenario.together:
            keys, self.late = [*self.late], ()
            self.order += keys
            self.tell(e.Fed(self.run_of(keys), keys, last=True))
            return
        key, *late = self.late
        self.late = (*late,)
        self.order.append(key)
        self.tell(e.Queued([self.calls[key]]))

    def run_of(self, keys: list[str]) -> FakeRun:
        run = FakeRun([*keys], self.policy, self.scenario.at_once)
        self.runs.append(run)
        return run

    def on_turn(self, worker: Worker) -> bool:
        many = len(self.late) if self.scenario.together else 1
        keys, self.late = self.late[:many], self.late[many:]
        self.order += keys
        work: Given | Span = self.calls[keys[0]]
        if self.scenario.together:
            run = self.run_of([*keys])
            run.sent = many
            work = Span(run, 0, [*keys])
        worker.under_way = work
        at = work.position = worker.ledger.last + worker.answered + 1
        places = [*range(at, at + many)]
        worker.keys.update(zip(places, keys, strict=True))
        if worker.alive:
            worker.inbox.append(("tasks" if many == 1 else "batch", places))
        return True

    def on_collect(self, worker: Worker) -> bool:
        work = worker.under_way
        assert work is not None
        places = [*range(work.position, work.position + work.count)]
        if worker.outbox[0][1] != places:
            self.awake()  # a part, or an answer that was read from the board before: for the pool
            return True
        worker.outbox.popleft()
        worker.under_way = None
        for at in places:
            self.end_call(worker.keys[at], "returned")
        worker.answered += len(places)
        return True

    def on_wake(self, _: Worker) -> bool:
        return True

    def on_fill(self) -> None:
        self.filling = True

    def on_refuse(self) -> None:
        self.refusing = "system"

    def on_spoil(self) -> None:
        self.refusing = "script"

    def on_retry(self) -> None:
        look_ns = self.core.next_look(self.now_ns)
        must(look_ns is not None, "nobody looks whether a worker can be started again")
        self.now_ns = max(self.now_ns, look_ns or 0)

    def on_resize(self) -> None:
        self.size = 1 if self.size > 1 else 2

    def on_cancel(self) -> None:
        self.closing = True
        self.tell(e.Close(cancel=True))
        self.cancel_aside()

    def cancel_aside(self) -> None:
        for call in self.aside:
            self.end_entry(call, "cancelled")
        self.aside.clear()

    def on_close(self) -> None:
        self.closing = True
        self.tell(e.Close())

    def on_terminate(self) -> None:
        self.closing = True
        self.tell(e.Close(cancel=True, forces=["terminate"]))
        self.cancel_aside()

    # States.

    def key(self) -> bytes:
        """Return what tells this state from others, in which something else can come.

        Calls of equal letters are told apart by where they are, not by name; of those that have
        ended nothing is kept. Workers are told apart by their age, positions by what is behind
        them.
        """
        core, names = self.core, dict[str, int]()

        def call(key: str) -> tuple[Any, ...]:
            if key in names:
                return (names[key],)
            names[key] = len(names)
            ended, dropped = key in self.outcomes, key in self.dropped
            behind = key in self.behind
            return self.letters[key], self.starts.get(key, 0), ended, dropped, behind

        def work(one: Any) -> tuple[Any, ...]:
            if isinstance(one, Given):
                return one.attempts, *call(one.key)
            if isinstance(one, Span):
                return one.start, one.attempts, one.alone, one.bound, *map(call, one.items)
            return tuple(map(call, one.waiting))

        state = (
            [
                (*self.key_of(one), *map(work, one.ledger), one.under_way and work(one.under_way))
                for one in self.workers
            ],
            [*map(call, self.late)],
            [
                (one.pid, *(call(whose.key) if isinstance(whose, Given) else ["run"]))
                for one, whose in vars(core)["_unwanted"]
            ],
            [*map(work, core.backlog)],
            [*map(work, self.aside)],
            sorted(call(key) for key in self.letters if key not in {*self.outcomes, *names}),
            sorted(self.budget.items()),
            self.size, self.closing, core.force, self.stopped, self.broken, self.refusing,
            self.passes, self.spoilt,
            self.scenario.is_queue and [names[key] for key in self.order if key in names],
            self.key_of_starts(),
        )  # fmt: skip
        return hashlib.blake2b(marshal.dumps(state, 0), digest_size=16).digest()

    def key_of_starts(self) -> tuple[object, ...]:
        """Return what tells the starts of workers from others; sizes are those of the world."""
        starts = vars(self.core)["_starts"]
        since_ns = vars(starts)["_refused_since_ns"]
        return (
            *map(vars(starts).get, ("_crashed", "_killed", "_had_one", "_failed")),
            since_ns and self.now_ns - since_ns,
            self.waits and starts.not_before_ns - self.now_ns,
        )  # fmt: skip

    def key_of(self, one: Worker) -> tuple[Any, ...]:
        """Return what tells this worker from one in which something else can come."""
        end = one.ledger.last + 1
        due = one.next or end
        here = one.at if one.state in ("claims", "reads", "runs") else 0
        # What is further behind is equal to all that is.
        least = end - min([due, *one.coming, *([here] if here else [])]) + 1

        def ago(position: int) -> int:
            return min(end - position, least)

        return (
            one.index, one.leaving and self.now_ns - one.leaving_since_ns,
            int(one.phase), one.ready, one.exclusive, one.alive, one.doomed, one.by_pool,
            one.lent, one.answered,
            type(one.condemned).__name__,
            one.exitcode, one.tasks_done if self.scenario.tasks_per_worker else 0,
            one.overdue == one.next, one.unsent and ago(one.unsent),
            one.silent and end - one.awaited, one.may_pass_over, ago(one.claimed),
            ago(one.b_claimed), ago(one.b_began), ago(one.b_revoked),
            self.now_ns - one.b_since, self.now_ns - one.sent_ns,
            one.state, here and ago(here), bool(one.todo or here) and (one.is_batch, one.is_read),
            [*map(ago, one.todo)], [*map(ago, one.left)],
            [(kind, *map(ago, positions)) for kind, positions in one.inbox],
            [(kind, *map(ago, positions)) for kind, positions in one.outbox],
            [(one_.position - due, one_.done) for one_ in one.ledger],
        )  # fmt: skip

    @property
    def is_too_far(self) -> bool:
        """Whether a worker has more before it that was taken back than is tried."""
        return self.scenario.unread is not None and any(
            sum(position <= one.b_revoked for position in one.coming) > self.scenario.unread
            for one in self.workers
        )

    def check_end(self) -> None:
        """Check a state after which nothing happens."""
        missing = [key for key in self.letters if key not in (*self.outcomes, *self.late)]
        must(not missing, f"nothing happens any more, and {missing} have not ended")
        must(not self.core.owes, "nothing happens any more, and a worker owes a call")
        staying = [one for one in self.core.members if not one.leaving]
        must(len(staying) <= self.size, "nothing happens any more, and workers are too many")
        must(not self.stopped or not self.core.members, "the pool is closed, and has workers")
