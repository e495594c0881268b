"""From whom tasks are taken back: none waits behind a long one, nor while a worker is idle.

Workers are sent short tasks ahead (``pace``). What one of them has not begun is better off
with another when a task turns out to be long, or when another has nothing to do.

Not covered:
    * How they are taken back: the scheduler's, and the board's (``workers.board``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from safepool.pool.worker import Worker

__all__ = ["next_looks", "slow_workers"]

# A task that runs for so long keeps those behind it: they are taken back, at once if a
# worker is idle. A worker that merely waits for a CPU looks the same, so not too soon.
_LONG_NS = 20_000_000
_LONG_WHILE_IDLE_NS = 1_000_000
# While a worker is idle, so much that another holds is worth dividing.
_DIVIDED_NS = 2_500_000
# A task that a worker has not come to after so long goes to another that is idle. It may be
# stopped; it may also import what the task needs, then two of them do.
_UNHEARD_NS = 1_000_000_000


def slow_workers(staff: Iterable[Worker], *, nothing_waits: bool) -> Iterator[Worker]:
    """Yield the workers that are to give back what they have not begun.

    Args:
        staff: All of them.
        nothing_waits: There is nothing else that an idle worker could do.
    """
    ahead, unheard = _sent_ahead(staff), _unheard(staff)
    if not (ahead or unheard):
        return
    idle = nothing_waits and any(worker.is_idle for worker in staff)
    long_ns = _LONG_WHILE_IDLE_NS if idle else _LONG_NS
    now = time.monotonic_ns()
    if idle:
        yield from (worker for worker in unheard if now - worker.sent_ns > _UNHEARD_NS)
    for worker in ahead:
        board = worker.board
        assert board is not None
        # What it has claimed and nobody has read yet counts as done here.
        left = min(worker.ledger.owed, worker.ledger.last - board.claimed)
        head = worker.ledger.head
        left_ns = left * head.expected_ns if head is not None else 0
        since_ns = max(board.since_ns, worker.sent_ns)
        if now - since_ns > long_ns or (idle and left > 1 and left_ns > _DIVIDED_NS):
            yield worker


def next_looks(staff: Iterable[Worker], now_s: float) -> Iterator[float]:
    """Yield when to ask again at the latest, by the monotonic clock in seconds."""
    ahead, unheard = _sent_ahead(staff), _unheard(staff)
    if not (ahead or unheard):
        return
    idle = any(worker.is_idle for worker in staff)
    if ahead:
        yield now_s + (_LONG_WHILE_IDLE_NS if idle else _LONG_NS) / 1e9
    if idle:
        yield from ((worker.sent_ns + _UNHEARD_NS) / 1e9 for worker in unheard)


def _sent_ahead(staff: Iterable[Worker]) -> list[Worker]:
    return [
        worker
        for worker in staff
        if worker.ledger.owed > 1
        and worker.board is not None
        and worker.packing is None
        and not worker.is_bound
    ]


def _unheard(staff: Iterable[Worker]) -> list[Worker]:
    return [
        worker
        for worker in staff
        if worker.unheard and not worker.exclusive and worker.packing is None
    ]
