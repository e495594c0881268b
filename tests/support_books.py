"""Invariants of the core's books, which hold between any two events.

Not covered:
    * Facts that only the core's owner knows: whether a worker was told of what its ledger says,
      and whether each call ends once. The explorer of the tests plays the owner, and checks that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.pool.core.work import Call, Span
from safepool.pool.core.worker import Phase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safepool.pool.core.backlog import Backlog
    from safepool.pool.core.machine import Core
    from safepool.pool.core.worker import Member


def check_books(core: Core) -> None:
    """Raise ``AssertionError`` with the invariants that do not hold."""
    wrong = [*_violations(core.members, core.backlog)]
    if core.backlog and (core._broken or core._cancelling):
        wrong.append("work waits in a pool that runs no more")
    if wrong:
        raise AssertionError("; ".join(wrong))


def _violations(members: Sequence[Member], backlog: Backlog) -> Iterator[str]:
    """Yield what is wrong with the workers and the waiting work of a pool."""
    for member in members:
        for what in _wrong_in(member):
            yield f"worker {member.pid}: {what}"
    places = [member.index for member in members if not member.leaving]
    if len(places) != len({*places}):
        yield f"two workers have one place: {places}"
    works = [id(work) for member in members for work in member.ledger] + [*map(id, backlog)]
    if len(works) != len({*works}):
        yield "work stands in two places"
    if any(not (isinstance(entry, Call | Span) or entry.queued) for entry in backlog):
        yield "a map waits that is not noted as queued"


def _wrong_in(member: Member) -> Iterator[str]:
    ledger, works = member.ledger, [*member.ledger]
    if member.phase is Phase.ENDED:
        yield "it has ended, and is kept"
    if (member.phase is Phase.CONDEMNED) != (member.condemned is not None):
        yield "it is condemned without a reason"
    if works and not member.ready:
        yield "it is not ready, and was given work"
    if len(works) > 1 and not member.has_board:
        yield "work was sent ahead without a board"
    left = [work.count - work.done for work in works]
    if ledger.owed != sum(left):
        yield "its ledger counts calls wrongly"
    if ledger.expected_ns != sum(
        work.expected_ns * count for work, count in zip(works, left, strict=True)
    ):
        yield "its ledger counts their time wrongly"
    if not all(left):
        yield "work is owed that was answered"
    if any(work.done for work in works[1:]):
        yield "later work was answered first"
    ends = [0, *(work.position + work.count - 1 for work in works)]
    begins = [*(work.position for work in works), ledger.last + 1]
    if any(end >= begin for end, begin in zip(ends, begins, strict=True)):
        yield "positions are not in order"
