"""``Pool``: the replacement of ``multiprocessing.Pool``, on the same engine as ``ProcessPool``.

``Pool`` translates calls into tasks and maps of a :class:`safepool.ProcessPool`, with the same
rules, and results into those of ``multiprocessing.pool``.

    apply, apply_async              submit()            -->  ApplyResult
    map, starmap and their _async   `GatheredRun`       -->  MapResult
    imap, imap_unordered            `_Streamed`         -->  IMapIterator

The same with futures, in `ProcessPool`: ``imap_unordered`` is ``map(..., ordered=False)``,
``starmap(f, pairs)`` is ``map(f, *zip(*pairs))``, and ``terminate()`` is ``terminate_workers()``.
A program that keeps the standard pool writes ``multiprocessing.Pool(safepool.cpu_count())``, and
``@safepool.worker`` above its functions.

Not covered:
    * ``Pool.Process``, ``_cache`` and ``_taskqueue``: internals of the standard pool.
    * Locks, queues and values of a "fork" context as globals of the script: a worker is no copy of
      the program. Pass them by ``initargs``.
"""

from __future__ import annotations

import multiprocessing.pool
import sys
import types
import warnings
from concurrent.futures import CancelledError
from concurrent.futures.process import _RemoteTraceback
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from safepool.arguments import RULES, Rule, check, what_was_meant
from safepool.pool.calls.gathering import GatheredRun
from safepool.pool.calls.mapping import MapRun
from safepool.pool.calls.results import ResultIterator
from safepool.pool.calls.tasks import here
from safepool.pool.core.policy import policy_of
from safepool.pool.executor import ProcessPool
from safepool.pool.hands import ThreadThatStarts
from safepool.pool.latch import Latch
from safepool.workers.describe import name_of

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from typing import Literal, NoReturn, Self, Unpack

    from safepool.budget import Rounding
    from safepool.pool.calls.results import Results
    from safepool.pool.watch import WorkerInfo

    # Features that the standard library's types lack, or have only in generic form.
    _StandardPool = multiprocessing.pool.Pool
    _StandardResult = multiprocessing.pool.ApplyResult
    _StandardMapResult = multiprocessing.pool.MapResult
    _StandardIterator = multiprocessing.pool.IMapIterator
    _standard: Any = multiprocessing.pool
else:
    _standard = multiprocessing.pool
    # The standard class, if "safepool run --patch" has replaced it by this pool.
    _StandardPool = vars(_standard).get("_safepool_replaces") or _standard.Pool
    _StandardResult = multiprocessing.pool.ApplyResult
    _StandardMapResult = multiprocessing.pool.MapResult

    class _StandardIterator(multiprocessing.pool.IMapIterator):
        __class_getitem__ = classmethod(types.GenericAlias)


_S = TypeVar("_S")
_T = TypeVar("_T")
_R = TypeVar("_R", bound=MapRun)

INIT, RUN, CLOSE, TERMINATE = "INIT", "RUN", "CLOSE", "TERMINATE"

# A longer sequence is not put into messages at once, before imap() returns.
_MOST_AT_ONCE = 1_000_000
# Chunks for each worker, as in the standard pool.
_CHUNKS = 4


class Options(TypedDict, total=False):
    """Further arguments of ``Pool``, by name: those of ``ProcessPool``."""

    threads_per_worker: int | Literal["auto"]
    rounding: Rounding
    reserve: float
    memory_per_worker: float | str | None
    pin_workers: bool
    env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None
    gpus: Literal["auto"] | int | Sequence[int | str] | None
    timeout: float | None
    retries: int
    max_memory_per_worker: float | str | None
    memory_limit: float | str | None
    on_worker_death: Literal["replace", "break"]
    preload: Literal["auto"] | Sequence[str]
    main: Literal["auto", "run", "value"]
    trace: str | os.PathLike[str] | None
    end_subprocesses: bool


