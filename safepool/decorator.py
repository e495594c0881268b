"""``@safepool.worker``: native threads capped around one function, in whatever pool runs it."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, ParamSpec, TypeVar, overload

from safepool.pool.policy import Policy
from safepool.threads.cap import capped

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["worker"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


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


def worker(
    function: Callable[_P, _T] | None = None,
    /,
    *,
    threads: int = 1,
    timeout: float | None = None,
    retries: int | None = None,
) -> Callable[_P, _T] | Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Cap native thread pools while ``function`` runs, and say how long and how often it may.

    The cap works in any process: a worker of this pool (where it costs nothing, the worker is
    capped anyway), of the standard pools, of joblib, or the main process. Afterwards the
    pools that were loaded before have their size again; a library that the function was
    the first to import keeps to its number. The result is a plain function of the same name,
    so the standard pickler takes it wherever it takes the function itself.

    ``timeout`` and ``retries`` are heeded by :class:`safepool.ProcessPool`, and take the place
    of the pool's own; no other pool can end a task or run it again.

    Not covered: a coroutine or generator function, whose body runs after it has returned.
    Outside of a worker the thread variables of ``os.environ`` are set while it runs, for the
    whole process.

    Args:
        function: The function to decorate; left out in ``@worker(timeout=5)``.
        threads: Threads for each native pool while it runs, at least 1. More than the worker
            has raises them for this function, where the runtime can be raised.
        timeout: Seconds that one call may run, above 0; ``None`` is the pool's.
        retries: How often a call is run again whose worker died under it, at least 0;
            ``None`` is the pool's. Never after an exception.

    Returns:
        A function with the same signature, name and docstring; without ``function`` a
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
    if operator.index(threads) < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    policy = Policy(timeout_s=timeout, retries=retries)

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        if not callable(function):
            raise TypeError(f"worker() takes something that can be called, not {function!r}")

        @functools.wraps(function)
        def run_capped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with capped(threads):
                return function(*args, **kwargs)

        policy.attach(run_capped)
        return run_capped

    return decorate if function is None else decorate(function)
