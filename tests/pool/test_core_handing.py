"""Who is given how much of what waits, who is hired for it, and what an answer changes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from support_core import MS, NOW, run_of, span_of, worker

from safepool.pool.calls.mapping import Span
from safepool.pool.core import events as e
from safepool.pool.core.backlog import kept_for
from safepool.pool.core.machine import Core
from safepool.pool.core.policy import NO_POLICY
from safepool.pool.core.work import Call
from safepool.pool.core.worker import Member, Phase

pytestmark = pytest.mark.unit


def calls(count: int) -> list[Call]:
    return [Call("f", NO_POLICY) for _ in range(count)]


def core_of(*members: Member, size: int = 2, waiting: int = 0, **options: Any) -> Core:
    """Return the core of a pool that knows a function ``f``, whose calls take a millisecond."""
    core = Core(size, **options)
    core.members = members
    core.pace.note("f", MS)
    core.handle(e.Queued(calls(waiting)), NOW)
    return core


def handed_out(core: Core, event: e.HandOut | None = None) -> list[tuple[Member, int]]:
    """Let the core hand out what waits; return who was given how many calls, in order."""
    given = []
    actions = core.handle(event or e.HandOut(), NOW)
    while actions and isinstance(actions[0], e.Send):
        member, work = actions[0].worker, actions[0].work
        works = [work] if isinstance(work, Span) else work
        given.append((member, sum(one.count for one in works)))
        actions = core.handle(e.Sent(member, works, ()), NOW)
    return given


def hired(core: Core) -> e.Hire | None:
    found = [one for one in core.handle(e.HandOut(), NOW) if isinstance(one, e.Hire)]
    return found[0] if found else None


def test_what_waits_is_divided_among_the_workers() -> None:
    first, second = worker(), worker()
    assert handed_out(core_of(first, second, waiting=10)) == [
        (first, 5),
        (second, 3),
        (first, 1),
        (second, 1),
    ]
    assert handed_out(core_of(first, waiting=10)) == []  # it holds enough
    third = worker()
    assert handed_out(core_of(third, waiting=8)) == [(third, 8)]
    third = worker()
    assert handed_out(core_of(third, ending(NOW), waiting=8)) == [(third, 8)]


def test_what_came_later_does_not_go_along_while_workers_are_kept() -> None:
    first, second = worker(), worker()
    event = e.HandOut(kept=1, before=2)
    assert handed_out(core_of(first, second, waiting=4), event) == [(first, 1)]


def test_as_many_workers_are_kept_as_calls_are_pickled() -> None:
    members = worker(), worker(), worker()
    core = core_of(*members, size=3, waiting=3)
    assert [one for one, _ in handed_out(core, e.HandOut(kept=1, before=1))][:2] == [*members[1:]]


def test_calls_of_several_names_make_up_what_a_worker_may_hold() -> None:
    core = core_of(worker(), size=1, waiting=4)
    core.pace.note("g", MS)
    core.handle(e.Queued([Call("g", NO_POLICY) for _ in range(12)]), NOW)
    assert [count for _, count in handed_out(core)] == [10]


def test_nothing_is_handed_out_before_the_workers_know_the_names() -> None:
    core = core_of(worker(), waiting=1)
    assert core.handle(e.HandOut(told=False), NOW) == []


def test_idle_workers_come_first_and_then_those_that_hold_least() -> None:
    more, unknown, idle, less = worker(3, MS), worker(1), worker(), worker(2, MS)
    core = core_of(more, unknown, idle, less, size=4, waiting=30)
    assert [member for member, _ in handed_out(core)][:4] == [idle, unknown, less, more]
    more, less = worker(3, MS), worker(2, MS)
    core = core_of(more, less, waiting=30)
    assert [member for member, _ in handed_out(core)][:2] == [less, more]


ALL = sys.maxsize
# One row per pool with work that is being pickled: the places of this work, whether it is too
# much, whether each may be passed, and was begun just now; how many workers are kept, and from
# which place on.
KEPT: dict[str, tuple[list[int], bool, list[bool], list[bool], tuple[int, int]]] = {
    "nothing": ([], False, [], [], (0, 0)),
    "nothing, and too much waits": ([], True, [], [], (0, 0)),
    "for a moment": ([7, 5], False, [False, False], [False, True], (ALL, 5)),
    "for longer": ([7, 5], False, [False, False], [False, False], (2, 5)),
    "one waits for a later call": ([5, 7], False, [False, True], [True, True], (0, 5)),
    "too much, and one waits": ([5, 7], True, [True, True], [False, False], (ALL, 5)),
}


@pytest.mark.parametrize("case", KEPT)
def test_who_is_kept_for_calls_that_are_pickled(case: str) -> None:
    aside, full, passed, fresh, kept = KEPT[case]
    assert kept_for(aside, full=full, passed=passed, fresh=fresh) == kept


# One row per worker: whether it is given one of two calls that wait.
GIVEN: dict[str, tuple[Member, bool]] = {
    "is idle": (worker(), True),
    "is starting": (worker(phase=Phase.STARTING, ready=False), False),
    "is to go": (worker(phase=Phase.RETIRING), False),
    "is ending": (worker(phase=Phase.DYING), False),
    "has a call": (worker(1, MS), True),
    "has a call, and no board": (worker(1, MS, has_board=False), False),
    "has no call, and no board": (worker(has_board=False), True),
    "has a call that nothing may follow": (worker(1, MS, exclusive=True), False),
    "had a call that nothing might follow": (worker(exclusive=True), True),
    "has what is not sent yet": (worker(1, MS, unsent=1), False),
    "has half of what it may": (worker(5, MS), True),
    "has more than half of what it may": (worker(6, MS), False),
    "has not come to what was taken back": (worker(awaited=2, claimed=1), False),
    "has come to what was taken back": (worker(awaited=2, claimed=2), True),
    "may pass over its call": (worker(1, MS, doubted=1), False),
}


@pytest.mark.parametrize("case", GIVEN)
def test_who_is_given_calls(case: str) -> None:
    member, given = GIVEN[case]
    found = handed_out(core_of(member, size=1, waiting=2))
    assert [one for one, _ in found][:1] == [member] * given
    assert not (given and member.exclusive)


def test_a_call_that_was_taken_back_no_longer_occupies_its_worker() -> None:
    member = worker(exclusive=True)
    core_of(member, size=1, waiting=1).handle(e.HandOut(), NOW)
    assert not member.exclusive


def test_a_worker_without_a_board_has_one_call_at_a_time() -> None:
    member = worker(has_board=False)
    assert handed_out(core_of(member, waiting=3)) == [(member, 1)]


# One row per pool that has become smaller: its size, the calls that each worker has, and those
# that are given something.
SMALLER: dict[str, tuple[int, list[int], list[int]]] = {
    "one is busy, and one more may be": (2, [1, 0, 0], [1, 0]),
    "the busy are as many as may be": (1, [1, 0], [0]),
    "the busy are more than may be": (1, [1, 1, 0, 0], [0]),
    "nobody is busy": (1, [0, 0], [0]),
    "it has not": (2, [0, 0], [0, 1]),
}


@pytest.mark.parametrize("case", SMALLER)
def test_who_is_given_calls_of_a_pool_that_has_become_smaller(case: str) -> None:
    size, counts, given = SMALLER[case]
    members = [worker(count, MS, index=place) for place, count in enumerate(counts)]
    found = handed_out(core_of(*members, size=size, waiting=40))
    assert [*dict.fromkeys(member.index for member, _ in found)] == given


def test_who_gave_calls_back_is_offered_others_if_it_has_none() -> None:
    """Else those would be the same, and come back again."""
    for owed in (0, 1):
        member = worker(owed, MS)
        core = core_of(member, size=1, waiting=2)
        (send,) = core.handle(e.HandOut(), NOW)
        assert isinstance(send, e.Send)
        again = core.handle(e.Sent(member, (), send.work[1:]), NOW)  # type: ignore[index]
        assert any(isinstance(action, e.Send) for action in again) is not bool(owed)


def test_nobody_is_given_more_when_all_that_follows_is_to_wait() -> None:
    first, second = worker(), worker()
    core = core_of(first, second, waiting=4)
    (send,) = core.handle(e.HandOut(), NOW)
    assert isinstance(send, e.Send)
    assert core.handle(e.Sent(first, send.work, (), full=True), NOW) == []
    assert core.backlog.at_most(9) == 2


def test_what_is_sent_is_written_down() -> None:
    member, work = worker(sent_ns=0), calls(2)
    core = core_of(member)
    core.handle(e.Sent(member, work, (), exclusive=True, unsent=2), NOW)
    assert [*member.ledger] == work
    assert (member.sent_ns, member.exclusive, member.unsent) == (NOW, True, 2)
    core.handle(e.Copied(member), NOW + 1)
    assert (member.sent_ns, member.unsent) == (NOW + 1, 0)
    core.handle(e.Sent(member, (), ()), NOW + 2)
    assert (member.sent_ns, member.exclusive) == (NOW + 1, True)


@pytest.mark.parametrize("ahead", [False, True])
def test_no_worker_is_lent_soon_after_calls_were_sent_ahead(ahead: bool) -> None:
    member, other, work = worker(), worker(), calls(1 + ahead)
    core = core_of(member, other)
    core.handle(e.Sent(member, work, ()), NOW)
    assert core.lend(NOW + 5 * MS - 1) == ([] if ahead else [other])
    assert core.lend(NOW + 5 * MS) == [other]


def test_no_worker_is_lent_soon_after_a_call_waited() -> None:
    core = core_of(waiting=1)
    core.handle(e.HandOut(), NOW)
    core.backlog.clear()
    core.members = (worker(),)
    assert core.lend(NOW + 5 * MS - 1) == []
    assert core.lend(NOW + 5 * MS) == [*core.members]


def ending(since_ns: int, index: int = 0) -> Member:
    return worker(phase=Phase.DYING, leaving_since_ns=since_ns, index=index)


# One row per pool of the size 3: its workers, how many could not be ended, the calls that wait,
# and how many workers are hired, of how many too many one is to hurry.
HIRED: dict[str, tuple[list[Member], int, int, tuple[int, int] | None]] = {
    "nobody": ([], 0, 5, (3, -3)),
    "fewer calls": ([], 0, 2, (2, -4)),
    "one that starts": ([worker(ready=False, phase=Phase.STARTING)], 0, 2, (1, -4)),
    "as many that start": ([worker(ready=False, phase=Phase.STARTING)], 0, 1, None),
    "one that is busy": ([worker(9, MS)], 0, 2, (2, -3)),
    "all are busy": ([worker(9, MS, index=at) for at in range(3)], 0, 2, None),
    "one that could not be ended": ([], 1, 5, (2, -4)),
    "three that could not be ended": ([], 3, 5, (1, -5)),
    "a failed initializer": ([worker(phase=Phase.FAILED)], 0, 2, None),
    "one that dies before it was ready": ([worker(phase=Phase.DYING, ready=False)], 0, 2, None),
    "one that has just died": ([ending(NOW)], 0, 5, (2, -3)),
    "one that has died long ago": ([ending(NOW - 1000 * MS)], 0, 5, (3, -2)),
    "one beyond the size has just died": ([ending(NOW, 3)], 0, 5, (3, -2)),
    "the last place is that of one that has just died": ([ending(NOW, 2)], 0, 5, (2, -3)),
    "all have just died": ([ending(NOW, at) for at in range(3)], 0, 5, None),
    "more die than may be": ([ending(0, at) for at in range(4)], 0, 5, (3, 1)),
}


@pytest.mark.parametrize("case", HIRED)
def test_who_is_hired(case: str) -> None:
    members, lost, waiting, found = HIRED[case]
    core = core_of(*members, size=3, waiting=waiting)
    core.handle(e.Step(3, lost), NOW)
    assert hired(core) == (None if found is None else e.Hire(*found))


def refuse(core: Core, why: BaseException, now_ns: int = NOW) -> e.Action:
    (action,) = core.handle(e.Refused(why), now_ns)
    return action


NO_PROCESS, NO_THREAD = OSError("no process"), RuntimeError("no thread")


@pytest.mark.parametrize("why", [NO_PROCESS, NO_THREAD])
def test_a_pool_that_gets_no_worker_at_all_gives_up(why: Exception) -> None:
    assert refuse(core_of(), why) == e.GiveUp(f"cannot start a worker: {why}", why)


@pytest.mark.parametrize("why", [NO_PROCESS, NO_THREAD])
def test_a_pool_that_has_workers_gets_the_next_a_second_later(why: Exception) -> None:
    core = core_of(worker(9, MS), waiting=1)
    for second in range(40):
        now_ns = NOW + 1000 * MS * second
        assert hired_at(core, now_ns)
        assert core.handle(e.Fill(), now_ns) == [e.Hire(1, 0)]
        assert refuse(core, why, now_ns) == e.PutOff(why)
        assert not hired_at(core, now_ns + 1000 * MS - 1)
        assert core.handle(e.Fill(), now_ns + 1000 * MS - 1) == []


def hired_at(core: Core, now_ns: int) -> bool:
    return core.handle(e.HandOut(), now_ns) == [e.Hire(1, -2)]


def test_a_pool_that_has_lost_its_workers_tries_for_half_a_minute() -> None:
    core, member = core_of(waiting=1), worker()
    core.handle(e.Hired(member, has_board=True), NOW)
    core.members = ()
    assert refuse(core, NO_PROCESS) == e.PutOff(NO_PROCESS)
    assert core.next_look(NOW) == NOW + 1000 * MS
    assert refuse(core, NO_PROCESS, NOW + 30_000 * MS) == e.PutOff(NO_PROCESS)
    core.handle(e.Hired(member, has_board=True), NOW + 30_000 * MS)  # it begins anew
    core.members = ()
    for now_ns in (NOW + 31_000 * MS, NOW + 61_000 * MS):
        assert refuse(core, NO_PROCESS, now_ns) == e.PutOff(NO_PROCESS)
    assert isinstance(refuse(core, NO_PROCESS, NOW + 61_000 * MS + 1), e.GiveUp)
    assert isinstance(refuse(core, NO_THREAD, NOW), e.GiveUp)


FAILED = RuntimeError("line 3 of its top level raises KeyError: 1")


def spoil(core: Core, now_ns: int) -> e.Action:
    (action,) = core.handle(e.Refused(FAILED, by_script=True), now_ns)
    return action


def test_a_pool_that_has_lost_its_workers_runs_the_script_three_times() -> None:
    core, member = core_of(waiting=1), worker()
    for _ in range(2):
        core.handle(e.Hired(member, has_board=True), NOW)  # it begins anew
        core.members = ()
        for pause_ns in (50 * MS, 100 * MS):
            assert spoil(core, NOW) == e.PutOff(FAILED)
            assert core.next_look(NOW) == NOW + pause_ns
    assert spoil(core, NOW) == e.GiveUp(f"cannot start a worker: {FAILED}", FAILED)


def test_a_pool_that_has_workers_runs_the_script_after_pauses_of_at_most_a_second() -> None:
    core, now_ns = core_of(worker(9, MS), waiting=1), NOW
    for pause_ns in [50 * MS << times for times in range(5)] + 100 * [1000 * MS]:
        assert hired_at(core, now_ns)
        assert spoil(core, now_ns) == e.PutOff(FAILED)
        assert not hired_at(core, now_ns + pause_ns - 1)
        now_ns += pause_ns


def test_a_pool_whose_script_fails_for_its_first_worker_gives_up() -> None:
    assert spoil(core_of(), NOW) == e.GiveUp(f"cannot start a worker: {FAILED}", FAILED)


# One row per pool of the size 3 whose workers are all to be started: its workers, how many could
# not be ended, and how many are started.
FILLED: dict[str, tuple[list[Member], int, int]] = {
    "nobody": ([], 0, 3),
    "one that starts, one that dies": (
        [worker(ready=False, phase=Phase.STARTING), ending(NOW, 1)],
        0,
        2,
    ),
    "one is missing": ([worker(index=at) for at in range(2)], 0, 1),
    "all are there": ([worker(index=at) for at in range(3)], 0, 0),
    "one that could not be ended": ([], 1, 2),
}


@pytest.mark.parametrize("case", FILLED)
def test_who_is_started_before_calls_come(case: str) -> None:
    members, lost, missing = FILLED[case]
    core = core_of(*members, size=3)
    core.handle(e.Step(3, lost), NOW)
    assert core.lacks_workers is (missing > 0)
    assert core.handle(e.Fill(), NOW) == [e.Hire(missing, 0)] * bool(missing)


def test_nobody_is_hired_for_what_nobody_wants() -> None:
    core, run = core_of(), run_of()
    core.handle(e.Fed(run, [(1,)], last=True), NOW)
    run.drop()
    assert hired(core) is None
    assert not core.backlog


# One row per number of tasks that a worker may do, has done, and was sent, two calls each: how
# many more calls it is sent.
LEFT: dict[str, tuple[int, float, int, int]] = {
    "none done": (5, 0.0, 0, 5),
    "some done": (5, 2.0, 0, 3),
    "a part of one done": (5, 2.5, 0, 3),
    "almost another": (5, 2.9999999, 0, 2),
    "not quite another": (5, 2.99999, 0, 3),
    "some sent": (5, 1.0, 2, 3),
    "all": (2, 2.0, 0, 0),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_worker_is_sent_as_many_tasks_as_it_may_still_do(case: str) -> None:
    most, done, sent, more = LEFT[case]
    member = worker(tasks_done=done)
    if sent:
        member.ledger.give(span_of(run_of(at_once=2), 4))
        member.ledger.settle(1, 2)
    core = core_of(member, size=1, waiting=9, tasks_per_worker=most)
    assert sum(count for _, count in handed_out(core)) == more


# Answers.


def answered(core: Core, member: Member, *answers: tuple[int, int, int | None], **how: Any) -> Any:
    return core.handle(e.Answered(member, answers, ["payload"], **how), NOW)


def test_answers_end_calls_and_tell_their_time() -> None:
    first, second = span_of(run_of(), 2), span_of(run_of(), 2, start=2)
    other = Call("f", NO_POLICY)
    member = worker(exclusive=True)
    core = core_of(member)
    for work in (first, second, other):
        member.ledger.give(work)
    settled = answered(core, member, (1, 3, 300), (4, 1, 200), (5, 1, None))

    parts = [(first, 0, 2, 0), (second, 0, 1, 2), (second, 1, 1, 3), (other, 0, 1, 4)]
    assert settled == [e.Settle(member, parts, ["payload"], False)]
    assert core.pace.expected_ns("square") == 125_000
    assert core.pace.expected_ns("f") == MS
    assert (member.done, member.claimed, member.exclusive, member.ledger.owed) == (5, 0, False, 0)


def test_a_plain_answer_is_none_of_a_call_of_its_own() -> None:
    member = worker(1)
    core, work = core_of(member), member.ledger.head
    member.ledger.give(Call("f", NO_POLICY))
    settle, distrust = answered(core, member, (1, 2, 100), plain=True)
    assert settle == e.Settle(member, [(work, 0, 1, 0)], ["payload"], True)
    assert (distrust.worker, str(distrust.error)) == (
        member,
        "several answers for position 2, which has one call",
    )
    assert core.pace.expected_ns("square") == 50_000


def test_answers_that_were_read_before_are_passed_over() -> None:
    member = worker(3)
    core, work = core_of(member), member.ledger.head
    member.ledger.settle(1)
    (settle,) = answered(core, member, (1, 1, 5), (1, 2, 5), (3, 1, 5))
    assert settle.settled == [(work, 1, 1, 2), (work, 2, 1, 3)]
    assert answered(core, member, (2, 1, 5)) == []


def test_an_answer_before_which_one_is_unread_is_left_to_that() -> None:
    member = worker(3)
    core = core_of(member)
    assert answered(core, member, (2, 1, None), peeked=True) == []
    assert answered(core_of(), worker(), (1, 1, None), peeked=True) == []
    (distrust,) = answered(core, member, (2, 1, None))
    assert isinstance(distrust, e.Distrust)
    assert member.ledger.owed == 3


def test_answers_of_what_was_given_up_are_passed_over() -> None:
    member = worker(1)
    core, later = core_of(member), Call("f", NO_POLICY)
    member.ledger.strike()
    assert answered(core, member, (1, 1, 5)) == []
    member.ledger.give(later)
    (settle,) = answered(core, member, (1, 1, 5), (2, 1, 5))
    assert settle.settled == [(later, 0, 1, 1)]


def test_answers_of_a_condemned_worker_are_not_heard() -> None:
    member = worker(1, phase=Phase.CONDEMNED)
    assert answered(core_of(member), member, (1, 1, 5)) == []
    assert member.ledger.owed == 1


def test_a_worker_has_claimed_what_comes_before_its_next_call() -> None:
    member = worker(3)
    core = core_of(member)
    answered(core, member, (1, 2, None))
    assert member.claimed == 2
    member.claimed = 3
    answered(core, member, (3, 1, None))
    assert member.claimed == 3


# One row per number of calls that make a task, and the answers, one call each, that make two
# tasks.
DONE = {"1": 2, "2": 4, "6": 12}


@pytest.mark.parametrize("at_once", DONE)
def test_a_worker_that_has_done_its_tasks_is_told_to_stop(at_once: str) -> None:
    member, count = worker(), DONE[at_once]
    member.ledger.give(span_of(run_of(at_once=int(at_once)), count))
    core = core_of(member, tasks_per_worker=2)
    found = [answered(core, member, (at + 1, 1, None))[1:] for at in range(count)]
    assert found == [[]] * (count - 1) + [[e.Stop(member)]]
    assert member.tasks_done == pytest.approx(2)


def test_a_worker_that_has_done_its_tasks_answers_what_it_was_sent_and_then_stops() -> None:
    member = worker(2)
    core = core_of(member, tasks_per_worker=1)
    assert len(answered(core, member, (1, 1, None))) == 1
    assert member.phase is Phase.RETIRING
    assert answered(core, member, (2, 1, None))[1:] == [e.Stop(member)]
    assert member.phase is Phase.STOPPING
