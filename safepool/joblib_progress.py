"""A bar for each ``Parallel`` call: joblib counts, and a thread of the bar reads the counts.

In workers, and in threads that a call has asked for::

    start_call() -> CallBar         n_completed_tasks, n_dispatched_tasks     stop_call() -> closed

For sequential calls in this process, where joblib makes no call to a backend::

    configure() -> CallBar          the same                     print_progress() -> closed

Not covered:
    * ``require="sharedmem"`` in ``joblib.parallel_config(...)`` of another backend than ours.
    * The number of ended calls of a batch that has raised: the bar counts one.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

from safepool.progress import Progress

if TYPE_CHECKING:
    from concurrent.futures import Future

    from safepool.untyped import Untyped as SequentialBackend
else:
    from joblib._parallel_backends import SequentialBackend

# Sequential calls of this thread that have a bar.
_thread = threading.local()


class CallBar:
    """The bar of one call, from its start.

    Attributes:
        begun: ``Parallel`` has dispatched its first batches.
        progress: The counter. Batches that raised, or whose worker died, have failed.
    """

    def __init__(self, parallel: Any, label: str) -> None:
        self.begun = False
        # The drawing thread must not keep an object that the caller has dropped.
        self._parallel = weakref.ref(parallel)
        self.progress: Progress = Progress(label, parallel.n_tasks, look=self._look)

    @classmethod
    def of(cls, parallel: Any, label: str) -> Self | None:
        """Return the bar of a call; ``None`` for one inside of another that has one."""
        return None if _is_inside_a_call() else cls(parallel, label)

    def count(self, future: Future[Any]) -> None:
        """Count a batch that has ended, if it failed."""
        if not future.cancelled() and future.exception() is not None:
            self.progress.failed += 1

    def close(self) -> None:
        """Show the last numbers and end the bar. May be called twice."""
        self.progress.close()

    def _look(self, progress: Progress) -> bool:
        parallel = self._parallel()
        if parallel is None:
            return False
        if progress.total is None and self._is_exhausted(parallel):
            progress.total = parallel.n_dispatched_tasks
        progress.done = parallel.n_completed_tasks + progress.failed
        return progress.total is None or progress.done < progress.total

    def _is_exhausted(self, parallel: Any) -> bool:
        if not parallel.n_dispatched_tasks or parallel._exception:
            return False  # the iterator may be that of an earlier call
        # With "all" joblib has no iterator from the start.
        begun = self.begun or parallel.pre_dispatch != "all"
        return begun and parallel._original_iterator is None


class SequentialWithBar(SequentialBackend):
    """joblib's own, and a bar for each call.

    Args:
        label: Text before the bar; empty for none.
        nesting_level: joblib's.
    """

    def __init__(self, label: str, nesting_level: int | None) -> None:
        super().__init__(nesting_level=nesting_level)
        self._label = label
        self.parallel: Any = None

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_options: Any) -> int:
        """Begin a call, unless ``Parallel`` is the context of several."""
        workers: int = super().effective_n_jobs(n_jobs)
        self.parallel = parallel
        if not parallel._managed_backend:
            self._begin()
        return workers

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Return 1; it is what joblib asks at the start of each of several calls."""
        workers: int = super().effective_n_jobs(n_jobs)
        if self.parallel is not None:
            self._begin()
        return workers

    def _begin(self) -> None:
        parallel = self.parallel
        bar = CallBar.of(parallel, self._label)
        if bar is None:
            return
        calls = _calls()
        calls.append(parallel)

        def print_progress() -> None:
            type(parallel).print_progress(parallel)
            if parallel._running:
                return
            # Called for the last time, in a "finally".
            if isinstance(sys.exception(), Exception):
                bar.progress.failed = parallel.n_dispatched_tasks - parallel.n_completed_tasks
            calls.remove(parallel)
            del parallel.print_progress
            bar.close()

        parallel.print_progress = print_progress


def _calls() -> list[Any]:
    calls: list[Any] | None = getattr(_thread, "calls", None)
    if calls is None:
        calls = _thread.calls = []
    return calls


def _is_inside_a_call() -> bool:
    # While a generator waits for a request for its next result, no call runs.
    return any(call.n_dispatched_tasks > call.n_completed_tasks for call in _calls())
