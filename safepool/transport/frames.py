"""Frames: the unit that travels on a channel.

The module turns bytes into frames, and knows no socket.

    0        2        3       4            8                16
    | "sp"   | version| kind  | segments   | task           | length x segments | bytes ...
    | magic  | u8     | u8    | u32        | u64            | u64 each          |

All numbers are in network byte order. The first segment of a payload is its pickle, the
others are the buffers that the pickle refers to (PEP 574).

Two bits of a length are flags:

    bit 63    the segment is in a memfd. Its descriptor is sent separately (``files``)
    bit 62    the segment is the first of its memfd. The others of the memfd come right behind it
"""

from __future__ import annotations

import enum
import mmap
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from safepool.errors import SafepoolError

Buffer: TypeAlias = bytes | bytearray | memoryview
Received: TypeAlias = bytearray | memoryview

_HEADER = struct.Struct("!2sBBIQ")
_MAGIC = b"sp"
_VERSION = 2
# One pickle and its buffers: no task needs more, and a corrupt count must not allocate memory.
_MOST_SEGMENTS = 1 << 20
# Small frames are read many at a time into one buffer of this size (a socket's default
# receive buffer is about three times as large). A segment with at least a quarter of it
# still to come is received into its own memory instead: no second copy.
_SCRATCH_BYTES = 64 * 1024
_DIRECT_BYTES = _SCRATCH_BYTES // 4
# A frame of no more is sent in one piece: to copy it is cheaper than to gather it.
_JOINED_BYTES = 4 * 1024
# Room in memory is checked for answers from this size on. An answer without room is read and
# dropped in pieces of this size.
_HELD_BYTES = 1 << 20
# A corrupt length must not allocate either: the memory of a segment begins with this size, and
# doubles when it is full.
_FIRST_BYTES = 1 << 24
_IN_A_FILE, _FIRST_OF_FILE = 1 << 63, 1 << 62
# The most bytes of a frame: the address space of a process.
_MOST_BYTES = 1 << 47
_TABLES = [struct.Struct(f"!{count}Q") for count in range(4)]


class Kind(enum.IntEnum):
    """Meaning of a frame."""

    INITIALIZE = 1
    """To a worker: run this initializer."""
    TASK = 2
    """To a worker: run this call."""
    STOP = 3
    """To a worker: end."""
    READY = 4
    """To the pool: initialized, send tasks."""
    INITIALIZER_FAILED = 5
    """To the pool: the initializer raised this."""
    RESULT = 6
    """To the pool: the call returned this."""
    EXCEPTION = 7
    """To the pool: the call raised this."""
    FUNCTION = 8
    """To a worker: keep this callable, under this number instead of a task's."""
    FORGET = 9
    """To a worker: drop the callable of this number."""
    TASKS = 10
    """To a worker: run these calls, one after the other."""
    BATCH = 11
    """To a worker: call one function with each of these."""
    RESULTS = 12
    """To the pool: records of several results."""
    UNREADABLE = 13
    """To the pool: this batch could not be unpickled, nothing of it has run."""
    SKIPPED = 14
    """To the pool: this call was taken back when it was about to begin."""
    LOG = 15
    """To the pool: a log record. To a worker: send them."""
    VALUES = 16
    """To the pool: several calls that follow each other returned these plain values."""
    SHARE = 17
    """To a worker: keep this shared object, under this number instead of a task's."""
    UNSHARE = 18
    """To a worker: drop the shared object of this number."""
    TRACE = 19
    """To a worker: tell when calls begin and end."""
    TIMES = 20
    """To the pool: when calls began and ended, whose answers may follow or have arrived."""
    NAMES = 21
    """To a worker: bind these values to names of ``__main__``."""
    SETTINGS = 22
    """To a worker: what the program has set, as far as it has changed."""
    IMPORTED = 23
    """To the pool: what tasks have imported, by name."""


class Frame(NamedTuple):
    """One message.

    Attributes:
        kind: Kind of the message.
        task: Position of the message's task, counted by worker from 1; 0 without a task.
        segments: Payload, each part in separate writable memory. An error replaces a part that
            could not be received.
    """

    kind: Kind
    task: int
    segments: list[Received]


class Filed:
    """Segments that lie in one file, one after the other, none empty; their lengths in bytes."""

    __slots__ = ("lengths",)

    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.lengths)


Segment: TypeAlias = bytes | memoryview | Filed
Segments: TypeAlias = Sequence[Segment]


