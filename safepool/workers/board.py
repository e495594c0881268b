"""The board: a few pages of memory that a worker and its pool share.

The board serves tasks that were sent ahead, for which a message would come too late. The worker
notes which calls have begun and finished; the pool reads these notes when the worker is dead,
stuck or slow, and notes which calls it takes back. No process waits for the other at the board,
and it has no lock, so a worker that is killed at any instruction leaves the board readable.

    0          8        16       24        32       40      48      56
    | claimed  | since  | began  | revoked | era,   | lane: | first | last
    | position | ns     | pos.   | pos.    | filled | kind  | pos.  | claimed
    64         72
    | mark     | lane: a number for each call       | records of results since the last flush

All cells are u64. The worker writes all of them but ``revoked`` and ``mark``, which the pool
writes. Positions count the calls that this worker was sent, from 1.

Results have one of two forms: records of any kind, or the lane, for the shortest calls that run
one after the other and return numbers of one kind. A slot of the lane holds the mark, a random
number, until its call has ended. Hence one store notes the end of a call, its result, and the
begin of the next, up to the last slot of the lane.

Two rules depend on the order of memory accesses:

    claim     The worker writes ``claimed``, or a slot, and then reads ``revoked``; the pool writes
              ``revoked`` and then reads those. At least one of the two sees the other's store, if
              no processor lets its read overtake its write. A fence in the worker for every task
              would cost more than a tiny task; so the pool pays for both (``fence``).
    results   The worker writes a result and then how much is filled; with each flush it closes
              the lane, and sets the filled bytes to zero and the era, in the same cell, one
              further, before it uses the space again. The pool reads cell and kind, passes
              the barrier, copies, passes the barrier, and throws the copy away if the era has
              changed: then the results are on their way as a frame.

The same unnamed file takes faulthandler's report, behind the board: a crashing process can still
write there.

Not covered:
    * Systems without memfd_create(2) or membarrier(2): the board is then :data:`NO_BOARD`,
      and a worker holds one task at a time.
    * A worker that is killed between the end of a call in the lane and its read of ``revoked``:
      the next call counts as begun.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

from safepool.errors import REFUSALS
from safepool.workers.fence import barrier, has_barrier

_CLAIMED, _SINCE, _BEGAN, REVOKED, _FILLED, _KIND, _FIRST, _LAST, _MARK, _PID, _RESTED = range(11)
# After the cells: the name of what runs.
_NAME_BYTES = 128
_CELLS_BYTES = (_RESTED + 1) * 8
_NAME_END = _CELLS_BYTES + _NAME_BYTES
# Calls that the lane has room for. With a flush each millisecond, those of half a microsecond.
LANE_CALLS = 2048
_LANE_END = _NAME_END + 8 * LANE_CALLS
# The lower half of the last cell; the upper half is the era. One cell holds both, so that no
# reader ever sees the bytes of one era with the number of the next.
_FILLED_MASK = (1 << 32) - 1
_CELL_MASK = (1 << 64) - 1
# Larger results travel in a separate frame. The size holds a few hundred small results, which are
# flushed in one message.
_BYTES = _LANE_END + 64 * 1024
# Before each result: position, microseconds it took, length, kind of frame.
RECORD = struct.Struct("<QIIB")
_RECORD_BYTES, _RESULTS_BYTES = RECORD.size, _BYTES - _LANE_END
_pack = RECORD.pack

# Kinds of lane, by the type of the results; an integer must fit 64 bits.
_INTEGER, _FLOAT, _BOOL, _NONE = range(1, 5)
LANES: dict[type, int] = {int: _INTEGER, float: _FLOAT, bool: _BOOL, type(None): _NONE}

_FILE = "safepool-board"

# Makes a worker write its Python stack behind the board. A real-time signal, which the system
# never uses and programs very rarely; glibc keeps the first two.
if sys.platform == "linux":
    from safepool import linux

    STACK_SIGNAL = int(signal.SIGRTMAX) - 3
else:  # not Linux
    STACK_SIGNAL = 0

# Begin of faulthandler's report when a signal ends the process (Modules/faulthandler.c,
# faulthandler_fatal_error). A requested stack begins with a thread.
_CRASH = b"Fatal Python error: "


class Left(NamedTuple):
    """Results that a worker has left on its board."""

    records: bytes
    first: int
    numbers: list[Any]


class Board:
    """The mapped board of one worker. It owns the descriptor, which :meth:`create` made."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _BYTES)
        whole = memoryview(self._map)
        self._cells = whole[:_CELLS_BYTES].cast("Q")
        self._name = whole[_CELLS_BYTES:_NAME_END]
        self._lane = whole[_NAME_END:_LANE_END]
        # Two views of the same memory: one to store, one to compare with the mark.
        self._numbers, self._floats = self._lane.cast("q"), self._lane.cast("d")
        self._slots = self._lane.cast("Q")
        self._results = whole[_LANE_END:]
        # The worker's last value of the cell, and the number of slots of the lane without a mark.
        self._filled, self._used = 0, LANE_CALLS

    @classmethod
    def create(cls) -> Board:
        """Return a new board; :data:`NO_BOARD` where the system cannot give one."""
        descriptor = _create_file() if has_barrier() else None
        if descriptor is None:
            return NO_BOARD
        try:
            os.ftruncate(descriptor, _BYTES)
            os.lseek(descriptor, _BYTES, os.SEEK_SET)  # where faulthandler begins to write
            board = cls(descriptor)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in REFUSALS:
                return NO_BOARD
            raise
        board._cells[_MARK] = int.from_bytes(os.urandom(8), sys.byteorder)
        return board

    def fileno(self) -> int:
        """Return the file's descriptor, -1 once closed."""
        return self._descriptor

    def close(self) -> None:
        """Give memory and descriptor back. May be called again."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        views = (self._numbers, self._floats, self._slots, self._cells, self._lane, self._results)
        for view in (*views, self._name):
            view.release()
        self._map.close()
        try:
            os.close(descriptor)
        except OSError:
            pass  # a task has closed it

    # Methods for the worker.

    def sign(self, pid: int) -> None:
        """Write the worker's process id, for readers in another process."""
        self._cells[_PID] = pid

    def tell(self, name: str, now_ns: int = 0) -> None:
        """Write the name of the call that runs now, or from the next claim on without a time."""
        self._name[:] = name.encode("utf-8", "replace")[-_NAME_BYTES:].ljust(_NAME_BYTES, b"\0")
        if now_ns:
            self._cells[_SINCE] = now_ns

    def rest(self) -> None:
        """Write that no call runs, until the next claim."""
        cells = self._cells
        cells[_RESTED] = cells[_SINCE]

    def claim(self, position: int, now_ns: int, *, reading: bool = False) -> bool:
        """Note that this position begins now; ``False`` if the pool has taken the call back.

        With ``reading`` its arguments are read first, and it begins then.
        """
        cells = self._cells
        cells[_SINCE] = now_ns
        cells[_CLAIMED] = position
        if cells[REVOKED] >= position:
            return False
        if not reading:
            cells[_BEGAN] = position
        return True

    def begin(self, position: int) -> None:
        """Say that a position begins that was claimed for reading."""
        self._cells[_BEGAN] = position

    def publish(
        self, position: int, microseconds: int, kind: int, pickled: bytes | memoryview
    ) -> bool:
        """Store a result for the next flush; ``False`` if the board has no room for it."""
        filled = self._filled
        begin = filled & _FILLED_MASK
        end = begin + _RECORD_BYTES + len(pickled)
        if end > _RESULTS_BYTES:
            return False
        # In one write, which is cheaper than two; the copy of a small pickle costs nothing.
        record = _pack(position, microseconds, len(pickled), kind) + pickled
        self._results[begin:end] = record
        self._cells[_FILLED] = self._filled = filled + end - begin
        return True

    def published(self) -> bytes:
        """Return the records since the last flush."""
        return bytes(self._results[: self._cells[_FILLED] & _FILLED_MASK])

    def open_lane(self, position: int, kind: int) -> memoryview[Any]:
        """Return slots for the results of calls from this position on, which is claimed."""
        cells, used = self._cells, self._used
        self._lane[: 8 * used] = cells[_MARK].to_bytes(8, sys.byteorder) * used
        self._used = 0
        cells[_FIRST] = position
        cells[_LAST] = position
        cells[_KIND] = kind
        return self._floats if kind == _FLOAT else self._numbers

    def enter_lane(self, last: int) -> memoryview:
        """Let each result in the lane claim the call that follows, up to this position.

        Returns the cells: the one at ``REVOKED`` is to be read after each result.
        """
        self._cells[_LAST] = last
        return self._cells

    def leave_lane(self, position: int) -> None:
        """Write that this is the last position that has begun."""
        cells = self._cells
        cells[_LAST] = position
        cells[_CLAIMED] = position
        cells[_BEGAN] = position

    def lane_bytes(self, count: int) -> bytes:
        """Return the first results in the lane, as :func:`numbers_of` reads them."""
        self._used = max(self._used, count)
        return bytes(self._lane[: 8 * count])

    def flushed(self) -> None:
        """Release the space after the results there were sent."""
        # First: a reader that sees the new era must not take old results for new ones.
        self._cells[_KIND] = 0
        self._filled = ((self._filled | _FILLED_MASK) + 1) & _CELL_MASK
        self._cells[_FILLED] = self._filled

    # Methods for the pool.

    def revoke(self, position: int) -> None:
        """Take back unclaimed calls, up to this position; then pass the barrier."""
        self._cells[REVOKED] = position

    @property
    def claimed(self) -> int:
        """The last position that the worker has claimed: begun, or found revoked."""
        # The lane first: the cell has its last position before the lane is closed. In the other
        # order both values could be older than the worker's step between the two reads.
        return max(self._entered(), self._cells[_CLAIMED])

    @property
    def began(self) -> int:
        """The last position that the worker has begun."""
        return max(self._entered(), self._cells[_BEGAN])  # in this order, as above

    def _entered(self) -> int:
        """Return the last position that is claimed in the lane, 0 if none."""
        cells = self._cells
        if not cells[_KIND]:
            return 0
        first, last, mark = cells[_FIRST], cells[_LAST], cells[_MARK]
        most = max(0, min(last - first, LANE_CALLS))
        return first + bisect_left(self._slots, True, 0, most, key=mark.__eq__)

    @property
    def since_ns(self) -> int:
        """Time at which the last call began, by the monotonic clock of all processes."""
        return self._cells[_SINCE]

    def peek(self) -> Left:
        """Return the results that are not flushed; none if a flush came between.

        Passes the barrier, so that what :attr:`claimed` says afterwards is later.
        """
        before, kind = self._cells[_FILLED], self._cells[_KIND]
        barrier()  # all that these count is there
        left = self._left(before, kind)
        barrier()
        return left if self._cells[_FILLED] >> 32 == before >> 32 else Left(b"", 0, [])

    def left(self) -> Left:
        """Return the results that a worker which has ended did not flush."""
        return self._left(self._cells[_FILLED], self._cells[_KIND])

    def _left(self, filled: int, kind: int) -> Left:
        records = bytes(self._results[: filled & _FILLED_MASK])
        if not kind:
            return Left(records, 0, [])
        lane = bytes(self._lane)
        slots = memoryview(lane).cast("Q").tolist()
        mark = self._cells[_MARK]
        ended = slots.index(mark) if mark in slots else LANE_CALLS
        return Left(records, self._cells[_FIRST], numbers_of(kind, lane[: 8 * ended]))

    @property
    def written(self) -> int:
        """Number of bytes that faulthandler has written."""
        try:
            return max(0, os.fstat(self._descriptor).st_size - _BYTES)
        except OSError:
            return 0

    def fault(self, begin: int | None = None) -> str:
        """Return what faulthandler wrote from this byte on, or the report of a crash."""
        skipped = begin or 0
        size = self.written - skipped
        if size <= 0:
            return ""
        found = b""
        if sys.platform != "win32":
            try:
                found = os.pread(self._descriptor, size, _BYTES + skipped)
            except OSError:
                return ""
        if begin is None:
            found = found[found.rindex(_CRASH) :] if _CRASH in found else b""
        return found.decode(errors="replace")

    def drop_faults(self) -> None:
        """Give back the memory of what faulthandler has written."""
        try:
            # The position of the next write belongs to the file description, which both processes
            # share.
            os.lseek(self._descriptor, _BYTES, os.SEEK_SET)
            os.ftruncate(self._descriptor, _BYTES)
        except OSError:
            pass


