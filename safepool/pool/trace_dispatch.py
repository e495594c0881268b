"""What calls cost the program before a worker has them: measured, for a pool that is traced.

A task notes when it was submitted and how long it took to be pickled; the calls of a run are too
many for that, so the run notes when each portion of them was queued.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from typing import TYPE_CHECKING

from safepool.pool.dispatch import Dispatch
from safepool.pool.mapping import Span
from safepool.pool.tasks import Task
from safepool.transport.frames import Kind, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.core.policy import Policy
    from safepool.pool.dispatch import Pieces
    from safepool.pool.mapping import MapRun
    from safepool.pool.tasks import Parts, Pickled, PoolFuture
    from safepool.pool.worker import Worker
    from safepool.transport.main_names import MainNames
    from safepool.workers.inheritance import Inheritance

__all__ = ["TracedDispatch", "TracedTask", "note_queued", "pickled_ns", "queued_ns"]

# Portions of a run whose time of submission is known; those before count as the oldest of these.
_MOST_PORTIONS = 4096


class TracedTask(Task):
    """A task that knows since when it waits.

    Attributes:
        queued_ns: When it was submitted, by the monotonic clock.
        pickled_ns: How long it took to be pickled.
    """

    __slots__ = ("pickled_ns", "queued_ns")

    def __init__(self, future: PoolFuture, call: Parts, name: str, policy: Policy) -> None:
        super().__init__(future, call, name, policy)
        self.queued_ns: int = time.monotonic_ns()
        self.pickled_ns: int = 0


class TracedDispatch(Dispatch):
    """Makes messages as its base does, and measures.

    Args:
        hired: Told of workers that are started.
        settled: As of the base.
        wake: As of the base.
        names: As of the base.
    """

    def __init__(
        self,
        hired: Callable[[Worker], None],
        settled: Callable[[MapRun, int], None],
        wake: Callable[[], None],
        names: MainNames | None = None,
    ) -> None:
        super().__init__(settled, wake, names)
        self._hired = hired

    def initialize(self, worker: Worker, inheritance: Inheritance) -> Pieces:
        """Return what a new worker is sent first."""
        self._hired(worker)
        return [*encode(Kind.TRACE, 0), *super().initialize(worker, inheritance)]

    def _prepare_span(self, span: Span) -> bool:
        before = time.monotonic_ns()
        prepared = super()._prepare_span(span)
        span.pickled_ns = (time.monotonic_ns() - before) // max(1, span.count)
        return prepared

    def _pickle_here(self, task: Task) -> Pickled | None:
        before = time.monotonic_ns()
        pickled = super()._pickle_here(task)
        _note_pickled(task, before)
        return pickled

    def _pickle(self, task: Task) -> Pickled:
        before = time.monotonic_ns()
        pickled = super()._pickle(task)
        _note_pickled(task, before)
        return pickled


def _note_pickled(task: Task, since_ns: int) -> None:
    if isinstance(task, TracedTask):
        task.pickled_ns = time.monotonic_ns() - since_ns


def note_queued(run: MapRun, count: int) -> None:
    """So many further calls of a run are queued now."""
    if run.added is None:
        run.added = deque(maxlen=_MOST_PORTIONS)
    last, _ = run.added[-1] if run.added else (0, 0)
    run.added.append((last + count, time.monotonic_ns()))


def queued_ns(work: Task | Span, place: int) -> int | None:
    """Return when the call at this place of its work was queued, if that is known."""
    if isinstance(work, TracedTask):
        return work.queued_ns
    if isinstance(work, Span) and work.run.added:
        added: deque[tuple[int, int]] = work.run.added
        # The first portion that ends behind the call.
        at = bisect.bisect_right(added, work.start + place, key=lambda portion: portion[0])
        return added[min(at, len(added) - 1)][1]
    return None


def pickled_ns(work: Task | Span) -> int:
    """Return how long each call of a work took to be pickled."""
    return work.pickled_ns if isinstance(work, TracedTask | Span) else 0
