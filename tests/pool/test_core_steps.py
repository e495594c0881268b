"""Single steps of the core: what the explorer of test_core.py does not send, or look at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks

from safepool.errors import MemoryExceeded
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
    core, waiting, later = Core(1), call(), call()
    member = hire(core)
    core.handle(e.Turned(member, 0, None, span(0, 3)), 0)
    core.handle(e.Answered(member, [(1, 1, None)], None), 0)
    core.handle(e.Queued([waiting]), 0)
    (failed,) = core.handle(e.Break(), 0)

    assert isinstance(failed, e.Fail)
    assert failed.works[0] is waiting
    spans = [work for work in failed.works[1:] if isinstance(work, Span)]
    assert [(one.start, one.items) for one in spans] == [(1, [(1,)]), (2, [(2,)])]
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
