"""Invariants of the core's books, which hold between any two events (`Core.check`).

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
    from safepool.pool.core.worker import Member


def violations(members: Sequence[Member], backlog: Backlog) -> Iterator[str]:
    """Yield what is wrong with the workers and the waiting work of a pool."""
    for member in members:
        for holds, what in _of_member(member):
            if not holds:
                yield f"worker {member.pid}: {what}"
    places = [member.index for member in members if not member.leaving]
    if len(places) != len({*places}):
        yield f"two workers have one place: {places}"
    works = [id(work) for member in members for work in member.ledger] + [*map(id, backlog)]
    if len(works) != len({*works}):
        yield "work stands in two places"
    if any(not (isinstance(entry, Call | Span) or entry.queued) for entry in backlog):
        yield "a map waits that is not noted as queued"


def _of_member(member: Member) -> Iterator[tuple[bool, str]]:
    ledger, works = member.ledger, [*member.ledger]
    yield member.phase is not Phase.ENDED, "it has ended, and is kept"
    yield member.ready or not works, "it is not ready, and was given work"
    yield member.has_board or len(works) <= 1, "work was sent ahead without a board"
    condemned = member.phase is Phase.CONDEMNED
    yield condemned == (member.condemned is not None), "it is condemned without a reason"
    left = [work.count - work.done for work in works]
    expected_ns = sum(work.expected_ns * count for work, count in zip(works, left, strict=True))
    yield ledger.owed == sum(left), "its ledger counts calls wrongly"
    yield ledger.expected_ns == expected_ns, "its ledger counts their time wrongly"
    yield all(left), "work is owed that was answered"
    yield not any(work.done for work in works[1:]), "later work was answered first"
    ends = [0, *(work.position + work.count - 1 for work in works)]
    begins = [*(work.position for work in works), ledger.last + 1]
    ordered = all(end < begin for end, begin in zip(ends, begins, strict=True))
    yield ordered, "positions are not in order"
