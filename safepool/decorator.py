"""``@safepool.worker``: native threads capped around one function, in any pool.

The standard pickler pickles a function as its name, so the name must lead to the pickled object.
Hence the decorator returns one of two shapes:

    a function          for a ``def`` that is being decorated: the result takes its name
    a ``WorkerCall``    for an object that has its name already, or none (``worker(f, timeout=5)``,
                        a method, a partial, a callable object): pickled as that object

The body of a generator, a coroutine or an asynchronous generator runs in steps, each from a
resumption to the next ``yield`` or ``await``. The cap holds during each step, in its thread.
Between the steps there is no cap.

Not covered:
    * A plain function that returns another's generator or coroutine, whose body runs later.
    * Wrong arguments of a generator or coroutine function: the error comes at its first step.
    * ``inspect.getfullargspec`` and ``getcallargs`` of a decorated ``def`` see ``(*args,
      **kwargs)``, as with every use of ``functools.wraps``; ``inspect.signature`` sees the
      function's own.
    * Threads that the body starts (``threads.blocks``). Programs that the body starts have only
      the capped variables.
    * Other threads outside of a worker: the thread variables of ``os.environ`` are set for the
      whole process while the function runs.
    * ``os.fork()`` while other threads compute with OpenBLAS. OpenBLAS ends its threads before a
      fork, and waits without end for a thread that another thread has just woken. NumPy alone does
      the same (0.3.31: 5 of 5 programs within 60 forks; none of 8 whose threads' work was
      decorated).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, overload

from safepool.arguments import check, checked
from safepool.pool.core.policy import NO_POLICY, Policy, policy_of
from safepool.threads.cap import capped, is_capped
from safepool.transport.marks import found_as

_C = TypeVar("_C")
_P = ParamSpec("_P")
_T = TypeVar("_T")

# Attributes by which ``inspect`` and others recognise a function.
_OF_FUNCTIONS = (
    "__annotations__",
    "__code__",
    "__defaults__",
    "__kwdefaults__",
    "__name__",
    "__qualname__",
)


@overload
def worker(
    function: staticmethod[_P, _T],
    /,
    *,
    threads: int = 1,
    timeout: float | None = None,
    retries: int | None = None,
) -> staticmethod[_P, _T]: ...


@overload
def worker(
    function: classmethod[_C, _P, _T],
    /,
    *,
    threads: int = 1,
    timeout: float | None = None,
    retries: int | None = None,
) -> classmethod[_C, _P, _T]: ...


@overload
def worker(
    function: Callable[_P, _T],
    /,
    *,
    threads: int = 1,
    timeout: float | None = None,
    retries: int | None = None,
) -> Callable[_P, _T]: ...


@overload
def worker(
    *, threads: int = 1, timeout: float | None = None, retries: int | None = None
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]: ...


@checked("worker")
def worker(
    function: Callable[..., Any] | classmethod[Any, Any, Any] | None = None,
    /,
    *,
    threads: int = 1,
    timeout: float | None = None,
    retries: int | None = None,
) -> Any:
    """Cap native thread pools while ``function`` runs, and set its timeout and retries.

    The cap works in any process: a worker of this pool, of the standard pools or of joblib, or the
    main process. In a worker of this pool, which is capped anyway, it costs half a microsecond.
    Afterwards the native pools have their former size again. A library that the function was the
    first to import gets its default size, if it can still be changed. Generators, coroutines and
    asynchronous generators are capped while their body runs, and not while they wait.

    The standard pickler accepts the result wherever it accepts the function itself: as a decorator
    and inline, from ``__main__`` too.

    ``timeout`` and ``retries`` replace those of a :class:`safepool.ProcessPool`. Other pools
    ignore them: they cannot end a task or run it again.

    Args:
        function: The function to decorate: any callable, a class or static method too. Left out in
            ``@worker(timeout=5)``.
        threads: The most threads of each native pool while the function runs, at least 1. A number
            above the worker's raises it for this function, if the runtime allows that.
        timeout: Seconds that one call may run, above 0; ``None`` uses the pool's value.
        retries: Number of times that a call runs again after its worker died, at least 0; ``None``
            uses the pool's value. A call that raised an exception never runs again.

    Returns:
        The wrapped function with the same signature, name and docstring; without ``function`` a
        decorator.

    Raises:
        ValueError: A number is out of its range.
        TypeError: ``function`` cannot be called, or ``threads`` is no integer.

    Example:
        >>> @worker
        ... def add(x: int, y: int) -> int:
        ...     return x + y
        >>> add(1, 2)
        3
        >>> @worker(timeout=30, retries=1)
        ... def slow(x: int) -> int:
        ...     return -x
        >>> slow(1), worker(abs, timeout=5)(-2)
        (-1, 2)
    """
    terms = _Terms(threads=threads, timeout_s=timeout, retries=retries)
    return terms.decorate if function is None else terms.decorate(function)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """Arguments of ``worker()``, able to travel."""

    threads: int
    timeout_s: float | None
    retries: int | None

    def decorate(self, function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(self.decorate(function.__func__))
        check("function", function)
        if not isinstance(function, types.FunctionType) or _is_found_by_name(function):
            return WorkerCall(function, self)
        run = _capped_like(function, self.threads)
        self.attach(functools.update_wrapper(run, function), function)
        return run

    def attach(self, run: Callable[..., Any], function: Callable[..., Any]) -> None:
        # A function that is decorated twice keeps the inner settings that the outer decorator
        # leaves out.
        own = Policy(timeout_s=self.timeout_s, retries=self.retries)
        own.otherwise(policy_of(function, NO_POLICY)).attach(run)


class WorkerCall:
    """A callable that runs another with native threads capped, and looks like it."""

    def __init__(self, function: Callable[..., Any], terms: _Terms) -> None:
        """Take what :func:`worker` was given."""
        # Other attributes are looked up in the function (``__getattr__``): they may change.
        functools.update_wrapper(self, function, updated=())
        self.__safepool_terms__ = terms
        self._run = functools.update_wrapper(_capped_like(function, terms.threads), function)
        self._run.__safepool_terms__ = terms  # type: ignore[attr-defined]
        if _is_of_main(self):
            # A search by that name finds the function in this object (``__reduce_ex__``).
            self._run.__qualname__ = self.__qualname__ + _RUN
        terms.attach(self, function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run it capped."""
        return self._run(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        # In a class body the object becomes a method if the called object would: a function does,
        # a builtin or a partial does not.
        function: Any = self.__wrapped__
        if instance is None or not hasattr(type(function), "__get__"):
            return self
        bound = function.__get__(instance, owner)
        return self if bound is function else types.MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        function = self.__dict__.get("__wrapped__")
        if function is None or (name.startswith("__") and name not in _OF_FUNCTIONS):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(function, name)
        except AttributeError:
            if name not in _OF_FUNCTIONS:
                raise
            return getattr(_body_of(function), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not _is_found_by_name(self):
            return WorkerCall, (self.__wrapped__, self.__safepool_terms__)
        if _is_of_main(self) and protocol >= 4:
            # The name would lead nowhere in a worker that has not run the same program. The
            # function in its place is pickled by the standard pickler by name as well, and
            # by cloudpickle by value.
            return _call_of, (self._run,)
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<safepool.worker {self.__wrapped__!r}>"


# Name of the attribute by which other decorators give their function.
_RUN = "._run"


def _call_of(run: Any) -> WorkerCall:
    """Return the callable with that function: this process's own, or one like it."""
    found = found_as(run.__module__, run.__qualname__.removesuffix(_RUN))
    if isinstance(found, WorkerCall) and found._run is run:
        return found
    return WorkerCall(run.__wrapped__, run.__safepool_terms__)


def _is_found_by_name(function: Any) -> bool:
    name = getattr(function, "__qualname__", None) or ""
    return found_as(getattr(function, "__module__", None) or "", name) is function


def _is_of_main(function: Any) -> bool:
    return function.__module__ == "__main__" and hasattr(function, "__qualname__")


def _body_of(function: Any) -> Any:
    """Return the function whose body runs when ``function`` is called, as far as it is known."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif hasattr(function, "__code__") or isinstance(function, type):
            return function
        else:
            call = type(function).__call__
            return call if isinstance(call, types.FunctionType) else function


def _capped_like(function: Callable[..., Any], threads: int) -> Any:
    """Return a function of the same kind that runs ``function`` with native threads capped."""
    flags = getattr(getattr(_body_of(function), "__code__", None), "co_flags", 0)
    if flags & inspect.CO_COROUTINE:
        return _capped_coroutine(function, threads)
    if flags & inspect.CO_ASYNC_GENERATOR:
        return _capped_async_generator(function, threads)
    if flags & inspect.CO_GENERATOR:
        run = _capped_generator(function, threads)
        return types.coroutine(run) if flags & inspect.CO_ITERABLE_COROUTINE else run

    def run_capped(*args: Any, **kwargs: Any) -> Any:
        # Asked here, since a ``with`` costs another half of a microsecond
        # (benchmarks/decorator.py).
        if is_capped(threads):
            return function(*args, **kwargs)
        with capped(threads):
            return function(*args, **kwargs)

    return run_capped


def _capped_generator(function: Callable[..., Any], threads: int) -> Any:
    def run_capped(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        body = function(*args, **kwargs)
        step, value = body.send, None
        # Passed in a list: this frame must not keep a reference to the item while the body waits.
        item: list[Any] = []
        while True:
            try:
                with capped(threads):
                    item.append(step(value))
            except StopIteration as stop:
                return stop.value
            finally:
                value = None  # it may be an exception that holds this frame
            try:
                value = yield item.pop()
                step = body.send
            except BaseException as error:  # noqa: BLE001 -- the body's to handle, all of them
                step, value = body.throw, error

    return run_capped


def _capped_coroutine(function: Callable[..., Any], threads: int) -> Any:
    steps = types.coroutine(_capped_generator(_itself, threads))

    async def run_capped(*args: Any, **kwargs: Any) -> Any:
        return await steps(function(*args, **kwargs))

    return run_capped


def _capped_async_generator(function: Callable[..., Any], threads: int) -> Any:
    steps = types.coroutine(_capped_generator(_itself, threads))

    async def run_capped(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        body = function(*args, **kwargs)
        step = body.asend(None)
        item: list[Any] = []
        while True:
            try:
                item.append(await steps(step))
            except StopAsyncIteration:
                return
            finally:
                step = None  # it may hold an exception that holds this frame
            try:
                sent = yield item.pop()
            except BaseException as error:  # noqa: BLE001 -- the body's to handle, all of them
                step = body.athrow(error)
            else:
                step = body.asend(sent)

    return run_capped


def _itself(body: Any) -> Any:
    return body
