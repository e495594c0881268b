"""joblib on safepool's workers: ``with safepool.parallel_backend():`` and ``backend="safepool"``.

Code that runs with ``n_jobs=`` through joblib, scikit-learn above all, runs in a
:class:`safepool.ProcessPool`. The number of workers fits the limits, native threads are capped,
and a dead worker is an error of its call instead of a broken executor.

The process has a pool for each setting, which it keeps from call to call and from block to block.
Idle workers end. A pool is not used again after a change of the state that its workers were born
with: environment, directory, ``sys.path``, CPUs, the initializer and its arguments.

Not covered:
    * joblib's files for large arguments: ``temp_folder`` is accepted and without effect. An array
      of more than ``max_nbytes`` is placed in memory once for all tasks of a call, if it is an
      argument itself and not inside of another argument. Tasks get its content at the time when
      the first of them was sent, as with joblib's files.
    * ``Parallel(mmap_mode="r")`` outside of a block: this is also joblib's default, so it has no
      effect there. In a block, and said by a block or ``joblib.parallel_config``, arrays of more
      than ``max_nbytes`` arrive read-only. With ``"r+"`` and ``"w+"`` each task writes into its
      own arrays, as with ``"c"``, which is the default. With ``None`` no array is placed.
    * Native threads of this process outside of a block: a sequential call (only one worker fits)
      has as many as the libraries have counted CPUs.
    * Native threads of sequential calls in other threads than a block's: OpenMP and MKL have a
      number for each thread, and that number stays as it was.
    * A call inside of a task that names a backend and a number itself, such as
      ``Parallel(n_jobs=4, backend="safepool")``: each worker starts that many. Without ``n_jobs``
      it is sequential there; with ``n_jobs=-1`` it has the worker's share.
"""

from __future__ import annotations

import functools
import inspect
import os
import queue
import threading
import warnings
import weakref
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from joblib import Parallel, parallel_config
from joblib._parallel_backends import FallbackToBackend, SequentialBackend
from joblib.disk import memstr_to_bytes

from safepool import joblib_blocks
from safepool.arguments import RULES, check, checked, parse_bytes, what_was_meant
from safepool.budget import Request
from safepool.joblib_arrays import Arrays, MmapMode, mode_asked_for, mode_of_block
from safepool.joblib_callbacks import Callbacks, fail
from safepool.joblib_here import CallBar, HeldThreads, sequential
from safepool.joblib_pools import IDLE_S, NOT_PICKLED, SHARED, Lease, Pools, Settings, born_with
from safepool.machine import log_once, read_budget, tell_once
from safepool.pool.calls.pickling import was_not_sent
from safepool.pool.core.policy import Policy, policy_of
from safepool.progress import label_of, require_tqdm
from safepool.threads.cap import capped
from safepool.workers.describe import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Unpack

    from safepool.budget import Rounding
    from safepool.joblib_cluster import ClusterPools, ClusterSettings
    from safepool.untyped import Untyped as ParallelBackendBase
    from safepool.untyped import UntypedMixin as AutoBatchingMixin
else:
    from joblib._parallel_backends import AutoBatchingMixin, ParallelBackendBase

__all__ = ["SafepoolBackend", "parallel_backend"]

# ProcessPool alone knows what "auto" is: it knows its number of workers.
_THREADS = RULES["threads"]


