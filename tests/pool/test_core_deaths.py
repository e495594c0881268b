"""What the core makes of a worker's death: facts, calls that wait again, and the pool's end."""

from __future__ import annotations

from typing import Any

import pytest
from support_core import MS, NOW, ending, worker

from safepool.errors import MemoryExceeded, OutOfMemory, TaskTimeoutError
from safepool.pool.calls.mapping import Span
from safepool.pool.core import events as e
from safepool.pool.core.ending import Ending, Lost, Stage
from safepool.pool.core.machine import Core
from safepool.pool.core.policy import Policy
from safepool.pool.core.work import Call
from safepool.pool.core.worker import Member, Phase

pytestmark = pytest.mark.unit

OVER = TaskTimeoutError(7, 1.5, "square", "")
TOO_MUCH = MemoryExceeded(limit_bytes=1, held_bytes=2, born_bytes=0, source="statm")
OOM = OutOfMemory(kills_before=0, kills=1, source="x", limit_bytes=None, used_bytes=None, group="")
FAULT, OTHER = OSError("broken"), ValueError("wrong")
RETRY = Policy(retries=1)


def ended(member: Member, core: Core | None = None, **facts: Any) -> list[e.Action]:
    """Let the worker end, in a pool of its own if there is none; a signal killed it."""
    core = core or Core(1)
    if facts.pop("forced", False):
        core.handle(e.Close(forces=["kill"]), NOW)
    core.members = (*core.members, member)
    return core.handle(e.Died(member, **{"exitcode": -9, **facts}), NOW)