class _NoBoard(Board):
    """Stands for the board where there is none. It is false, and its results are empty."""

    claimed = began = since_ns = property(lambda _: 0)

    def __init__(self) -> None:
        self._descriptor = -1

    def __bool__(self) -> bool:
        return False

    def _do_nothing(self, *_: Any, **_words: Any) -> None:
        pass

    sign = tell = rest = begin = revoke = flushed = _do_nothing

    def claim(self, _position: int, _now_ns: int, *, reading: bool = False) -> bool:  # noqa: ARG002
        """Allow every position to begin: the pool takes none back."""
        return True

    def publish(self, *_: object) -> bool:
        """Take no result."""
        return False

    def peek(self) -> Left:
        """Return no results."""
        return Left(b"", 0, [])

    left = peek


NO_BOARD: Board = _NoBoard()


class Seen(NamedTuple):
    """One worker's board, as another process reads it; the name is ``None`` while nothing runs."""

    pid: int
    name: str | None
    since_ns: int


def boards_of(process: int) -> list[Seen]:
    """Read the boards that another process shares with workers. Linux only; changes nothing.

    The kernel shows the descriptors of a process to its own user and to root alone
    (proc_pid_fd(5)); to others this raises ``OSError``.
    """
    found: dict[int, Seen] = {}
    folder = f"/proc/{process}/fd"
    for name in os.listdir(folder):
        try:
            if not os.readlink(f"{folder}/{name}").startswith(f"/memfd:{_FILE}"):
                continue
            with open(f"{folder}/{name}", "rb", buffering=0) as file:
                data = file.read(_NAME_END)
        except OSError:
            continue  # closed meanwhile
        if len(data) == _NAME_END:
            cells = memoryview(data)[:_CELLS_BYTES].cast("Q")
            text = data[_CELLS_BYTES:].rstrip(b"\0").decode("utf-8", "replace")
            runs = cells[_SINCE] != cells[_RESTED]
            found[cells[_PID]] = Seen(cells[_PID], text if runs else None, cells[_SINCE])
    # 0: it has not started. A worker holds its own board.
    return [found[pid] for pid in sorted(found) if pid not in (0, process)]


def numbers_of(kind: int, data: bytes | bytearray | memoryview) -> list[Any]:
    """Return the results that a lane held."""
    if kind not in LANES.values() or len(data) % 8:
        raise ValueError(f"invalid content of a result slot: {len(data)} bytes of kind {kind}")
    if kind == _NONE:
        return [None] * (len(data) // 8)
    numbers: list[Any] = memoryview(data).cast("d" if kind == _FLOAT else "q").tolist()
    return [*map(bool, numbers)] if kind == _BOOL else numbers


def records_of(data: bytes | bytearray) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield position, microseconds, kind and pickle of each record."""
    view = memoryview(data)
    at, end = 0, len(data)
    size = RECORD.size
    while at < end:
        if end - at < size:
            raise ValueError(f"a record of {end - at} bytes")
        position, microseconds, length, kind = RECORD.unpack_from(data, at)
        at += size
        if length > end - at:
            raise ValueError(f"a record of {length} bytes, of which {end - at} are there")
        yield position, microseconds, kind, view[at : at + length]
        at += length


def _create_file() -> int | None:
    if sys.platform == "linux":
        try:
            return linux.memfd_create(_FILE, linux.MFD_CLOEXEC)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
    return None
