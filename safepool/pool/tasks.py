"""One call on its way to a result, and the ways in which it gets there."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import Future, InvalidStateError, _base
from concurrent.futures.process import _RemoteTraceback
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.errors import PoolBrokenError, RemoteTaskError, text_of
from safepool.transport import payloads
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from safepool.pool.functions import SentFunction
    from safepool.pool.names import Delivery
    from safepool.pool.policy import Policy
    from safepool.transport.frames import Segment
    from safepool.transport.sharing import Shared

    Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

__all__ = [
    "Pickled",
    "PoolFuture",
    "Task",
    "begin",
    "cancel",
    "fail",
    "finish",
    "fresh",
    "name_of",
    "rebuild",
]

_log = ContainedLogger()


class Pickled(NamedTuple):
    """A call on its way.

    Attributes:
        function: If workers keep it; otherwise it is in the payload.
        segments: The payload.
        shared: What it refers to, by :func:`safepool.share`.
        needs: Names of the script that a worker must have.
    """

    function: SentFunction | None
    segments: Sequence[Segment]
    shared: Sequence[Shared[Any]]
    needs: Sequence[Delivery]


class PoolFuture(Future[Any]):
    """A future that may have to wait again, and raises exceptions whatever their truth value.

    ``concurrent.futures.Future`` before Python 3.14 asks ``if self._exception:`` and so
    returns ``None`` for an exception with ``__bool__`` or an empty ``__len__`` (gh-132063).
    """

    def __init__(self, owner: object = None) -> None:
        """Make one.

        Args:
            owner: Whoever ends it.
        """
        super().__init__()
        self.owner = owner

    def begin(self) -> bool:
        """Become running; ``False`` if it was cancelled, or has ended otherwise."""
        with self._condition:
            # Asked first: what that call raises for other states, it logs as well.
            return (
                self._state in (_base.PENDING, _base.CANCELLED)
                and self.set_running_or_notify_cancel()
            )

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call a function when this has ended, as the base does."""
        if getattr(fn, "__module__", None) == "asyncio.futures":
            fn = functools.partial(_end_awaiting, fn)
        super().add_done_callback(fn)

    def wait_again(self) -> None:
        """Stop being marked as running: the worker that had it never began."""
        with self._condition:
            if self._state == _base.RUNNING:
                self._state = _base.PENDING

    def cancel_running(self) -> bool:
        """Become cancelled though a worker may run it; ``False`` if it has ended otherwise."""
        with self._condition:
            if self._state not in (_base.PENDING, _base.RUNNING):
                return self.cancelled()
            self._state = _base.CANCELLED
            # In the same breath: the scheduler's thread may ask the same question.
            self.set_running_or_notify_cancel()
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        return True

    if sys.version_info < (3, 14):

        def _Future__get_result(self) -> Any:  # noqa: N802 -- the mangled name of the method replaced
            if self._exception is None:
                return self._result
            try:
                raise self._exception
            finally:
                # Else the exception's traceback would hold this frame, and it this future.
                self = None  # type: ignore[assignment]  # noqa: PLW0642


def _end_awaiting(end: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    """End what a coroutine awaits (``asyncio.wrap_future``, ``run_in_executor``).

    A coroutine cannot be told of a ``StopIteration``: asyncio refuses it before Python 3.12, and
    the coroutine waits for ever. So it is told in the way of PEP 479.
    """
    error = None if future.cancelled() else future.exception()
    if isinstance(error, (StopIteration, StopAsyncIteration)):
        stopped = RuntimeError(f"task raised {type(error).__name__}")
        stopped.__cause__ = error
        future = Future()
        future.set_exception(stopped)
    end(future)


class Task:
    """A call that waits for a worker, or that one has.

    Attributes:
        future: Where its result goes.
        call: Function, positional and keyword arguments; ``None`` once they were sent, so
            that the pool keeps nothing alive.
        name: What an error calls it.
        policy: What holds for it.
        pickled: What was sent, kept while it may have to be sent again: the function, the
            segments, and the shared objects that they refer to.
        attempts: How often it was begun and lost with its worker.
        position, done, count, expected_ns, bound: As of any :class:`~safepool.pool.ledger.Work`.
    """

    __slots__ = (
        "attempts",
        "call",
        "done",
        "expected_ns",
        "future",
        "name",
        "pickled",
        "policy",
        "position",
    )

    count = 1
    bound = False

    def __init__(self, future: PoolFuture, call: Call, name: str, policy: Policy) -> None:
        self.future = future
        self.call: Call | None = call
        self.name = name
        self.policy = policy
        self.pickled: Pickled | None = None
        self.attempts = self.position = self.done = self.expected_ns = 0

    def tasks_in(self, calls: int) -> float:
        """Tell how many tasks so many calls are."""
        return calls

    def split(self, at: int) -> Self:
        """Never asked for: there is one call."""
        raise ValueError(at)


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


def begin(future: PoolFuture) -> bool:
    """Mark a future as running; ``False`` if it was cancelled, or ended by somebody else."""
    return future.begin()


def cancel(future: PoolFuture) -> None:
    """End a future that no worker has begun."""
    _end(future.cancel)
    begin(future)


def finish(future: PoolFuture, result: object) -> None:
    """End a future with a result, unless somebody else has ended it."""
    _end(future.set_result, result)


def fail(future: PoolFuture, error: BaseException) -> None:
    """End a future with an exception, unless somebody else has ended it."""
    _end(future.set_exception, error)


def _end(end: Callable[..., object], *arguments: object) -> None:
    try:
        end(*arguments)
    except InvalidStateError:
        pass  # somebody else has ended it
    except BaseException:  # noqa: BLE001 -- a callback's SystemExit must not cost other tasks
        _log.exception("a callback of a future raised")


def fresh(error: PoolBrokenError) -> PoolBrokenError:
    """Return an error of its own for each future (gh-101267), with the same cause."""
    copy = PoolBrokenError(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def rebuild(segments: Sequence[bytes | bytearray | memoryview]) -> BaseException:
    """Return the exception that a worker described, its remote traceback as the cause."""
    pickled, name, text, trace, reason = payloads.loads(segments)
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = payloads.loads(pickled)
        except BaseException as problem:  # noqa: BLE001 -- user code
            reason = f"{type(problem).__name__}: {text_of(problem)}"
    if not isinstance(error, BaseException):
        error = RemoteTaskError(name, text, reason)
    # Not by the exception's own __setattr__: a frozen dataclass forbids it.
    BaseException.__setattr__(error, "__cause__", _RemoteTraceback(trace))
    return error
