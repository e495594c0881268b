"""joblib on safepool's workers: ``with safepool.parallel_backend():`` and ``backend="safepool"``.

Everything that runs with ``n_jobs=`` through joblib, scikit-learn above all, runs in a
:class:`safepool.ProcessPool`: as many workers as fit the limits, native threads capped, one
dead worker an error instead of a broken executor.

A block has a pool of its own, which ends with it. Without one there is a pool for each
setting in the process, kept from call to call; its workers end when they have been idle.

Not covered:
    * joblib's files for large arguments: ``temp_folder`` is accepted and without effect. An
      array of more than ``max_nbytes`` is placed in memory once for all tasks of a call that
      are given it, if it is an argument itself and not inside of another. As with joblib's
      files they get it as it was when the first of them was sent.
    * ``mmap_mode``: tasks may write to every array and see their own writes alone, as with
      ``"c"``; with ``None`` nothing is placed. joblib says ``"r"`` unless told otherwise, so
      that cannot mean read-only.
    * Without a block, native threads of this process: a call that is sequential because only
      one worker fits has as many as the libraries found CPUs.
    * ``require="sharedmem"``: joblib runs such a call in threads of this process.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Literal

from joblib import parallel_config
from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from safepool.budget import Request, parse_bytes
from safepool.machine import log_once, read_budget
from safepool.pool.dispatch import was_not_sent
from safepool.pool.executor import ProcessPool
from safepool.pool.policy import Policy, policy_of
from safepool.pool.tasks import name_of
from safepool.threads.cap import capped
from safepool.transport.sharing import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safepool.budget import Rounding

__all__ = ["SafepoolBackend", "parallel_backend"]

# How long a worker waits for the next call outside of a block, as loky's do.
_IDLE_S = 300.0


@contextmanager
def parallel_backend(
    n_jobs: int = -1,
    *,
    threads_per_worker: int = 1,
    rounding: Rounding = "nearest",
    timeout: float | None = None,
    retries: int = 0,
    memory_per_worker: float | str | None = None,
    preload: Literal["auto"] | Sequence[str] = "auto",
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[None]:
    """Run joblib's parallel calls in a safepool pool inside the ``with`` block.

    The workers are started by the first call, shared by all calls of the block, and ended
    with it. Where only one worker fits, ``n_jobs=-1`` is sequential, in this process: then its
    own native threads are held at ``threads_per_worker`` inside the block.

    Args:
        n_jobs: What ``n_jobs=None`` means inside the block, as joblib counts: -1 is as many
            workers as fit the limits, -2 one less, a positive number that many workers, more
            than fit as well; 1 is sequential, in this process.
        threads_per_worker: Threads for each native pool in a worker, at least 1; the number
            of workers that fit is the limit divided by it. joblib's
            ``inner_max_num_threads`` is another word for it.
        rounding: What becomes of a fraction of a CPU, as for :class:`safepool.ProcessPool`. Here
            1.5 CPUs are two workers: a program that waits for its calls has no use for what
            ``"floor"`` leaves to it, and one worker does two thirds of the work
            (``benchmarks/joblib_backend.py``). ``"floor"`` is for one with threads that must
            not be frozen.
        timeout: Seconds that one task may run, from its start; above 0. Then its worker is killed
            and the call raises :class:`safepool.TaskTimeoutError`. Tasks then travel one by one.
            joblib's own ``timeout`` counts the time that the caller waits for a batch.
        retries: How often a task is run again whose worker died under it, at least 0, and
            with it those that travelled in the same batch.
        memory_per_worker: Bytes, or text such as ``"2GiB"``: ``n_jobs=-1`` is no more workers
            than fit into what the control groups have left.
        preload: As for :class:`safepool.ProcessPool`.
        initializer: Called once in each worker before its first task.
        initargs: Its arguments.

    Raises:
        ValueError: ``n_jobs`` is 0, or another number is out of its range.

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
    backend = SafepoolBackend(
        nesting_level=0,
        inner_max_num_threads=threads_per_worker,
        rounding=rounding,
        pools=_Pools(idle_s=None),
        timeout=timeout,
        retries=retries,
        memory_per_worker=memory_per_worker,
        preload=preload,
        initializer=initializer,
        initargs=initargs,
    )
    one_fits = backend.effective_n_jobs(-1) == 1
    try:
        with (
            capped(threads_per_worker) if one_fits else nullcontext(),
            parallel_config(backend=backend, n_jobs=n_jobs),
        ):
            yield
    except KeyboardInterrupt:
        backend.close(end=True)
        raise
    finally:
        backend.close()


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What tells pools apart."""

    threads: int
    preload: str | tuple[str, ...]
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...] = field(compare=False)
    idle_s: float

    def fit(self, other: _Settings) -> bool:
        """Tell whether a pool of these settings serves for others."""
        # By identity: what an initializer is given need not be comparable.
        same = len(self.initargs) == len(other.initargs) and all(
            mine is theirs for mine, theirs in zip(self.initargs, other.initargs, strict=True)
        )
        return self == other and same

    def make(self, workers: int) -> ProcessPool:
        """Make a pool."""
        return ProcessPool(
            workers,
            initializer=self.initializer,
            initargs=self.initargs,
            threads_per_worker=self.threads,
            preload="auto" if self.preload == "auto" else self.preload,
        )


@dataclass(eq=False)
class _Lease:
    """A pool, and how many ``Parallel`` calls use it now."""

    settings: _Settings
    pool: ProcessPool
    workers: int
    users: int = 0


class _Pools:
    """Pools that are kept from call to call.

    Args:
        idle_s: Let workers go that have done nothing for so long; ``None`` keeps them.
    """

    def __init__(self, idle_s: float | None) -> None:
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._leases: list[_Lease] = []
        if hasattr(os, "register_at_fork") and idle_s is not None:
            os.register_at_fork(after_in_child=self._forget)

    def lease(self, settings: _Settings, workers: int) -> _Lease:
        """Return a pool with so many workers, one that was used before if there is any."""
        with self._lock:
            self._leases = [lease for lease in self._leases if not lease.pool._broken]
            fitting = [lease for lease in self._leases if settings.fit(lease.settings)]
            # One of this size, which calls in several threads share; or one that is free.
            fitting.sort(key=lambda lease: lease.workers != workers)
            for lease in fitting:
                if lease.workers == workers or not lease.users:
                    break
            else:
                lease = _Lease(settings, settings.make(workers), workers)
                if self._idle_s is not None:
                    lease.pool._scheduler.let_go_after(settings.idle_s)
                self._leases.append(lease)
            if lease.workers != workers:
                lease.workers = workers
                lease.pool.resize(workers)
            lease.users += 1
            return lease

    def give_back(self, lease: _Lease) -> None:
        """End one use."""
        with self._lock:
            lease.users -= 1

    def close(self, *, end: bool) -> None:
        """End all workers; ``end`` does not wait for running tasks."""
        with self._lock:
            leases, self._leases = self._leases, []
        for lease in leases:
            lease.pool._scheduler.shut_down(wait=True, end="terminate" if end else "")

    def _forget(self) -> None:
        # They are the parent's, and the lock may be held by a thread of it.
        self._lock = threading.Lock()
        self._leases = []


_shared = _Pools(_IDLE_S)


# Placed for the first batch already: a smaller array costs less inside of its batch, should no
# other batch be given it (benchmarks/joblib_backend.py).
_AT_ONCE_BYTES = 8 * 1024**2


@dataclass
class _Met:
    """An array of a call: what drops it here, and its handle if there is one.

    A handle that only one batch was given lives as long as that batch; a second batch keeps it.
    """

    gone: weakref.ref[Any]
    handle: Callable[[], Any]


class _Arrays:
    """The large arrays of one call, to be placed once instead of sent with each batch.

    Args:
        more_than_bytes: Of what size an array is large; ``None`` is never.
    """

    def __init__(self, more_than_bytes: float | None) -> None:
        self._more_than_bytes = more_than_bytes
        # By id(), which is another array's once this one is gone.
        self._met: dict[int, _Met] = {}

    def place(self, batch: Any) -> None:
        """Let the large arrays of a batch travel as handles."""
        items = getattr(batch, "items", None)
        numpy = sys.modules.get("numpy")
        if not items or numpy is None or self._more_than_bytes is None:
            return
        large = {
            id(value): value
            for _, args, keywords in items
            for value in (*args, *keywords.values())
            # A subclass may hold more than its buffer; a memory-mapped one travels by its name.
            if type(value) is numpy.ndarray and value.nbytes > self._more_than_bytes
        }
        if not large:
            return
        handles = {name: self._handle(value) for name, value in large.items()}
        batch.items = [
            (
                function,
                tuple(_or_same(handles.get(id(value)), value) for value in args),
                {key: _or_same(handles.get(id(value)), value) for key, value in keywords.items()},
            )
            for function, args, keywords in items
        ]

    def _handle(self, array: Any) -> Any:
        """Return the handle of an array; ``None`` if it travels by itself."""
        name = id(array)
        met = self._met.get(name)
        handle = None if met is None else met.handle()
        wanted = met is not None or array.nbytes >= _AT_ONCE_BYTES
        if handle is None and wanted and not array.dtype.hasobject:
            try:
                handle = share(array, writable=True)
            except MemoryError:
                pass  # it travels by itself, or says so there
        if met is None:
            gone = weakref.ref(array, lambda _: self._met.pop(name, None))
            self._met[name] = _Met(gone, _nothing if handle is None else weakref.ref(handle))
        elif handle is not None:
            met.handle = lambda: handle
        return handle


def _nothing() -> None:
    """Stand for a handle that is not there, as a dead reference does."""


def _or_same(handle: Any, value: Any) -> Any:
    return value if handle is None else handle


class SafepoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib is untyped
    """joblib's backend interface on a pool that is kept between calls.

    Args:
        nesting_level: joblib's.
        inner_max_num_threads: As ``threads_per_worker`` of :func:`parallel_backend`.
        pools: Where pools are kept; ``None`` is this process's.
        idle_worker_timeout: Seconds after which a worker ends that has nothing to do, as for
            joblib's own backend.
        rounding, timeout, retries, memory_per_worker, preload, initializer, initargs: As for
            :func:`parallel_backend`.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = 1

    def __init__(  # noqa: PLR0913 -- each by its name
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        pools: _Pools | None = None,
        rounding: Rounding = "nearest",
        timeout: float | None = None,
        retries: int = 0,
        memory_per_worker: float | str | None = None,
        preload: Literal["auto"] | Sequence[str] = "auto",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        idle_worker_timeout: float = _IDLE_S,
        **others: Any,
    ) -> None:
        super().__init__(
            nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **others
        )
        self._pools = pools or _shared
        self._policy = Policy(timeout_s=timeout, retries=retries)
        self._memory = None if memory_per_worker is None else parse_bytes(memory_per_worker)
        self._rounding = rounding
        # What is out of its range is said here, not by the first call.
        self._request()
        self._preload = preload
        self._initialize = (initializer, initargs)
        self._idle_s = idle_worker_timeout
        self.parallel: Any = None
        self._lease: _Lease | None = None
        self._futures: set[Future[Any]] = set()
        self._arrays = _Arrays(None)
        self._max_nbytes: float | None = None

    @property
    def _threads(self) -> int:
        return 1 if self.inner_max_num_threads is None else self.inner_max_num_threads

    def _request(self) -> Request:
        # Made anew: joblib sets inner_max_num_threads later as well.
        return Request(
            threads_per_worker=self._threads,
            rounding=self._rounding,
            memory_per_worker=self._memory,
        )

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers that ``n_jobs`` stands for, at least 1."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None or n_jobs == 1:
            return 1
        budget, _ = read_budget(self._request())
        if n_jobs < 0:
            return max(1, budget.workers + 1 + n_jobs)
        if n_jobs > budget.workers:
            log_once(
                f"n_jobs={n_jobs} is more than the {budget.workers} workers that fit "
                f"({budget.because.name}: {budget.because.raw}); it is done as asked"
            )
        return n_jobs

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        idle_worker_timeout: float | None = None,
        max_nbytes: float | None = None,
        mmap_mode: str | None = None,
        **_options: Any,
    ) -> int:
        """Make the pool ready for one ``Parallel`` object; return its number of workers."""
        workers = self.effective_n_jobs(n_jobs)
        if workers == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if self.parallel is not parallel:
            # joblib gives every Parallel object of a block the same backend, also those that
            # run at the same time: a generator that is not used up, and the next call.
            raise FallbackToBackend(self._for(parallel))
        own = self._initialize if initializer is None else (initializer, initargs)
        preload = self._preload
        settings = _Settings(
            threads=self._threads,
            preload=preload if isinstance(preload, str) else tuple(preload),
            initializer=own[0],
            initargs=own[1],
            idle_s=self._idle_s if idle_worker_timeout is None else idle_worker_timeout,
        )
        self._release()
        self._max_nbytes = None if mmap_mode is None else max_nbytes
        self._lease = self._pools.lease(settings, workers)
        return workers

    def _for(self, parallel: Any) -> SafepoolBackend:
        """Return a backend like this one, of the same pools, for one ``Parallel`` object alone."""
        own = type(self).__new__(type(self))
        own.__dict__.update(self.__dict__)
        own.parallel, own._lease, own._futures = parallel, None, set()
        own._arrays = _Arrays(None)
        own.reset_batch_stats()
        return own

    def start_call(self) -> None:
        """Begin one call; what arrays hold is another matter in each."""
        self._arrays = _Arrays(self._max_nbytes)

    def stop_call(self) -> None:
        """End it; its arrays are placed no longer."""
        self._arrays = _Arrays(None)

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None
    ) -> Future[Any]:
        """Run one batch in a worker; ``callback`` gets the future, also when it failed."""
        future: Future[Any] = Future()
        lease = self._lease
        if lease is None:
            future.set_exception(RuntimeError("the pool of this Parallel call was shut down"))
        else:
            name, policy = self._facts_of(func)
            try:
                self._arrays.place(func)
                future = lease.pool._scheduler.submit(func, (), {}, name=name, policy=policy)
            except Exception as error:  # noqa: BLE001 -- raised here, joblib would wait for ever
                future.set_exception(error)
            self._futures.add(future)
            future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def _facts_of(self, batch: Any) -> tuple[str, Policy]:
        """Return what an error calls a batch, and what holds for it."""
        items = getattr(batch, "items", None)
        if not items:
            return name_of(batch), self._policy
        functions = {id(function): function for function, _, _ in items}
        policies = [policy_of(function, self._policy) for function in functions.values()]
        timeouts = [policy.timeout_s for policy in policies if policy.timeout_s is not None]
        name = name_of(next(iter(functions.values())))
        if len(items) > 1:
            name += f" and {len(items) - 1} more calls of its batch"
        # Limited if all of them are: a call that is not may take as long as it likes.
        limited = len(timeouts) == len(policies)
        return name, Policy(
            timeout_s=max(timeouts) * len(items) if limited else None,
            retries=min(policy.retries or 0 for policy in policies),
        )

    def compute_batch_size(self) -> int:
        """Return how many calls are to travel together."""
        # A timeout is one call's.
        if self._policy.timeout_s is not None:
            return 1
        size: int = super().compute_batch_size()
        return size

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """Return what a batch returned, or raise what it raised."""
        error = future.exception()
        if error is not None and was_not_sent(error):
            # In the words of joblib's own backend, which programs match.
            raise PicklingError("Could not pickle the task to send to the workers.") from error
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002 -- joblib's
        """Drop the batches of a call that failed, and end the workers that run one."""
        lease = self._lease
        for future in [*self._futures]:
            if lease is not None and not future.done():
                lease.pool.cancel(future, kill=True)

    def terminate(self) -> None:
        """End one ``Parallel`` call; the workers stay for the next."""
        self._release()
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[SequentialBackend, None]:
        """Return the backend of ``Parallel`` inside a task: the workers are the budget."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    def close(self, *, end: bool = False) -> None:
        """End the workers; ``end=True`` does not wait for running tasks."""
        self._pools.close(end=end)

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._pools.give_back(lease)

    def __reduce__(self) -> tuple[Any, ...]:
        # Travels inside batches as the parent of a nested call; a pool cannot.
        return SafepoolBackend, (self.nesting_level, self.inner_max_num_threads)
