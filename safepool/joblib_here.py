"""joblib's calls in this process, sequential or in threads, and the bar of each ``Parallel`` call.

``require="sharedmem"`` is impossible with processes. Libraries ask for ``prefer="threads"`` if
their tasks release Python's lock and share the data that they read: forests, neighbours, paths of
coordinate descent. Sending these data to workers and back takes longer than the computation
(``benchmarks/joblib_backend.py``, boruta). Native pools of these threads are capped.

joblib counts, and a thread of the bar reads the counts. In workers, and in threads::

    start_call() -> CallBar         n_completed_tasks, n_dispatched_tasks     stop_call() -> closed

For sequential calls, where joblib makes no call to a backend::

    configure() -> CallBar          the same                     print_progress() -> closed

Not covered:
    * A call in threads that ends early: its tasks run to their end, because nothing can end a
      thread. Hence a function's ``timeout=`` and ``retries=`` (:func:`safepool.worker`) have no
      effect here.
    * A bar for ``require="sharedmem"`` in ``joblib.parallel_config(...)`` of another backend.
    * The number of ended calls of a batch that has raised: the bar counts one.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

from joblib._parallel_backends import FallbackToBackend

from safepool.progress import Progress
from safepool.threads.cap import capped

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from safepool.untyped import Untyped as SequentialBackend
    from safepool.untyped import Untyped as ThreadingBackend
else:
    from joblib._parallel_backends import SequentialBackend, ThreadingBackend

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
    """joblib's sequential backend, with a bar for each call.

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
        """Return 1. joblib asks this at the start of each of several calls."""
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
            bar.progress.close()

        parallel.print_progress = print_progress


def _calls() -> list[Any]:
    calls: list[Any] | None = getattr(_thread, "calls", None)
    if calls is None:
        calls = _thread.calls = []
    return calls


def _is_inside_a_call() -> bool:
    # While a generator waits for a request for its next result, no call runs.
    return any(call.n_dispatched_tasks > call.n_completed_tasks for call in _calls())


def sequential(label: str | None, nesting_level: int | None) -> SequentialBackend:
    """Return what runs calls one after the other, here; ``None`` for the label shows no bar."""
    if label is None:
        return SequentialBackend(nesting_level=nesting_level)
    return SequentialWithBar(label, nesting_level=nesting_level)


class HeldThreads(ThreadingBackend):
    """joblib's backend of threads: as many as workers fit, with capped native pools.

    Args:
        count: Function that returns the number of threads for ``n_jobs``.
        threads: Native threads of each.
    """

    def __init__(
        self,
        count: Callable[[int | None], int],
        *,
        threads: int,
        label: str | None,
        nesting_level: int | None,
    ) -> None:
        super().__init__(nesting_level=nesting_level)
        self._count = count
        self._threads = threads
        self._label = label
        self._bar: CallBar | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of threads for ``n_jobs``, at least 1."""
        return self._count(n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Be ready for one ``Parallel`` object; return the number of threads."""
        if self.effective_n_jobs(n_jobs) == 1:
            raise FallbackToBackend(sequential(self._label, self.nesting_level))
        threads: int = super().configure(n_jobs, parallel, **options)
        return threads

    def start_call(self) -> None:
        """Begin one call."""
        if self._label is not None:
            self._bar = CallBar.of(self.parallel, self._label)

    def stop_call(self) -> None:
        """End it."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.progress.close()

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None
    ) -> Any:
        """Run one batch in a thread."""
        bar = self._bar

        def held() -> Any:
            try:
                # In each thread: OpenMP's and MKL's numbers are its own.
                with capped(self._threads):
                    return func()
            except BaseException:
                if bar is not None:
                    bar.progress.failed += 1
                raise

        return super().submit(held, callback)

    def get_nested_backend(self) -> tuple[SequentialBackend, None]:
        """Return the backend of ``Parallel`` inside a task: these threads are the budget."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None