@checked("parallel_backend", threads_per_worker=_THREADS)
@contextmanager
def parallel_backend(  # noqa: PLR0913 -- each by its name
    n_jobs: int = -1,
    *,
    threads_per_worker: int = 1,
    rounding: Rounding = "nearest",
    timeout: float | None = None,
    retries: int = 0,
    memory_per_worker: float | str | None = None,
    memory_limit: float | str | None = None,
    preload: Literal["auto"] | Sequence[str] = "auto",
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    progress: bool | str = False,
    mmap_mode: MmapMode | Literal["auto"] = "auto",
    max_nbytes: float | str | None = "auto",
    prefer: Literal["processes"] | None = None,
    idle_worker_timeout: float | None = None,
    end_subprocesses: bool = False,
    cluster: Any = None,
) -> Iterator[None]:
    """Run joblib's parallel calls in a safepool pool inside the ``with`` block.

    The first call starts the workers. All calls of the block share them, and the next block or
    call with equal arguments uses them again. If only one worker fits, ``n_jobs=-1`` is
    sequential, in this process. Inside the block the native threads of this process are then
    capped at ``threads_per_worker``.

    A call that asks for threads (``require="sharedmem"`` or ``prefer="threads"``, as forests of
    scikit-learn do) runs in threads of this process: as many as workers fit, with capped native
    pools. ``timeout``, ``retries``, ``memory_limit`` and ``initializer`` need workers, and
    override ``prefer="threads"``.

    The block holds in every thread of the process without a joblib setting of its own, also in
    threads that are started inside the block.

    Args:
        n_jobs: Meaning of ``n_jobs=None`` inside the block, as in joblib: -1 is as many workers as
            fit the limits, -2 one fewer. A positive number is that many workers, even if fewer
            fit; 1 is sequential, in this process.
        threads_per_worker: The most threads of each native pool in a worker, at least 1. The
            number of workers that fit is the limit divided by it. joblib's
            ``inner_max_num_threads`` means the same.
        rounding: Treatment of a fraction of a CPU, as for :class:`safepool.ProcessPool`. Here 1.5
            CPUs are two workers: a program that only waits for its calls does not need the
            fraction that ``"floor"`` leaves to it, and one worker does two thirds of the work of
            two (``benchmarks/joblib_backend.py``). ``"floor"`` is for a program with threads that
            the kernel must not freeze.
        timeout: Seconds that one task may run, from its start; above 0. Then the pool kills the
            task's worker, and the call raises :class:`safepool.TaskTimeoutError`. Tasks then
            travel one by one. joblib's own ``timeout`` counts the time that the caller waits for a
            batch. A sequential call cannot be ended: a warning says so once.
        retries: Number of times that a batch of tasks runs again after its worker died, at least
            0.
        memory_per_worker: Memory that one worker needs, in bytes or as text such as ``"2GiB"``.
            ``n_jobs=-1`` is no more workers than the free memory of the control groups holds.
        memory_limit: The same as for :class:`safepool.ProcessPool`: the most that a worker may
            hold while it runs a batch of tasks. A sequential call cannot be ended: a warning says
            so once.
        preload: The same as for :class:`safepool.ProcessPool`.
        initializer: Function that each worker calls once before its first task. If calls are
            sequential, this process calls the function once, so that its settings hold here as
            well.
        initargs: Arguments of ``initializer``.
        progress: ``True`` or a label: a bar on standard error for each ``Parallel`` call. The bar
            counts ended calls, a batch at a time. A call inside of another call has no bar. Needs
            ``safepool[progress]``.
        mmap_mode: Access of tasks to arrays of more than ``max_nbytes`` anywhere in their
            arguments. ``"r"``: read. ``"c"``: read and write, each task in its own view.
            ``"auto"`` is ``"c"``, unless ``joblib.parallel_config`` around the block sets another
            mode. ``help("safepool.joblib_backend")`` describes the other modes. A call may have a
            mode of its own.
        max_nbytes: Size in bytes, or text such as ``"1M"``. A larger array is placed once for all
            tasks of a call. ``None`` places none. ``"auto"`` is joblib's own value, by default one
            mebibyte.
        prefer: ``"processes"`` uses workers also for calls with ``prefer="threads"``: right for
            tasks that hold Python's lock all the time.
        idle_worker_timeout: Seconds after which an idle worker ends, also after the block;
            ``None`` is joblib's 300. With 0 all workers end with the block.
        end_subprocesses: The same as for :class:`safepool.ProcessPool`: processes that tasks have
            started end with the program. Without effect on calls that run in this process.
        cluster: A ``distributed.Client``, or an executor, as for :class:`safepool.ClusterPool`.
            Calls run on its nodes, and ``n_jobs=-1`` stands for all workers of all nodes.
            ``n_jobs=1`` and ``require="sharedmem"`` stay in this process; ``prefer="threads"``
            does not.

    Returns:
        A context manager, without a value for ``as``.

    Raises:
        ValueError: ``n_jobs`` is 0, or another number is out of its range.
        MissingExtraError: ``progress`` is given, and tqdm is not installed.
        NoNodesError: No node of the cluster could be used for 60 seconds, or 10 seconds if each
            node that is there has another version. The ``Parallel`` call raises it.
        TypeError: ``cluster`` is no client and no executor.

    Source:
        joblib, ``parallel_config``.

    Example:
        >>> from joblib import Parallel, delayed
        >>> with parallel_backend():
        ...     Parallel(n_jobs=-1)(delayed(pow)(n, 2) for n in range(4))
        [0, 1, 4, 9]
    """
    of_block = idle_worker_timeout == 0 or cluster is not None
    backend = SafepoolBackend(
        nesting_level=0,
        inner_max_num_threads=threads_per_worker,
        rounding=rounding,
        cluster=cluster,
        pools=Pools(idle_s=None) if of_block and cluster is None else None,
        timeout=timeout,
        retries=retries,
        memory_per_worker=memory_per_worker,
        memory_limit=memory_limit,
        preload=preload,
        initializer=initializer,
        initargs=initargs,
        progress=progress,
        idle_worker_timeout=idle_worker_timeout,
        end_subprocesses=end_subprocesses,
    )
    backend._takes_hints = prefer is None and cluster is None
    arrays: dict[str, Any] = {"mmap_mode": mode_of_block(mmap_mode)}
    if max_nbytes != "auto":
        text = isinstance(max_nbytes, str)
        arrays["max_nbytes"] = memstr_to_bytes(max_nbytes) if text else max_nbytes
    if cluster is not None:
        backend._open_cluster()
    one_fits = cluster is None and backend.effective_n_jobs(-1) == 1
    # For threads that have no setting of joblib's own.
    in_threads = functools.partial(
        backend._like, default_n_jobs=n_jobs, _arrays_of_block=arrays, nesting_level=None
    )
    block: joblib_blocks.Block = {
        "DEFAULT_BACKEND": in_threads,
        "DEFAULT_THREAD_BACKEND": lambda **words: in_threads(**words)._held_threads(),
    }
    try:
        with (
            capped(threads_per_worker) if one_fits else nullcontext(),
            parallel_config(backend=backend, n_jobs=n_jobs, **arrays),
        ):
            joblib_blocks.enter(block)
            yield
    except KeyboardInterrupt:
        backend.close(end=True)
        raise
    finally:
        joblib_blocks.leave(block)
        if of_block:
            backend.close()


