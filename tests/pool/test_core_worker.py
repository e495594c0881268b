"""A worker as the core knows it: what each state allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support_books import check_books
from support_core import NOW, run_of, span_of, worker

from safepool.pool.core import events as e
from safepool.pool.core.machine import Core
from safepool.pool.core.worker import Member, Phase

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unit

FLAGS = (
    "leaving",
    "dismissed",
    "fails_to_start",
    "is_in_a_call",
    "silent",
    "may_pass_over",
    "is_idle",
    "is_bound",
    "takes_more",
    "is_ahead",
    "may_be_unheard",
)

# One row per worker: what holds of it.
HOLDS: dict[str, tuple[Member, set[str]]] = {
    "idle": (worker(), {"is_idle", "takes_more"}),
    "starting": (worker(ready=False, phase=Phase.STARTING), {"takes_more"}),
    "to go": (worker(phase=Phase.RETIRING), {"is_idle", "takes_more"}),
    "dying": (worker(phase=Phase.DYING), {"leaving", "takes_more"}),
    "dying, and was never ready": (
        worker(ready=False, phase=Phase.DYING),
        {"leaving", "fails_to_start", "takes_more"},
    ),
    "to stop": (worker(phase=Phase.STOPPING), {"leaving", "dismissed", "takes_more"}),
    "to stop, and was never ready": (
        worker(ready=False, phase=Phase.STOPPING),
        {"leaving", "dismissed", "takes_more"},
    ),
    "failed": (
        worker(ready=False, phase=Phase.FAILED),
        {"leaving", "dismissed", "fails_to_start", "takes_more"},
    ),
    "in its call": (worker(1, claimed=1), {"is_in_a_call", "takes_more"}),
    "past its call": (worker(1, claimed=2), {"takes_more"}),
    "before its call": (worker(1), {"takes_more", "may_be_unheard"}),
    "in a call, without a board": (worker(1, has_board=False), {"is_in_a_call"}),
    "without a board": (worker(has_board=False), {"is_idle", "takes_more"}),
    "in the first of two calls": (
        worker(2, claimed=1),
        {"is_in_a_call", "takes_more", "is_ahead"},
    ),
    "before the first of two calls": (worker(2), {"takes_more", "is_ahead", "may_be_unheard"}),
    "with two calls, without a board": (worker(2, has_board=False), {"is_in_a_call"}),
    "with two calls that are not sent yet": (worker(2, unsent=1), set()),
    "with one call that is not sent yet": (worker(1, unsent=1), set()),
    "with a call that nothing may follow": (worker(1, exclusive=True), set()),
    "with nothing, while something is copied": (worker(unsent=1), {"is_idle"}),
    "in a chunk that stays together": (
        worker(2, claimed=1, bound=True),
        {"is_in_a_call", "is_bound"},
    ),
    "not come to what was taken back": (
        worker(claimed=1, awaited=2),
        {"silent", "takes_more"},
    ),
    "come to what was taken back": (worker(claimed=2, awaited=2), {"is_idle", "takes_more"}),
    "perhaps passing over its call": (
        worker(1, claimed=1, doubted=1),
        {"is_in_a_call", "may_pass_over", "takes_more"},
    ),
    "past what it might have passed over": (
        worker(claimed=1, doubted=1),
        {"is_idle", "takes_more"},
    ),
}


@pytest.mark.parametrize("case", HOLDS)
def test_what_holds_of_a_worker(case: str) -> None:
    member, holds = HOLDS[case]
    assert {flag for flag in FLAGS if getattr(member, flag)} == holds


def test_the_next_call_is_the_first_that_is_not_answered() -> None:
    member = worker(3)
    assert (worker().next, member.next) == (0, 1)
    member.ledger.settle(1)
    assert member.next == 2
    member.doubted = 1
    assert not member.may_pass_over
    member.doubted = 2
    assert member.may_pass_over


# One row per position of a call: whether a worker may be in it that has claimed the second.
@pytest.mark.parametrize(("position", "may_be"), [(1, False), (2, True), (3, True)])
def test_where_a_worker_can_be(position: int, may_be: bool) -> None:
    assert worker(claimed=2).can_be_at(position) is may_be
    assert worker(claimed=2, has_board=False).can_be_at(position)


def with_ledger(change: Callable[[Member], object]) -> list[Member]:
    """Return a worker with two spans of two calls each, to which something has happened."""
    member = worker(2, 5)
    member.ledger.give(span_of(run_of(), 2, start=2, expected_ns=5))
    change(member)
    return [member]


def owe(member: Member, **wrong: int) -> None:
    for name, value in wrong.items():
        setattr(member.ledger, name, value)


def have_answered(member: Member, place: int, done: int) -> None:
    work = [*member.ledger][place]
    work.done = done
    member.ledger.owed -= done
    member.ledger.expected_ns -= 5 * done


def put(member: Member, place: int, position: int) -> None:
    [*member.ledger][place].position = position


def complaint(core: Core) -> str:
    with pytest.raises(AssertionError) as raised:
        check_books(core)
    return str(raised.value)


# One row per pool whose books are wrong: its workers, and what the check says.
WRONG: dict[str, tuple[list[Member], str]] = {
    "ended": ([worker(phase=Phase.ENDED)], "worker 7: it has ended, and is kept"),
    "not ready": ([worker(1, ready=False)], "worker 7: it is not ready, and was given work"),
    "no board": (
        with_ledger(lambda one: setattr(one, "has_board", False)),
        "worker 7: work was sent ahead without a board",
    ),
    "condemned": (
        [worker(phase=Phase.CONDEMNED)],
        "worker 7: it is condemned without a reason",
    ),
    "to be ended": (
        [worker(condemned=ValueError())],
        "worker 7: it is condemned without a reason",
    ),
    "calls": (
        with_ledger(lambda one: owe(one, owed=3)),
        "worker 7: its ledger counts calls wrongly",
    ),
    "time": (
        with_ledger(lambda one: owe(one, expected_ns=15)),
        "worker 7: its ledger counts their time wrongly",
    ),
    "answered": (
        with_ledger(lambda one: have_answered(one, 0, 2)),
        "worker 7: work is owed that was answered",
    ),
    "answered out of order": (
        with_ledger(lambda one: have_answered(one, 1, 1)),
        "worker 7: later work was answered first",
    ),
    "position 0": (
        with_ledger(lambda one: put(one, 0, 0)),
        "worker 7: positions are not in order",
    ),
    "a position twice": (
        with_ledger(lambda one: put(one, 1, 2)),
        "worker 7: positions are not in order",
    ),
    "a position that was not sent": (
        with_ledger(lambda one: put(one, 1, 4)),
        "worker 7: positions are not in order",
    ),
    "places": (
        [worker(index=1), worker(index=1), worker(index=1, phase=Phase.DYING)],
        "two workers have one place: [1, 1]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_books_that_are_wrong(case: str) -> None:
    members, what = WRONG[case]
    core = Core(2)
    check_books(core)
    core.members = (*members,)
    assert complaint(core) == what


def test_books_that_are_right() -> None:
    core = Core(3)
    gone = worker(1, index=1, phase=Phase.DYING, has_board=False)
    core.members = (worker(index=1), gone, *with_ledger(lambda one: have_answered(one, 0, 1)))
    core.handle(e.Fed(run_of(), [1, 2], last=True), NOW)
    check_books(core)


def test_work_that_stands_in_two_places() -> None:
    core, work = Core(2), span_of(run_of(), 2)
    core.members = worker(), worker(index=1)
    core.members[0].ledger.give(work)
    core.backlog.put_back([work])
    assert complaint(core) == "work stands in two places"
    core.backlog.clear()
    check_books(core)
    core.members[1].ledger.give(work)
    assert complaint(core) == "work stands in two places"


def test_a_map_that_waits_and_is_not_noted() -> None:
    core, run = Core(2), run_of()
    core.handle(e.Fed(run, [1, 2], last=True), NOW)
    run.queued = False
    assert complaint(core) == "a map waits that is not noted as queued"


@pytest.mark.parametrize("event", [e.Break(), e.Close(cancel=True)])
def test_work_that_waits_in_vain(event: e.Event) -> None:
    core = Core(2)
    core.handle(event, NOW)
    check_books(core)
    core.backlog.put_back([span_of(run_of(), 1)])
    assert complaint(core) == "work waits in a pool that runs no more"
