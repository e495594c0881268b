"""Threads of this process for joblib's calls that ask for them, with capped native pools.

``require="sharedmem"`` is impossible with processes. Libraries ask for ``prefer="threads"`` if
their tasks release Python's lock and share the data that they read: forests, neighbours, paths of
coordinate descent. Sending these data to workers and back takes longer than the computation
(``benchmarks/joblib_backend.py``, boruta).

Not covered:
    * A call that ends early: its tasks run to their end, because nothing can end a thread. Hence a
      function's ``timeout=`` and ``retries=`` (:func:`safepool.worker`) have no effect here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from joblib._parallel_backends import FallbackToBackend

from safepool.joblib_progress import CallBar, SequentialWithBar
from safepool.threads.cap import capped

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.untyped import Untyped as SequentialBackend
    from safepool.untyped import Untyped as ThreadingBackend
else:
    from joblib._parallel_backends import SequentialBackend, ThreadingBackend


def sequential(label: str | None, nesting_level: int | None) -> SequentialBackend:
    """Return what runs calls one after the other, here; ``None`` for the label shows no bar."""
    if label is None:
        return SequentialBackend(nesting_level=nesting_level)
    return SequentialWithBar(label, nesting_level=nesting_level)


class HeldThreads(ThreadingBackend):
    """joblib's own, with as many threads as workers fit, and their native pools held.

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
            bar.close()

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
