"""One call on its way to a result."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PoolFuture", "Task"]


class PoolFuture(Future[Any]):
    """A future that also raises exceptions that are false in a boolean context.

    ``concurrent.futures.Future`` before Python 3.14 asks ``if self._exception:`` and so
    returns ``None`` for an exception with ``__bool__`` or an empty ``__len__`` (gh-132063).
    """

    if sys.version_info < (3, 14):

        def _Future__get_result(self) -> Any:  # noqa: N802 -- the mangled name of the method replaced
            if self._exception is None:
                return self._result
            try:
                raise self._exception
            finally:
                # Else the exception's traceback would hold this frame, and it this future.
                self = None  # type: ignore[assignment]  # noqa: PLW0642


@dataclass(slots=True, eq=False)
class Task:
    """A call that waits for a worker, or runs in one.

    Attributes:
        number: What its frames are marked with.
        future: Where its result goes.
        call: Function, positional and keyword arguments; ``None`` once they were sent, so
            that the pool keeps nothing alive.
        name: What an error calls it.
    """

    number: int
    future: PoolFuture
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None
    name: str


def name_of(function: Callable[..., Any]) -> str:
    """Return what to call a function in a message.

    Example:
        >>> name_of(len)
        'builtins.len'
    """
    function = getattr(function, "func", function)  # what a functools.partial calls
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{module}.{name}"