class Words(TypedDict, total=False):
    """Further arguments of ``joblib.parallel_config(backend="safepool", ...)`` and ``Parallel``.

    Attributes:
        threads_per_worker, rounding, retries, memory_per_worker, memory_limit, preload,
            initializer, initargs, progress, end_subprocesses: The same as for
            :func:`parallel_backend`.
        timeout: The same as for :func:`parallel_backend`. ``Parallel(timeout=)`` is joblib's own.
        idle_worker_timeout: Seconds after which an idle worker ends, as for joblib's own backend;
            ``None`` is joblib's 300.
    """

    threads_per_worker: int | None
    rounding: Rounding
    timeout: float | None
    retries: int
    memory_per_worker: float | str | None
    memory_limit: float | str | None
    preload: Literal["auto"] | Sequence[str]
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    progress: bool | str
    idle_worker_timeout: float | None
    end_subprocesses: bool


_WORDS = Words.__annotations__.keys()
# joblib's default of max_nbytes: the program has not set it.
_DEFAULT_BYTES = 1 << 20
# And the context of multiprocessing's start method.
_WORDS_OF_JOBLIB = {*inspect.signature(Parallel.__init__).parameters, "context"}


# Arguments whose ``None`` means the default.
_MAY_BE_NONE = {word for word, kind in Words.__annotations__.items() if "None" in str(kind)}


