"""One call on its way to a result, and the ways in which it gets there."""

from __future__ import annotations

import sys
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import _RemoteTraceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safepool.errors import PoolBrokenError, RemoteTaskError
from safepool.transport import payloads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PoolFuture", "Task", "fail", "finish", "fresh", "name_of", "rebuild"]


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


def finish(future: PoolFuture, result: object) -> None:
    """End a future with a result, unless somebody else has ended it."""
    try:
        future.set_result(result)
    except InvalidStateError:
        pass


def fail(future: PoolFuture, error: BaseException) -> None:
    """End a future with an exception, unless somebody else has ended it."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass


def fresh(error: PoolBrokenError) -> PoolBrokenError:
    """Return an error of its own for each future (gh-101267), with the same cause."""
    copy = PoolBrokenError(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def rebuild(segments: Sequence[bytearray]) -> BaseException:
    """Return the exception that a worker described, its remote traceback as the cause."""
    pickled, name, text, trace, reason = payloads.loads(segments)
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = payloads.loads(pickled)
        except BaseException as problem:  # noqa: BLE001 -- user code
            reason = f"{type(problem).__name__}: {problem}"
    if not isinstance(error, BaseException):
        error = RemoteTaskError(name, text, reason)
    error.__cause__ = _RemoteTraceback(trace)
    return error
