"""Workers of the core as a test wants them, and what they are sent."""

from __future__ import annotations

from typing import Any

import support_tasks

from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.core.ending import Ending, Stage
from safepool.pool.core.policy import NO_POLICY, Policy
from safepool.pool.core.worker import Member, Phase

MS = 1_000_000
NOW = 10_000 * MS


def run_of(policy: Policy = NO_POLICY, at_once: int | None = None) -> MapRun:
    return MapRun(support_tasks.square, "square", policy, at_once)


def span_of(run: MapRun, calls: int, start: int = 0, **is_: Any) -> Span:
    span = Span(run, start, [(n,) for n in range(start, start + calls)])
    for name, value in is_.items():
        setattr(span, name, value)
    return span


def ending(**changes: Any) -> Ending:
    """Return how a worker ended that was killed after its first calls, apart from what changes."""
    facts: dict[str, Any] = {
        "pid": 7,
        "exitcode": -9,
        "by_pool": False,
        "oom": None,
        "exceeded": None,
        "stage": Stage.USED,
        "reading": "",
        "dismissed": False,
        "pool_ends": False,
        "condemned": None,
        "fault": None,
        "stack": "",
        "lost": (),
    }
    return Ending(**{**facts, **changes})


def worker(
    calls: int = 0,
    each_ns: int = 0,
    policy: Policy = NO_POLICY,
    *,
    bound: bool = False,
    **is_: Any,
) -> Member:
    """Return a worker that was sent so many calls of a map, now if nothing else is said."""
    member = Member()
    state = {"pid": 7, "ready": True, "has_board": True, "phase": Phase.READY, "sent_ns": NOW}
    for name, value in {**state, **is_}.items():
        setattr(member, name, value)
    if calls:
        member.ledger.give(span_of(run_of(policy), calls, expected_ns=each_ns, bound=bound))
    return member
