"""A worker as the core knows it: what each state allows."""

from __future__ import annotations

import pytest
from support_core import worker

from safepool.pool.core.worker import Member, Phase

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
