"""Choice of workers that give calls back, so that no call waits needlessly.

Workers are sent short calls ahead (``pace``). When a call turns out to be long, or another worker
is idle, calls that have not begun should move to another worker.

Not covered:
    * Execution of the choice: the board does that (``workers.board``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from safepool.pool.core.worker import Member

# A call that runs for so long keeps those behind it: they are taken back, at once if a
# worker is idle. A worker that merely waits for a CPU looks the same, so not too soon.
_LONG_NS = 20_000_000
_LONG_WHILE_IDLE_NS = 1_000_000
# While a worker is idle, so much that another holds is worth dividing.
_DIVIDED_NS = 2_500_000
# A call that a worker has not come to after so long goes to another that is idle. The worker may
# be stopped, or it imports modules for the call; then two workers do.
_UNHEARD_NS = 1_000_000_000


def to_look_at(members: Sequence[Member], *, nothing_waits: bool) -> Iterator[Member]:
    """Yield the workers whose boards say something that matters now."""
    idle = nothing_waits and any(member.is_idle for member in members)
    for member in members:
        head = member.ledger.head
        timed = head is not None and head.policy.timeout_s is not None
        if member.has_board and (
            timed or member.silent or member.is_ahead or (idle and member.may_be_unheard)
        ):
            yield member


def slow_workers(
    members: Sequence[Member], now_ns: int, *, nothing_waits: bool
) -> Iterator[Member]:
    """Yield the workers that give back calls that have not begun.

    Args:
        members: All workers, with the state that was just read from their boards.
        now_ns: The present time by the monotonic clock.
        nothing_waits: Whether an idle worker has no other work.
    """
    idle = nothing_waits and any(member.is_idle for member in members)
    long_ns = _LONG_WHILE_IDLE_NS if idle else _LONG_NS
    for member in members:
        if idle and member.may_be_unheard and now_ns - member.sent_ns > _UNHEARD_NS:
            yield member
        elif member.is_ahead:
            # Calls that it has claimed and whose results were not read yet count as done here.
            left = min(member.ledger.owed, member.ledger.last - member.claimed)
            head = member.ledger.head
            left_ns = left * head.expected_ns if head is not None else 0
            since_ns = max(member.since_ns, member.sent_ns)
            if now_ns - since_ns > long_ns or (idle and left > 1 and left_ns > _DIVIDED_NS):
                yield member


def next_looks(members: Sequence[Member], now_ns: int) -> list[int]:
    """Return when to ask again at the latest, by the monotonic clock."""
    looks = []
    idle = len(members) > 1 and any(member.is_idle for member in members)
    for member in members:
        if member.is_ahead:
            looks.append(now_ns + (_LONG_WHILE_IDLE_NS if idle else _LONG_NS))
        if idle and member.may_be_unheard:
            looks.append(member.sent_ns + _UNHEARD_NS)
    return looks
