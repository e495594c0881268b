"""One call, its result, and the ways of the result to the caller."""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import time
import types
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future, InvalidStateError, _base
from concurrent.futures.process import _RemoteTraceback
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from safepool.errors import PoolBrokenError, RemoteTaskError, text_of
from safepool.pool.core.work import Call
from safepool.pool.hands import in_a_thread
from safepool.pool.latch import Bell, Latch
from safepool.transport import payloads
from safepool.transport.trusted import UntrustedError
from safepool.workers.contained import ContainedLogger
from safepool.workers.describe import UNSENT_RESULT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.functions import SentFunction
    from safepool.pool.core.policy import Policy
    from safepool.transport.frames import Buffer, Segment
    from safepool.transport.sharing import Shared

    class Turn(Protocol):
        """Way in which a call was sent that the scheduler does not know yet: of ``turns``."""

        def ask(self) -> None:
            """Give the calls to the scheduler."""

        def collect(self, timeout_s: float | None) -> None:
            """Wait for the answer, and end the calls by it."""

        @property
        def is_over(self) -> bool:
            """Whether the calls were ended here, or are the scheduler's."""
            ...

    Parts = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_log = ContainedLogger()


class Pickled(NamedTuple):
    """A call on its way.

    Attributes:
        function: If workers keep it; otherwise it is in the payload.
        needs: Names of the script that a worker must have.
    """

    function: SentFunction | None
    segments: Sequence[Segment]
    shared: Sequence[Shared[Any]]
    needs: Sequence[Delivery]


# State of a future: the thread that has claimed it, and its outcome.
_RUN, _CANCEL = "run", "cancel"
_Verdict = tuple[str, Any, "BaseException | None"]
_CANCELLED: _Verdict = (_base.CANCELLED_AND_NOTIFIED, None, None)
# For those who look at many futures at once, and hold their locks: microseconds, unless a signal's
# handler runs meanwhile.
_MOMENT_S = 0.02
# Name of a thread that waits for a lock which a signal's handler may keep.
_LATE = "safepool-late"


class _Here:
    """This process. ``os.getpid()`` asks the system each time, which is slow in some sandboxes."""

    pid: int = os.getpid()


here: _Here = _Here()


class OwnerRef(weakref.ref[Any]):
    """Weak reference to a pool, and the process in which the pool ends its calls."""

    __slots__ = ("pid",)

    pid: int

    def __new__(cls, pool: object) -> Self:
        """Refer to a pool of this process."""
        made = super().__new__(cls, pool)
        made.pid = os.getpid()
        return made

    def check(self) -> None:
        """Refuse the use of the pool in a fork of its process."""
        if os.getpid() != self.pid:
            raise self.refusal()

    def refusal(self) -> RuntimeError:
        """Return the error of a use in a fork."""
        return RuntimeError(
            f"this pool belongs to process {self.pid}, and process {os.getpid()} is a fork of "
            f"that process: results arrive only in process {self.pid}. Make a new pool in the "
            "fork, and submit the call there"
        )


