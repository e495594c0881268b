"""Methods of any pool: ``map``, ``cancel``, the ``with`` block; coroutines await them.

    a pool                      has what does the work     in
    ``ProcessPool``             `Scheduler`                this machine's workers
    ``ClusterPool``             `Shell`                    pools on many nodes

Not covered:
    * ``submit``: what becomes of its arguments differs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sized
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

from safepool.arguments import TIME_TO_WAIT, checked
from safepool.pool.calls.awaiting import AwaitedCalls
from safepool.pool.calls.mapping import Coming, MapRun
from safepool.pool.calls.results import end_failed
from safepool.pool.core.policy import Policy, policy_of
from safepool.workers.describe import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self, Unpack

    from safepool.pool.calls.awaiting import Raising as _Raising
    from safepool.pool.calls.awaiting import Returning as _Returning
    from safepool.pool.calls.results import ResultIterator


_T = TypeVar("_T")
_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")
_D = TypeVar("_D")
_E = TypeVar("_E")
_Run = TypeVar("_Run", bound=MapRun)


_SIZED = frozenset({list, tuple, range, dict, str, bytes})


class PoolCalls(AwaitedCalls):
    """The part of a pool that does not ask where its calls run.

    Attributes:
        _scheduler: Object that does the work, as above, by ``map``, ``kill`` and ``shut_down``.
        _policy: Timeout and retries of calls whose function has no policy.
        _own_submit: The pool's own ``submit``.
    """

    _scheduler: Any
    _policy: Policy
    _own_submit: Any

    @overload
    def map(
        self, fn: Callable[[_A], _T], a: Iterable[_A], /, **options: Unpack[_Raising]
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        /,
        **options: Unpack[_Raising],
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        /,
        **options: Unpack[_Raising],
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C, _D], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        d: Iterable[_D],
        /,
        **options: Unpack[_Raising],
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C, _D, _E], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        d: Iterable[_D],
        e: Iterable[_E],
        /,
        **options: Unpack[_Raising],
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self,
        fn: Callable[..., _T],
        a: Iterable[Any],
        b: Iterable[Any],
        c: Iterable[Any],
        d: Iterable[Any],
        e: Iterable[Any],
        f: Iterable[Any],
        /,
        *more: Iterable[Any],
        **options: Unpack[_Raising],
    ) -> Iterator[_T]: ...

    @overload
    def map(
        self, fn: Callable[[_A], _T], a: Iterable[_A], /, **options: Unpack[_Returning]
    ) -> Iterator[_T | BaseException]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        /,
        **options: Unpack[_Returning],
    ) -> Iterator[_T | BaseException]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        /,
        **options: Unpack[_Returning],
    ) -> Iterator[_T | BaseException]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C, _D], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        d: Iterable[_D],
        /,
        **options: Unpack[_Returning],
    ) -> Iterator[_T | BaseException]: ...

    @overload
    def map(
        self,
        fn: Callable[[_A, _B, _C, _D, _E], _T],
        a: Iterable[_A],
        b: Iterable[_B],
        c: Iterable[_C],
        d: Iterable[_D],
        e: Iterable[_E],
        /,
        **options: Unpack[_Returning],
    ) -> Iterator[_T | BaseException]: ...

    @overload
    def map(
        self,
        fn: Callable[..., _T],
        a: Iterable[Any],
        b: Iterable[Any],
        c: Iterable[Any],
        d: Iterable[Any],
        e: Iterable[Any],
        f: Iterable[Any],
        /,
        *more: Iterable[Any],
        **options: Unpack[_Returning],
    ) -> Iterator[_T | BaseException]: ...

    @checked("map", timeout=TIME_TO_WAIT)
    def map(
        self,
        fn: Callable[..., _T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> Iterator[_T | BaseException]:
        """Return an iterator over ``fn`` applied to the items, in order or as calls end.

        A subclass may have a ``submit`` of its own: ``map`` then calls it for each item, as the
        standard pool's does for each task. ``map`` with ``buffersize``, ``progress``, ``ordered``
        or ``return_exceptions``, and ``amap``, do not call it.

        Args:
            fn: Called with one item of each iterable.
            *iterables: Iterables of items. The shortest one ends the calls.
            timeout: Seconds from this call after which waiting for a result raises
                ``TimeoutError``; ``None`` waits for ever.
            chunksize: Items that one task takes, at least 1.
            buffersize: Tasks taken from the iterables ahead of the results, at least 1. ``None``
                takes all items of an iterable with a length at once. From another iterable, which
                may be endless, the pool takes 16,384 items before this returns, and further items
                as the results are taken.
            progress: ``True`` or a label: a bar on standard error. The bar counts ended calls, in
                any order. Needs ``safepool[progress]``.
            ordered: ``True`` yields results in the order of the items. ``False`` yields each
                result when its call has ended.
            return_exceptions: ``True`` yields the exception of a call in the place of its result,
                also :class:`safepool.WorkerDiedError`.

        Returns:
            The results. The iterator raises the exception of a call at its position. The next
            request returns the next result. If the loop ends early, or such an error leaves the
            pool's ``with`` block, waiting calls are cancelled. A ``TimeoutError`` of ``timeout``
            ends the iterator. The pool sends no further calls while untaken results of at least 64
            KiB exceed 256 MiB, or a quarter of the memory that the limits left when the first of
            them arrived.

        Raises:
            ValueError: ``chunksize`` or ``buffersize`` is below 1.
            TypeError: ``buffersize`` is no integer.
            MissingExtraError: ``progress`` is given, and tqdm is not installed.

        Example:
            >>> from safepool import ProcessPool
            >>> with ProcessPool(1) as pool:
            ...     list(pool.map(pow, [2, 3], [5, 2], chunksize=2))
            ...     sorted(pool.map(abs, [-3, -1, -2], ordered=False))
            ...     list(pool.map(int, ["1", "x", "3"], return_exceptions=True))
            [32, 9]
            [1, 2, 3]
            [1, ValueError("invalid literal for int() with base 10: 'x'"), 3]
        """
        deadline = None if timeout is None else timeout + time.monotonic()
        # In items; a list is taken whole.
        ahead = None if buffersize is None else buffersize * chunksize
        # The first of the two takes no call of Python's.
        if ahead is None and (
            _SIZED.issuperset(map(type, iterables))
            or all(isinstance(items, Sized) for items in iterables)
        ):
            ahead = sys.maxsize
        starred = len(iterables) != 1
        items = zip(*iterables, strict=False) if starred else iterables[0]
        if isinstance(items, Coming):
            ahead, starred = 0, items.starred
        elif (
            cast("Executor", self).submit != self._own_submit
            and ordered
            and progress in (False, None)
            and not (return_exceptions or buffersize)
        ):
            # The standard map() submits. A subclass may wrap or count what goes through submit().
            return Executor.map(cast("Executor", self), fn, *iterables, timeout=timeout)

        def make(kind: type[_Run]) -> _Run:
            return kind(
                fn,
                name_of(fn),
                policy_of(fn, self._policy),
                None if chunksize == 1 else chunksize,
                starred=starred,
                ordered=ordered,
                returns_errors=return_exceptions,
            )

        queue: Callable[..., ResultIterator] = self._scheduler.map
        if progress is False or progress is None:
            return queue(make(MapRun), items, ahead, deadline, keep=self)
        from safepool.pool.calls.counted import CountedRun, total_of  # noqa: PLC0415 -- seldom
        from safepool.progress import label_of  # noqa: PLC0415 -- seldom

        counted = make(CountedRun)
        return counted.shown(
            label_of(progress) or "",
            total_of(iterables),
            lambda: queue(counted, items, ahead, deadline, keep=self),
        )

    def cancel(self, future: Future[Any], *, kill: bool = False) -> bool:
        """Cancel a task, on request also one that runs.

        Args:
            future: A future that :meth:`submit` has returned.
            kill: If the task has begun, kill its worker with every process that the task
                started; the worker is replaced. Without it this is ``future.cancel()``,
                which leaves a running task alone.

        Returns:
            Whether the future is cancelled. ``False`` if the task has ended, or runs and was
            not to be killed.

        Raises:
            ValueError: With ``kill``: the future is not one of this pool.

        Example:
            >>> import time
            >>> from safepool import ProcessPool
            >>> with ProcessPool(1) as pool:
            ...     future = pool.submit(time.sleep, 60)
            ...     pool.cancel(future, kill=True)
            ...     future.cancelled(), pool.submit(abs, -1).result()
            True
            (True, 1)
        """
        cancelled: bool = self._scheduler.kill(future) if kill else future.cancel()
        return cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        # Someone at the terminal wants the prompt back: running tasks are not waited for.
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if kind is not None:
            end_failed(self._scheduler)
        self._scheduler.shut_down(wait=True, end="terminate" if interrupted else "")
        return False
