"""Files for picklers and unpicklers, which compare each step with the memory that is left.

The size of a pickle is known at its end, and that of its objects after loading. Hence each step of
both is compared with the remaining memory (``room``), and a step that does not fit ends with
`MemoryLimitError`. The C code of `pickle` works in steps, with protocols 4 and 5:

    step                                            written by      read by
    a frame: objects, from 64 KiB on                one write()     one read()
    header of what is large in one piece            one write()     read()
    bytes or text of at least 64 KiB                one write()     one readinto() or read()

Small objects take one step, which is not checked.

Not covered:
    * Text outside ASCII: Python encodes and keeps the whole text before the first write.
      ``require_to_pickle`` checks such text among arguments, but not inside of objects.
    * An allocator of the program's own (``LD_PRELOAD``) that copies large blocks when they grow.

Sources: Python, Modules/_pickle.c, _Pickler_write_bytes, FRAME_SIZE_TARGET, PyMemoTable.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import TYPE_CHECKING, Any

from safepool.transport.room import require

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.transport.frames import Buffer

STEP_BYTES = 64 * 1024
# Objects take about so many times as much as their pickle: a float and its place in a list, whose
# pickle has 9 bytes. On free-threaded builds more; small dictionaries take 10 times as much.
OBJECTS = -(-(float.__basicsize__ + 8) // 9)
_PROTO, _FRAME, _MEMOIZE, _STOP = b"\x80\x05", b"\x95", b"\x94", ord(".")
_write = io.BytesIO.write
_FRAME_HEADER_BYTES = 9
# A frame that is larger holds one piece.
_MOST_FRAMED_BYTES = 4 * STEP_BYTES
# Less than 4 bytes have no frame. Source: FRAME_SIZE_MIN.
_LEAST_FRAMED = 4
# Text is copied between the write of its header and its own. Opcodes, and bytes of the length.
_TEXTS = ((0x8D, 8), (0x58, 4))
# Opcodes that a length follows, of so many bytes.
_LENGTHS = {0x95: 8, 0x42: 4, 0x58: 4, 0x8D: 8, 0x8E: 8, 0x96: 8}
# The pickler's table of pickled objects: size of a slot, and number of slots from which its growth
# matters. It doubles when two thirds are used, and then both tables exist.
_SLOT_BYTES = 16
_FIRST_SLOTS = 1 << 18
# More than are used by one frame.
_SLOTS_AHEAD = 1 << 13
# A buffer of fewer bytes that outgrows its block is copied, and both blocks exist meanwhile: glibc
# moves pages only of a block that has a mapping of its own. Blocks of up to 32 MiB have none
# once the program has freed one as large (mallopt(3), M_MMAP_THRESHOLD). The allocator of
# free-threaded builds moves no pages.
_COPIED_BYTES = sys.maxsize if "free-threading" in sys.version else 32 << 20


class Sink(io.BytesIO):
    """File that a pickler writes to. When a write raises, all written before is dropped."""

    _done = _used = 0
    _slots = _FIRST_SLOTS

    def write(self, data: Any, /) -> int:
        """Write one step of a pickler."""
        # All of a small pickle is one step. No super(): this is half of what that costs.
        if self._done or type(data) is not bytes or len(data) >= STEP_BYTES or data[-1] != _STOP:
            self._hold(data)
        return _write(self, data)

    def _hold(self, data: Any) -> None:
        size = more = memoryview(data).nbytes
        if type(data) is bytes and size < _MOST_FRAMED_BYTES:
            more += 2 * _announced(data)
            self._used += data.count(_MEMOIZE)
            if 3 * (self._used + _SLOTS_AHEAD) > 2 * self._slots:
                more += 2 * self._slots * _SLOT_BYTES
                self._slots *= 2
        at = self.tell()
        if at < _COPIED_BYTES and at + size > self.__sizeof__() - _EMPTY_BYTES:
            more += at
        try:
            require(more, self._done, self._done + more)
        except MemoryError:
            self.seek(0)
            self.truncate()  # the error may be kept, and this by its traceback
            raise
        self._done += size


def _announced(data: bytes) -> int:
    """Return the length of the text whose header is the end of a step, 0 if there is none."""
    at = len(_PROTO) if data.startswith(_PROTO) else 0
    if data[at : at + 1] == _FRAME:
        head = at + _FRAME_HEADER_BYTES
        at = head + int.from_bytes(data[at + 1 : head], "little")
    rest = len(data) - at
    for code, length in _TEXTS:
        if length < rest <= length + _LEAST_FRAMED and data[-length - 1] == code:
            return int.from_bytes(data[-length:], "little")
    return 0


# Size of a sink beside its bytes.
_EMPTY_BYTES = Sink.__basicsize__ + b"".__sizeof__()


class Source:
    """File that an unpickler reads from."""

    def __init__(self, pickled: Buffer) -> None:
        self._view = memoryview(pickled)
        self._at = self._done = 0

    def read(self, size: int) -> bytes:
        """Return a frame, a text in one piece, or a few bytes."""
        # A text is copied here, and decoded.
        self._hold(size, OBJECTS if size < _MOST_FRAMED_BYTES else 2)
        return bytes(self._take(size))

    def readinto(self, buffer: Any) -> int:
        """Read bytes in one piece, whose memory was asked for and is not in use yet."""
        target = memoryview(buffer).cast("B")
        self._hold(len(target), 1)
        taken = self._take(len(target))
        target[: len(taken)] = taken
        return len(taken)

    def readline(self) -> bytes:
        """Return a name."""
        places: Iterable[int] = range(self._at, len(self._view))
        end = next((place for place in places if self._view[place] == ord("\n")), -1)
        return bytes(self._take(end + 1 - self._at))

    def _take(self, size: int) -> memoryview:
        begin, self._at = self._at, self._at + size
        return self._view[begin : self._at]

    def _hold(self, size: int, times: int) -> None:
        if size * times >= STEP_BYTES:
            require(size * times, self._done, self._done + size * times)
            self._done += size * times


def load(pickled: Buffer, buffers: Iterable[Any] = ()) -> Any:
    """Unpickle, if the memory limits leave room for the objects."""
    if len(pickled) < STEP_BYTES:
        return pickle.loads(pickled, buffers=buffers)
    return pickle.Unpickler(Source(pickled), buffers=buffers).load()


def loaded_bytes(pickled: Buffer) -> int:
    """Return a lower bound of the memory that the objects of a pickle take.

    Example:
        >>> numbers = pickle.dumps([float(number) for number in range(20_000)], protocol=5)
        >>> round(loaded_bytes(numbers) / len(numbers)) == OBJECTS
        True
    """
    view, at, framed, unknown = memoryview(pickled), len(_PROTO), 0, 0
    while at < len(view) and unknown <= _LEAST_FRAMED:
        code = view[at]
        begin = at + 1 + _LENGTHS.get(code, 0)
        length = int.from_bytes(view[at + 1 : begin], "little")
        if code in _LENGTHS and begin + length <= len(view):
            framed += length if code == _FRAME[0] else 0
            at, unknown = begin + length, 0
        else:
            at, unknown = at + 1, unknown + 1
    return len(view) + (OBJECTS - 1) * framed