# Any object that Python can unpack, as in the standard pool.
_ARGS = Rule(
    kind="a tuple",
    is_kind=lambda value: hasattr(value, "__iter__") or hasattr(value, "__getitem__"),
    remedy="A tuple of one argument is written (argument,)",
)
_KWDS = Rule(
    kind="a dict of keyword arguments",
    is_kind=lambda value: hasattr(value, "keys"),
    remedy="The function's other arguments are args=",
)

# A chunksize that is too small raises the standard pool's own text.
_CHUNKSIZE = RULES["chunksize"]._replace(lacks=lambda _: "", optional=True)

_STANDARD = ("processes", "initializer", "initargs", "maxtasksperchild", "context")


class Pool(_StandardPool):
    """A pool that fits the machine, in the place of ``multiprocessing.Pool``.

    ``Pool`` has all methods, errors and results of the standard pool. The engine is another one,
    with these differences:

    ================================  ==========================================================
    ``multiprocessing.Pool``          here
    ================================  ==========================================================
    ``os.cpu_count()`` workers        what the kernel grants
    NumPy's threads in each worker    one, or ``threads_per_worker``
    a killed worker: ``get()`` hangs  :class:`safepool.WorkerDiedError` for its call
    forks of the program              clean processes; functions of the script, lambdas, closures
    all workers from the start        as calls need them, if there is no ``initializer``
    ``terminate()``: ``get()`` hangs  ``CancelledError`` for what had not ended
    ================================  ==========================================================

    Args:
        processes: The most workers, at least 1; ``None`` is the number that fits.
        initializer: Function that each worker calls once before its first call.
        initargs: Arguments of ``initializer``.
        maxtasksperchild: Replace a worker after this many tasks, at least 1. A chunk is a task.
        context: A ``multiprocessing`` context that starts the workers, or its name; the same as
            ``mp_context`` of :class:`safepool.ProcessPool`.
        **options: Arguments of :class:`safepool.ProcessPool` by name: ``timeout=``, ``retries=``,
            ``threads_per_worker=``, ``env=``, ``trace=`` and the others.

    Raises:
        ValueError: A number is out of its range.
        TypeError: ``initializer`` cannot be called; an option does not exist.

    Source:
        Python, Doc/library/multiprocessing.rst, "multiprocessing.pool.Pool".

    Example:
        >>> with Pool(1) as pool:
        ...     pool.map(abs, [-1, -2]), pool.starmap(pow, [(2, 3), (3, 2)])
        ...     pool.apply_async(divmod, (7, 2)).get(timeout=60)
        ...     sorted(pool.imap_unordered(abs, [-3, -4]))
        ([1, 2], [8, 9])
        (3, 1)
        [3, 4]
    """

    _state = INIT

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any | None = None,
        **options: Unpack[Options],
    ) -> None:
        check("processes", processes, optional=True)
        check("initializer", initializer, optional=True)
        check("initargs", initargs)
        check("maxtasksperchild", maxtasksperchild, optional=True)
        check("context", context, RULES["mp_context"], optional=True)
        known = Options.__annotations__
        for name in options:
            if name not in known:
                hint = what_was_meant(name, [*_STANDARD, *known])
                raise TypeError(f"Pool() got an unexpected keyword argument {name!r}{hint}")
        self._chunk_is_task = maxtasksperchild is not None
        arguments = processes, context, initializer, tuple(initargs or ())
        self._engine = ProcessPool(*arguments, max_tasks_per_child=maxtasksperchild, **options)
        # Workers of the standard pool are daemons.
        self._engine._scheduler.ends_at_exit = True
        # Threads that take the items of imap() and imap_unordered().
        self._feeders: dict[threading.Thread, Results] = {}
        self._state = RUN
        if initializer is not None:
            # The program may need only the initializer in the workers.
            self._engine._scheduler.staff_up()

    @property
    def _processes(self) -> int:
        """The most workers. Programs read it from the standard pool."""
        return self._engine.size

    @property
    def _pool(self) -> list[Any]:
        """All workers' processes. Programs read it from the standard pool."""
        if self._state == RUN:
            self._engine._scheduler.staff_up()
        return [worker.process for worker in self._engine._scheduler.workers()]

    @property
    def size(self) -> int:
        """The most workers that the pool may have now. Libraries read it.

        Example:
            >>> with Pool(3) as pool:
            ...     pool.size
            3
        """
        size: int = vars(self).get("size") or self._engine.size
        return size

    @size.setter
    def size(self, size: int) -> None:
        # For a class that derives from the standard pool, which has no size (schwimmbad's).
        vars(self)["size"] = size

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Return what each worker does at this moment, as :meth:`safepool.ProcessPool.workers`.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.apply(abs, (-1,)), pool.workers()[0].tasks_done
            (1, 1)
        """
        return self._engine.workers()

    def apply(
        self, func: Callable[..., _T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}
    ) -> _T:
        """Return ``func(*args, **kwds)``, called in a worker.

        Args:
            func: Any callable; lambdas, closures and functions of ``__main__`` as well.
            args: Positional arguments of ``func``.
            kwds: Keyword arguments of ``func``.

        Raises:
            ValueError: The pool is not running.
            WorkerDiedError: The worker died.
            MaybeEncodingError: The result could not be pickled.
            BaseException: The exception that ``func`` raised.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.apply(int, ("ff",), {"base": 16})
            255
        """
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., _T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[_T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> ApplyResult[_T]:
        """Schedule ``func(*args, **kwds)`` and return an object for its result.

        Args:
            func: Any callable.
            args: Positional arguments of ``func``.
            kwds: Keyword arguments of ``func``.
            callback: Called with the result, in a thread of the pool, before ``get()`` returns.
            error_callback: Called with the exception. ``terminate()`` discards both callbacks.

        Raises:
            ValueError: The pool is not running.

        Example:
            >>> found = []
            >>> with Pool(1) as pool:
            ...     pool.apply_async(abs, (-1,), callback=found.append).wait()
            >>> found
            [1]
        """
        self._require_running()
        if type(args) is not tuple:
            check("args", args, _ARGS)
        if type(kwds) is not dict:
            check("kwds", kwds, _KWDS)
        future = self._engine.submit(func, *args, **kwds)
        return ApplyResult(self, future, callback, error_callback)

    def map(
        self, func: Callable[[_S], _T], iterable: Iterable[_S], chunksize: int | None = None
    ) -> list[_T]:
        """Return the list of ``func(item)`` for each item.

        Args:
            func: Any callable.
            iterable: The items.
            chunksize: Items that one task takes, at least 1; ``None`` leaves it to the pool.

        Raises:
            ValueError: The pool is not running, or ``chunksize`` is below 1.
            BaseException: The exception of the first call that failed, when all have ended.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.map(lambda n: n * n, range(4))
            [0, 1, 4, 9]
        """
        return self.map_async(func, iterable, chunksize).get()

    def map_async(
        self,
        func: Callable[[_S], _T],
        iterable: Iterable[_S],
        chunksize: int | None = None,
        callback: Callable[[list[_T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[_T]:
        """Schedule the calls of :meth:`map` and return an object for the list of results.

        ``callback`` and ``error_callback`` are the same as in :meth:`apply_async`.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.map_async(abs, [-1, -2]).get()
            [1, 2]
        """
        return self._gather(func, iterable, chunksize, callback, error_callback)

    def starmap(
        self,
        func: Callable[..., _T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
    ) -> list[_T]:
        """Return the list of ``func(*item)`` for each item, with the arguments of :meth:`map`.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.starmap(pow, [(2, 5), (3, 2)])
            [32, 9]
        """
        return self.starmap_async(func, iterable, chunksize).get()

    def starmap_async(
        self,
        func: Callable[..., _T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[_T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[_T]:
        """Schedule the calls of :meth:`starmap`, with the arguments of :meth:`map_async`.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.starmap_async(max, [(2, 5), (3, 2)]).get()
            [5, 3]
        """
        items = map(tuple, iterable)
        return self._gather(func, items, chunksize, callback, error_callback, starred=True)

    def imap(
        self, func: Callable[[_S], _T], iterable: Iterable[_S], chunksize: int | None = 1
    ) -> IMapIterator[_T]:
        """Return an iterator over ``func(item)`` for each item, in order.

        Args:
            func: Any callable.
            iterable: The items, taken in a thread of the pool. After the first request for a
                result, at most 65,536 items are taken ahead of the results, until :meth:`join`.
            chunksize: Items that one task takes, at least 1.

        Returns:
            The results. ``next(timeout)`` raises ``multiprocessing.TimeoutError`` if none is there
            in time. An exception of a call is raised in its turn, and the next results follow.

        Raises:
            ValueError: The pool is not running, or ``chunksize`` is below 1.

        Example:
            >>> with Pool(1) as pool:
            ...     results = pool.imap(abs, iter([-1, -2]))
            ...     next(results), results.next(timeout=60)
            (1, 2)
        """
        return self._stream(func, iterable, chunksize, ordered=True)

    def imap_unordered(
        self, func: Callable[[_S], _T], iterable: Iterable[_S], chunksize: int | None = 1
    ) -> IMapIterator[_T]:
        """Return an iterator over the results as calls end, with the arguments of :meth:`imap`.

        Example:
            >>> with Pool(1) as pool:
            ...     sorted(pool.imap_unordered(abs, [-2, -1]))
            [1, 2]
        """
        return self._stream(func, iterable, chunksize, ordered=False)

    def close(self) -> None:
        """Accept no more calls. Workers end when all submitted calls have ended.

        Example:
            >>> pool = Pool(1)
            >>> pool.close()
            >>> pool.map(abs, [-1])
            Traceback (most recent call last):
                ...
            ValueError: Pool not running
        """
        if self._state == RUN:
            self._state = CLOSE
            self._close_if_fed()

    def terminate(self) -> None:
        """End the workers at once, even in the middle of a call.

        A pending result raises ``CancelledError``, or :class:`safepool.WorkerDiedError` if its
        call had begun.

        Example:
            >>> import time
            >>> pool = Pool(1)
            >>> result = pool.apply_async(time.sleep, (60,))
            >>> pool.terminate()
            >>> result.ready(), result.successful()
            (True, False)
        """
        self._state = TERMINATE
        self._engine._scheduler.shut_down(wait=True, end="terminate")
        for results in [*self._feeders.values()]:
            results.take_all()  # the first one is refused, which ends it

    def join(self) -> None:
        """Wait until the workers have ended, after :meth:`close` or :meth:`terminate`.

        Raises:
            ValueError: The pool is still running.

        Example:
            >>> pool = Pool(1)
            >>> pool.join()
            Traceback (most recent call last):
                ...
            ValueError: Pool is still running
            >>> pool.terminate()
            >>> pool.join()
        """
        if self._state == RUN:
            raise ValueError("Pool is still running")
        # A fork has no such threads.
        if self._state == CLOSE and self._engine._scheduler._me.pid == here.pid:
            for feeder, results in [*self._feeders.items()]:
                results.take_all()
                feeder.join()
        self._engine.shutdown()

    def __enter__(self) -> Self:
        self._require_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    # Default arguments are still there when the interpreter ends.
    def __del__(self, _warn: Any = warnings.warn, _run: str = RUN) -> None:
        if self._state == _run:
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)

    def __repr__(self) -> str:
        kind = type(self)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return f"<{name} state={self._state} pool_size={self._engine.size}>"

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def _require_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running")

    def _gather(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[Any], object] | None,
        error_callback: Callable[[BaseException], object] | None,
        *,
        starred: bool = False,
    ) -> MapResult[Any]:
        self._require_running()
        check("chunksize", chunksize, _CHUNKSIZE)
        items = list(iterable)
        chunk = -(-len(items) // (_CHUNKS * self._engine.size)) if chunksize is None else chunksize
        if chunk < 1 and items:
            raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")
        scheduler = self._engine._scheduler
        at_once = None if chunksize is None and not self._chunk_is_task else chunk
        more = {"starred": starred, "count": len(items), "owner": scheduler._me}
        run = self._run(_Gathered, func, at_once, **more)
        if items:
            scheduler.map(run, items, sys.maxsize, None, keep=None)
        else:  # not reported, as in the standard pool
            run.future.set_result([])
            callback = error_callback = None
        return MapResult(self, run, chunk, callback, error_callback)

    def _stream(
        self,
        func: Callable[[Any], _T],
        iterable: Iterable[Any],
        chunksize: int | None,
        *,
        ordered: bool,
    ) -> IMapIterator[_T]:
        self._require_running()
        check("chunksize", chunksize, _CHUNKSIZE)
        chunk = 1 if chunksize is None else chunksize
        if chunk < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")
        at_once = None if chunk == 1 else chunk
        run = self._run(_Streamed, func, at_once, starred=False, ordered=ordered)
        # Another iterable may run code of the program for each item, and wait for its results.
        there = type(iterable) in (list, tuple, range) and len(iterable) <= _MOST_AT_ONCE  # type: ignore[arg-type]
        scheduler = self._engine._scheduler
        iterator: Any = scheduler.map(run, iterable, sys.maxsize if there else 0, None, keep=self)
        if not there:
            self._feed(iterator.results, chunk)
        return iterator  # type: ignore[no-any-return]

    def _run(
        self, kind: type[_R], func: Callable[..., Any], at_once: int | None, **more: Any
    ) -> _R:
        policy = policy_of(func, self._engine._policy)
        return kind(func, name_of(func), policy, at_once, **more)

    def _feed(self, results: Results, chunk: int) -> None:
        def feed() -> None:
            try:
                results.feed(chunk)
            finally:
                del self._feeders[thread]
                self._close_if_fed()

        thread = ThreadThatStarts(feed, "safepool-feeder")
        self._feeders[thread] = results
        thread.start()

    def _close_if_fed(self) -> None:
        """Close the engine when the last item was taken. The last thread that arrives does it."""
        if self._state == CLOSE and not self._feeders:
            self._engine.shutdown(wait=False)


def _of_the_pool(error: BaseException) -> BaseException:
    """Return an error as ``multiprocessing.pool`` would have made it."""
    result = getattr(error, "unsent_result", None)
    if isinstance(result, str):
        unsent: BaseException = _standard.MaybeEncodingError(error, _Shown(result))
        for note in getattr(error, "__notes__", ()):
            unsent.add_note(note)
        return unsent
    if isinstance(error, CancelledError) and not error.args:
        return CancelledError("the pool was terminated before this call had ended")
    cause = error.__cause__
    if isinstance(cause, _RemoteTraceback):
        # The exception's __setattr__ may refuse, as that of a frozen dataclass does.
        BaseException.__setattr__(error, "__cause__", _standard.RemoteTraceback(cause.tb))
    return error


class _Shown(str):
    """Placeholder for a result of which only the ``repr()`` has arrived."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _OfThePool(MapRun):
    spread = "write starmap(function, items)"

    def put_error(self, index: int, error: BaseException) -> None:
        super().put_error(index, _of_the_pool(error))

    def stop(self, error: Callable[[], BaseException]) -> None:
        def told() -> BaseException:
            problem = error()
            refused = type(problem) is RuntimeError  # the pool took no more calls
            return _of_the_pool(CancelledError() if refused else problem)

        super().stop(told)


