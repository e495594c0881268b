"""The board: a page of memory that a worker and its pool share.

What a task sent ahead needs, and no message can give in time: the worker chalks up what it
begins and what it has finished; the pool reads that when the worker is dead, stuck or slow, and
chalks up what it takes back. Nothing on it is ever waited for and no lock exists, so a worker
that is killed at any instruction leaves the board readable.

    0          8        16       24        32                  40
    | claimed  | since  | began  | revoked | era, filled       | ... | results
    | position | ns     | pos.   | pos.    | flushes, bytes    |     | since the last flush

All cells are u64, written by the worker, but ``revoked``: by the pool. Positions count what was
sent to this worker, from 1.

Two agreements rest on the order of memory accesses:

    claim     The worker writes ``claimed`` and then reads ``revoked``; the pool writes ``revoked``
              and then reads ``claimed``. One of the two sees the other's, if neither processor
              lets its read overtake its write. A fence in the worker for every task would
              cost more than a tiny task; so the pool pays for both: membarrier(2) makes every
              processor that runs a registered process pass a fence.
    results   The worker writes a record and then how many bytes are filled; with each flush it
              sets that to zero and the era, in the same cell, one further, before it uses the
              space again. The pool reads the cell, passes the barrier, copies, passes the
              barrier, and throws the copy away if the era has changed: then the results are
              on their way as a frame.

The same unnamed file takes faulthandler's report, behind the board: a crash is written down by a
process that can do nothing else any more.

Not covered:
    * Where there is no memfd_create(2) or membarrier(2), ``create`` returns ``None``; a worker
      then holds one task at a time.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import signal
import struct
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    Segment = bytes | memoryview

__all__ = ["STACK_SIGNAL", "Board", "barrier", "record_of", "records_of", "register"]

_CLAIMED, _SINCE, _BEGAN, _REVOKED, _FILLED = range(5)
_CELLS_BYTES = 64
# The last cell's lower half; the era is above it. In one cell, so that nobody ever sees the
# bytes of one era with the number of the next.
_FILLED_MASK = (1 << 32) - 1
_CELL_MASK = (1 << 64) - 1
# Larger results go as a frame of their own. Large enough for a few hundred small ones: that
# many are flushed in one message.
_BYTES = 64 * 1024
# Before each result: position, microseconds it took, length, kind of frame.
_RECORD = struct.Struct("<QIIB")
_RECORD_BYTES, _RESULTS_BYTES = _RECORD.size, _BYTES - _CELLS_BYTES
_pack = _RECORD.pack

# Makes a worker write its Python stack behind the board. A real-time signal, which
# neither the system nor, as good as ever, a program uses; glibc keeps the first two.
if sys.platform == "linux":
    STACK_SIGNAL = int(signal.SIGRTMAX) - 3
else:
    STACK_SIGNAL = 0

# How faulthandler begins when a signal ends the process (Modules/faulthandler.c,
# faulthandler_fatal_error); a stack that was asked for begins with a thread.
_CRASH = b"Fatal Python error: "

# membarrier(2): MEMBARRIER_CMD_GLOBAL_EXPEDITED and its registration, Linux 4.16.
_EXPEDITED, _REGISTER_EXPEDITED = 1 << 1, 1 << 2
# Linux, arch/*/entry/syscalls/*.tbl and include/uapi/asm-generic/unistd.h, by uname -m.
_SYSCALL_NUMBERS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "loongarch64": 283,
    "ppc64le": 365,
    "s390x": 356,
}


class Board:
    """One worker's board, mapped.

    Args:
        descriptor: The file that :meth:`create` made. It is owned by the board from now on.
    """

    __slots__ = ("_cells", "_descriptor", "_filled", "_map", "_results")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, _BYTES)
        whole = memoryview(self._map)
        self._cells = whole[:_CELLS_BYTES].cast("Q")
        self._results = whole[_CELLS_BYTES:]
        self._filled = 0  # as the worker has last written it

    @classmethod
    def create(cls) -> Self | None:
        """Return a new board; ``None`` where the system cannot give one.

        Raises:
            OSError: No descriptor or no memory is left.
        """
        descriptor = _create_file() if _has_barrier() else None
        if descriptor is None:
            return None
        try:
            os.ftruncate(descriptor, _BYTES)
            os.lseek(descriptor, _BYTES, os.SEEK_SET)  # where faulthandler begins to write
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def fileno(self) -> int:
        """Return the file's descriptor, -1 once closed."""
        return self._descriptor

    def close(self) -> None:
        """Give memory and descriptor back. May be called again."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        self._cells.release()
        self._results.release()
        self._map.close()
        try:
            os.close(descriptor)
        except OSError:
            pass  # a task has closed it

    # What the worker writes.

    def claim(self, position: int, now_ns: int, *, reading: bool = False) -> bool:
        """Say that this position begins now; ``False`` if the pool has taken it back.

        Args:
            position: Which.
            now_ns: By the monotonic clock.
            reading: Its arguments are read first, with those of others, and it begins then.
        """
        cells = self._cells
        cells[_SINCE] = now_ns
        cells[_CLAIMED] = position
        if cells[_REVOKED] >= position:
            return False
        if not reading:
            cells[_BEGAN] = position
        return True

    def begin(self, position: int) -> None:
        """Say that a position begins that was claimed for reading."""
        self._cells[_BEGAN] = position

    def publish(self, position: int, microseconds: int, kind: int, pickled: Segment) -> bool:
        """Leave a result for the next flush; ``False`` if there is no room for it."""
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

    def flushed(self) -> None:
        """Use the space again: what was published has been sent."""
        self._filled = ((self._filled | _FILLED_MASK) + 1) & _CELL_MASK
        self._cells[_FILLED] = self._filled

    # What the pool reads and writes.

    def revoke(self, position: int) -> None:
        """Take back what is not claimed, up to this position; then pass the barrier."""
        self._cells[_REVOKED] = position

    @property
    def revoked(self) -> int:
        """The last position that was taken back."""
        return self._cells[_REVOKED]

    @property
    def claimed(self) -> int:
        """The last position that the worker has claimed: begun, or found revoked."""
        return self._cells[_CLAIMED]

    @property
    def began(self) -> int:
        """The last position that the worker has begun."""
        return self._cells[_BEGAN]

    @property
    def since_ns(self) -> int:
        """When it did, by the monotonic clock, which is one for all processes."""
        return self._cells[_SINCE]

    def peek(self) -> bytes:
        """Return the records that are not flushed; nothing if a flush came between.

        Passes the barrier, so that what :attr:`claimed` says afterwards is later.
        """
        before = self._cells[_FILLED]
        barrier()  # all records that it counts are there
        records = bytes(self._results[: before & _FILLED_MASK])
        barrier()
        return records if self._cells[_FILLED] >> 32 == before >> 32 else b""

    @property
    def written(self) -> int:
        """How many bytes faulthandler has written."""
        try:
            return max(0, os.fstat(self._descriptor).st_size - _BYTES)
        except OSError:
            return 0

    def fault(self, begin: int | None = None) -> str:
        """Return what faulthandler has written, empty if nothing.

        Args:
            begin: From this byte on, such as :attr:`written` when the worker was asked. ``None``
                is what it wrote of a crash, and nothing that it was asked for.
        """
        skipped = begin or 0
        size = self.written - skipped
        if size <= 0:
            return ""
        try:
            found = _read_at(self._descriptor, size, _BYTES + skipped)
        except OSError:
            return ""
        if begin is None:
            found = found[found.rindex(_CRASH) :] if _CRASH in found else b""
        return found.decode(errors="replace")

    def drop_faults(self) -> None:
        """Give back the memory of what faulthandler has written."""
        try:
            # Where it writes next is a property of the file that both processes hold open.
            os.lseek(self._descriptor, _BYTES, os.SEEK_SET)
            os.ftruncate(self._descriptor, _BYTES)
        except OSError:
            pass


def record_of(position: int, microseconds: int, kind: int, pickled: Segment) -> bytes:
    """Return one record as :func:`records_of` reads it, for a result that is not published."""
    return _RECORD.pack(position, microseconds, len(pickled), kind) + pickled


def records_of(data: bytes | bytearray) -> Iterator[tuple[int, int, int, memoryview]]:
    """Yield position, microseconds, kind and pickle of each record.

    Raises:
        ValueError: The last one is cut off.
    """
    view = memoryview(data)
    at, end = 0, len(data)
    size = _RECORD.size
    while at < end:
        if end - at < size:
            raise ValueError(f"a record of {end - at} bytes")
        position, microseconds, length, kind = _RECORD.unpack_from(data, at)
        at += size
        if length > end - at:
            raise ValueError(f"a record of {length} bytes, of which {end - at} are there")
        yield position, microseconds, kind, view[at : at + length]
        at += length


if sys.platform == "linux":
    # What a system that knows the call and does not allow it says (a seccomp filter, mostly).
    _REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES)

    def _create_file() -> int | None:
        try:
            return os.memfd_create("safepool-board", os.MFD_CLOEXEC)
        except OSError as error:
            if error.errno in _REFUSED:
                return None
            raise

    def _read_at(descriptor: int, size: int, at: int) -> bytes:
        return os.pread(descriptor, size, at)

    @functools.cache
    def _membarrier() -> Callable[[int], int] | None:
        import ctypes  # noqa: PLC0415 -- 5 ms

        number = _SYSCALL_NUMBERS.get(os.uname().machine)
        if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            return None
        # PyDLL: it takes a few microseconds, and to give the lock away and get it again more.
        syscall = ctypes.PyDLL(None).syscall

        def call(command: int) -> int:
            result: int = syscall(number, command, 0, 0)
            return result

        return call

else:

    def _create_file() -> int | None:
        return None

    def _read_at(_descriptor: int, _size: int, _at: int) -> bytes:
        return b""

    def _membarrier() -> Callable[[int], int] | None:
        return None


@functools.cache
def _has_barrier() -> bool:
    call = _membarrier()
    if call is None:
        return False
    needed = _EXPEDITED | _REGISTER_EXPEDITED
    offered = call(0)  # MEMBARRIER_CMD_QUERY
    return offered >= 0 and offered & needed == needed


def register() -> bool:
    """Let barriers of other processes reach this one; ``False`` if the system does not."""
    call = _membarrier()
    return call is not None and call(_REGISTER_EXPEDITED) == 0


def barrier() -> None:
    """Return when every running thread of a registered process has passed a memory fence."""
    call = _membarrier()
    assert call is not None  # there would be no board
    call(_EXPEDITED)
