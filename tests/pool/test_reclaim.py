"""When workers are looked at, when they give calls back, and when to look again."""

from __future__ import annotations

from typing import Any

import pytest
from support_core import MS, NOW, run_of, worker

from safepool.pool.core import events as e
from safepool.pool.core import reclaim
from safepool.pool.core.machine import Core
from safepool.pool.core.policy import Policy
from safepool.pool.core.work import Call
from safepool.pool.core.worker import Member, Phase

pytestmark = pytest.mark.unit

# One row per worker: how it is when no other is idle, and when one is.
SLOW: dict[str, tuple[Member, bool, bool]] = {
    "has nothing": (worker(), False, False),
    "is just long in a call": (worker(2, sent_ns=NOW - 20 * MS - 1), True, True),
    "is almost long in a call": (worker(2, sent_ns=NOW - 20 * MS), False, True),
    "is just long for one that could be divided": (worker(2, sent_ns=NOW - MS - 1), False, True),
    "is almost long for one that could be divided": (worker(2, sent_ns=NOW - MS), False, False),
    "has begun its call lately": (
        worker(2, sent_ns=NOW - 30 * MS, claimed=1, since_ns=NOW - MS),
        False,
        False,
    ),
    "has nothing behind its call": (worker(1, sent_ns=NOW - 30 * MS, claimed=1), False, False),
    "has no board": (worker(2, sent_ns=NOW - 3000 * MS, has_board=False), False, False),
    "has just enough to divide": (worker(2, 1_250_001), False, True),
    "has almost enough to divide": (worker(2, 1_250_000), False, False),
    "has enough but for what it has claimed": (worker(3, 1_250_000, claimed=1), False, False),
    "has one call that it has not claimed": (worker(2, 3 * MS, claimed=1), False, False),
    "has two calls that it has not claimed": (worker(3, 3 * MS, claimed=1), False, True),
    "has not come to its call": (worker(1, sent_ns=NOW - 1000 * MS - 1), False, True),
    "may come to its call": (worker(1, sent_ns=NOW - 1000 * MS), False, False),
    "is sent a large call": (worker(1, sent_ns=0, unsent=1), False, False),
}


@pytest.mark.parametrize("case", SLOW)
def test_who_gives_calls_back(case: str) -> None:
    member, alone, beside_an_idle_one = SLOW[case]
    idle = worker()

    def slow(*members: Member, waits: bool = False) -> list[Member]:
        return [*reclaim.slow_workers(members, NOW, nothing_waits=not waits)]

    assert slow(member) == [member] * alone
    assert slow(member, idle) == slow(idle, member) == [member] * beside_an_idle_one
    assert slow(member, idle, waits=True) == [member] * alone


def test_what_was_answered_counts_as_done() -> None:
    """Two of three calls are left, and the worker has claimed none of them."""
    member = worker(3, 1_250_000)
    member.ledger.settle(1)
    assert [*reclaim.slow_workers([member, worker()], NOW, nothing_waits=True)] == []


# One row per worker: whether its board matters when no other is idle, and when one is.
LOOKED_AT: dict[str, tuple[Member, bool, bool]] = {
    "has nothing": (worker(), False, False),
    "has more than one call": (worker(2), True, True),
    "is in its only call": (worker(1, claimed=1), False, False),
    "may not have come to its only call": (worker(1), False, True),
    "has a call with a timeout": (worker(1, policy=Policy(timeout_s=1.0), claimed=1), True, True),
    "has a timeout and no board": (
        worker(1, policy=Policy(timeout_s=1.0), has_board=False),
        False,
        False,
    ),
    "has not come to what was taken back": (worker(awaited=1), True, True),
}


@pytest.mark.parametrize("case", LOOKED_AT)
def test_whose_board_is_read(case: str) -> None:
    member, alone, beside_an_idle_one = LOOKED_AT[case]
    idle = worker()

    def looked_at(*members: Member, waits: bool = False) -> list[Member]:
        return [*reclaim.to_look_at(members, nothing_waits=not waits)]

    assert looked_at(member) == [member] * alone
    assert looked_at(member, idle) == looked_at(idle, member) == [member] * beside_an_idle_one
    assert looked_at(member, idle, waits=True) == [member] * alone