class PoolFuture(Future[Any]):
    """A future without a lock that could be held while a signal handler runs.

    A signal handler may wait for any call, whatever code it has interrupted.
    ``concurrent.futures.Future`` holds a condition in ``result()`` and ``cancel()``, and the
    thread that ends the future needs the same condition.

        claim     _RUN or _CANCEL: one of them, by ``dict.setdefault``, in one step
        verdict   state, result and exception: the first one counts, by the same
        told      the state for ``wait()`` and ``as_completed()``, which look at ``_state``
                  under ``_condition``
        turn      by which the call was sent, while the scheduler does not know of it (``turns``)

    A fork of the pool's process has none of its threads. An unfinished future ends there with an
    error as soon as the fork asks for it; its callbacks are left to the pool's process.

    ``_condition`` and its relatives are made on first access. Unlike ``concurrent.futures.Future``
    before Python 3.14, this class raises exceptions whatever their truth value: that one asks ``if
    self._exception:`` and so returns ``None`` for an exception with ``__bool__`` or an empty
    ``__len__`` (gh-132063).
    """

    def __init__(self, owner: OwnerRef | None = None) -> None:
        """Make one that this pool ends."""
        # The base class's __init__ is not called: its condition costs as much as the pickling of a
        # call.
        self.owner = owner

    def __getattr__(self, name: str) -> Any:
        make = _MADE_WHEN_ASKED.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        facts = self.__dict__
        made = facts.setdefault(name, make())
        if "_turn" in facts:
            self._ask()
        if name == "_condition" and "_verdict" in facts:
            self.tell()  # one that has ended by `end_alone`
        return made

    # Attributes that functions of concurrent.futures, and repr(), read.

    @property
    def _state(self) -> str:  # type: ignore[override]
        facts = self.__dict__
        told: str | None = facts.get("_told")
        if told is None and "_verdict" in facts:
            told = self._tell_now()
        if told is not None:
            return told
        claim = facts.get("_claim")
        if claim is None:
            return _base.PENDING
        if "_turn" in facts:
            self._ask()
        return _base.RUNNING if claim is _RUN else _base.CANCELLED

    @property
    def _result(self) -> Any:  # type: ignore[override]
        return self.__dict__.get("_verdict", _CANCELLED)[1]

    @property
    def _exception(self) -> BaseException | None:  # type: ignore[override]
        error: BaseException | None = self.__dict__.get("_verdict", _CANCELLED)[2]
        return error

    # Methods for callers.

    def cancel(self) -> bool:
        """Cancel the call, unless it runs or has ended."""
        facts = self.__dict__
        if self._is_left or "_verdict" in facts or facts.setdefault("_claim", _CANCEL) is _RUN:
            return self.cancelled()
        self._announce()
        return True

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        verdict = self._outcome()
        return verdict is not None and verdict[0] == _base.CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """Return whether a worker has it."""
        self._ask()
        return self.__dict__.get("_claim") is _RUN and self._outcome() is None

    def done(self) -> bool:
        """Return whether it has ended, or was cancelled."""
        if "_turn" in self.__dict__:
            self._ask()
        return self._outcome() is not None

    def has_ended(self) -> bool:
        """Return the same; a caller that reads the answer itself goes on with that."""
        return self._outcome() is not None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call; return its result or raise its exception."""
        verdict: _Verdict | None = self._wait(timeout)
        assert verdict is not None
        state, result, error = verdict
        if error is None and state == _base.FINISHED:
            return result
        try:
            raise CancelledError if error is None else error
        finally:
            # Otherwise the exception's traceback would hold this frame, and the frame this future.
            del self, verdict, error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call; return its exception."""
        state, _, error = self._wait(timeout)
        if state != _base.FINISHED:
            raise CancelledError
        return error

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call ``fn`` with this future when it has ended; at once if it has."""
        if getattr(fn, "__module__", None) == "asyncio.futures":
            fn = functools.partial(_end_awaiting, fn)
        entry = [fn]
        callbacks: deque[list[Callable[[Future[Any]], object]]] = self._done_callbacks
        callbacks.append(entry)
        # First this, then the check: the ending thread does the two in the other order.
        if self.done():
            self._call(entry)

    # Methods for the scheduler's thread, with the names that the base promises to subclasses.

    def set_running_or_notify_cancel(self) -> bool:
        """Become running; ``False`` if it was cancelled."""
        if self.__dict__.get("_claim") is _RUN:
            raise InvalidStateError(f"future in unexpected state: {self._state}")
        return self.begin()

    def set_result(self, result: Any) -> None:
        """End with a result."""
        self._end((_base.FINISHED, result, None))

    def set_exception(self, exception: BaseException | None) -> None:
        """End with an exception."""
        self._end((_base.FINISHED, None, exception))

    def begin_alone(self, turn: Turn) -> None:
        """Become running in a direct turn. Only the caller's thread knows this future yet."""
        facts = self.__dict__
        facts["_turn"], facts["_claim"] = turn, _RUN

    def forget_turn(self) -> None:
        """Drop the turn: the scheduler knows the call, or the call has ended."""
        self.__dict__.pop("_turn", None)

    def end_alone(self, result: Any) -> bool:
        """End with a result, in the waiting thread; ``False``: another calls :meth:`tell`."""
        facts, verdict = self.__dict__, (_base.FINISHED, result, None)
        first = facts.setdefault("_verdict", verdict) is verdict
        # After that: a thread that asks for one of these checks the verdict afterwards.
        return first and facts.keys().isdisjoint(_MADE_WHEN_ASKED)

    def begin(self) -> bool:
        """Become running; ``False`` if it was cancelled, or has ended otherwise."""
        facts = self.__dict__
        if facts.get("_claim") is _RUN:
            return False
        if facts.setdefault("_claim", _RUN) is _RUN and "_verdict" not in facts:
            return True
        if "_told" not in facts:
            self.tell()
        return False

    def wait_again(self) -> None:
        """Stop being marked as running: the worker that had it never began."""
        if self.running():
            del self.__dict__["_claim"]

    def cancel_running(self) -> bool:
        """Become cancelled even if a worker runs it; ``False`` if it has already ended.

        The scheduler's thread wakes those that wait for several futures (`tell`): an interrupt of
        the caller could leave the condition locked, and the waiting threads asleep.
        """
        if not self.cancel():
            if self.__dict__.setdefault("_verdict", _CANCELLED) is not _CANCELLED:
                return False
            self._announce()
        return True

    def tell(self) -> None:
        """Wake the threads that wait for this future. A second call does nothing."""
        condition = self._condition
        if condition.acquire(timeout=_MOMENT_S):
            try:
                self._tell()
            finally:
                condition.release()
        else:
            self._tell_later()
        self._announce()

    def _end(self, verdict: _Verdict) -> None:
        facts = self.__dict__
        mine = threading.RLock()
        mine.acquire()
        # Without a condition, a later request for one waits for the end of this.
        condition = facts.setdefault("_condition", mine)
        held = condition is mine or condition.acquire(timeout=_MOMENT_S)
        try:
            claimed = facts.setdefault("_claim", _RUN) is _RUN
            first = claimed and facts.setdefault("_verdict", verdict) is verdict
            if held and claimed:
                self._tell()  # also for a call that was interrupted before it had
        finally:
            if held:
                condition.release()
        if not held and self._outcome() is not _CANCELLED:  # otherwise the canceller does
            self._tell_later()
        self._announce()
        if not first:
            # repr() is not used: it waits for the condition.
            raise InvalidStateError(f"future at {id(self):#x} has ended, or was cancelled")

    def _tell(self) -> None:
        """Set the state for threads that hold the condition; it is held here."""
        facts = self.__dict__
        verdict = self._outcome()
        if verdict is None or "_told" in facts:
            return
        facts["_told"] = verdict[0]
        for waiter in facts.get("_waiters", ()):
            if verdict[0] != _base.FINISHED:
                notify = waiter.add_cancelled
            else:
                notify = waiter.add_result if verdict[2] is None else waiter.add_exception
            if _is_free(waiter):
                notify(self)
            else:
                in_a_thread(functools.partial(notify, self), _LATE)

    def _tell_now(self) -> str | None:
        """Set it for a reader that comes before the scheduler; ``None`` if another thread must."""
        condition: Any = self._condition
        # The same if another thread holds the condition and expects no change.
        if condition._is_owned() or not condition.acquire(blocking=False):
            return None
        try:
            self._tell()
        finally:
            condition.release()
        told: str | None = self.__dict__.get("_told")
        return told

    def _tell_later(self) -> None:
        condition = self._condition

        def tell() -> None:
            with condition:
                self._tell()

        in_a_thread(tell, _LATE)

    def _announce(self) -> None:
        """Wake the waiting thread, and call the callbacks."""
        facts = self.__dict__
        latch: Latch | None = facts.get("_latch")
        if latch is not None:
            latch.open()
        callbacks: deque[list[Callable[[Future[Any]], object]]] | None
        callbacks = facts.get("_done_callbacks")
        while callbacks is not None:
            try:
                entry = callbacks.popleft()
            except IndexError:
                return
            elsewhere = getattr(_callers, "call", None)
            functions = [*entry]  # another thread may call it meanwhile
            if elsewhere is None or not functions or _is_ours(functions[0]):
                self._call(entry)
            else:
                elsewhere(functools.partial(self._call, entry))

    def _call(self, entry: list[Callable[[Future[Any]], object]]) -> None:
        try:
            function = entry.pop()
        except IndexError:
            return  # by another thread
        try:
            function(self)
        except Exception:  # noqa: BLE001 -- user code; the words of concurrent.futures
            _base.LOGGER.exception("exception calling callback for %r", self)

    def _outcome(self) -> _Verdict | None:
        facts = self.__dict__
        verdict: _Verdict | None = facts.get("_verdict")
        if verdict is None:
            owner = self.owner
            if owner is not None and owner.pid != here.pid:
                return self._leave()
            if facts.get("_claim") is _CANCEL:
                return _CANCELLED
        return verdict

    @property
    def _is_left(self) -> bool:
        """Whether this process is a fork of the pool's."""
        owner = self.owner
        return owner is not None and owner.pid != here.pid

    def _leave(self) -> _Verdict:
        """End it in a fork, without its locks: threads that the fork lacks may hold them."""
        facts, owner = self.__dict__, self.owner
        assert owner is not None
        for left in ("_turn", "_done_callbacks"):
            facts.pop(left, None)
        error = None if facts.get("_claim") is _CANCEL else (_base.FINISHED, None, owner.refusal())
        verdict: _Verdict = facts.setdefault("_verdict", error or _CANCELLED)
        facts["_told"] = verdict[0]
        return verdict

    def _condition_in_fork(self) -> Any:
        facts = self.__dict__
        if not self._is_left:
            return facts.get("_condition") or self.__getattr__("_condition")
        self._leave()
        return facts.setdefault(f"condition in {here.pid}", threading.Condition())

    def _ask(self) -> None:
        """Let the scheduler know of the call, if it does not yet and has not ended."""
        facts = self.__dict__
        turn: Turn | None = facts.get("_turn")
        if turn is not None and "_verdict" not in facts:
            turn.ask()

    def _collect(self, turn: Turn, timeout_s: float) -> float:
        """Wait for the answer in this thread; return the remaining time."""
        begun_s = time.monotonic()
        turn.collect(timeout_s)
        return max(0.0, timeout_s - (time.monotonic() - begun_s))

    def _wait(self, timeout_s: float | None) -> _Verdict:
        facts = self.__dict__
        turn: Turn | None = facts.get("_turn")
        # A call that was sent in a turn is not cancelled.
        verdict: _Verdict | None
        verdict = self._outcome() if turn is None else facts.get("_verdict")
        if verdict is None:
            if getattr(_callers, "owner", self) is self.owner:
                raise RuntimeError(
                    "the pool's own thread would wait for itself. Do not wait for a call of a "
                    "pool in a finalizer (__del__)"
                )
            if turn is not None:
                if timeout_s is None:
                    turn.collect(None)
                else:
                    timeout_s = self._collect(turn, timeout_s)
                found: _Verdict | None = facts.get("_verdict")
                if found is not None:
                    return found
            latch: Latch = self._latch
            # First this, then the look.
            verdict = self._outcome()
            if verdict is None:
                latch.wait(timeout_s)
                verdict = self._outcome()
            if verdict is None:
                raise TimeoutError
        return verdict


