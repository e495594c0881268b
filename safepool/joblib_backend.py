"""joblib on safepool's workers: ``with safepool.parallel_backend():``.

Everything that runs with ``n_jobs=`` through joblib, scikit-learn above all, runs inside
the block in a :class:`safepool.ProcessPool`: as many workers as fit the limits, native
threads capped, one dead worker an error instead of a broken executor.

Not covered:
    * joblib's memory-mapping of large arguments (``max_nbytes``, ``mmap_mode``): accepted
      and without effect, arguments travel over the worker's own channel.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from joblib import parallel_config
from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from safepool.machine import cpu_count
from safepool.pool.executor import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SafepoolBackend", "parallel_backend"]


@contextmanager
def parallel_backend(n_jobs: int = -1) -> Iterator[None]:
    """Run joblib's parallel calls in a safepool pool inside the ``with`` block.

    The workers are started by the first call, shared by all calls of the block, and ended
    with it.

    Args:
        n_jobs: What ``n_jobs=None`` means inside the block, as joblib counts: -1 is every
            CPU that fits the limits, -2 all but one, a positive number that many workers.

    Raises:
        ValueError: ``n_jobs`` is 0.

    Source:
        joblib, ``parallel_config``.

    Example:
        >>> from joblib import Parallel, delayed
        >>> with parallel_backend():
        ...     Parallel(n_jobs=-1)(delayed(pow)(n, 2) for n in range(4))
        [0, 1, 4, 9]
    """
    if n_jobs == 0:
        raise ValueError("n_jobs == 0 has no meaning: -1 is every CPU that fits, 1 is sequential")
    backend = SafepoolBackend(nesting_level=0)
    try:
        with parallel_config(backend=backend, n_jobs=n_jobs):
            yield
    except KeyboardInterrupt:
        backend.close(end=True)
        raise
    finally:
        backend.close()


class SafepoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib is untyped
    """joblib's backend interface on one pool, kept between calls."""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        # Not waited for when they were replaced; with the block, they end too.
        self._old: list[ProcessPool] = []

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers that ``n_jobs`` stands for, at least 1."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(1, cpu_count() + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_options: Any) -> int:
        """Make the pool ready for one ``Parallel`` object; return its number of workers."""
        workers = self.effective_n_jobs(n_jobs)
        if workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        with self._lock:
            old = self._pool
            if old is None or old._broken or old._max_workers != workers:
                if old is not None:
                    old.shutdown(wait=False)
                    self._old.append(old)
                self._pool = self._new_pool(workers)
        return workers

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None
    ) -> Future[Any]:
        """Run one batch in a worker; ``callback`` gets the future, also when it failed."""
        pool = self._pool
        future: Future[Any] = Future()
        if pool is None:
            future.set_exception(RuntimeError("the pool of this Parallel call was shut down"))
        else:
            try:
                future = pool.submit(func)
            except Exception as error:  # noqa: BLE001 -- raised here, joblib would wait for ever
                future.set_exception(error)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """Return what a batch returned, or raise what it raised."""
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop the batches of a call that failed and end the workers that run one."""
        with self._lock:
            old, self._pool = self._pool, None
            if old is None:
                return
            # Not waited for: joblib may hold a lock that the pool's callbacks want.
            old._scheduler.shut_down(wait=False, end="terminate")
            self._old.append(old)
            if ensure_ready:
                self._pool = self._new_pool(old._max_workers)

    def terminate(self) -> None:
        """End one ``Parallel`` call; the workers stay for the next."""
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[SequentialBackend, None]:
        """Return the backend of ``Parallel`` inside a task: the workers are the budget."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    def close(self, *, end: bool = False) -> None:
        """End the workers; ``end=True`` does not wait for running tasks."""
        with self._lock:
            pools = [*self._old, *([self._pool] if self._pool else [])]
            self._old, self._pool = [], None
        for pool in pools:
            pool._scheduler.shut_down(wait=True, end="terminate" if end else "")

    def _new_pool(self, workers: int) -> ProcessPool:
        return ProcessPool(workers, threads_per_worker=self.inner_max_num_threads or 1)

    def __reduce__(self) -> tuple[Any, ...]:
        # Travels inside batches as the parent of a nested call; a pool cannot.
        return SafepoolBackend, ()