class _Gathered(_OfThePool, GatheredRun):
    """A run whose results come as one list."""


class _Streamed(_OfThePool):
    """A run whose results come one by one."""


class ApplyResult(_StandardResult[_T]):
    """Handle of the result of ``apply_async``.

    Args:
        pool: Held until then.
        future: The engine's.
        callback: Called with the result.
        error_callback: Called with the exception.
    """

    def __init__(
        self,
        pool: Pool,
        future: Future[_T],
        callback: Callable[[_T], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._pool: Pool | None = pool
        self._future = future
        self._on_result = callback
        self._on_error = error_callback
        self._error: BaseException | None = None
        # A waiting thread wakes after the callback.
        self._told: Latch | None = None
        if callback is not None or error_callback is not None:
            self._told, self._pid = Latch(), here.pid
            future.add_done_callback(self._tell)

    def ready(self) -> bool:
        """Return whether the call has ended.

        Example:
            >>> with Pool(1) as pool:
            ...     result = pool.apply_async(abs, (-1,))
            ...     result.wait()
            ...     result.ready()
            True
        """
        told = self._told_here
        return self._future.done() if told is None else told.is_open

    def successful(self) -> bool:
        """Return whether the call has ended without an exception.

        Raises:
            ValueError: The call has not ended.

        Example:
            >>> with Pool(1) as pool:
            ...     result = pool.apply_async(int, ("x",))
            ...     result.wait()
            ...     result.successful()
            False
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._raised() is None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has ended, at most ``timeout`` seconds.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.apply_async(abs, (-1,)).wait(timeout=60)
        """
        if (told := self._told_here) is not None:
            told.wait(timeout)
            return
        try:
            self._future.exception(timeout)
        except (TimeoutError, CancelledError):
            pass

    def get(self, timeout: float | None = None) -> _T:
        """Return the result of the call, or raise its exception.

        Args:
            timeout: Seconds to wait at most; ``None`` waits for ever.

        Raises:
            multiprocessing.TimeoutError: The call has not ended within ``timeout``.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.apply_async(abs, (-1,)).get(timeout=60)
            1
        """
        self.wait(timeout)
        if not self.ready():
            raise multiprocessing.TimeoutError
        self._pool = None
        error = self._raised()
        if error is None:
            return self._future.result()
        try:
            raise error
        finally:
            # Otherwise the exception's traceback would hold this frame.
            del self, error

    @property
    def _told_here(self) -> Latch | None:
        # A fork has no thread that calls back.
        return None if self._told is None or self._pid != here.pid else self._told

    def _raised(self) -> BaseException | None:
        if self._error is None:
            try:
                error = self._future.exception(0)
            except CancelledError as cancelled:
                error = cancelled
            self._error = None if error is None else _of_the_pool(error)
        return self._error

    def _tell(self, _: object) -> None:
        assert self._told is not None
        try:
            if self._pool is not None and self._pool._state == TERMINATE:
                return
            error = self._raised()
            if error is not None:
                if self._on_error is not None:
                    self._on_error(error)
            elif self._on_result is not None:
                self._on_result(self._future.result())
        finally:
            self._told.open()
            self._pool = None


class MapResult(ApplyResult[list[_T]], _StandardMapResult[_T]):
    """Handle of the list of results of ``map_async``.

    Args:
        pool: Held until then.
        run: The engine's.
        chunksize: Items that the standard pool would put into one task.
        callback: Called with the list.
        error_callback: Called with the exception.
    """

    def __init__(
        self,
        pool: Pool,
        run: GatheredRun,
        chunksize: int,
        callback: Callable[[list[_T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> None:
        self._run = run
        self._chunksize = chunksize
        # Last: it may call the callback.
        super().__init__(pool, run.future, callback, error_callback)

    def _raised(self) -> BaseException | None:
        is_new = self._error is None
        error = super()._raised()
        if is_new and error is not None:
            self._run.hint(error)
        return error

    @property
    def _number_left(self) -> int:
        """Number of chunks that have not ended; programs show it as their progress."""
        return -(-self._run.left // max(1, self._chunksize))


class IMapIterator(ResultIterator, _StandardIterator[_T]):  # type: ignore[misc]
    """The results of ``imap`` and ``imap_unordered``."""

    def next(self, timeout: float | None = None) -> _T:
        """Return the next result; wait at most ``timeout`` seconds.

        Raises:
            multiprocessing.TimeoutError: The result has not come in time. A later call may return
                it.
            StopIteration: All results have been returned.

        Example:
            >>> with Pool(1) as pool:
            ...     pool.imap(abs, [-1]).next(timeout=60)
            1
        """
        results = self.results
        there = self._here or timeout is None or results is None or results.wait(timeout)
        if not there:
            raise multiprocessing.TimeoutError
        result: _T = next(self)
        return result


_Streamed.iterator = IMapIterator
