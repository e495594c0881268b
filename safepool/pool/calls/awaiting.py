"""Calls of an executor that coroutines await, based on ``submit`` and ``map``.

    run      `submit`; the future's callback rings a bell (`latch.Bell`)
    amap     `map`; its results ring the bell, and many may be there by then
    a coroutine that is cancelled                          ends its calls for real
    async with                                             waits in a thread of its own

Nothing here blocks the event loop or knows of processes: another executor whose ``map`` returns a
`ResultIterator` may use this module.

uvloop's loops and anyio (on asyncio) work, and each thread may have a separate loop.

Not covered:
    * Event loops that are not asyncio's: trio.
    * A loop that is closed while calls run: the calls go on to their end. ``asyncio.run()``
      cancels its tasks before, also after Ctrl-C.
    * Work of ``submit`` itself: it runs in the loop's thread for some microseconds. A check of
      large globals of the script takes longer (``help("safepool.pool")``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sized
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

from safepool.arguments import TIME_TO_WAIT, checked
from safepool.pool.calls.mapping import Coming
from safepool.pool.hands import in_a_thread
from safepool.pool.latch import Bell

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType
    from typing import Required, Self, TypedDict, Unpack

    from safepool.pool.calls.results import ResultIterator, Results

    class Options(TypedDict, total=False):
        """Options of ``map``."""

        timeout: float | None
        chunksize: int
        buffersize: int | None
        progress: bool | str
        ordered: bool

    class Raising(Options, total=False):
        """Options of ``map`` that raises the exceptions of its calls."""

        return_exceptions: Literal[False]

    class Returning(Options):
        """Options of ``map`` that may yield the exceptions of its calls."""

        return_exceptions: Required[bool]


_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A")
_T_co = TypeVar("_T_co", covariant=True)

_Items = Iterable[_A] | AsyncIterable[_A]

# Items taken ahead of the results from what does not say its length: the loop's thread runs its
# code. Enough for workers whose calls take some microseconds.
_AHEAD = 1024


class AwaitedCalls:
    """The part of an executor that coroutines use.

    It calls the executor's ``submit``, ``map``, ``cancel``, ``kill_workers`` and ``__exit__``.
    """

    __slots__ = ()

    @overload
    async def run(
        self,
        fn: Callable[_P, Coroutine[Any, Any, _T]],
        /,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _T: ...

    @overload
    async def run(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T: ...

    async def run(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn(*args, **kwargs)`` in a worker and await the result; the loop is not blocked.

        Cancelling the coroutine while it waits, as ``asyncio.timeout()`` does, ends the task. A
        waiting task is dropped; the worker of a running task is killed and replaced, as by
        ``cancel(future, kill=True)``. The ``CancelledError`` goes on at once, before the worker
        has ended.

        Args:
            fn: The same as for :meth:`submit`. A coroutine function is run by ``asyncio.run()``,
                in the worker.
            *args: Positional arguments of ``fn``.
            **kwargs: Keyword arguments of ``fn``.

        Returns:
            The value that ``fn`` returned.

        Raises:
            BaseException: The exception of the future of :meth:`submit`;
                ``concurrent.futures.CancelledError``, which is not asyncio's, if the pool dropped
                the task.

        Example:
            >>> import asyncio, time
            >>> from safepool import ProcessPool
            >>> async def main() -> None:
            ...     async with ProcessPool(1) as pool:
            ...         print(await pool.run(pow, 2, 10))
            ...         try:
            ...             async with asyncio.timeout(0.1):
            ...                 await pool.run(time.sleep, 60)
            ...         except TimeoutError:
            ...             print("ended")
            >>> asyncio.run(main())
            1024
            ended
        """
        future = self.submit(fn, *args, **kwargs)
        del fn, args, kwargs  # as large as they may be
        loop = _running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        future.add_done_callback(Bell(loop, waiter))
        try:
            await waiter
        except BaseException:
            self.cancel(future, kill=True)
            raise
        try:
            return future.result()
        finally:
            del future, waiter  # this frame may be part of the exception's traceback

    @overload
    def amap(
        self,
        fn: Callable[[_A], Coroutine[Any, Any, _T]],
        a: _Items[_A],
        /,
        **options: Unpack[Raising],
    ) -> AsyncResults[_T]: ...

    @overload
    def amap(
        self, fn: Callable[[_A], _T], a: _Items[_A], /, **options: Unpack[Raising]
    ) -> AsyncResults[_T]: ...

    @overload
    def amap(
        self,
        fn: Callable[..., Coroutine[Any, Any, _T]],
        a: _Items[Any],
        b: _Items[Any],
        /,
        *more: _Items[Any],
        **options: Unpack[Raising],
    ) -> AsyncResults[_T]: ...

    @overload
    def amap(
        self,
        fn: Callable[..., _T],
        a: _Items[Any],
        b: _Items[Any],
        /,
        *more: _Items[Any],
        **options: Unpack[Raising],
    ) -> AsyncResults[_T]: ...

    @overload
    def amap(
        self,
        fn: Callable[[_A], Coroutine[Any, Any, _T]],
        a: _Items[_A],
        /,
        **options: Unpack[Returning],
    ) -> AsyncResults[_T | BaseException]: ...

    @overload
    def amap(
        self, fn: Callable[[_A], _T], a: _Items[_A], /, **options: Unpack[Returning]
    ) -> AsyncResults[_T | BaseException]: ...

    @overload
    def amap(
        self,
        fn: Callable[..., Coroutine[Any, Any, _T]],
        a: _Items[Any],
        b: _Items[Any],
        /,
        *more: _Items[Any],
        **options: Unpack[Returning],
    ) -> AsyncResults[_T | BaseException]: ...

    @overload
    def amap(
        self,
        fn: Callable[..., _T],
        a: _Items[Any],
        b: _Items[Any],
        /,
        *more: _Items[Any],
        **options: Unpack[Returning],
    ) -> AsyncResults[_T | BaseException]: ...

    @checked("amap", timeout=TIME_TO_WAIT)
    def amap(
        self: Any,
        fn: Callable[..., Any],
        *iterables: _Items[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> AsyncResults[Any]:
        """Return an asynchronous iterator over ``fn`` applied to the items, as :meth:`map`.

        Args:
            fn: The same as for :meth:`run`.
            *iterables: Iterables of items, also asynchronous. The shortest one ends the calls.
            timeout: The same as for :meth:`map`.
            chunksize: The same as for :meth:`map`.
            buffersize: Tasks taken from the iterables ahead of the results, at least 1. ``None``
                takes all items of an iterable with a length at once, and otherwise as many tasks
                as hold 1,024 items: the code of an iterator runs in the loop's thread. From an
                asynchronous iterable it may take as many again while results that arrived together
                are handed over.
            progress: The same as for :meth:`map`.
            ordered: The same as for :meth:`map`.
            return_exceptions: The same as for :meth:`map`.

        Returns:
            The results, for ``async for``. Leaving the loop early cancels waiting calls, as in
            :meth:`map`. Cancelling a coroutine that waits for a result, and ``aclose()``, also end
            running calls: ``async with contextlib.aclosing(pool.amap(...))`` does so for every way
            to leave the block.

        Raises:
            ValueError: ``chunksize`` or ``buffersize`` is below 1.
            TypeError: ``buffersize`` is no integer.
            MissingExtraError: ``progress`` is given, and tqdm is not installed.

        Example:
            >>> import asyncio
            >>> from safepool import ProcessPool
            >>> async def main() -> None:
            ...     async with ProcessPool(1) as pool:
            ...         print([result async for result in pool.amap(abs, [-1, -2])])
            >>> asyncio.run(main())
            [1, 2]
        """
        if buffersize is None and not all(isinstance(items, Sized) for items in iterables):
            buffersize = max(1, _AHEAD // chunksize)
        source: Any = None
        loop: asyncio.AbstractEventLoop | None = None
        taken: Sequence[Any] = iterables
        if any(isinstance(items, AsyncIterable) for items in iterables):
            loop = _running_loop()
            starred = len(iterables) != 1
            source = _together(iterables) if starred else iterables[0]
            taken = [Coming(starred=starred)]
        iterator: ResultIterator = self.map(
            fn,
            *taken,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
            progress=progress,
            ordered=ordered,
            return_exceptions=return_exceptions,
        )
        feeder = None
        if loop is not None:
            assert iterator.results is not None  # it has just begun
            most = (buffersize or _AHEAD) * chunksize
            feeder = loop.create_task(_feed(source, iterator.results, most))
        return AsyncResults(iterator, feeder)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self: Any,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the block as ``with`` does, without blocking the loop.

        If the block or its end is cancelled, running calls are ended. The method then waits for
        the workers' end, unless it is cancelled again.
        """
        import asyncio  # noqa: PLC0415 -- whoever comes here has it

        if kind is not None and issubclass(kind, (asyncio.CancelledError, GeneratorExit)):
            self.kill_workers()
            if issubclass(kind, GeneratorExit):
                return  # nothing can be awaited any more
        ended: Future[None] = Future()
        ended.set_running_or_notify_cancel()  # no one cancels it

        def leave() -> None:
            try:
                self.__exit__(kind, error, trace)
            except BaseException as problem:  # noqa: BLE001 -- raised to whoever leaves
                ended.set_exception(problem)
            else:
                ended.set_result(None)

        in_a_thread(leave, "safepool-exit")
        waiter = asyncio.wrap_future(ended)
        try:
            await asyncio.shield(waiter)
        except asyncio.CancelledError:
            self.kill_workers()
            await waiter
            raise


class AsyncResults(AsyncIterator[_T_co], Generic[_T_co]):
    """The results of :meth:`ProcessPool.amap`, which several coroutines may share.

    An error that a call raised is raised in its turn, and the next results follow when they are
    asked for.
    """

    def __init__(self, iterator: ResultIterator, feeder: asyncio.Task[None] | None = None) -> None:
        self._iterator = iterator
        self._feeder = feeder
        if feeder is not None:
            weakref.finalize(self, _cancel, feeder).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T_co:
        results = self._iterator.results
        if not (results is None or self._iterator.is_at_hand):
            try:
                await _until_at_hand(results)
            except BaseException:
                self._end()
                raise
        try:
            result: _T_co = next(self._iterator)
        except StopIteration:
            raise StopAsyncIteration from None
        except StopAsyncIteration as error:  # of a call: it is not the end
            raise RuntimeError("task raised StopAsyncIteration") from error
        return result

    async def aclose(self) -> None:
        """Take no more results, drop waiting calls and end running ones."""
        self._end()
        if self._feeder is not None:
            import asyncio  # noqa: PLC0415 -- whoever comes here has it

            await asyncio.wait([self._feeder])

    def _end(self) -> None:
        self._iterator.end()
        if self._feeder is not None:
            self._feeder.cancel()


async def _until_at_hand(results: Results) -> None:
    """Wait until a result, an error or the end is available, or the time is over.

    Even if a result is already there, the loop gets one turn for many results.
    """
    import asyncio  # noqa: PLC0415 -- whoever comes here has it

    loop, deadline = asyncio.get_running_loop(), results.deadline
    had_turns = False
    while not (there := results.look()) or not had_turns:
        had_turns = True
        if there:
            await asyncio.sleep(0)  # in which another coroutine may take it
            continue
        waiter: asyncio.Future[None] = loop.create_future()
        bell = Bell(loop, waiter)
        left_s = None if deadline is None else deadline - time.monotonic()
        if results.look(bell) or (left_s is not None and left_s <= 0):
            return
        timer = None if left_s is None else loop.call_later(left_s, bell)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()


async def _feed(source: AsyncIterable[Any], results: Results, most: int) -> None:
    """Queue calls as their items arrive, a bounded number ahead of the results."""
    loop = _running_loop()
    error: BaseException | None = None
    try:
        async for item in source:
            if results.exhausted or not results.push([item]):
                break  # the rest is not needed, or cannot run
            while results.ahead >= most and not results.exhausted:
                waiter: asyncio.Future[None] = loop.create_future()
                results.wait_for_room(Bell(loop, waiter))
                if results.ahead >= most and not results.exhausted:
                    await waiter
    except BaseException as problem:  # noqa: BLE001 -- raised to the reader, when its turn comes
        error = problem
    finally:
        results.push_no_more(error)


async def _together(iterables: Sequence[_Items[Any]]) -> AsyncIterator[Any]:
    """Yield tuples of one item of each."""
    sources: list[tuple[Callable[..., Any], Any]] = [
        (anext, aiter(items)) if isinstance(items, AsyncIterable) else (next, iter(items))
        for items in iterables
    ]
    end = object()
    while True:
        found: list[Any] = []
        for advance, source in sources:
            item = advance(source, end)
            item = await item if advance is anext else item
            if item is end:
                return
            found.append(item)
        yield tuple(found)


def _cancel(feeder: asyncio.Task[None]) -> None:
    try:
        feeder.get_loop().call_soon_threadsafe(feeder.cancel)
    except RuntimeError:
        pass  # the loop was closed


def _running_loop() -> asyncio.AbstractEventLoop:
    import asyncio  # noqa: PLC0415 -- whoever comes here has it

    return asyncio.get_running_loop()
