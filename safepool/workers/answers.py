"""Answers of a worker to its pool: left on the board, and sent together.

A frame is sent when the worker has no other work, otherwise after a millisecond. Hence a result
costs no system call, and is not lost if the next call kills the process. The answer of a call that
has logged, or has arrived alone, is sent at once: it must follow its log records, or the pool
waits for it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from safepool.transport.frames import Filed, Kind, Segments, encode
from safepool.workers.board import LANE_CALLS, Board
from safepool.workers.describe import describe
from safepool.workers.messages import answer_frame, numbers_frame, values_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.workers.fork import Fork
    from safepool.workers.logs import Outbox

# Results wait for no more than this while further calls run. A message costs some 5
# microseconds on each side, so it is paid by a few hundred of the shortest calls.
_FLUSH_NS = 1_000_000
# A larger result is sent on its own: it would fill the board.
SMALL_BYTES = 16 * 1024

_RESULT = int(Kind.RESULT)


class Answers:
    """Answers that the pool does not know yet.

    Answers have three forms, never two at a time: numbers in the board's lane; consecutive plain
    values, on the board as records and here as a list; records of any answers.
    """

    def __init__(self, outbox: Outbox, board: Board, fork: Fork) -> None:
        self._outbox = outbox
        self._send: Callable[[Sequence[bytes | memoryview]], None] = outbox.send
        self._board = board
        self._fork = fork
        # When the call under way began to cost time, and since when answers wait at the most.
        self._mark_ns = self._flushed_ns = 0
        # The position of the first, with the lane's kind and how many numbers are there.
        self._first = self._kind = self._count = 0
        self._slots: memoryview[Any] = memoryview(b"")
        self._values: list[object] = []
        self._others = False

    def begin(self) -> None:
        """Count the time of calls from now on."""
        self._mark_ns = time.monotonic_ns()

    def begin_many(self, now_ns: int) -> None:
        """Let the answers of calls that travel together wait from now on, if no other does."""
        if not (self._kind or self._values or self._others):
            self._flushed_ns = now_ns

    def are_due(self, now_ns: int) -> bool:
        """Tell whether they have waited long enough."""
        return now_ns - self._flushed_ns > _FLUSH_NS

    def send(self, position: int, kind: Kind, segments: Segments) -> None:
        """Answer one call."""
        self._fork.leave()
        board, outbox, head = self._board, self._outbox, segments[0]
        if self._values or self._kind:
            self.flush()
        if not board or len(segments) > 1 or isinstance(head, Filed) or len(head) > SMALL_BYTES:
            self.flush()
            outbox.logged = False
            self._send_large(position, kind, segments)
            return
        now = time.monotonic_ns()
        microseconds = min((now - self._mark_ns) // 1000, 0xFFFF_FFFF)
        self._mark_ns = now
        if outbox.logged:
            self.flush()
            outbox.logged = False
            self._send([answer_frame(position, microseconds, kind, head)])
            return
        if not board.publish(position, microseconds, kind, head):
            self.flush()
            board.publish(position, microseconds, kind, head)
        self._others = True
        if self.are_due(now):
            self.flush()

    def send_number(self, position: int, begun_ns: int, pickled: bytes) -> None:
        """Answer a single call that has returned a number or ``None``."""
        microseconds = min((time.monotonic_ns() - begun_ns) // 1000, 0xFFFF_FFFF)
        outbox = self._outbox
        outbox.send_answer(answer_frame(position, microseconds, _RESULT, pickled))
        outbox.logged = False

    def send_alone(self, position: int, begun_ns: int, kind: Kind, segments: Segments) -> None:
        """Answer a single call."""
        self._mark_ns = begun_ns
        self._outbox.logged = True  # nothing waits for what follows
        self.send(position, kind, segments)

    def _send_large(self, position: int, kind: Kind, segments: Segments) -> None:
        try:
            segments = self._outbox.hand_over(segments)
        except MemoryError as error:  # it could not go as a file after all
            kind, segments = Kind.EXCEPTION, describe(error)
        self._send(encode(kind, position, segments))

    def keep(self, position: int, value: object, pickled: bytes) -> bool:
        """Leave a plain value for the next flush; ``False`` if it must be sent."""
        if (
            self._others
            or self._kind
            or self._fork.here
            or self._outbox.logged
            or not self._board.publish(position, 0, _RESULT, pickled)
        ):
            return False
        if not self._values:
            self._first = position
        self._values.append(value)
        return True

    def lane(self, position: int, kind: int, calls: int) -> tuple[memoryview[Any], int, int]:
        """Return slots for results from this claimed position on, the first one, and how many."""
        if kind != self._kind or self._count == LANE_CALLS:
            self.flush()
            self._slots = self._board.open_lane(position, kind)
            self._first, self._kind = position, kind
        return self._slots, self._first, min(calls, LANE_CALLS - self._count)

    def kept(self, last: int) -> None:
        """Count the results in the lane: up to this position."""
        self._count = last + 1 - self._first

    def flush(self) -> None:
        """Send the results that were left on the board."""
        board = self._board
        if not (self._kind or self._values or self._others):
            return
        self._fork.leave()
        now = time.monotonic_ns()
        spent = (now - self._mark_ns) // 1000
        if self._values:
            frame = values_frame(self._first, spent, self._values)
            self._values.clear()
            self._mark_ns = now
        elif self._kind:
            numbers = board.lane_bytes(self._count)
            frame = numbers_frame(self._first, spent, self._kind, numbers) if numbers else []
            self._kind = self._count = 0
            self._mark_ns = now
        else:
            frame = encode(Kind.RESULTS, 0, [board.published()])
            self._others = False
        if frame:
            self._send(frame)
        # Only now: if the worker is killed in between, they are there twice, and the pool takes
        # them once.
        board.flushed()
        self._flushed_ns = now