# One row per worker: after how many nanoseconds to look again when no other is idle, and when one
# is. It was sent its calls half a second ago.
AGAIN: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "has nothing": ({}, [], []),
    "has more than one call, and is in the first": (
        {"calls": 2, "claimed": 1},
        [20 * MS],
        [MS],
    ),
    "may not have come to its only call": ({"calls": 1}, [], [500 * MS]),
    "may not have come to the first": ({"calls": 2}, [20 * MS], [MS, 500 * MS]),
}


@pytest.mark.parametrize("case", AGAIN)
def test_when_to_look_again(case: str) -> None:
    state, alone, beside_an_idle_one = AGAIN[case]
    member = worker(sent_ns=NOW - 500 * MS, **state)

    assert reclaim.next_looks([member], NOW) == [NOW + after for after in alone]
    assert reclaim.next_looks([member, member], NOW) == [NOW + after for after in alone * 2]
    found = reclaim.next_looks([member, worker()], NOW)
    assert found == [NOW + after for after in beside_an_idle_one]


def core_of(*members: Member, waits: bool = False, size: int = 2, now_ns: int = NOW) -> Core:
    core = Core(size)
    core.members = members
    core.handle(e.Queued([Call("f", Policy())] if waits else []), now_ns)
    return core


def leaving(since_ns: int) -> Member:
    return worker(phase=Phase.STOPPING, leaving_since_ns=since_ns)


# One row per pool: when a step is due, in nanoseconds from now.
DUE: dict[str, tuple[Core, int | None]] = {
    "nobody": (core_of(), None),
    "an idle worker": (core_of(worker()), None),
    "one that ends, and nothing waits": (core_of(leaving(NOW)), None),
    "one that ends has a place": (core_of(leaving(NOW - 300 * MS), waits=True), 700 * MS),
    "of two the first": (
        core_of(leaving(NOW - 300 * MS), leaving(NOW - 400 * MS), waits=True),
        600 * MS,
    ),
    "one that ends has had a place": (core_of(leaving(NOW - 1000 * MS), waits=True), None),
    "one that stays": (core_of(worker(leaving_since_ns=NOW - 1), waits=True), None),
    "calls ahead": (core_of(worker(2)), 20 * MS),
    "a timeout": (
        core_of(worker(2, policy=Policy(timeout_s=0.005), claimed=1, since_ns=NOW - MS)),
        4 * MS,
    ),
    "a long timeout": (
        core_of(worker(1, policy=Policy(timeout_s=10.0), claimed=1, since_ns=NOW)),
        10_000 * MS,
    ),
    "a timeout without a board": (
        core_of(worker(1, policy=Policy(timeout_s=0.005), sent_ns=NOW - 2 * MS, has_board=False)),
        3 * MS,
    ),
    "a timeout of a call that was not claimed": (
        core_of(worker(1, policy=Policy(timeout_s=0.005), since_ns=NOW - 2 * MS)),
        5 * MS,
    ),
    "a timeout of one that is ended for another reason": (
        core_of(worker(1, policy=Policy(timeout_s=0.005), phase=Phase.CONDEMNED)),
        None,
    ),
}


@pytest.mark.parametrize("case", DUE)
def test_when_a_step_is_due(case: str) -> None:
    core, after_ns = DUE[case]
    assert core.next_look(NOW) == (None if after_ns is None else NOW + after_ns)


# One row per time after which an idle worker goes, and timeout of a call, in milliseconds: when a
# step is due. One more worker ends, and has its place for ten more.
FIRST = [(3, 5, 3), (30, 5, 5), (30, 50, 10)]


@pytest.mark.parametrize(("idle_ms", "timeout_ms", "due_ms"), FIRST)
def test_a_step_is_due_at_the_first_of_all(idle_ms: int, timeout_ms: int, due_ms: int) -> None:
    busy = worker(1, policy=Policy(timeout_s=timeout_ms / 1000), claimed=1, since_ns=NOW)
    core = core_of(worker(idle_since_ns=NOW), leaving(NOW - 990 * MS), busy, waits=True, size=3)
    core.idle_ns = idle_ms * MS
    assert core.next_look(NOW) == NOW + due_ms * MS


def test_a_step_is_due_when_an_idle_worker_may_go() -> None:
    core = core_of(worker(idle_since_ns=7), worker(), worker(idle_since_ns=5), size=3)
    assert core.next_look(NOW) is None
    core.idle_ns = 100
    assert core.next_look(NOW) == 105


