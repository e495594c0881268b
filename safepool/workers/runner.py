"""Run the calls that arrive, one after the other, and answer each.

Small results are left on the board (``board``) and sent together: at once when nothing else is
here to do, else after a millisecond. So a result costs no system call, and is not lost when
the next call kills the process. The result of a call that has logged is sent at once: the
pool is to see it after what was logged.

Not covered:
    * A task that starts threads which outlive it: they go on beside the next task.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any

from safepool.transport import references
from safepool.transport.frames import Filed, Kind, encode
from safepool.transport.payloads import dumps, loads
from safepool.transport.sharing import received
from safepool.workers.board import record_of
from safepool.workers.describe import describe
from safepool.workers.logs import Outbox, forward_records
from safepool.workers.messages import function_of, read_tasks, values_frame
from safepool.workers.namespace import MainNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.threads.cap import WorkerCap
    from safepool.transport.channel import Channel
    from safepool.transport.frames import Frame, Received, Segment
    from safepool.workers.board import Board
    from safepool.workers.inheritance import Initializer

    Segments = Sequence[Segment]

__all__ = ["Runner"]

# Results wait for no more than this while further calls run. A message costs some 5
# microseconds on each side, so it is paid by a few hundred of the shortest calls.
_FLUSH_NS = 1_000_000
# A larger result is sent on its own: it would fill the board.
_SMALL_BYTES = 16 * 1024
# Their pickle needs no second look for buffers or names of ``__main__``.
# And they hold nothing, so that several in one pickle do not become one object.
_PLAIN = frozenset({int, float, bool, str, bytes, type(None)})

# A library that brings threads takes longer to load: nothing new can be there before.
_LOADING_NS = 20_000

_dumps, _RESULT = pickle.dumps, int(Kind.RESULT)


class Runner:
    """The calls of one pool in this process.

    Args:
        channel: To the pool. Blocking.
        board: Shared with the pool; ``None`` if there is none, then calls come one by one.
        cap: Checked again before each call.
        initializer: What a forked worker has inherited, instead of a pickle of it.
    """

    def __init__(
        self,
        channel: Channel,
        board: Board | None,
        cap: WorkerCap,
        initializer: Initializer | None = None,
    ) -> None:
        references.restart()
        self._initializer = initializer
        self._channel = channel
        self._outbox = Outbox(channel)
        self._board = board
        self._cap = cap
        self._forked = False
        self._main = MainNamespace()
        self._functions: dict[int, Callable[..., Any]] = {}
        # When the call under way began to cost time, and when results were last sent.
        self._mark_ns = self._flushed_ns = 0
        # What is on the board: plain values that follow each other, the first one's position,
        # or else records of other answers.
        self._values: list[object] = []
        self._first = 0
        self._others = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked_now)

    def serve(self) -> None:
        """Do what the pool says until it says stop.

        Raises:
            ChannelClosedError: The pool is gone.
            CorruptFrameError: It sent what is no message.
        """
        while True:
            for frame in self._channel.receive():
                if frame.kind is Kind.STOP:
                    self._outbox.close(flush=True)
                    return
                self._mark_ns = time.monotonic_ns()
                self._handle(frame)
                # Nothing of the task may live on in this frame while the worker waits.
                del frame
                self._flush()

    def _handle(self, frame: Frame) -> None:
        kind, position, segments = frame
        match kind:
            case Kind.LOG:
                forward_records(self._outbox, segments[0])
            case Kind.INITIALIZE:
                self._initialize(segments)
            case Kind.FUNCTION | Kind.FORGET | Kind.SHARE | Kind.UNSHARE:
                self._keep(kind, position, segments)
            case Kind.TASK:
                function = self._functions.get(function_of(segments))
                self._run_pickled(position, function, segments[1:], segments)
            case Kind.TASKS:
                for number, pickled in read_tasks(segments):
                    self._run_pickled(position, self._functions.get(number), [pickled], segments)
                    position += 1
            case Kind.BATCH:
                self._run_batch(position, segments)
            case _:
                raise RuntimeError(f"a pool does not send {kind!r}")

    def _keep(self, kind: Kind, number: int, segments: Sequence[Received]) -> None:
        if kind is Kind.FUNCTION:
            self._functions[number] = _load_function(segments)
        elif kind is Kind.FORGET:
            self._functions.pop(number, None)
        elif kind is Kind.SHARE:
            references.keep(number, received(segments))
        else:
            references.drop(number)

    def _initialize(self, segments: Sequence[Received]) -> None:
        try:
            initializer, arguments = self._initializer or loads(segments)
            self._initializer = None
            with self._main:
                if initializer is not None:
                    initializer(*arguments)
        except BaseException as error:  # the pool must learn of SystemExit as well
            # Where the standard pool's workers say it, for a program that collects it there.
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            reply, described = Kind.INITIALIZER_FAILED, describe(error)
        else:
            # Whether what the pool writes on the board is heeded.
            reply, described = Kind.READY, [b"board"] if self._board else []
        self._cap.apply()  # what the initializer has loaded or changed
        self._leave_if_forked()
        self._outbox.send(encode(reply, 0, described))

    def _run_pickled(
        self,
        position: int,
        function: Callable[..., Any] | None,
        pickled: Sequence[Received],
        segments: list[Received],
    ) -> None:
        if not self._claim(position):
            return
        try:
            if function is None:
                function, arguments, keywords = loads(pickled)
            else:
                arguments, keywords = loads(pickled)
            if len(segments) > 2:
                segments.clear()  # the buffers live on in the arrays made of them
            del pickled
            with self._main:
                result = function(*arguments, **keywords)
            # Before it is pickled: what only the result refers to is to go first.
            del function, arguments, keywords
            kind, answer = Kind.RESULT, self._pack(result)
            del result  # a large one has been copied
        except BaseException as error:  # noqa: BLE001 -- SystemExit is delivered, as by the standard pool
            self._leave_if_forked(error)
            kind, answer = Kind.EXCEPTION, describe(error)
        self._answer(position, kind, answer)

    def _run_batch(self, position: int, segments: list[Received]) -> None:
        function = self._functions[function_of(segments)]
        # Unclaimed, what takes long to read would be taken back meanwhile, and sent, for ever.
        if not self._claim(position, reading=True):
            return
        try:
            items = loads(segments[1:])
        except BaseException:  # noqa: BLE001 -- user code; the pool finds out which item it is
            self._leave_if_forked()
            self._outbox.send(encode(Kind.UNREADABLE, position))
            return
        self._leave_if_forked()
        if self._board is not None:
            self._board.begin(position)
        segments.clear()
        items.reverse()  # each is dropped when its turn has come
        with self._main:
            self._run_items(position, function, items)

    def _run_items(
        self, position: int, function: Callable[..., Any], items: list[tuple[Any, ...]]
    ) -> None:
        """Call the function with each item, from the last to the first; that one has begun."""
        # Names of this frame, one look at the clock, few calls: for the shortest calls this
        # loop is most of what they cost (benchmarks/dispatch.py, map).
        board, values, clock = self._board, self._values, time.monotonic_ns
        begun, now, checked = position, clock(), 0
        while items:
            if now - checked > _LOADING_NS:
                self._cap.recheck()  # what the calls before have loaded
                checked = now
            if board is not None and position != begun and not board.claim(position, now):
                self._skip(position)
                return
            try:
                value = function(*items.pop())
                if (
                    type(value) in _PLAIN
                    and board is not None
                    and not (self._others or self._forked or self._outbox.logged)
                    and board.publish(position, 0, _RESULT, _dumps(value, 5))
                ):
                    if not values:
                        self._first = position
                    values.append(value)
                    answer = None
                else:
                    kind, answer = Kind.RESULT, self._pack(value)
                del value
            except BaseException as error:  # noqa: BLE001 -- as above
                self._leave_if_forked(error)
                kind, answer = Kind.EXCEPTION, describe(error)
            if answer is not None:
                self._answer(position, kind, answer)
            position += 1
            now = clock()
            if now - self._flushed_ns > _FLUSH_NS:
                self._flush()
                now = clock()

    def _claim(self, position: int, *, reading: bool = False) -> bool:
        self._cap.recheck()  # what the task before has loaded
        board = self._board
        if self._forked:  # while it read the arguments: the call is the worker's
            os._exit(0)
        if board is None or board.claim(position, time.monotonic_ns(), reading=reading):
            return True
        self._skip(position)
        return False

    def _skip(self, position: int) -> None:
        # What ended before goes first: the pool takes this for its turn.
        self._flush()
        self._outbox.send(encode(Kind.SKIPPED, position))

    def _pack(self, result: object) -> Segments:
        segments = _pickle(result)
        if len(segments) > 1 or len(segments[0]) > _SMALL_BYTES:
            return self._channel.store(segments)
        return segments

    def _send_alone(self, position: int, kind: Kind, segments: Segments) -> None:
        try:
            segments = self._channel.hand_over(segments)
        except MemoryError as error:
            kind, segments = Kind.EXCEPTION, describe(error)
        self._outbox.send(encode(kind, position, segments))

    def _answer(self, position: int, kind: Kind, segments: Segments) -> None:
        self._leave_if_forked()
        board, head = self._board, segments[0]
        if self._values:
            self._flush()
        if (
            board is None
            or len(segments) > 1
            or isinstance(head, Filed)
            or len(head) > _SMALL_BYTES
        ):
            self._flush()
            self._outbox.logged = False
            self._send_alone(position, kind, segments)
            return
        now = time.monotonic_ns()
        microseconds = min((now - self._mark_ns) // 1000, 0xFFFF_FFFF)
        self._mark_ns = now
        if self._outbox.logged:
            self._flush()
            self._outbox.logged = False
            record = record_of(position, microseconds, kind, head)
            self._outbox.send(encode(Kind.RESULTS, 0, [record]))
            return
        if not board.publish(position, microseconds, kind, head):
            self._flush()
            board.publish(position, microseconds, kind, head)
        self._others = True
        if now - self._flushed_ns > _FLUSH_NS:
            self._flush()

    def _flush(self) -> None:
        """Send the results that were left on the board."""
        board = self._board
        if board is None or not (self._values or self._others):
            return
        self._leave_if_forked()
        now = time.monotonic_ns()
        if self._values:
            spent = (now - self._mark_ns) // 1000
            frame = values_frame(self._first, spent, self._values)
            self._values.clear()
            self._mark_ns = now
        else:
            frame = encode(Kind.RESULTS, 0, [board.published()])
            self._others = False
        self._outbox.send(frame)
        # Only now: who is killed in between leaves them twice, and the pool takes them once.
        board.flushed()
        self._flushed_ns = now

    def _leave_if_forked(self, error: BaseException | None = None) -> None:
        # The task has forked and this is its child: the answer is the worker's to give, and
        # so is the next task to take. It ends as a fork of any program does.
        if not self._forked:
            return
        code = 0
        if isinstance(error, SystemExit):
            code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        elif error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (AttributeError, OSError, ValueError):
                pass
        os._exit(code & 0xFF)

    def _forked_now(self) -> None:
        self._forked = True
        self._outbox.close()


def _load_function(segments: Sequence[Received]) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = loads(segments)
    except BaseException as error:  # noqa: BLE001 -- user code; every call of it raises this
        problem = error

        def function(*_args: object, **_keywords: object) -> Any:
            raise problem.with_traceback(None)

    return function


def _pickle(result: object) -> Segments:
    if type(result) in _PLAIN and (not isinstance(result, (str, bytes)) or len(result) < 1024):
        return [pickle.dumps(result, protocol=5)]
    return dumps(result)
