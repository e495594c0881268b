"""``@safepool.worker``: native threads capped around one function, in whatever pool runs it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from safepool.threads.cap import capped

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["worker"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def worker(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cap native thread pools at one thread while ``function`` runs.

    It works in any process: a worker of this pool (where it costs nothing, the worker is
    capped anyway), of the standard pools, of joblib, or the main process. Afterwards the
    pools that were loaded before have their size again; a library that the function was
    the first to import keeps to one thread. The result is a plain function of the same name,
    so the standard pickler takes it wherever it takes the function itself.

    Not covered: a coroutine or generator function, whose body runs after it has returned.
    Outside of a worker the thread variables of ``os.environ`` are set while it runs, for the
    whole process.

    Args:
        function: The function to decorate.

    Returns:
        A function with the same signature, name and docstring.

    Example:
        >>> @worker
        ... def add(x: int, y: int) -> int:
        ...     return x + y
        >>> add(1, 2)
        3
    """

    @functools.wraps(function)
    def run_capped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with capped(1):
            return function(*args, **kwargs)

    return run_capped