# One row per pool of the size 2: whether its workers need a look.
BUSY: dict[str, tuple[Core, bool]] = {
    "idle workers": (core_of(worker(), worker()), False),
    "a worker too many": (core_of(worker(), worker(), worker()), True),
    "one that owes a call": (core_of(worker(), worker(1)), True),
    "one that has not come to what was taken back": (core_of(worker(awaited=1)), True),
    "one that has": (core_of(worker(awaited=1, claimed=1)), False),
    "one that is to go": (core_of(worker(phase=Phase.RETIRING), worker()), True),
}


@pytest.mark.parametrize("case", BUSY)
def test_whether_workers_need_a_look(case: str) -> None:
    core, busy = BUSY[case]
    assert core.is_busy(2, 0) is busy
    assert core.is_busy(1, 0)
    assert core.is_busy(3, 0)
    assert core.is_busy(2, 1)


# One row per pool of two workers, long after the last calls: what keeps it from lending one.
UNLENT: dict[str, dict[str, Any]] = {
    "a call waits": {"waits": True},
    "it has become smaller": {"size": 1},
}


@pytest.mark.parametrize("case", UNLENT)
def test_no_worker_is_lent_while(case: str) -> None:
    assert core_of(worker(), worker(), **UNLENT[case]).lend(NOW) == []


def test_workers_are_lent_that_have_nothing_and_may_be_given_something() -> None:
    members = {
        "idle": worker(),
        "busy": worker(1),
        "starting": worker(phase=Phase.STARTING, ready=False),
        "to go": worker(phase=Phase.RETIRING),
        "without a board": worker(has_board=False),
        "large": worker(unsent=1),
        "second": worker(),
    }
    assert core_of(*members.values(), size=7).lend(NOW) == [members["idle"], members["second"]]


def test_no_worker_is_lent_of_a_pool_that_cancels_breaks_or_replaces_them() -> None:
    core = core_of(worker())
    core.handle(e.Close(cancel=True), NOW)
    assert core.lend(NOW) == []
    core = core_of(worker())
    core.handle(e.Break(), NOW)
    assert core.lend(NOW) == []
    core = Core(2, 5)
    core.members = (worker(),)
    assert core.lend(NOW) == []


@pytest.mark.parametrize(("items", "presses"), [(16, False), (17, True)])
def test_no_worker_is_lent_soon_after_many_calls_at_once(items: int, presses: bool) -> None:
    core = core_of(worker())
    core.handle(e.Fed(run_of(Policy()), [(n,) for n in range(items)], last=True), NOW)
    core.backlog.clear()
    assert core.lend(NOW + 5 * MS - 1) == ([] if presses else [*core.members])
    assert core.lend(NOW + 5 * MS) == [*core.members]


# One row per pool: its size, the places of who stays and of who ends, and the next one's place.
PLACES: dict[str, tuple[int, list[int], list[int], int]] = {
    "the first": (2, [], [], 0),
    "the second": (2, [0], [], 1),
    "one between": (3, [0, 2], [], 1),
    "not that of one that ends": (2, [], [0], 1),
    "that of one that ends, if there is no other": (2, [0], [1], 1),
    "the lowest of these": (2, [], [1, 0], 0),
    "beyond the size": (1, [0], [], 1),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_place_of_the_next(case: str) -> None:
    size, staying, ending, place = PLACES[case]
    core = Core(size)
    phases = {Phase.READY: staying, Phase.DYING: ending}
    core.members = tuple(
        worker(index=index, phase=phase) for phase, some in phases.items() for index in some
    )
    assert core.place_of_next() == place


def test_the_place_of_one_that_could_not_be_ended_is_not_given_while_it_is_there() -> None:
    core = core_of(worker(), size=3)
    member = core.members[0]
    core.handle(e.Died(member, -9, lost=1), NOW)
    assert (core.members, core.place_of_next()) == ((), 1)
    core.handle(e.Died(worker(index=1), -9, lost=1), NOW)  # one that has ended: no further one
    assert core.place_of_next() == 1
    core.handle(e.Step(3, lost=1), NOW)
    assert core.place_of_next() == 1
    core.handle(e.Step(3), NOW)
    assert core.place_of_next() == 0
