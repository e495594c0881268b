"""Unnamed files on Linux: written once, sealed, sent, mapped privately.

Not covered:
    * Freeing a single buffer of a shared file: the kernel frees a file when the last of its
      buffers is dropped. Buffers of at least 8 MiB have separate files, up to 16 of a payload.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safepool import linux
from safepool.transport import room
from safepool.transport.descriptors import Descriptor, Handed, close_all
from safepool.transport.frames import CorruptFrameError, Filed, Missing, Segment

assert sys.platform == "linux"

# Where each buffer begins in its file: a cache line, and as much as any vector instruction needs.
_ALIGNED_BYTES = 64
# A buffer of at least this size has a separate file, so that it can be freed alone.
_OWN_BYTES = 8 << 20
_MOST_OWN_FILES = 16
# write(2) takes no more at once: "at most 0x7ffff000 bytes".
_MOST_WRITTEN_BYTES = 0x7FFF_F000
_HUGE_BYTES = 2 << 20
# A file of at least this size gets large pages, in steps of this size. Between two steps the copy
# checks whether it is still needed.
_PREPARED_BYTES = 2 << 20
_STEP_BYTES = 16 << 20
# madvise(2): MADV_COLLAPSE, Linux 6.1.
_COLLAPSE = 25
# memfd_create(2): MFD_NOEXEC_SEAL, Linux 6.3. With vm.memfd_noexec=2 a file without it is refused.
_NOEXEC = 8
# Nobody can change the file, or make it shorter than its mapping, which would cause a SIGBUS.
_SEALS = linux.F_SEAL_SHRINK | linux.F_SEAL_GROW | linux.F_SEAL_WRITE | linux.F_SEAL_SEAL
_NO_MEMORY = frozenset({errno.ENOMEM, errno.ENOSPC})
# Beside a descriptor: its number, counted by side from 1.
_NUMBER = struct.Struct("!Q")
_RIGHTS_BYTES = socket.CMSG_SPACE(4)
_INVITATION = b"\x01"
_DECLINED = b"\x00"


class Stored(Filed):
    """One sealed file with consecutive segments of a payload. It owns the descriptor."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int, lengths: tuple[int, ...]) -> None:
        self._descriptor = descriptor
        self.lengths = lengths

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._descriptor

    def filenos(self) -> list[int]:
        """Return the descriptors to send."""
        return [self._descriptor]

    def segments(self) -> list[memoryview]:
        """Return the content of the file, mapped or read."""
        return [*_map(self._descriptor, self.lengths)]

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file; the kernel frees it after its last mapping. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            close(descriptor)

    def __del__(self) -> None:
        self.close()


def store(segments: Sequence[Segment], given_up: Callable[[], bool] = bool) -> list[Segment]:
    """Copy a payload's buffers into files; each run of segments in one file becomes that file.

    Unchanged if the system refuses a file because no descriptor is left or files are forbidden.
    ``given_up`` is asked during the copy whether the arrays are no longer needed.

    Raises:
        MemoryError: The memory that is left is too small for the copy.
        InterruptedError: The copy was given up.
    """
    stored: list[Segment] = []
    runs = [*_runs(segments)]
    done, whole = 0, sum(len(buffer) for run, _ in runs for buffer in run)
    for run, small in runs:
        if small is not None:
            stored.append(small)
            continue
        try:
            stored.append(_write(run, given_up, done, whole))
            done += sum(map(len, run))
        except (InterruptedError, MemoryError):
            # The error may be kept, and these by its traceback.
            for one in stored:
                if isinstance(one, Stored):
                    one.close()
            raise
        except OSError as error:
            if error.errno in _NO_MEMORY:
                total = sum(len(buffer) for buffer in run)
                raise MemoryError(
                    f"no memory for a copy of {total:,} bytes of arrays on their way between "
                    f"pool and worker: {error.strerror}. Send less at once, or run fewer workers"
                ) from error
            return list(segments)
    return stored