def of(kind: type, actions: list[e.Action]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def ending_of(member: Member, **facts: Any) -> Ending:
    (bury,) = of(e.Bury, ended(member, **facts))
    assert bury.worker is member
    assert member.phase is Phase.ENDED
    assert isinstance(bury.ending, Ending)
    return bury.ending


def answer(member: Member, position: int) -> e.Answered:
    return e.Answered(member, [(position, 1, None)], [b""], peeked=True)


# One row per death: the worker, what is told of its end, and what differs from an idle one's.
ENDS: dict[str, tuple[Member, dict[str, Any], dict[str, Any]]] = {
    "idle": (worker(), {}, {}),
    "of nothing that is known": (worker(), {"exitcode": None}, {"exitcode": None}),
    "before its initializer ended": (
        worker(ready=False, phase=Phase.STARTING),
        {},
        {"stage": Stage.STARTING},
    ),
    "after calls": (worker(done=1), {}, {"stage": Stage.USED}),
    "killed by the pool": (worker(), {"by_pool": True}, {"by_pool": True}),
    "as it was told": (worker(phase=Phase.STOPPING), {}, {"dismissed": True}),
    "out of memory": (worker(), {"oom": OOM, "stack": "x"}, {"oom": OOM, "stack": "x"}),
    "with the pool": (worker(), {"forced": True}, {"pool_ends": True}),
    "for a defect": (worker(), {"fault": FAULT}, {"fault": FAULT}),
    "for a time that was over": (
        worker(phase=Phase.CONDEMNED, condemned=OVER),
        {},
        {"condemned": OVER},
    ),
    "for its memory": (
        worker(phase=Phase.CONDEMNED, condemned=TOO_MUCH),
        {},
        {"exceeded": TOO_MUCH},
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_facts_of_a_death(case: str) -> None:
    member, told, differs = ENDS[case]
    assert ending_of(member, **told) == ending(**{"stage": Stage.READY, **differs})


# One row per worker that was in the second of three calls: the worker, what is told, whether the
# call is queued again, and the indexes of all calls that wait afterwards.
LOSES: dict[str, tuple[Member, dict[str, Any], bool, list[int]]] = {
    "no retry": (worker(3), {}, False, [2]),
    "a retry": (worker(3, policy=RETRY), {}, True, [1, 2]),
    "a retry, and the pool ends": (worker(3, policy=RETRY), {"forced": True}, False, [2]),
    "a retry, and its time was over": (
        worker(3, policy=RETRY, phase=Phase.CONDEMNED, condemned=OVER),
        {},
        False,
        [2],
    ),
    "a retry, and too much memory": (
        worker(3, policy=RETRY, phase=Phase.CONDEMNED, condemned=TOO_MUCH),
        {},
        True,
        [1, 2],
    ),
    "no board": (worker(3, has_board=False), {"claimed": 0, "began": 0}, False, [2]),
}


@pytest.mark.parametrize("case", LOSES)
def test_the_call_that_a_worker_was_in_is_lost_and_the_others_wait(case: str) -> None:
    member, told, again, waiting = LOSES[case]
    member.ledger.settle(1)
    core = Core(1)
    actions = ended(member, core, **{"claimed": 2, "began": 2, **told})
    (bury,) = of(e.Bury, actions)
    (lost,) = bury.ending.lost
    assert (lost.place, lost.begun, lost.again is not None) == (1, True, again)
    assert not again or (lost.again.attempts, lost.again.start) == (1, 1)
    assert [item[0] for entry in core.backlog for item in entry.items] == waiting  # type: ignore[union-attr]


def test_a_call_of_which_there_is_a_copy_waits_again_and_one_of_which_there_is_none_is_lost() -> (
    None
):
    copied, gone, member, core = Call("f", Policy()), Call("g", Policy()), worker(), Core(1)
    copied.pickled = b"f"
    for call in (copied, gone):
        member.ledger.give(call)
    actions = ended(member, core)
    (bury,) = of(e.Bury, actions)
    assert bury.ending.lost == (Lost(gone, 0, begun=False, again=None),)
    assert [*core.backlog] == [copied]
    assert of(e.Wait, actions) == [e.Wait([copied])]


def test_a_call_that_was_lost_runs_again_as_often_as_its_policy_says() -> None:
    call = Call("f", Policy(retries=2))
    call.pickled = b"f"
    for attempts in (1, 2):
        member = worker()
        member.ledger.give(call)
        (lost,) = ending_of(member, claimed=1, began=1).lost
        assert (lost.again, call.attempts) == (call, attempts)
    member = worker()
    member.ledger.give(call)
    (lost,) = ending_of(member, claimed=1, began=1).lost
    assert (lost.again, call.attempts) == (None, 2)


def test_who_dies_of_arguments_that_it_reads_lets_each_call_travel_alone() -> None:
    member, core = worker(3), Core(1)
    member.ledger.give(Span(member.ledger.head.run, 3, [(3,), (4,)]))  # type: ignore[union-attr]
    behind = Call("f", Policy())
    behind.pickled = b"f"
    member.ledger.give(behind)
    member.ledger.settle(1, 3)
    actions = ended(member, core, claimed=4, began=3)
    (bury,) = of(e.Bury, actions)
    assert (bury.ending.stage, bury.ending.reading) == (Stage.READING, "square")
    assert bury.ending.lost == ()
    alone = [one for one in core.backlog if isinstance(one, Span)]
    assert [(one.start, one.alone) for one in alone] == [(3, True), (4, True)]
    assert behind in [*core.backlog]


def test_who_dies_before_it_reads_arguments_leaves_them_together() -> None:
    member, core = worker(3), Core(1)
    (bury,) = of(e.Bury, ended(member, core, claimed=0, began=0))
    assert bury.ending.stage is Stage.READY
    assert [(one.start, one.alone) for one in core.backlog] == [(0, False)]  # type: ignore[union-attr]


def test_what_a_condemned_worker_read_counts_as_begun() -> None:
    member, core = worker(3, phase=Phase.CONDEMNED, condemned=OVER), Core(1)
    (bury,) = of(e.Bury, ended(member, core, claimed=1, began=0))
    assert [lost.place for lost in bury.ending.lost] == [0]
    assert [(one.start, one.count) for one in core.backlog] == [(1, 2)]  # type: ignore[union-attr]


def test_results_on_the_board_of_the_dead_count() -> None:
    member = worker(2)
    actions = ended(member, claimed=2, began=2, results=[answer(member, 1)])
    assert [type(action) for action in actions] == [e.Settle, e.Bury]
    (bury,) = of(e.Bury, actions)
    assert [lost.place for lost in bury.ending.lost] == [1]
    assert bury.ending.stage is Stage.USED


def test_results_of_a_condemned_worker_do_not_count() -> None:
    """Nor those of one without a board."""
    member = worker(1, phase=Phase.CONDEMNED, condemned=OVER)
    actions = ended(member, claimed=1, began=1, results=[answer(member, 1)])
    assert [type(action) for action in actions] == [e.Bury]
    member = worker(1, has_board=False)
    actions = ended(member, results=[answer(member, 1)])
    assert [type(action) for action in actions] == [e.Bury]


def test_the_first_defect_is_told() -> None:
    """Results that cannot be right are one, unless another was found before."""
    for fault in (FAULT, None):
        member = worker(1)
        wrong = [answer(member, at)._replace(peeked=False) for at in (9, 8)]
        found = ending_of(member, claimed=1, began=1, results=wrong, fault=fault).fault
        if fault is None:
            assert "position 9" in str(found)
        else:
            assert found is fault


def test_the_dead_is_no_member_and_the_others_are() -> None:
    core, other, member = Core(2), worker(), worker()
    core.members = (other,)
    ended(member, core)
    assert core.members == (other,)


def test_a_cancelled_call_of_the_dead_is_forgotten_and_others_are_not() -> None:
    core, unwanted = Core(2), Call("f", Policy())
    members = worker(1), worker(1)
    core.members = members
    for member in members:
        member.ledger.give(unwanted)
        core.handle(e.Revoked(member, 2, 2, (), e.Then(cancelled=unwanted)), NOW)
    core.handle(e.Died(members[0], -9, claimed=2, began=2), NOW)
    actions = core.handle(e.Answered(members[1], [(1, 1, None)], [b""]), NOW)
    assert of(e.Revoke, actions) == [e.Revoke(members[1], 2, e.Then(cancelled=unwanted))]
    for member in members:  # once
        actions = core.handle(e.Answered(member, [(1, 1, None)], [b""]), NOW)
        assert of(e.Revoke, actions) == []


def test_a_failed_initializer_breaks_the_pool_once_its_worker_has_ended() -> None:
    error = ValueError("wrong")
    member = worker(ready=False, phase=Phase.FAILED, failure=error)
    actions = ended(member)
    why = "the initializer raised an exception in a worker: ValueError: wrong"
    assert of(e.GiveUp, actions) == [e.GiveUp(why, error)]


# One row per number of workers that could not be ended, of a pool of two: whether it gives up.
@pytest.mark.parametrize(("lost", "gives_up"), [(4, False), (5, True)])
def test_too_many_workers_that_cannot_be_ended_break_the_pool(lost: int, gives_up: bool) -> None:
    member = worker(done=1)
    found = of(e.GiveUp, ended(member, Core(2), lost=lost))
    assert len(found) == gives_up
    for one in found:
        assert one.reason == (
            "5 workers did not end after SIGKILL: each is in a system call that does not return. "
            "See whether a disk or network mount that they use has stopped"
        )
        assert not one.ask


@pytest.mark.parametrize("breaks", [False, True])
def test_one_death_breaks_a_pool_that_is_to_be_as_the_standard_one(breaks: bool) -> None:
    member = worker(done=1)
    found = of(e.GiveUp, ended(member, Core(1, break_on_death=breaks), exitcode=3))
    assert len(found) == breaks
    for one in found:
        assert one.reason == (
            "A process in the process pool was terminated abruptly while the future was "
            "running or pending: worker 7 ended with exit code 3"
        )
        assert not one.ask


def test_a_dismissed_worker_breaks_no_pool() -> None:
    member = worker(phase=Phase.STOPPING)
    actions = ended(member, Core(1, break_on_death=True), exitcode=0)
    assert [type(action) for action in actions] == [e.Bury]


def next_start_ns(core: Core, now_ns: int) -> int:
    """Return when a worker is started for a call that waits; it is put away again."""
    core.handle(e.Queued([Call("f", Policy())]), now_ns)
    looks = core.next_look(now_ns)
    times = [now_ns, *([] if looks is None else [looks - 1, looks])]
    hired = [bool(of(e.Hire, core.handle(e.HandOut(), time))) for time in times]
    core.backlog.clear()
    assert hired == [*[False] * (len(times) - 1), True]
    return times[-1]


# One row per end of a worker before it ran a task: exit code, by the pool, out of memory, and
# whether to ask if the system refuses something.
USELESS: dict[str, tuple[int | None, bool, OutOfMemory | None, bool]] = {
    "an exit code": (3, False, None, True),
    "0": (0, False, None, True),
    "nothing known": (None, False, None, True),
    "a crash": (-11, False, None, False),
    "killed by the pool": (-9, True, None, True),
    "out of memory": (3, False, OOM, False),
}


@pytest.mark.parametrize("case", USELESS)
def test_the_third_crash_before_a_task_breaks_the_pool(case: str) -> None:
    exitcode, by_pool, oom, asks = USELESS[case]
    core = Core(1)
    for _ in range(2):
        member = worker()
        actions = ended(member, core, exitcode=exitcode, by_pool=by_pool, oom=oom)
        assert actions[1:] == []
        assert next_start_ns(core, NOW) == NOW
    member = worker()
    bury, *actions = ended(member, core, exitcode=exitcode, by_pool=by_pool, oom=oom)
    assert isinstance(bury, e.Bury)
    reason = (
        f"3 workers in a row died before they ran a task; the last: worker {bury.ending.unasked}"
    )
    reason += "" if oom is None else f": {oom}"
    assert actions == [e.GiveUp(reason, ask=asks)]


def test_workers_that_are_killed_from_outside_are_started_again_after_a_pause() -> None:
    core = Core(1)
    for pause_ns in (50 * MS, 100 * MS):
        ended(worker(), core)
        assert next_start_ns(core, NOW) == NOW + pause_ns


# One row per worker between two crashes of useless ones: whether the count begins anew.
BETWEEN: dict[str, tuple[Member, bool]] = {
    "died in a call": (worker(1), True),
    "died after calls": (worker(done=1), False),
    "was dismissed": (worker(phase=Phase.STOPPING), False),
    "answered": (worker(), True),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_worker_of_use_ends_the_row(case: str) -> None:
    member, anew = BETWEEN[case]
    core = Core(1)
    for _ in range(2):
        ended(worker(), core, exitcode=3)
    if case == "answered":
        core.handle(e.Turned(member, 1, None, None), NOW)
    else:
        ended(member, core, exitcode=3, claimed=1, began=1)
    assert bool(of(e.GiveUp, ended(worker(), core, exitcode=3))) is not anew