_MADE_WHEN_ASKED: dict[str, Callable[[], Any]] = {
    "_condition": threading.Condition,
    "_waiters": list,
    "_done_callbacks": deque,
    "_latch": Latch,
}


def _forked() -> None:
    here.pid = os.getpid()
    # Only here: in the program a property would cost time with each future of a wait().
    setattr(PoolFuture, "_condition", property(PoolFuture._condition_in_fork))  # noqa: B010


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forked)

# Attributes of a scheduler's thread: its pool, and the caller of its futures' callbacks.
_callers = threading.local()


def callbacks_by(call: Callable[[Callable[[], None]], None], owner: object) -> None:
    """Have ``call`` run the callbacks of futures that this thread ends: elsewhere, in order.

    The thread must not wait for a future of this owner: it would have to end it itself.
    """
    _callers.call, _callers.owner = call, owner


def _is_ours(function: object) -> bool:
    """Tell whether a callback is known to wait for nothing."""
    if type(function) is types.BuiltinMethodType:
        return type(function.__self__) in (set, list, deque, queue.SimpleQueue)
    # They hand over to the event loop.
    if type(function) is Bell:
        return True
    return type(function) is functools.partial and function.func is _end_awaiting


def _is_free(waiter: Any) -> bool:
    """Tell whether no thread holds a lock of what waits for several futures."""
    condition = getattr(getattr(waiter, "event", None), "_cond", None)
    locks = getattr(waiter, "lock", None), getattr(condition, "_lock", None)
    return not any(lock is not None and lock.locked() for lock in locks)