class Missing(bytearray):
    """Empty placeholder for a segment that has arrived and that this process cannot hold."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception = error


_KINDS = frozenset(Kind)
_ANSWERS = frozenset({Kind.RESULT, Kind.EXCEPTION})
_KIND_OF = {int(kind): kind for kind in Kind}


class CorruptFrameError(SafepoolError):
    """The bytes on a channel are not a frame of this version."""


def encode(kind: Kind, task: int, segments: Sequence[Segment] = ()) -> list[bytes | memoryview]:
    """Return the pieces to send for one frame; the segments are not copied.

    The header, then the segments that are not empty; small ones joined to one piece. The
    descriptor of one that is a file goes ahead, by :meth:`~safepool.transport.files.Side.send`.

    Example:
        >>> b"".join(encode(Kind.STOP, 0)).hex()
        '73700203000000000000000000000000'
    """
    lengths: list[int] = []
    pieces: list[bytes | memoryview] = []
    total = 0
    for segment in segments:
        if type(segment) is bytes:
            length = len(segment)
        elif isinstance(segment, Filed):
            lengths += _table_of(segment)
            continue
        else:
            length = memoryview(segment).nbytes
        lengths.append(length)
        total += length
        if length:
            pieces.append(segment)
    header = _HEADER.pack(_MAGIC, _VERSION, kind, len(lengths), task)
    header += struct.pack(f"!{len(lengths)}Q", *lengths)
    return [b"".join([header, *pieces])] if total <= _JOINED_BYTES else [header, *pieces]


def _table_of(filed: Filed) -> list[int]:
    table = [_IN_A_FILE | length for length in filed.lengths]
    table[0] |= _FIRST_OF_FILE
    return table


def _fetch_nothing(_kind: Kind, _lengths: tuple[int, ...]) -> list[Received]:
    raise CorruptFrameError("a frame refers to a file, but this channel has no files")


class FrameReader:
    """Cut received bytes into frames, independent of the pieces in which they arrive.

    Ask :meth:`buffer` where the next bytes go, receive into it, and tell
    :meth:`received` how many came.

    Args:
        fetch: Function that returns the segments of a file, by the frame's kind and their lengths,
            when the frame is complete.
        hold: Called with the number of bytes that an answer will take here. If it raises
            `MemoryError`, the answer is read and dropped, and that error stands for each of its
            segments.
    """

    def __init__(
        self,
        fetch: Callable[[Kind, tuple[int, ...]], list[Received]] = _fetch_nothing,
        hold: Callable[[int], None] | None = None,
    ) -> None:
        self._fetch = fetch
        self._hold = hold
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._start = 0
        self._end = 0
        # State of the incomplete frame: its kind and task; the lengths of its parts (the table of
        # lengths, then the segments); the parts up to the current one, and the offset in it.
        self._head: tuple[Kind, int] | None = None
        self._table: bytearray | None = None
        self._lengths: list[int] = []
        self._parts: list[bytearray] = []
        self._filled: tuple[int, int] = (0, 0)
        # Parts of an answer that there is no room for.
        self._missing: list[Received] = []
        # The segments in files: how many of the parts go before each file, and the lengths in it.
        self._files: list[tuple[int, list[int]]] = []

    @property
    def is_empty(self) -> bool:
        """Whether no part of a frame is there."""
        return self._head is None and self._start == self._end

    def buffer(self) -> memoryview:
        """Return the memory for the next received bytes, never empty."""
        direct = self._direct()
        if direct is not None:
            return direct
        if self._start:
            rest = self._end - self._start
            self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def received(self, count: int) -> Generator[Frame, None, bool]:
        """Account for ``count`` bytes in the last :meth:`buffer`; yield the complete frames.

        Returns whether there were any.
        """
        if self._direct() is None:
            self._end += count
        else:
            index, filled = self._filled
            self._filled = (index, filled + count)
        some = False
        while (frame := self._whole()) is not None or self._complete():
            # No reference is kept here: the owner of a frame may drop it while it waits for more.
            yield self._take() if frame is None else frame
            frame, some = None, True
            if self.is_empty:
                break
        return some

    def _direct(self) -> memoryview | None:
        index, filled = self._filled
        if index < len(self._parts):
            end = min(len(self._parts[index]), self._lengths[index])
            if end - filled >= _DIRECT_BYTES:
                return memoryview(self._parts[index])[filled:end]
        return None

    def _whole(self) -> Frame | None:
        """Return the next frame if it is short and all there: most are."""
        start, end = self._start + _HEADER.size, self._end
        if self._head is not None or start > end:
            return None
        magic, version, kind, count, task = _HEADER.unpack_from(self._scratch, self._start)
        if count >= len(_TABLES) or magic != _MAGIC or version != _VERSION or kind not in _KINDS:
            return None
        start += 8 * count
        if start > end:
            return None
        lengths = _TABLES[count].unpack_from(self._scratch, start - 8 * count)
        if start + sum(lengths) > end:
            return None
        segments: list[Received] = []
        for length in lengths:
            segments.append(self._scratch[start : start + length])
            start += length
        self._start = start
        return Frame(_KIND_OF[kind], task, segments)

    def _complete(self) -> bool:
        if self._head is None and not self._begin():
            return False
        if not self._fill():
            return False
        if self._table is None:
            return True
        lengths = struct.unpack(f"!{len(self._table) // 8}Q", self._table)
        self._table = None
        self._allocate(lengths)
        return self._fill()

    def _take(self) -> Frame:
        assert self._head is not None
        segments: list[Received] = self._missing or [*self._parts]
        for place, lengths in reversed([*self._fetched(self._head[0])]):
            segments[place:place] = lengths
        frame = Frame(*self._head, segments)
        self._head, self._missing = None, []
        self._expect([])
        return frame

    def _fetched(self, kind: Kind) -> Iterator[tuple[int, list[Received]]]:
        files, self._files = self._files, []
        for place, lengths in files:
            yield place, self._fetch(kind, tuple(lengths))

    def _begin(self) -> bool:
        if self._end - self._start < _HEADER.size:
            return False
        magic, version, kind, count, task = _HEADER.unpack_from(self._scratch, self._start)
        if magic != _MAGIC or version != _VERSION or kind not in _KINDS or count > _MOST_SEGMENTS:
            found = bytes(self._view[self._start : self._start + _HEADER.size])
            raise CorruptFrameError(
                f"expected the header of a frame of version {_VERSION}, found {found!r}"
            )
        self._start += _HEADER.size
        self._head = (Kind(kind), task)
        if count:
            self._table = bytearray(8 * count)
            self._expect([8 * count], self._table)
        return True

    def _expect(self, lengths: list[int], *parts: bytearray) -> None:
        self._lengths, self._parts, self._filled = lengths, [*parts], (0, 0)

    def _allocate(self, lengths: tuple[int, ...]) -> None:
        in_stream: list[int] = []
        for length in lengths:
            inside = length & (_FIRST_OF_FILE - 1)
            if length & _IN_A_FILE and length & _FIRST_OF_FILE:
                self._files.append((len(in_stream), []))
            if length <= _MOST_BYTES:
                in_stream.append(length)
            elif length & _IN_A_FILE and inside <= _MOST_BYTES and self._goes_on(len(in_stream)):
                self._files[-1][1].append(inside)
            else:
                raise CorruptFrameError(f"invalid length of a segment: {length:#x}")
        whole = sum(in_stream)
        if whole > _MOST_BYTES or (whole > _FIRST_BYTES and not _could_be_had(whole)):
            raise CorruptFrameError(f"invalid length of all segments: {whole:,} bytes")
        self._expect(in_stream)
        assert self._head is not None
        if self._hold is not None and whole >= _HELD_BYTES and self._head[0] in _ANSWERS:
            try:
                self._hold(whole)
            except MemoryError as error:
                # All arriving bytes go to the same small piece of memory.
                self._missing = [Missing(error.with_traceback(None)) for _ in in_stream]
                self._expect([whole], bytearray(_HELD_BYTES))

    def _goes_on(self, place: int) -> bool:
        """Tell whether there is a file that nothing has come behind."""
        return bool(self._files) and self._files[-1][0] == place

    def _fill(self) -> bool:
        """Move the bytes in the scratch buffer to the parts; return whether all parts are full."""
        index, filled = self._filled
        while index < len(self._lengths):
            if index == len(self._parts):
                self._parts.append(bytearray(min(self._lengths[index], _FIRST_BYTES)))
            part, rest = self._parts[index], self._lengths[index] - filled
            if filled == len(part) and rest:
                if self._missing:
                    self._lengths[index], filled = rest, 0
                else:
                    part += bytes(min(filled, rest))
            take = min(len(part) - filled, rest, self._end - self._start)
            part[filled : filled + take] = self._view[self._start : self._start + take]
            self._start += take
            filled += take
            if filled == self._lengths[index]:
                index, filled = index + 1, 0
            elif not take:
                break
        self._filled = (index, filled)
        return index == len(self._lengths)


def _could_be_had(size_bytes: int) -> bool:
    """Ask the system for that much memory, without using it.

    A frame that can never be complete must not be waited for: it would swallow the next ones.
    """
    try:
        mmap.mmap(-1, size_bytes).close()
    except (OSError, OverflowError):
        return False
    return True
