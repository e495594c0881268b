"""Costs of calls in the program before a worker has them.

A call notes when it was submitted, and work notes how long its pickling took. A run has too many
calls for that, and notes when each portion of calls was queued.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from typing import TYPE_CHECKING

from safepool.pool.core.work import Call, Given

if TYPE_CHECKING:
    from safepool.pool.core.events import Fed

# Portions of a run whose time of submission is known; those before count as the oldest of these.
_MOST_PORTIONS = 4096


class _Note:
    """Note of work: when it was queued, and how long the pickling of each call took."""

    __slots__ = ("pickled_ns", "queued_ns")

    def __init__(self, queued_ns: int | None = None) -> None:
        self.queued_ns = queued_ns
        self.pickled_ns = 0


def note_brought(brought: Call | Fed) -> None:
    """A call, or further ones of a run, are queued now."""
    now = time.monotonic_ns()
    if isinstance(brought, Call):
        brought.noted = _Note(now)
        return
    run = brought.run
    portions: deque[tuple[int, int]] | None = getattr(run, "noted", None)
    if portions is None:
        portions = run.noted = deque(maxlen=_MOST_PORTIONS)
    last, _ = portions[-1] if portions else (0, 0)
    portions.append((last + len(brought.items), now))


def note_pickled(work: Given, since_ns: int) -> None:
    """All calls of a work were pickled since then."""
    if not hasattr(work, "noted"):
        work.noted = _Note()
    work.noted.pickled_ns = (time.monotonic_ns() - since_ns) // max(1, work.count)


def queued_ns(work: Given, place: int) -> int | None:
    """Return when the call at this place of its work was queued, if that is known."""
    if isinstance(work, Call):
        return work.noted.queued_ns if hasattr(work, "noted") else None
    portions: deque[tuple[int, int]] | None = getattr(work.run, "noted", None)
    if not portions:
        return None
    # The first portion that ends behind the call.
    at = bisect.bisect_right(portions, work.start + place, key=lambda portion: portion[0])
    return portions[min(at, len(portions) - 1)][1]


def pickled_ns(work: Given) -> int:
    """Return how long each call of a work took to be pickled."""
    return work.noted.pickled_ns if hasattr(work, "noted") else 0