class SafepoolBackend(AutoBatchingMixin, ParallelBackendBase):
    """joblib's backend interface on a pool that is kept between calls.

    Args:
        nesting_level: joblib's.
        inner_max_num_threads: The same as ``threads_per_worker``.
        pools: The collection of pools; ``None`` is this process's.
        cluster: The same as for :func:`parallel_backend`.
        words: See :class:`Words`.

    Raises:
        TypeError: An argument has an unknown name.
        ValueError: A number is out of its range.
        MissingExtraError: The same as for :func:`parallel_backend`.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    # In threads of this process.
    supports_sharedmem = True
    uses_threads = False
    default_n_jobs = 1
    # Each Parallel object gets a separate backend.
    _is_of_one = False
    # Settings for arrays in a thread that has no joblib setting.
    _arrays_of_block: Mapping[str, Any] | None = None

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        pools: Pools | None = None,
        cluster: Any = None,
        **words: Unpack[Words],
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        # Without a level, the backend was named in a call, or in joblib.parallel_config(), which
        # sets the level later.
        self._takes_hints = nesting_level is None
        # The backend that this one is a copy of, or itself.
        self._origin = self
        if unknown := sorted(words.keys() - _WORDS):
            hint = what_was_meant(unknown[0], _WORDS)
            raise TypeError(f"the joblib backend 'safepool' has no argument {unknown[0]!r}{hint}")
        self._cluster = cluster
        if cluster is not None:
            from safepool.joblib_cluster import ClusterPools  # noqa: PLC0415 -- seldom

            pools = ClusterPools()
        self._pools = pools or SHARED
        self._lease: Lease | None = None
        # Its own leases, and those of its copies.
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._futures: set[Future[Any]] = set()
        self._arrays = Arrays(None)
        self._max_nbytes: float | None = None
        self._read_only = False
        self._bar: CallBar | None = None
        self._callbacks: Callbacks | None = None
        self._take(words)

    def _take(self, words: Words) -> None:
        for word, value in words.items():
            rule = _THREADS if word == "threads_per_worker" else None
            check(word, value, rule, optional=word in _MAY_BE_NONE)
        initargs = words.get("initargs")
        words = {**words, "initargs": () if initargs is None else tuple(initargs)}
        self._words = words
        self._born_with: list[tuple[object, ...]] = []
        threads = words.get("threads_per_worker")
        if threads is not None:
            self.inner_max_num_threads = threads
        self._policy = Policy(timeout_s=words.get("timeout"), retries=words.get("retries", 0))
        memory, most = words.get("memory_per_worker"), words.get("memory_limit")
        self._memory = None if memory is None else parse_bytes(memory)
        self._memory_limit = None if most is None else parse_bytes(most)
        self._rounding: Rounding = words.get("rounding", "nearest")
        # A value out of its range raises here, and not in the first call.
        self._request()
        self._label = label_of(words.get("progress", False))
        if self._label is not None:
            require_tqdm()

    @property
    def _threads(self) -> int:
        return 1 if self.inner_max_num_threads is None else self.inner_max_num_threads

    def _request(self) -> Request:
        # Made for each use, because joblib may set inner_max_num_threads later.
        check("threads_per_worker", self._threads, _THREADS)
        return Request(
            threads_per_worker=self._threads,
            rounding=self._rounding,
            memory_per_worker=self._memory,
        )

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers for ``n_jobs``, at least 1."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        if n_jobs == 1:
            return 1
        if self._cluster is not None:
            return self._of_cluster(n_jobs)
        budget, _ = read_budget(self._request())
        if n_jobs < 0:
            return max(1, budget.workers + 1 + n_jobs)
        if n_jobs > budget.workers:
            one = budget.workers == 1
            fitting = "one worker that fits" if one else f"{budget.workers} workers that fit"
            threads = budget.threads_per_worker
            each = f", each with {threads} threads" if threads > 1 else ""
            log_once(
                f"n_jobs={n_jobs} is more than the {fitting} ({budget.because.name}: "
                f"{budget.because.raw}{each}), and is used all the same. Pass n_jobs=-1 for as "
                "many as fit"
            )
        return n_jobs

    def _of_cluster(self, n_jobs: int) -> int:
        workers = n_jobs
        if n_jobs < 0:
            workers = max(1, self._open_cluster().workers() + 1 + n_jobs)
        # joblib runs a call of one job in this process. With two, the node's one worker does.
        return max(2, workers) if self._is_of_one else workers

    def _open_cluster(self) -> Any:
        return cast("ClusterPools", self._pools).open(self._cluster_settings())

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Make the pool ready for one ``Parallel`` object; return its number of workers."""
        if parallel is None or self._is_of_one:
            return self._configure(n_jobs, parallel, **options)
        for word in sorted(options.keys() - _WORDS - _WORDS_OF_JOBLIB):
            # joblib's own backends ignore such words, so a library may use one: no error.
            text = f"Parallel(...) of the joblib backend 'safepool' ignores the argument {word!r}"
            hint = what_was_meant(word, _WORDS)
            warnings.warn(f"{text}{hint}", RuntimeWarning, stacklevel=2)
        own = {word: options[word] for word in options.keys() & _WORDS}
        backend = self._of_one(cast("Words", own))
        # FallbackToBackend is not raised here: a later exception would be "during handling" of it.
        parallel._backend = backend
        return backend._configure(n_jobs, parallel, **options)

    def _configure(
        self,
        n_jobs: int,
        parallel: Any,
        *,
        max_nbytes: float | None = None,
        mmap_mode: str | None = None,
        prefer: str | None = None,
        require: str | None = None,
        **_others: Any,
    ) -> int:
        workers = self.effective_n_jobs(n_jobs)
        if workers == 1:
            initializer = self._words.get("initializer")
            if initializer is not None:
                self._pools.initialize_here(initializer, self._words.get("initargs", ()))
            for word, value in (
                ("timeout", self._policy.timeout_s),
                ("memory_limit", self._memory_limit),
            ):
                if value is not None:
                    tell_once(
                        f"{word}= of the joblib backend 'safepool' has no effect on a sequential "
                        "call: it runs in this process, and only tasks in workers can be ended. "
                        "Leave it out",
                        subject=f"{word} of a sequential call",
                    )
            raise FallbackToBackend(sequential(self._label, self.nesting_level))
        if require == "sharedmem" or (prefer == "threads" and self._may_take_threads()):
            raise FallbackToBackend(self._held_threads())
        self.parallel = parallel
        self._release()
        mode = mode_asked_for(mmap_mode)
        arrays = self._arrays_of_block
        if arrays is not None and mmap_mode == "r" and max_nbytes == _DEFAULT_BYTES:
            mode = arrays["mmap_mode"]
            max_nbytes = arrays.get("max_nbytes", max_nbytes)
        self._max_nbytes = None if mode is None else max_nbytes
        self._read_only = mode == "r"
        settings = self._settings() if self._cluster is None else self._cluster_settings()
        self._lease = self._pools.lease(settings, workers, self)
        self._leases.add(self._lease)
        return workers

    def _settings(self) -> Settings:
        # Computed once for a block: its copies share the list.
        if not self._born_with:
            words = self._words
            found = born_with(words.get("initializer"), words.get("initargs", ()))
            self._born_with.append(found)
        return Settings(**self._common_settings(), born_with=self._born_with[0])

    def _cluster_settings(self) -> ClusterSettings:
        from safepool.joblib_cluster import ClusterSettings  # noqa: PLC0415 -- seldom

        return ClusterSettings(
            **self._common_settings(),
            engine=self._cluster,
            rounding=self._rounding,
            memory_per_worker=self._memory,
        )

    def _common_settings(self) -> dict[str, Any]:
        preload = self._words.get("preload", "auto")
        idle_s = self._words.get("idle_worker_timeout")
        return {
            "threads": self._threads,
            "preload": preload if isinstance(preload, str) else tuple(preload),
            "initializer": self._words.get("initializer"),
            "initargs": self._words.get("initargs", ()),
            "idle_s": IDLE_S if idle_s is None else idle_s,
            "end_subprocesses": self._words.get("end_subprocesses", False),
            "memory_limit": self._memory_limit,
        }

    def _of_one(self, words: Words) -> SafepoolBackend:
        """Return a backend like this one that a single ``Parallel`` object uses.

        joblib gives all ``Parallel`` objects of a block the same backend. Calls must not mix their
        state: the results of several generators may be taken in turns.
        """
        backend = self._like(_is_of_one=True, _lease=None, _futures=set())
        backend.reset_batch_stats()
        if words:
            # The arguments of an earlier initializer must not go to this one.
            others: Words = {"initargs": ()} if "initializer" in words else {}
            backend._take({**self._words, **others, **words})
        return backend

    def _like(self, **attributes: Any) -> SafepoolBackend:
        backend = SafepoolBackend.__new__(SafepoolBackend)
        own: dict[str, Any] = backend.__dict__  # pyright: ignore[reportAssignmentType]
        own.update(self.__dict__, **attributes)
        return backend

    def _may_take_threads(self) -> bool:
        policy = self._policy
        limited = policy.timeout_s is not None or self._memory_limit is not None
        limits = limited or policy.retries
        return self._takes_hints and not (limits or self._words.get("initializer"))

    def _held_threads(self) -> HeldThreads:
        return HeldThreads(
            self.effective_n_jobs,
            threads=self._threads,
            label=self._label,
            nesting_level=self.nesting_level,
        )

    def start_call(self) -> None:
        """Begin one call, with a new collection of arrays: their contents may have changed."""
        # Batches that an earlier, failed call had prepared and not sent: joblib would send them
        # with this call's, and return their results.
        self.parallel._ready_batches = queue.Queue()
        self._arrays = Arrays(self._max_nbytes, read_only=self._read_only)
        try:
            self._callbacks = Callbacks(self._goes_on)
        except RuntimeError:
            pass  # the system gives no thread: they run in the scheduler's
        if self._label is not None:
            self._bar = CallBar.of(self.parallel, self._label)

    def retrieval_context(self) -> AbstractContextManager[object]:
        """Wait for the end of a call whose results are wanted all at once.

        All tasks of the first dispatch were sent. joblib's code after this looks for results
        every 10 ms, which for a short call is most of its time.
        """
        if self._bar is not None:
            self._bar.begun = True
        parallel = self.parallel
        # A generator is given results as they come, and only joblib's loop counts its timeout.
        at_once = not parallel.return_generator and parallel.timeout is None
        if self._callbacks is not None and at_once:
            self._callbacks.wait()
        if parallel._aborting:
            # The input of the call has raised. With ``pre_dispatch="all"`` joblib looks at that
            # only while a call is still running, and returns what there is.
            parallel._raise_error_fast()
        return nullcontext()

    def _goes_on(self) -> bool:
        """Tell whether joblib waits for a batch, by what its own loop asks."""
        return not self.parallel._aborting and self.parallel._wait_retrieval()

    def stop_call(self) -> None:
        """End the call, and drop its placed arrays."""
        self._arrays = Arrays(None)
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            callbacks.close()
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.progress.close()

    def submit(
        self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None
    ) -> Future[Any]:
        """Run one batch in a worker; ``callback`` gets the future, also when it failed."""
        future: Future[Any] = Future()
        lease = self._lease
        if lease is None:
            future.set_exception(
                RuntimeError(
                    "the pool of this Parallel call was shut down before the call ended: start "
                    "the call again"
                )
            )
        else:
            try:
                name, policy = self._facts_of(func)
                batch = self._arrays.place(func)
                future = lease.pool.begin(batch, name, policy)
            except Exception as error:  # noqa: BLE001 -- raised here, joblib would wait for ever
                future.set_exception(error)
            self._futures.add(future)
            future.add_done_callback(self._futures.discard)
            if self._bar is not None:
                future.add_done_callback(self._bar.count)
        callbacks = self._callbacks
        if callback is not None and callbacks is not None:
            callbacks.after(future, callback)
        elif callback is not None:
            future.add_done_callback(callback)
        return future

    def _facts_of(self, batch: Any) -> tuple[str, Policy]:
        """Return a batch's name for errors, and its policy."""
        items = getattr(batch, "items", None)
        if not items:
            return name_of(batch), self._policy
        functions = {id(function): function for function, _, _ in items}
        policies = [policy_of(function, self._policy) for function in functions.values()]
        timeouts = [policy.timeout_s for policy in policies if policy.timeout_s is not None]
        name = name_of(next(iter(functions.values())))
        if len(items) > 1:
            others = len(items) - 1
            name += f" and {others} more call{'s' if others > 1 else ''} of its batch"
        # A batch has a timeout only if each of its calls has one.
        limited = len(timeouts) == len(policies)
        return name, Policy(
            timeout_s=max(timeouts) * len(items) if limited else None,
            retries=min(policy.retries or 0 for policy in policies),
        )

    def compute_batch_size(self) -> int:
        """Return how many calls are to travel together."""
        # A timeout applies to a single call.
        if self._policy.timeout_s is not None:
            return 1
        size: int = super().compute_batch_size()
        return size

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """Return the result of a batch, or raise its exception."""
        error = future.exception()
        if error is not None and was_not_sent(error):
            raise PicklingError(NOT_PICKLED) from error
        return future.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002 -- joblib's
        """Drop the batches of a call that failed, and end the workers that run one."""
        lease = self._lease
        for future in [*self._futures]:
            if lease is not None and not future.done():
                lease.pool.cancel(future, kill=True)

    def leave(self) -> None:
        """Let a call that is not over raise in a fork of the program: nothing ends it there."""
        if self._callbacks is None:
            return
        parallel = self.parallel
        parallel._lock = threading.RLock()  # a thread that the fork lacks may hold it
        told = (
            f"this Parallel call belongs to process {os.getppid()}, and process {os.getpid()} is "
            "a fork of that process, where no results arrive. Start the call again in the fork"
        )
        fail(parallel, parallel._call_id, RuntimeError(told))

    def terminate(self) -> None:
        """End one ``Parallel`` call; the workers stay for the next."""
        self._release()
        self.reset_batch_stats()

    def get_nested_backend(self) -> tuple[SequentialBackend, None]:
        """Return the backend of ``Parallel`` inside a task: the workers are the budget."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    def close(self, *, end: bool = False) -> None:
        """End the workers, those that other calls use left out.

        Args:
            end: Do not wait for running tasks.
        """
        self._pools.close(end=end, which=self._is_ours_alone)

    def _is_ours_alone(self, lease: Lease) -> bool:
        return lease in self._leases and all(
            user._origin is self._origin for user in [*lease.users]
        )

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.users.discard(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Travels inside batches as the parent of a nested call; a pool cannot.
        return SafepoolBackend, (self.nesting_level, self.inner_max_num_threads)