def _runs(segments: Sequence[Segment]) -> Iterator[tuple[list[memoryview], Segment | None]]:
    """Yield buffers that share a file, or a segment that stays in the stream."""
    shared: list[memoryview] = []
    own = 0
    for segment in segments:
        if isinstance(segment, Filed) or memoryview(segment).nbytes < _LEAST_BYTES:
            if shared:
                yield shared, None
                shared = []
            yield [], segment
            continue
        buffer = memoryview(segment).cast("B")
        if len(buffer) < _OWN_BYTES or own == _MOST_OWN_FILES:
            shared.append(buffer)
            continue
        if shared:
            yield shared, None
            shared = []
        own += 1
        yield [buffer], None
    if shared:
        yield shared, None


# A smaller segment stays in the stream, which is the function's number or the pickle.
_LEAST_BYTES = 16 * 1024


def _write(
    buffers: Sequence[memoryview], given_up: Callable[[], bool], done_bytes: int, whole_bytes: int
) -> Stored:
    lengths = tuple(len(buffer) for buffer in buffers)
    stored = Stored(_create(), lengths)
    try:
        _fill(stored, buffers, given_up, done_bytes, whole_bytes)
    except BaseException:
        stored.close()
        raise
    fcntl.fcntl(stored.fileno(), linux.F_ADD_SEALS, _SEALS)
    return stored


def _fill(
    stored: Stored,
    buffers: Sequence[memoryview],
    given_up: Callable[[], bool],
    done_bytes: int,
    whole_bytes: int,
) -> None:
    places, size = _places(stored.lengths)
    descriptor, prepared = stored.fileno(), 0
    if size >= _PREPARED_BYTES:
        os.ftruncate(descriptor, size)
    for buffer, place in zip(buffers, places, strict=True):
        done = 0
        while done < len(buffer):
            if given_up():
                raise InterruptedError(
                    "the copy of arrays was stopped: its call is no longer needed"
                )
            piece = buffer[done : done + _STEP_BYTES]
            room.require(len(piece), done_bytes, whole_bytes)
            done_bytes += len(piece)
            end = place + done + len(piece)
            if size >= _PREPARED_BYTES and end > prepared:
                _prepare(descriptor, prepared, min(_STEP_BYTES + prepared, size))
                prepared += _STEP_BYTES
            done += os.pwrite(descriptor, piece, place + done)