def _end_awaiting(end: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    """End the future that a coroutine awaits (``asyncio.wrap_future``, ``run_in_executor``).

    A coroutine cannot receive a ``StopIteration``: asyncio refuses it before Python 3.12, and the
    coroutine waits for ever. The coroutine gets a ``RuntimeError`` instead, as PEP 479 demands.
    """
    error = None if future.cancelled() else future.exception()
    if isinstance(error, (StopIteration, StopAsyncIteration)):
        stopped = RuntimeError(f"task raised {type(error).__name__}")
        stopped.__cause__ = error
        future = Future()
        future.set_exception(stopped)
    end(future)


class Task(Call):
    """A call with a future.

    ``call`` is ``None`` once it was sent, so that the pool keeps nothing alive.
    """

    __slots__ = ("call", "future")

    pickled: Pickled | None

    def __init__(self, future: PoolFuture, call: Parts, name: str, policy: Policy) -> None:
        super().__init__(name, policy)
        self.future: PoolFuture = future
        self.call: Parts | None = call

    def is_wanted(self) -> bool:
        """Whether it was not cancelled. If it was, waiting threads are woken."""
        return not self.future.cancelled() or self.future.begin()


def cancel(future: PoolFuture) -> None:
    """End a future that no worker has begun."""
    _end(future.cancel)
    future.begin()


def finish(future: PoolFuture, result: object) -> None:
    """End a future with a result, unless it has already ended."""
    _end(future.set_result, result)


def fail(future: PoolFuture, error: BaseException) -> None:
    """End a future with an exception, unless it was cancelled or has already ended."""
    if future.running() or future.begin():
        _end(future.set_exception, error)


def _end(end: Callable[..., object], *arguments: object) -> None:
    try:
        end(*arguments)
    except InvalidStateError:
        pass  # it has already ended
    except BaseException:  # noqa: BLE001 -- a callback's SystemExit must not cost other tasks
        _log.exception("a callback of a future raised")


def fresh(error: PoolBrokenError) -> PoolBrokenError:
    """Return a separate error for each future (gh-101267), with the same cause."""
    copy = PoolBrokenError(*error.args)
    copy.__cause__ = error.__cause__
    return copy


def rebuild(
    segments: Sequence[Buffer],
    loads: Callable[[Sequence[Buffer]], Any] = payloads.loads,
    call: str = "the call",
) -> BaseException:
    """Return the exception that a worker described, its remote traceback as the cause."""
    pickled, name, text, trace, reason = payloads.loads(segments)
    told = f"while the result of {call} was pickled"
    trace = trace.replace(UNSENT_RESULT, told)
    error: BaseException | None = None
    if pickled is not None:
        try:
            error = loads(pickled)
        except UntrustedError:
            raise
        except BaseException as problem:  # noqa: BLE001 -- user code
            reason = f"{type(problem).__name__}: {text_of(problem)}"
    if not isinstance(error, BaseException):
        error = RemoteTaskError(name, text, reason)
    notes: object = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        notes[:] = [
            note.replace(UNSENT_RESULT, told) if isinstance(note, str) else note for note in notes
        ]
    # The exception's own __setattr__ is not used: a frozen dataclass forbids it.
    BaseException.__setattr__(error, "__cause__", _RemoteTraceback(trace))
    return error
