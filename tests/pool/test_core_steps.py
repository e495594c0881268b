"""Single steps of the core: what the explorer of test_core.py does not send, or look at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks
from support_core import MS, NOW, worker

from safepool.errors import MemoryExceeded, TaskTimeoutError
from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.core import events as e
from safepool.pool.core.gauge import Gauge
from safepool.pool.core.machine import Core
from safepool.pool.core.policy import NO_POLICY, Policy, policy_of
from safepool.pool.core.work import Call
from safepool.pool.core.worker import Member, Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.unit

IDLE_NS = 100


def hire(core: Core, *, ready: bool = True) -> Member:
    member = Member()
    member.pid = 1
    member.index = core.place_of_next()
    core.handle(e.Hired(member, has_board=True), 0)
    if ready:
        core.handle(e.Ready(member, has_board=True), 0)
    return member


def lend(core: Core, member: Member, call: Call, now_ns: int = 0) -> None:
    core.handle(e.Turned(member, 0, None, call), now_ns)


def answer(core: Core, member: Member, now_ns: int = 0) -> list[e.Action]:
    position = member.ledger.last
    return core.handle(e.Answered(member, [(position, 1, None)], None), now_ns)


def stopped(actions: Sequence[e.Action]) -> list[Member]:
    return [action.worker for action in actions if isinstance(action, e.Stop)]


def call() -> Call:
    return Call("f", NO_POLICY)


def test_a_new_call_has_no_past() -> None:
    new = call()

    assert (new.pickled, new.attempts, new.position, new.done, new.expected_ns) == (
        None,
        0,
        0,
        0,
        0,
    )
    assert (new.is_wanted(), new.tasks_in(3)) == (True, 3)
    with pytest.raises(ValueError, match="1"):
        new.split(1)
    assert (span(0, 4).tasks_in(4), span(0, 4, at_once=2).tasks_in(4)) == (4, 2)


@pytest.mark.parametrize("kept", [1, 2, 9])
def test_workers_are_kept_only_from_what_came_later(kept: int) -> None:
    """Calls that came before the one that is being pickled are sent, and not those behind it."""
    core = Core(2)
    member, other = hire(core), hire(core)
    early, later = call(), call()
    core.handle(e.Queued([early, call(), later]), 0)
    aside = core.backlog.take(lambda *_: 2, lambda _: 0, 1, 2)[1]  # type: ignore[index]
    core.handle(e.Returned([early]), 0)

    sent = core.handle(e.HandOut(kept=kept, before=aside.number), 0)
    assert [(one.worker, one.work) for one in sent if isinstance(one, e.Send)] == [
        (member, [early])
    ]
    assert core.handle(e.Sent(member, [early], ()), 0) == []
    assert [*core.backlog] == [later]
    sent = core.handle(e.HandOut(), 0)
    assert [one.worker for one in sent if isinstance(one, e.Send)] == [other]
    assert core.handle(e.Sent(other, [later], ()), 0) == []


def test_a_worker_that_is_idle_for_so_long_is_let_go() -> None:
    core = Core(2)
    core.idle_ns = IDLE_NS
    first, second = hire(core), hire(core)
    lend(core, second, call())

    assert [stopped(core.handle(e.Step(2), now)) for now in (10, 109)] == [[], []]
    assert stopped(core.handle(e.Step(2), 110)) == [first]
    assert first.idle_since_ns is None
    assert stopped(core.handle(e.Step(2), 500)) == []
    answer(core, second, 500)
    assert [stopped(core.handle(e.Step(2), now)) for now in (501, 600)] == [[], []]
    lend(core, second, call(), 600)  # from here on it was not idle all the time
    answer(core, second, 600)
    assert [stopped(core.handle(e.Step(2), now)) for now in (601, 700)] == [[], []]
    assert stopped(core.handle(e.Step(2), 701)) == [second]


def test_nobody_is_let_go_while_calls_wait() -> None:
    core = Core(1)
    core.idle_ns = IDLE_NS
    hire(core)
    core.handle(e.Step(1), 0)
    core.handle(e.Queued([call()]), 0)

    assert stopped(core.handle(e.Step(1), 1_000)) == []


def test_calls_that_callers_have_sent_count_as_all_others() -> None:
    core = Core(1)
    member, last = hire(core), call()
    core.handle(e.Turned(member, 3, ("f", 50), None), 0)
    core.handle(e.Turned(member, 2, None, last), 7)

    assert (member.done, member.tasks_done, member.sent_ns) == (5, 5, 7)
    assert member.ledger.head is last
    assert last.expected_ns == core.pace.expected_ns("f") > 0
    assert last.position == 6


@pytest.mark.parametrize("event", ["outgrown", "strangers"])
def test_a_worker_that_is_to_be_replaced_ends_after_its_call(event: str) -> None:
    core = Core(3)
    idle, busy, starting = hire(core), hire(core), hire(core, ready=False)
    lend(core, busy, call())
    if event == "outgrown":
        ended = [one for one in (idle, busy) for one in stopped(core.handle(e.Outgrown(one), 0))]
        assert ended == [idle]
    else:
        assert stopped(core.handle(e.Strangers(), 0)) == [idle, starting]

    assert (idle.phase, busy.phase) == (Phase.STOPPING, Phase.RETIRING)
    assert stopped(answer(core, busy)) == [busy]


# One row per position that a worker could not read, after its first call: what comes of it.
UNREADABLE: dict[str, tuple[int, list[str]]] = {"was sent": (1, []), "was not": (2, ["Distrust"])}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_worker_that_could_not_read_what_was_not_sent_is_not_trusted(case: str) -> None:
    position, names = UNREADABLE[case]
    core = Core(1)
    member = hire(core)
    lend(core, member, call())
    actions = core.handle(e.Unreadable(member, position), 0)

    assert [type(action).__name__ for action in actions] == names
    assert member.awaited == 0
    for action in actions:
        assert isinstance(action, e.Distrust)
        assert action.worker is member
        assert f"position {position}, which was not sent" in str(action.error)


def test_a_cancelled_call_behind_what_was_not_read_is_looked_after_again() -> None:
    core, unwanted = Core(1), call()
    member = hire(core)
    core.handle(e.Turned(member, 0, None, span(0, 2)), 0)
    lend(core, member, unwanted)
    assert core.handle(e.Revoked(member, 3, 3, (), e.Then(cancelled=unwanted)), 0) == []
    actions = core.handle(e.Unreadable(member, 1), 0)

    assert actions == [e.Revoke(member, 3, e.Then(cancelled=unwanted))]


def span(start: int, count: int, at_once: int | None = None, **others: Any) -> Span:
    run = others.pop("run", None) or MapRun(support_tasks.square, "square", NO_POLICY, at_once)
    return Span(run, start, [(n,) for n in range(count)], **others)


# One row per state that keeps two spans apart: of the first, of the second.
APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the first travels alone": ({"alone": True}, {}),
    "the second travels alone": ({}, {"alone": True}),
    "the first has begun": ({"done": 1}, {}),
    "the second has begun": ({}, {"done": 1}),
    "the second was lost once": ({}, {"attempts": 1}),
    "the first is pickled": ({"pickled": b""}, {}),
    "the second is pickled": ({}, {"pickled": b""}),
}


@pytest.mark.parametrize("case", APART)
def test_spans_that_must_stay_apart(case: str) -> None:
    first = span(0, 2)
    assert first.is_followed_by(span(2, 1, run=first.run))

    first, others = span(0, 2, **APART[case][0]), APART[case][1]
    assert not first.is_followed_by(span(2, 1, run=first.run, **others))


def test_parts_of_a_chunk_belong_together_wherever_it_was_cut() -> None:
    first = span(0, 3, at_once=4)
    assert first.is_followed_by(span(3, 1, run=first.run))
    later = span(5, 1, run=first.run)
    assert later.is_followed_by(span(6, 1, run=first.run))
    assert not span(3, 1, run=first.run).is_followed_by(span(4, 1, run=first.run))


def test_pieces_of_a_span_are_what_it_was() -> None:
    whole = span(4, 3, bound=True, attempts=2)
    whole.expected_ns = 9
    only = [whole.only(place) for place in range(3)]
    rest = whole.split(1)

    assert [(one.start, one.items, one.attempts, one.alone) for one in only] == [
        (4, [(0,)], 2, True),
        (5, [(1,)], 0, True),
        (6, [(2,)], 0, True),
    ]
    assert (rest.start, rest.items, rest.bound, rest.expected_ns) == (5, [(1,), (2,)], True, 9)
    assert whole.items == [(0,)]


def test_a_map_is_told_that_nothing_more_comes() -> None:
    core, run = Core(1), MapRun(support_tasks.square, "square", NO_POLICY, None)
    core.handle(e.Fed(run, [(1,)], last=False), 0)
    assert not run.fed
    core.handle(e.Fed(run, [(2,)], last=True), 0)
    assert (run.fed, run.count) == (True, 2)


def too_much(held: int) -> MemoryExceeded:
    return MemoryExceeded(limit_bytes=1, held_bytes=held, born_bytes=0, source="statm")


def test_the_first_reason_to_end_a_worker_stays() -> None:
    core, first, second = Core(1), too_much(2), too_much(3)
    member = hire(core)
    lend(core, member, call())
    ended = core.handle(e.Revoked(member, 1, 1, (), e.Then(exceeded=first)), 0)

    assert ended == [e.Condemn(member, stack=True)]
    assert core.handle(e.Exceeded(member, second), 0) == []
    assert core.handle(e.Revoked(member, 1, 1, (), e.Then(exceeded=second)), 0) == []
    assert member.condemned is first


def test_a_call_that_is_cancelled_has_no_stack() -> None:
    core, unwanted = Core(1), call()
    member = hire(core)
    lend(core, member, unwanted)
    ended = core.handle(e.Revoked(member, 1, 1, (), e.Then(cancelled=unwanted)), 0)

    assert ended == [e.Condemn(member, stack=False)]


def test_a_pool_that_breaks_fails_each_call_that_is_not_answered() -> None:
    core, waiting, later, owed = Core(2), call(), call(), call()
    member, other = hire(core), hire(core)
    lend(core, other, owed)
    core.handle(e.Turned(member, 0, None, span(0, 3)), 0)
    core.handle(e.Answered(member, [(1, 1, None)], None), 0)
    core.handle(e.Queued([waiting]), 0)
    (failed,) = core.handle(e.Break(), 0)

    assert isinstance(failed, e.Fail)
    assert failed.works[0] is waiting
    spans = [work for work in failed.works[1:] if isinstance(work, Span)]
    assert [(one.start, one.items) for one in spans] == [(1, [(1,)]), (2, [(2,)])]
    assert failed.works[-1] is owed
    assert core.handle(e.Queued([later]), 0) == [e.Fail([later])]


def test_a_call_that_could_not_be_sent_waits_again_and_occupies_nobody() -> None:
    core, first, large = Core(1), call(), call()
    member = hire(core)
    lend(core, member, first)
    core.handle(e.Sent(member, [large], [], exclusive=True, unsent=2), 0)
    actions = core.handle(e.NotSent(member, 2, [large]), 0)

    assert actions == [e.Wait([large])]
    assert [*core.backlog] == [large]
    assert (member.exclusive, member.unsent, [*member.ledger]) == (False, 0, [first])


# One row per worker of a pool of the size 1: what a step does with it.
STEPS: dict[str, tuple[Member, list[str], Phase]] = {
    "is idle": (worker(), [], Phase.READY),
    "is in its only call": (worker(1, claimed=1), [], Phase.READY),
    "is ahead": (worker(2), ["Look"], Phase.READY),
    "has not come to what was taken back": (worker(awaited=1), ["Look"], Phase.READY),
    "is to go, and idle": (worker(phase=Phase.RETIRING), ["Stop"], Phase.STOPPING),
    "is to go, and in a call": (worker(1, claimed=1, phase=Phase.RETIRING), [], Phase.RETIRING),
    "is to go, and ahead": (worker(2, phase=Phase.RETIRING), ["Revoke", "Look"], Phase.RETIRING),
    "is beyond the size, and idle": (worker(index=1), ["Stop"], Phase.STOPPING),
    "is beyond the size, and ahead": (worker(2, index=1), ["Revoke", "Look"], Phase.RETIRING),
    "is beyond the size, and in a chunk that stays together": (
        worker(2, index=1, bound=True),
        [],
        Phase.RETIRING,
    ),
    "is to go, and in a chunk that stays together": (
        worker(2, phase=Phase.RETIRING, bound=True),
        ["Revoke"],
        Phase.RETIRING,
    ),
    "is beyond the size, and ends": (worker(index=1, phase=Phase.DYING), [], Phase.DYING),
    "is long in a call, with others behind it, and no board is read": (
        worker(2, has_board=False, policy=Policy(timeout_s=0.0), overdue=1),
        ["Condemn"],
        Phase.CONDEMNED,
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_a_step_does(case: str) -> None:
    member, names, phase = STEPS[case]
    core = Core(3)
    core.members = (member,)
    actions = core.handle(e.Step(1), NOW)
    assert [type(action).__name__ for action in actions] == names
    assert all(
        getattr(action, "worker", member) is member
        and getattr(action, "workers", [member]) == [member]
        for action in actions
    )
    assert member.phase is phase


def test_a_step_looks_at_each_worker() -> None:
    members, core = (worker(), worker(phase=Phase.RETIRING)), Core(2)
    core.members = members
    assert stopped(core.handle(e.Step(2), NOW)) == [members[1]]


def test_boards_are_read_of_who_matters_when_nothing_waits() -> None:
    member, idle, core = worker(1), worker(), Core(2)
    core.members = (member, idle)
    assert core.handle(e.Step(2), NOW) == [e.Look([member])]
    core.handle(e.Queued([call()]), NOW)
    assert core.handle(e.Step(2), NOW) == []


def revoked(core: Core, member: Member, claimed: int, began: int, **what: Any) -> list[e.Action]:
    then = e.Then(**what)
    return core.handle(e.Revoked(member, claimed, began, (), then), NOW)


def test_what_a_board_says_is_remembered() -> None:
    member, core = worker(2, sent_ns=NOW - 30 * MS), Core(1)
    core.members = (member,)
    assert core.handle(e.Seen([(member, 1, NOW - 20 * MS)]), NOW) == []
    assert (member.claimed, member.since_ns) == (1, NOW - 20 * MS)
    assert core.handle(e.Seen([(member, 0, NOW - 21 * MS)]), NOW) == [
        e.Revoke(member, 2, e.Then())
    ]
    assert (member.claimed, member.since_ns) == (1, NOW - 21 * MS)


def test_calls_are_taken_back_of_who_is_slow_when_nothing_waits() -> None:
    member, core = worker(2, sent_ns=NOW - 2 * MS), Core(2)
    core.members = (member, worker())
    assert core.handle(e.Seen([]), NOW) == [e.Revoke(member, 2, e.Then())]
    core.handle(e.Queued([call()]), NOW)
    assert core.handle(e.Seen([]), NOW) == []


def test_a_call_whose_time_is_over_ends_at_the_second_look() -> None:
    """The program may have been stopped, and the result be here in time."""
    member, core = worker(1, policy=Policy(timeout_s=0.005), claimed=1), Core(1)
    core.members = (member,)
    member.since_ns = NOW - 5 * MS + 1
    for _ in range(2):
        assert core.handle(e.Seen([]), NOW) == []
    member.since_ns = NOW - 5 * MS
    assert core.handle(e.Seen([]), NOW) == []
    assert core.handle(e.Seen([]), NOW) == [e.Revoke(member, 1, e.Then(overdue=1))]
    assert revoked(core, member, 1, 1, overdue=1) == [e.Condemn(member, stack=True)]
    why = member.condemned
    assert isinstance(why, TaskTimeoutError)
    assert (why.pid, why.timeout_s, why.task, why.stack) == (7, 0.005, "square", "")
    assert member.phase is Phase.CONDEMNED
    assert core.handle(e.Seen([]), NOW) == []


# One row per worker with three calls of a map when a look ends: what it had claimed, and the
# reason to take calls back, with whether that ends it.
SINCE: dict[str, tuple[int, dict[str, Any], bool]] = {
    "its time is over": (1, {"overdue": 1}, True),
    "its time is over, and it has ended": (2, {"overdue": 1}, False),
    "the time of another was over": (2, {"overdue": 2}, False),
    "its map is cancelled": (1, {"cancelled": True}, True),
    "its map is cancelled, and has ended there": (4, {"cancelled": True}, False),
    "another call is cancelled": (1, {"cancelled": Call("f", NO_POLICY)}, False),
    "it holds too much": (1, {"exceeded": too_much(2)}, True),
    "it held too much before its call": (0, {"exceeded": too_much(2)}, False),
    "it was slow": (1, {}, False),
}


@pytest.mark.parametrize("case", SINCE)
def test_what_ends_a_worker_when_calls_were_taken_back(case: str) -> None:
    claimed, what, ends = SINCE[case]
    member, core = worker(3, policy=Policy(timeout_s=1.0)), Core(1)
    core.members = (member,)
    head = member.ledger.head
    assert head is not None
    cancelled = what.get("cancelled") is True
    if cancelled:
        what = {"cancelled": head.run}
    actions = revoked(core, member, claimed, claimed, **what)
    condemned = [one for one in actions if isinstance(one, e.Condemn)]
    assert condemned == [e.Condemn(member, not cancelled)] * ends
    assert not (cancelled and ends) or str(member.condemned) == "the program cancelled the call"


def test_calls_that_a_worker_has_not_claimed_wait_again() -> None:
    member, core = worker(4), Core(1)
    core.members = (member,)
    revoked(core, member, 2, 2)
    assert [(one.start, one.count) for one in core.backlog] == [(2, 2)]  # type: ignore[union-attr]
    assert (member.claimed, member.awaited, member.doubted, member.ledger.owed) == (2, 3, 0, 2)
    revoked(core, member, 2, 1)  # nothing is left to take back
    assert (member.awaited, member.doubted) == (3, 2)
    assert not [*core.backlog][1:]


# One row per position of what was not sent yet, in a worker that has claimed one of three calls:
# whether it will come to what is taken back.
@pytest.mark.parametrize(("unsent", "comes"), [(0, True), (1, False), (2, False), (3, True)])
def test_a_worker_comes_to_what_was_sent(unsent: int, comes: bool) -> None:
    member, core = worker(3, unsent=unsent), Core(1)
    core.members = (member,)
    revoked(core, member, 1, 1)
    assert member.awaited == (2 if comes else 0)


def test_results_on_the_board_of_who_gives_calls_back_count_first() -> None:
    member, core = worker(2), Core(1)
    core.members = (member,)
    result = e.Answered(member, [(1, 1, None)], [b""], peeked=True)
    actions = core.handle(e.Revoked(member, 2, 2, [result], e.Then(overdue=1)), NOW)
    assert [type(action) for action in actions] == [e.Settle]
    assert member.done == 1


def test_a_worker_that_is_to_go_stops_once_it_has_nothing() -> None:
    member, core = worker(2, phase=Phase.RETIRING), Core(1)
    core.members = (member,)
    assert revoked(core, member, 0, 0) == []  # it has to come to what was taken back
    assert core.handle(e.Skipped(member, 1), NOW) == []
    assert revoked(core, member, 1, 1) == [e.Stop(member)]


# One row per position at which a worker passes over a call, of three calls in two messages, the
# first of two: the calls that wait again, and what it still has to come to.
PASSED: dict[str, tuple[int, list[int], int]] = {
    "its next call": (1, [0, 1], 3),
    "the one before what was taken back": (2, [], 0),
    "one that was answered": (0, [], 3),
}


@pytest.mark.parametrize("case", PASSED)
def test_a_worker_passes_over_a_call(case: str) -> None:
    position, back, awaited = PASSED[case]
    member, core = worker(2, awaited=3), Core(1)
    core.members = (member,)
    member.ledger.give(span(2, 1))
    core.handle(e.Skipped(member, position), NOW)
    assert [item[0] for one in core.backlog for item in one.items] == back  # type: ignore[union-attr]
    assert (member.claimed, member.awaited) == (position, awaited)
    assert member.ledger.owed == 3 - len(back)


def test_a_condemned_worker_keeps_the_call_that_it_passes_over() -> None:
    member, core = worker(1, phase=Phase.CONDEMNED), Core(1)
    core.handle(e.Skipped(member, 1), NOW)
    assert member.ledger.owed == 1


def test_a_cancelled_call_is_looked_after_again_when_the_one_before_it_is_passed_over() -> None:
    members, unwanted, core = (worker(1), worker(1)), call(), Core(2)
    core.members = members
    for member in members:
        member.ledger.give(unwanted)
        assert revoked(core, member, 2, 2, cancelled=unwanted) == []
    for member in members:
        actions = core.handle(e.Skipped(member, 1), NOW)
        assert actions == [e.Revoke(member, 2, e.Then(cancelled=unwanted))]


def test_a_request_to_end_is_done_for_each_worker_or_for_one() -> None:
    core = Core(3)
    core.members = members = worker(), worker(1), worker(phase=Phase.STOPPING)
    assert core.handle(e.End("", members[1]), NOW) == [e.Stop(members[1])]
    assert (members[1].phase, members[1].leaving_since_ns) == (Phase.STOPPING, NOW)
    assert core.handle(e.End(""), NOW + 1) == [e.Stop(members[0])]
    assert core.handle(e.End("kill", members[1]), NOW + 2) == [e.EndNow(members[1], "kill")]
    assert members[1].leaving_since_ns == NOW
    assert core.handle(e.End("terminate"), NOW) == [e.EndNow(one, "terminate") for one in members]


def test_a_worker_that_is_ended_by_force_is_to_stop() -> None:
    member, core = worker(), Core(1)
    core.handle(e.End("ask", member), NOW)
    assert (member.phase, member.leaving_since_ns) == (Phase.STOPPING, NOW)


def test_a_worker_whose_initializer_fails_is_told_to_stop() -> None:
    core = Core(1)
    member = hire(core, ready=False)
    assert member.has_board
    assert core.handle(e.InitFailed(member), 5) == [e.Stop(member)]
    assert (member.phase, member.leaving_since_ns) == (Phase.FAILED, 5)


def test_a_worker_that_can_be_sent_nothing_leaves() -> None:
    core = Core(1)
    member = hire(core)
    assert core.handle(e.Parted(member), 5) == []
    assert (member.phase, member.leaving_since_ns) == (Phase.DYING, 5)
    core.handle(e.Ready(member, has_board=False), 6)  # said before
    assert (member.phase, member.leaving_since_ns, member.has_board) == (Phase.DYING, 5, False)


@pytest.mark.parametrize("of_all", [False, True])
def test_what_waits_is_cancelled_and_what_comes(of_all: bool) -> None:
    core, waiting, later = Core(1), call(), call()
    member = hire(core)
    core.handle(e.Queued([waiting]), 0)
    revokes = [e.Revoke(member, 0, e.Then())] * of_all
    actions = core.handle(e.Close(True, ["kill"] * of_all), 0)
    assert actions == [*revokes, e.Cancel([waiting])]
    assert isinstance(actions[-1], e.Cancel)
    assert core.handle(e.Queued([later]), 0) == [e.Cancel([later])]


def test_a_closed_pool_ends_in_the_sharpest_way_that_was_asked_for() -> None:
    core = Core(1)
    member = hire(core)
    lend(core, member, call())
    assert not core.may_end(awaited=False)
    assert core.handle(e.Close(), NOW) == []
    assert (core.backlog.holds, core.force, core.may_end(awaited=False)) == (False, "", False)
    asked: list[e.Force] = ["ask"]
    assert core.handle(e.Close(True, asked), NOW) == [e.Revoke(member, 1, e.Then())]
    assert core.may_end(awaited=True)
    core.handle(e.Break(), NOW)
    assert core.force == "terminate"
    assert core.handle(e.Close(True, [*asked, "kill", *asked]), NOW) == []
    core.handle(e.Break(), NOW)
    assert core.force == "kill"


# One row per closed pool: whether a call waits, one is pickled, a worker owes one; it may not end.
@pytest.mark.parametrize("waits", ["", "queued", "pickled", "sent"])
def test_a_closed_pool_ends_after_its_last_call(waits: str) -> None:
    core = Core(1)
    member = hire(core)
    core.handle(e.Close(), NOW)
    if waits == "queued":
        core.handle(e.Queued([call()]), NOW)
    elif waits == "sent":
        lend(core, member, call())
    assert core.may_end(awaited=waits == "pickled") is not bool(waits)


def test_calls_without_a_board_are_cancelled_at_once() -> None:
    member, unwanted, core = worker(has_board=False), call(), Core(1)
    core.members = (member,)
    member.ledger.give(unwanted)
    assert core.handle(e.Cancelled(member, unwanted), NOW) == [e.Condemn(member, stack=False)]


def test_who_holds_too_much_gives_its_calls_back_first() -> None:
    member, much, core = worker(2), too_much(2), Core(1)
    core.members = (member,)
    assert core.handle(e.Exceeded(member, much), NOW) == [
        e.Revoke(member, 2, e.Then(exceeded=much))
    ]


def test_a_pool_that_broke_cancels_nothing() -> None:
    core = Core(1)
    core.handle(e.Close(cancel=True), 0)
    core.handle(e.Break(), 0)
    waiting = call()
    (fail,) = core.handle(e.Queued([waiting]), 0)
    assert isinstance(fail, e.Fail)
    assert fail.works == [waiting]


# One row per policy of a function and of its pool: what holds.
POLICIES: dict[str, tuple[Policy | None, Policy, Policy]] = {
    "of a function, of a pool without": (Policy(retries=2), NO_POLICY, Policy(retries=2)),
    "of the pool alone": (None, Policy(timeout_s=3), Policy(timeout_s=3)),
    "one each": (Policy(timeout_s=1), Policy(retries=4), Policy(timeout_s=1, retries=4)),
    "the function's goes first": (
        Policy(timeout_s=1, retries=0),
        Policy(timeout_s=2, retries=4),
        Policy(timeout_s=1, retries=0),
    ),
    "the pool's, where the function's says nothing": (
        Policy(),
        Policy(timeout_s=2, retries=4),
        Policy(timeout_s=2, retries=4),
    ),
}


@pytest.mark.parametrize("case", POLICIES)
def test_which_policy_holds(case: str) -> None:
    own, default, held = POLICIES[case]

    def function() -> None: ...

    if own is not None:
        own.attach(function)
    assert policy_of(function, default) == held
    assert policy_of(partial(function), default) == held
    if own is not None and default is NO_POLICY:  # no new one for each call
        assert policy_of(function, default) is own


MIB = 1 << 20
# One row per worker that may hold 400 MB: what it holds at each look, and the pauses after them.
PAUSES: dict[str, tuple[list[int], list[int]]] = {
    "too little to be growth": ([MIB, 2 * MIB], [100_000_000, 100_000_000]),
    "just growth: a quarter of a nanosecond for each byte": ([MIB + 1], [99_737_855]),
    "it does not grow: twice as long each time": (
        [320 * 10**6] * 4,
        [20_000_000, 40_000_000, 80_000_000, 100_000_000],
    ),
    "too much, but hardly more than before": ([400 * 10**6, 400 * 10**6 + 1], [10_000_000] * 2),
}


@pytest.mark.parametrize("case", PAUSES)
def test_a_worker_is_looked_at_before_it_can_exceed_its_limit(case: str) -> None:
    gauge, (held, pauses) = Gauge(400 * 10**6, 5), PAUSES[case]
    assert gauge.look_ns == 0
    found = []
    for private in held:
        gauge.note(private + 5, 1_000)
        found.append(gauge.look_ns - 1_000)

    assert found == pauses
