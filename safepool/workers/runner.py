"""Run the calls that arrive, one after the other, and answer each (``answers``).

Not covered:
    * A task that starts threads which outlive it: they go on beside the next task.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections import Counter
from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from safepool.transport import references
from safepool.transport.frames import Frame, Kind, Received, Segments, encode
from safepool.transport.marks import PLAIN
from safepool.transport.payloads import dumps_to_send, loads
from safepool.transport.reductions import Reductions
from safepool.transport.sharing import received
from safepool.workers.answers import SMALL_BYTES, Answers
from safepool.workers.board import LANES, REVOKED, Board
from safepool.workers.coroutines import run_to_its_end
from safepool.workers.describe import describe, name_of, say_what
from safepool.workers.fork import Fork
from safepool.workers.logs import Outbox, forward_records
from safepool.workers.messages import function_of, read_batch, read_call, read_tasks
from safepool.workers.namespace import MainNamespace
from safepool.workers.settings import WorkerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.threads.cap import WorkerCap
    from safepool.transport.channel import Channel
    from safepool.workers.inheritance import Initializer
    from safepool.workers.preload import Imports

# Their pickle needs no second look for buffers or names of ``__main__``.
# And they hold nothing, so that several in one pickle do not become one object.
_PLAIN = PLAIN - {complex}
_NUMBERS = _PLAIN - {str, bytes}

# A library that brings threads takes longer to load: nothing new can be there before.
_LOADING_NS = 20_000

# Calls of a batch that begin without a look at the clock: so many, as long as they take no
# longer together.
_MOST_AT_ONCE = 64
_AT_ONCE_NS = 20_000
# Calls of a batch whose results did not go to the lane, until it is given up for the rest.
_MOST_MISSES = 3
_NOTHING = object()
# The most calls of a message whose errors name the part that cannot be pickled.
_MOST_BLAMED = 3

_dumps = pickle.dumps


class Runner:
    """The calls of one pool in this process; without a board they come one by one.

    A forked worker has inherited its initializer. With ``imports`` it reports those of tasks.
    """

    def __init__(
        self,
        channel: Channel,
        board: Board,
        cap: WorkerCap,
        initializer: Initializer | None = None,
        imports: Imports | None = None,
    ) -> None:
        references.restart()
        self._initializer = initializer
        self._imports = imports
        self._channel = channel
        self._outbox = Outbox(channel)
        self._board = board
        self._cap = cap
        self._fork = Fork(self._outbox.close)
        self._answers = Answers(self._outbox, board, self._fork)
        self._main = MainNamespace()
        self._settings = WorkerSettings()
        self._timed = False
        # Timed in a pool that is traced.
        self._loads: Callable[[Sequence[Received]], Any] = loads
        self._pack: Callable[[object], Segments] = self._packed
        self._functions: dict[int, Callable[..., Any]] = {}
        # The number of the function whose name is on the board.
        self._told = 0
        # Results that could not be pickled, by their type.
        self._unsent: Counter[str] = Counter()
        # What the last result of a batch was: the next will be alike.
        self._lane: type = object

    def serve(self) -> None:
        """Process the pool's messages until it sends stop."""
        while True:
            self._run_alone()
            for frame in self._channel.receive():
                if frame.kind is Kind.STOP:
                    self._answers.flush()
                    self._tell_imports()
                    self._outbox.close(flush=True)
                    return
                self._answers.begin()
                self._handle(frame)
                # This frame must not keep objects of the task while the worker waits.
                del frame
                if self._answers.are_due(time.monotonic_ns()):
                    self._answers.flush()
            self._answers.flush()
            self._tell_imports()  # only when no caller waits for this worker

    def _run_alone(self) -> None:
        """Run calls that arrive one by one, until another message has come.

        This needs neither board nor frame reader, which cost more than a tiny call
        (benchmarks/dispatch.py, round-trip).
        """
        channel, functions, imports = self._channel, self._functions, self._imports
        board = self._board
        while True:
            board.rest()
            data = channel.receive_raw()
            call = read_call(data)
            if call is None or call[1] not in functions or not self._run_plain(*call):
                channel.feed(data)
                return
            if imports:
                self._tell_imports()

    def _run_plain(self, position: int, number: int, pickled: memoryview) -> bool:
        """Run a call and answer it at once: :meth:`_run_pickled` without what others need."""
        board, fork, answers = self._board, self._fork, self._answers
        self._cap.recheck()
        now = time.monotonic_ns()
        if not board or fork.here or self._timed or not board.claim(position, now):
            return False
        if number != self._told:
            self._tell(number, self._functions[number])
        kind, number_of = Kind.RESULT, b""
        packed: Segments = []
        try:
            # It has no buffers, and is no larger than what is read at a time.
            arguments, keywords = pickle.loads(pickled)
            result = self._functions[number](*arguments, **keywords)
            # Before it is pickled, as below.
            del arguments, keywords
            if type(result) in _NUMBERS and not fork.here:
                number_of = _dumps(result, 5)
            else:
                packed = self._packed(result)
            del result
        except BaseException as error:  # noqa: BLE001 -- as below
            fork.leave(error)
            kind, packed, number_of = Kind.EXCEPTION, self._described(error), b""
        if number_of:
            answers.send_number(position, now, number_of)
        else:
            answers.send_alone(position, now, kind, packed)
        return True

    def _tell(self, number: int, function: Callable[..., Any]) -> None:
        """Say on the board which function runs."""
        self._told = number
        try:
            name = name_of(function)
        except Exception:  # noqa: BLE001 -- attributes of an object of the user's
            name = type(function).__qualname__
        self._board.tell(name)

    def _tell_imports(self) -> None:
        if self._imports and (names := self._imports.new()):
            self._outbox.send(encode(Kind.IMPORTED, 0, [names]))

    def _handle(self, frame: Frame) -> None:
        kind, position, segments = frame
        match kind:
            case Kind.LOG:
                forward_records(self._outbox)
            case Kind.SETTINGS:
                self._settings.apply(segments[0])
            case Kind.INITIALIZE:
                self._initialize(segments)
            case Kind.TRACE:
                self._be_timed()
            case Kind.FUNCTION | Kind.FORGET | Kind.SHARE | Kind.UNSHARE | Kind.NAMES:
                self._keep(kind, position, segments)
            case Kind.TASK:
                self._run_pickled(position, function_of(segments), segments[1:], segments)
            case Kind.TASKS:
                for number, pickled in read_tasks(segments):
                    self._run_pickled(position, number, [pickled], segments)
                    position += 1
            case Kind.BATCH:
                self._run_batch(position, segments)
            case _:
                raise RuntimeError(f"unexpected message {kind!r} from the pool")

    def _keep(self, kind: Kind, number: int, segments: Sequence[Received]) -> None:
        if kind is Kind.FUNCTION:
            self._functions[number] = _load_function(segments, self._loads)
            self._told = 0
        elif kind is Kind.FORGET:
            self._functions.pop(number, None)
        elif kind is Kind.SHARE:
            references.keep(number, received(segments))
        elif kind is Kind.NAMES:
            self._main.receive(segments)
        else:
            references.drop(number)

    def _be_timed(self) -> None:
        from safepool.workers.timed import TimedAnswers  # noqa: PLC0415 -- seldom

        self._timed = True
        answers = TimedAnswers(self._outbox, self._board, self._fork)
        self._answers = answers
        self._loads = answers.timed_loads(loads)
        self._pack = answers.timed_pack(self._packed)

    def _initialize(self, segments: Sequence[Received]) -> None:
        initializer = None
        try:
            initializer, arguments = self._initializer or loads(segments)
            self._initializer = None
            if initializer is not None:
                self._board.tell(name_of(initializer), time.monotonic_ns())
                initializer(*arguments)
        except BaseException as error:  # the pool must learn of SystemExit as well
            self._main.explain(error)
            # The standard pool's workers log it there, and programs collect it there.
            logging.getLogger("concurrent.futures").critical(
                "Exception in initializer:", exc_info=True
            )
            reply, described = Kind.INITIALIZER_FAILED, describe(error)
        else:
            # Whether the pool's entries on the board are read.
            reply, described = Kind.READY, [b"board"] if self._board else []
        if initializer is None:
            self._cap.recheck()
        else:
            self._cap.apply()  # libraries that the initializer has loaded or changed
        self._fork.leave()
        self._outbox.send(encode(reply, 0, described))

    def _run_pickled(
        self, position: int, number: int, pickled: Sequence[Received], segments: list[Received]
    ) -> None:
        if not self._claim(position):
            return
        function = self._functions.get(number)
        if function is not None and number != self._told:
            self._tell(number, function)
        try:
            if function is None:
                function, arguments, keywords = self._loads(pickled)
                self._tell(0, function)
            else:
                arguments, keywords = self._loads(pickled)
            if len(segments) > 2:
                segments.clear()  # the arrays of the segments keep the buffers
            del pickled
            result = function(*arguments, **keywords)
            # Before it is pickled: what only the result refers to is to go first.
            del function, arguments, keywords
            kind, answer = Kind.RESULT, self._pack(result)
            del result  # a large one has been copied
        except BaseException as error:  # noqa: BLE001 -- SystemExit is delivered, as by the standard pool
            self._fork.leave(error)
            kind, answer = Kind.EXCEPTION, self._described(error)
        self._answers.send(position, kind, answer)

    def _run_batch(self, position: int, segments: list[Received]) -> None:
        number, starred, timed, apart = read_batch(segments)
        function = self._functions[number]
        # Unclaimed, what takes long to read would be taken back meanwhile, and sent, for ever.
        if not self._claim(position, reading=True):
            return
        if number != self._told:
            self._tell(number, function)
        try:
            items = self._loads(segments[1:])
            if apart:
                items = [self._loads([item]) for item in items]
        except BaseException:  # noqa: BLE001 -- user code; the pool finds out which item it is
            self._fork.leave()
            self._answers.flush()
            self._outbox.send(encode(Kind.UNREADABLE, position))
            return
        self._fork.leave()
        self._board.begin(position)
        segments.clear()
        items.reverse()  # each is dropped when its turn has come
        self._run_items(position, function, items, starred=starred, timed=timed)

    def _run_items(
        self,
        position: int,
        function: Callable[..., Any],
        items: list[Any],
        *,
        starred: bool,
        timed: bool,
    ) -> None:
        """Call the function with each item, from the last to the first; that one has begun."""
        board, answers, clock = self._board, self._answers, time.monotonic_ns
        begun, now, checked = position, clock(), 0
        answers.begin_many(now)
        many, most, misses = 1, 1 if timed else _MOST_AT_ONCE, 0
        while items:
            if now - checked > _LOADING_NS:
                self._cap.recheck()  # libraries that earlier calls have loaded
                checked = now
            if position != begun and not board.claim(position, now):
                self._skip(position)
                return
            if not board or self._lane not in LANES or misses > _MOST_MISSES:
                self._run_item(position, function, items, starred=starred)
                position += 1
            else:
                last, hit = self._run_short(position, function, items, many, starred=starred)
                position = last + 1
                misses += not hit
            before, now = now, clock()
            if now - before > _AT_ONCE_NS:
                many = 1
            elif many < most:
                many *= 2
            if answers.are_due(now):
                answers.flush()
                now = clock()

    def _run_item(
        self, position: int, function: Callable[..., Any], items: list[Any], *, starred: bool
    ) -> None:
        answers = self._answers
        try:
            value = function(*items.pop()) if starred else function(items.pop())
            kind = self._lane = type(value)
            if kind in _PLAIN and answers.keep(position, value, _dumps(value, 5)):
                return
            answer = self._pack(value)
        except BaseException as error:  # noqa: BLE001 -- as above
            self._fork.leave(error)
            answers.send(position, Kind.EXCEPTION, self._described(error))
        else:
            answers.send(position, Kind.RESULT, answer)

    def _run_short(
        self,
        position: int,
        function: Callable[..., Any],
        items: list[Any],
        most: int,
        *,
        starred: bool,
    ) -> tuple[int, bool]:
        """Call the function with the last items, as long as its results can go to the lane.

        Returns the last position that has begun, and whether its result went there.
        """
        # Local names, and no look at the clock: for the shortest calls this loop is most of the
        # cost (benchmarks/dispatch.py, map).
        board, answers, fork, outbox = self._board, self._answers, self._fork, self._outbox
        kind = self._lane
        slots, first, room = answers.lane(position, LANES[kind], min(most, len(items)))
        cells = board.enter_lane(position + room - 1)
        at, value = position, _NOTHING
        try:
            for at in range(position, position + room):
                value = _NOTHING
                value = function(*items.pop()) if starred else function(items.pop())
                if type(value) is not kind or fork.here or outbox.logged:
                    break
                slots[at - first] = 0 if value is None else value
                if cells[REVOKED] > at:
                    value = _NOTHING
                    break
            else:
                value = _NOTHING
        except BaseException as error:  # noqa: BLE001 -- as above
            fork.leave(error)
            if value is _NOTHING:
                board.leave_lane(at)
                answers.kept(at - 1)
                answers.send(at, Kind.EXCEPTION, self._described(error))
                return at, False
            # The slot is too small for the number.
        fork.leave()
        board.leave_lane(at)
        if value is _NOTHING:
            answers.kept(at)
            return at, True
        answers.kept(at - 1)
        self._lane = type(value)
        try:
            answer = self._pack(value)
        except BaseException as error:  # noqa: BLE001 -- as above
            answers.send(at, Kind.EXCEPTION, self._described(error))
        else:
            answers.send(at, Kind.RESULT, answer)
        return at, False

    def _claim(self, position: int, *, reading: bool = False) -> bool:
        self._cap.recheck()  # libraries that the task before has loaded
        if self._fork.here:  # while it read the arguments: the call is the worker's
            os._exit(0)
        if self._board.claim(position, time.monotonic_ns(), reading=reading):
            return True
        self._skip(position)
        return False

    def _skip(self, position: int) -> None:
        # What ended before goes first: the pool takes this for its turn.
        self._answers.flush()
        self._outbox.send(encode(Kind.SKIPPED, position))

    def _described(self, error: BaseException) -> Segments:
        self._main.explain(error)
        return describe(error)

    def _packed(self, result: object) -> Segments:
        if type(result) is CoroutineType:
            result = run_to_its_end(result)
        done = Reductions()
        try:
            segments: Segments = _pickle(result, done)
        except MemoryError:
            raise
        except Exception as error:
            if not isawaitable(result):
                kind = type(result).__qualname__
                self._unsent[kind] += 1
                say_what(error, result, done, look=self._unsent[kind] <= _MOST_BLAMED)
                raise
            segments = ()
        if not segments:
            return self._packed(run_to_its_end(result))
        if len(segments) > 1 or len(segments[0]) > SMALL_BYTES:
            return self._channel.store(segments)
        return segments


def _load_function(
    segments: Sequence[Received], loads: Callable[[Sequence[Received]], Any]
) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = loads(segments)
    except BaseException as error:  # noqa: BLE001 -- user code; every call of it raises this
        problem = error

        def fail(*_args: object, **_keywords: object) -> Any:
            raise problem.with_traceback(None)

        return fail
    return function


def _pickle(result: object, done: Reductions) -> Segments:
    if type(result) in _PLAIN and (not isinstance(result, (str, bytes)) or len(result) < 1024):
        return [pickle.dumps(result, protocol=5)]
    return dumps_to_send(result, reductions=done)