def _create() -> int:
    flags = linux.MFD_CLOEXEC | linux.MFD_ALLOW_SEALING
    try:
        return linux.memfd_create("safepool-arrays", flags | _NOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return linux.memfd_create("safepool-arrays", flags)


def _places(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Return where each segment begins in its file, and where the last one ends."""
    places, end = [], 0
    for length in lengths:
        begin = -(-end // _ALIGNED_BYTES) * _ALIGNED_BYTES
        places.append(begin)
        end = begin + length
    return places, end


def _prepare(descriptor: int, begin: int, end: int) -> None:
    """Give a part of a new file large pages if the system can: half of a copy's cost.

    Small pages are allocated one by one, 25,000 for 100 MB. Without large pages (before Linux 6.1,
    or when memory is in small pieces) everything works as well (benchmarks/arrays.py, pages).
    """
    global _collapses  # noqa: PLW0603 -- a fact about this system
    import ctypes  # noqa: PLC0415 -- as below

    length = (end - begin) // _HUGE_BYTES * _HUGE_BYTES
    if not (_collapses and length):
        return
    # The kernel fills holes with large pages, but does not begin an empty file with one.
    for place in range(begin, begin + length, _HUGE_BYTES):
        os.pwrite(descriptor, b"\0", place)
    libc = _libc()
    room = mmap.mmap(-1, length + _HUGE_BYTES, mmap.MAP_PRIVATE)
    try:
        at = -(-_address(room) // _HUGE_BYTES) * _HUGE_BYTES
        flags = mmap.MAP_SHARED | _MAP_FIXED
        mapped = libc.mmap(at, length, mmap.PROT_READ, flags, descriptor, begin) == at
        if mapped and libc.madvise(at, length, _COLLAPSE):
            _collapses = ctypes.get_errno() != errno.EINVAL
    finally:
        room.close()


_collapses = True
_MAP_FIXED = 0x10


def _map(descriptor: int, lengths: Sequence[int]) -> Iterator[memoryview]:
    """Yield the segments of a file, in private memory of this process."""
    places, size = _places(lengths)
    view = _map_whole(descriptor, size)
    for place, length in zip(places, lengths, strict=True):
        yield view[place : place + length]


def _map_whole(descriptor: int, size: int) -> memoryview:
    # An anonymous mapping replaced by one of the file, because Python's own keeps the descriptor
    # open as long as the array lives (until 3.13, ``trackfd``). Dropping the last view unmaps
    # both.
    spare = _HUGE_BYTES if size >= _HUGE_BYTES else 0  # large pages are mapped where they fit
    try:
        room = mmap.mmap(-1, size + spare, mmap.MAP_PRIVATE)
        at = _address(room)
        begin = -(-at // _HUGE_BYTES) * _HUGE_BYTES if spare else at
        access = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        if _libc().mmap(begin, size, access, flags, descriptor, 0) == begin:
            return memoryview(room)[begin - at : begin - at + size]
    except OSError:
        pass  # this process has as many mappings as it may have, or no addresses
    return _read(descriptor, size)


def _read(descriptor: int, size: int) -> memoryview:
    whole = memoryview(bytearray(size))
    done = 0
    while done < size:
        count = linux.preadv(descriptor, [whole[done : done + _MOST_WRITTEN_BYTES]], done)
        if not count:
            raise CorruptFrameError(f"expected a file of {size} bytes, found {done}")
        done += count
    return whole


def _address(room: mmap.mmap) -> int:
    import ctypes  # noqa: PLC0415 -- as below

    return ctypes.addressof(ctypes.c_char.from_buffer(room))


@functools.cache
def _libc() -> Any:
    import ctypes  # noqa: PLC0415 -- 5 ms, and most workers map nothing

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class Side:
    """One end of the socket pair for a channel's descriptors, which keeps messages apart.

    With ``waits`` sending waits for room, as in a worker; a pool's does not.
    """

    def __init__(self, sock: socket.socket, *, waits: bool) -> None:
        self._sock = sock
        self._flags = socket.MSG_NOSIGNAL | (0 if waits else socket.MSG_DONTWAIT)
        self._sent = self._received = 0
        self._open = True
        _spare.count(1)

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def send(self, stored: Stored | Handed) -> bool:
        """Send descriptors ahead of the frame that refers to them; ``False`` if they cannot go."""
        numbers = stored.filenos()
        packed = struct.pack(f"{len(numbers)}i", *numbers)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
        try:
            self._sock.sendmsg([_NUMBER.pack(self._sent + 1)], rights, self._flags)
        except OSError:
            return False
        self._sent += 1
        return True

    def receive(self, lengths: tuple[int, ...], *, mapped: bool = True) -> list[Any]:
        """Return the segments of a file, or the descriptors, that a frame refers to.

        In the place of each is the reason, if this process has no memory or no descriptor for
        them. Unless ``mapped``, the file itself is returned, as one :class:`Stored`.
        """
        self._received += 1
        handed = not any(lengths)
        try:
            with _spare:
                numbers = self._take(len(lengths) if handed else 1)
                if handed:
                    return [Descriptor(number) for number in numbers]
                stored = Stored(numbers[0], lengths)
                _check(stored.fileno(), lengths)
                if not mapped:
                    return [stored]
                segments = stored.segments()
                stored.close()
                return segments
        except (OSError, MemoryError) as error:
            return [Missing(_explain(error, lengths))] * len(lengths)

    def _take(self, count: int) -> list[int]:
        """Take the descriptors of the next message."""
        descriptors = self._look(count)
        if not descriptors:
            _spare.give_back()
            descriptors = self._look(count)
        # Only now the number is taken: a descriptor that could not be received is not lost.
        self._sock.recv(_NUMBER.size, socket.MSG_DONTWAIT)
        if not descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return descriptors

    def _look(self, count: int) -> list[int]:
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | linux.MSG_CMSG_CLOEXEC
        room = socket.CMSG_SPACE(4 * count)
        try:
            data, rights, told, _ = self._sock.recvmsg(_NUMBER.size, room, flags)
        except BlockingIOError:
            raise CorruptFrameError("a frame refers to a file that was not sent") from None
        descriptors = [
            number
            for _, _, packed in rights
            for (number,) in struct.iter_unpack("i", packed[: len(packed) // 4 * 4])
        ]
        if len(data) != _NUMBER.size or _NUMBER.unpack(data)[0] != self._received:
            close_all(descriptors)
            raise CorruptFrameError(f"expected file {self._received}, found {data!r}")
        if len(descriptors) == count:
            return descriptors
        close_all(descriptors)
        if not told & socket.MSG_CTRUNC:
            raise CorruptFrameError(f"expected {count} descriptors, found {len(descriptors)}")
        return []

    def close(self) -> None:
        """Close the socket; descriptors that were not taken are closed. May be called again."""
        if not self._open:
            return
        self._open = False
        _spare.count(-1)
        try:
            self._sock.close()
        except OSError:
            pass  # a task has closed the descriptor


def _explain(error: OSError | MemoryError, lengths: tuple[int, ...]) -> Exception:
    size = sum(lengths)
    if isinstance(error, MemoryError):
        return MemoryError(
            f"no memory to map {size:,} bytes of arrays. Send less at once, or run fewer workers"
        )
    what = f"{size:,} bytes of arrays" if size else f"{len(lengths)} descriptors"
    told = f"cannot receive {what}: {error.strerror}"
    return OSError(error.errno, told)


def _check(descriptor: int, lengths: Sequence[int]) -> None:
    _, size = _places(lengths)
    seals = fcntl.fcntl(descriptor, linux.F_GET_SEALS)
    found = os.fstat(descriptor).st_size
    if seals & _SEALS != _SEALS or found < size:
        raise CorruptFrameError(
            f"expected a sealed file of {size} bytes, found {found} bytes with seals {seals:#x}"
        )


class _Spare:
    """A descriptor in reserve, closed when a file arrives and no other descriptor is free.

    One for the process, as long as it has an end of a side: it is held while a descriptor is
    taken, mapped and closed again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptor = -1
        self._users = 0
        os.register_at_fork(after_in_child=self._after_fork)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._keep()
        self._lock.release()

    def count(self, users: int) -> None:
        """Count users that have come or gone: with the last goes the descriptor."""
        with self:
            self._users += users

    def give_back(self) -> None:
        """Close the descriptor in reserve, inside the ``with`` block."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _keep(self) -> None:
        if not self._users:
            self.give_back()
        elif self._descriptor < 0:
            try:
                self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # a thread that the child has not may hold it


_spare = _Spare()


def invite(sock: socket.socket) -> Side | None:
    """Make this end of a new channel's side, and send the other end before all else.

    ``None`` if the system has no descriptor for it: then all data use the stream.
    """
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        sock.send(_DECLINED)
        return None
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", theirs.fileno()))]
        sock.sendmsg([_INVITATION], rights)
    except OSError:  # too many descriptors are under way to other processes
        ours.close()
        sock.send(_DECLINED)
        return None
    finally:
        theirs.close()
    return Side(ours, waits=False)


def accept(sock: socket.socket) -> Side | None:
    """Receive the other end, in a worker, before it reads anything else."""
    data, rights, _, _ = sock.recvmsg(1, _RIGHTS_BYTES, linux.MSG_CMSG_CLOEXEC)
    if not data:
        raise ConnectionError("the pool is gone")
    numbers = [number for _, _, packed in rights for (number,) in struct.iter_unpack("i", packed)]
    if data != _INVITATION or not numbers:
        return None
    side = socket.socket(fileno=numbers[0])
    side.setblocking(True)  # independent of socket.setdefaulttimeout()
    return Side(side, waits=True)
