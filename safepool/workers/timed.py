"""Times at which calls began and ended, by the worker's clock: only for a traced pool.

The times travel just ahead of the answers, in a separate frame (``Kind.TIMES``): one entry for a
call, or for several very short calls of a batch. The clock is the monotonic one, which all
processes of a machine share.

Not covered:
    * Calls of a batch that run without a look at the clock (the shortest calls) have one entry
      together, even if the last call took long.
    * A worker that is killed: times that it had not sent are lost.
"""

from __future__ import annotations

import struct
import time
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.transport.frames import Buffer, CorruptFrameError, Kind, Segments, encode
from safepool.workers.answers import Answers
from safepool.workers.coroutines import run_to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.workers.board import Board
    from safepool.workers.fork import Fork
    from safepool.workers.logs import Outbox

# Calls of a batch share an entry as long as they take no longer together.
_TOGETHER_NS = 1_000_000
# Between a function that was read and the call that needs it: more, and it was for another.
_APART_NS = 1_000_000
_ENTRY = struct.Struct("<QIQQQQ")


class Timed(NamedTuple):
    """Calls that follow each other, and when.

    Attributes:
        begin_ns: Begin of the first call, before its arguments were read.
        end_ns: When the last had ended, its result pickled.
        loaded_ns: Part of that time in which functions and arguments were read.
        packed_ns: Part of that time in which results were pickled.
    """

    first: int
    calls: int
    begin_ns: int
    end_ns: int
    loaded_ns: int
    packed_ns: int


def read_times(segments: Sequence[Buffer]) -> list[Timed]:
    """Return the entries of a frame of times."""
    if len(segments) != 1 or len(segments[0]) % _ENTRY.size:
        raise CorruptFrameError("a frame of times has a wrong size")
    return [Timed._make(entry) for entry in _ENTRY.iter_unpack(segments[0])]


class TimedAnswers(Answers):
    """Answers, with the end time of each call; the arguments are those of :class:`Answers`."""

    def __init__(self, outbox: Outbox, board: Board, fork: Fork) -> None:
        super().__init__(outbox, board, fork)
        self._times: list[Timed] = []
        self._send = self._send_timed
        # Begin of the next measurement, and its time for reading and packing.
        self._since_ns = self._loaded_ns = self._packed_ns = 0
        # The last entry is of calls that others may join.
        self._joins = False

    def timed_loads(self, loads: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function that does the same, and counts the time."""

        def counted(segments: Any) -> Any:
            before = time.monotonic_ns()
            try:
                return loads(segments)
            finally:
                self._loaded_ns += time.monotonic_ns() - before

        return counted

    def timed_pack(self, pack: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function that does the same, and counts the time."""

        def counted(result: Any) -> Any:
            if type(result) is CoroutineType:
                result = run_to_its_end(result)
            before = time.monotonic_ns()
            try:
                return pack(result)
            finally:
                self._packed_ns += time.monotonic_ns() - before

        return counted

    def begin(self) -> None:
        """Count the time of what comes from now on."""
        super().begin()
        self._joins = False
        # The time may include reading the function for the next call.
        apart_ns = self._mark_ns - self._since_ns - self._loaded_ns
        if not self._loaded_ns or apart_ns > _APART_NS:
            self._since_ns, self._loaded_ns = self._mark_ns, 0

    def send(self, position: int, kind: Kind, segments: Segments) -> None:
        """Answer one call."""
        self._note(position, 1, joins=False)
        super().send(position, kind, segments)

    def keep(self, position: int, value: object, pickled: bytes) -> bool:
        """Leave a plain value for the next flush; ``False`` if it must be sent."""
        kept = super().keep(position, value, pickled)
        if kept:
            self._note(position, 1, joins=True)
        return kept

    def kept(self, last: int) -> None:
        """Count the results in the lane: up to this position."""
        before = self._count
        super().kept(last)
        if self._count > before:
            self._note(self._first + before, self._count - before, joins=True)

    def _note(self, first: int, count: int, *, joins: bool) -> None:
        now, times = time.monotonic_ns(), self._times
        loaded, packed = self._loaded_ns, self._packed_ns
        self._loaded_ns = self._packed_ns = 0
        last = times[-1] if joins and self._joins and times else None
        if last is not None and now - last.begin_ns < _TOGETHER_NS:
            times[-1] = Timed(
                last.first,
                last.calls + count,
                last.begin_ns,
                now,
                last.loaded_ns + loaded,
                last.packed_ns + packed,
            )
        else:
            times.append(Timed(first, count, self._since_ns, now, loaded, packed))
        self._joins, self._since_ns = joins, now

    def _send_timed(self, pieces: Sequence[bytes | memoryview]) -> None:
        times, self._times = self._times, []
        # The message travels with the answers: sent alone, it would wake the pool once more.
        told = encode(Kind.TIMES, 0, [b"".join([_ENTRY.pack(*entry) for entry in times])])
        self._outbox.send([*told, *pieces] if times else pieces)
