"""An end of the private channel between a pool and one worker.

An unnamed socket pair has no path and no port, no other process can reach it, and the kernel frees
it with its last descriptor. The pool's end never blocks; the worker's end always does.
"""

from __future__ import annotations

import itertools
import select
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from safepool.errors import REFUSALS
from safepool.transport.descriptors import Handed
from safepool.transport.files import FILE_BYTES, Side, Stored, store
from safepool.transport.frames import CorruptFrameError, Filed, Frame, FrameReader, Kind, Segment
from safepool.transport.room import require

# Pieces handed to the kernel in one call. Linux takes 1,024 (IOV_MAX, limits.h); POSIX
# promises 16 and every system of today takes this many.
_PIECES = 256
# Bytes that are read at a time outside the frame reader, as many as it takes at once.
_RAW_BYTES = 8 * 1024
# Reads of at most a socket buffer each before another worker has its turn.
_ROUNDS = 64
# A program may have given SIGPIPE its default meaning, and a dead worker must not end it.
NO_SIGPIPE = getattr(socket, "MSG_NOSIGNAL", 0)
# For one send on a socket that waits otherwise. Windows has no such flag.
_DO_NOT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
# Linux also wakes a thread that waits in recv() when the other end has read something, because
# there is room for more then. poll() sleeps on. One system call is cheaper than one wake-up.
# (Source: Linux, net/unix/af_unix.c, unix_write_space; fs/select.c, pollwake.)
_poll: Any = getattr(select, "poll", None) if sys.platform == "linux" else None
_POLLIN: int = getattr(select, "POLLIN", 0)


class ChannelClosedError(Exception):
    """The other end is gone."""


class Channel:
    """Send and receive frames on one socket.

    Args:
        sock: A connected stream socket, blocking for a worker and not for a pool. Owned by this
            object.
        side: Channel for descriptors; ``None``: everything goes through the stream.

    Raises:
        ChannelClosedError: The other end is gone; by each method that sends or receives.
    """

    def __init__(self, sock: socket.socket, side: Side | None = None) -> None:
        self._sock = sock
        self._side = side
        waits = sock.getblocking()
        self._waits = waits
        # Returns when the first bytes of a frame are there. Within a frame recv() itself may wait.
        self._await: Callable[[], object] = _awaiting(sock) if waits else bool
        # Out of memory, a worker may be ended instead.
        self._reader = FrameReader(self._fetch, None if waits else require)
        self._unsent: deque[memoryview] = deque()
        # Read outside the frame reader, and to be cut by it.
        self._fed = b""

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 once closed."""
        return self._sock.fileno()

    def descriptors(self) -> list[int]:
        """Return the descriptors of this end."""
        found = [self.fileno(), -1 if self._side is None else self._side.fileno()]
        return [descriptor for descriptor in found if descriptor >= 0]

    def takes_file(self, segments: Sequence[Segment]) -> bool:
        """Return whether a payload is large enough to go in files, and can."""
        return self._side is not None and _is_large(segments)

    def store(
        self, segments: Sequence[Segment], given_up: Callable[[], bool] = bool
    ) -> list[Segment]:
        """Return the payload in the form to send: copied into files if it is large."""
        if self.takes_file(segments):
            return store(segments, given_up)
        require(sum(map(size_of, segments)))
        return list(segments)

    def hand_over(self, segments: Sequence[Segment]) -> list[Segment]:
        """Send the files of a payload, just before the frame that refers to them.

        Returns the content of the frame: the payload, with segments that could not be sent as
        files read into memory. Descriptors that cannot be sent become empty segments; using one
        raises an error.
        """
        gone: list[Segment] = []
        for segment in segments:
            if not isinstance(segment, (Stored, Handed)) or (
                self._side and self._side.send(segment)
            ):
                gone.append(segment)
            elif isinstance(segment, Stored):
                gone += segment.segments()
            else:
                gone += [b""] * len(segment.lengths)
        return gone

    @property
    def is_clear(self) -> bool:
        """Whether it is open, and no part of anything is on its way in either direction."""
        return not (self._unsent or self._fed) and self._reader.is_empty and self.fileno() >= 0

    def ends(self) -> tuple[int, Callable[..., int], Callable[..., bytes]]:
        """Return the descriptor, send() and recv() as they are: functions written in C."""
        return self._sock.fileno(), self._sock.send, self._sock.recv

    @property
    def unsent(self) -> bool:
        """Whether pieces wait for the other end to read."""
        return bool(self._unsent)

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Queue the pieces of one frame and send as much as the kernel takes now."""
        if len(pieces) == 1 and not self._unsent:  # the common case, without a queue
            try:
                sent = self._sock.send(pieces[0], NO_SIGPIPE)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise ChannelClosedError from error
            if sent < len(pieces[0]):
                self._unsent.append(memoryview(pieces[0]).cast("B")[sent:])
        else:
            self._unsent.extend(memoryview(piece).cast("B") for piece in pieces)
        if self._unsent:
            self.flush()

    def offer(self, frame: bytes) -> bool:
        """Send a frame without waiting, on any socket; return whether it was taken.

        ``False`` while an earlier one is queued, and always where the system can only wait
        (Windows).
        """
        if not _DO_NOT_WAIT:
            return False
        self.flush(_DO_NOT_WAIT)
        if self._unsent:
            return False
        self._unsent.append(memoryview(frame))
        self.flush(_DO_NOT_WAIT)
        return True

    def flush(self, flags: int = 0) -> None:
        """Send queued frames, as far as the kernel takes them."""
        while self._unsent:
            try:
                sent = self._send_some(flags)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosedError from error
            while sent:
                piece = self._unsent[0]
                if sent < len(piece):
                    self._unsent[0] = piece[sent:]
                    break
                sent -= len(piece)
                self._unsent.popleft()

    def drop_unsent(self) -> None:
        """Drop waiting data: the other end reads no more."""
        self._unsent.clear()

    def receive_raw(self) -> bytes:
        """Wait for the first bytes of a frame; return them with all that has arrived.

        Bytes that are no complete message the caller knows go to :meth:`feed`. Returns nothing, at
        once, if a part of a frame is here: :meth:`receive` is to be called.
        """
        if self._fed or not self._reader.is_empty:
            return b""
        try:
            self._await()
            data = self._sock.recv(_RAW_BYTES)
        except OSError as error:
            raise ChannelClosedError from error
        if not data:
            raise ChannelClosedError
        return data

    def feed(self, data: bytes) -> None:
        """Let :meth:`receive` begin with bytes that were read outside it."""
        self._fed += data

    def receive(self, *, everything: bool = False) -> Iterator[Frame]:
        """Yield frames that have arrived, or on a blocking socket wait for some.

        With ``everything`` it goes on until nothing is left to read. Without, the call ends after
        a while, so that one busy worker does not delay the others; on a blocking socket after the
        frames that have arrived with the end of the first.
        """
        if self._fed:
            yield from self._cut_fed()
            if self._waits:
                return
        for _ in itertools.count() if everything or self._waits else range(_ROUNDS):
            buffer = self._reader.buffer()
            room = len(buffer)
            try:
                count = self._sock.recv_into(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosedError from error
            if not count:
                raise ChannelClosedError
            del buffer  # the owner of a frame may drop it while this waits for more
            some = yield from self._reader.received(count)
            if everything:
                continue
            if some if self._waits else count < room:
                # That was all: another call to find that out would cost as much as the first
                # (benchmarks/dispatch.py, round-trip).
                return

    def _cut_fed(self) -> Iterator[Frame]:
        while self._fed:
            buffer = self._reader.buffer()
            count = min(len(buffer), len(self._fed))
            buffer[:count], self._fed = self._fed[:count], self._fed[count:]
            del buffer
            yield from self._reader.received(count)

    def close(self) -> None:
        """Close the socket; unsent bytes are dropped. May be called again."""
        self._unsent.clear()
        if self._side is not None:
            self._side.close()
        try:
            self._sock.close()
        except OSError:
            pass  # a task has closed the descriptor

    def _fetch(self, kind: Kind, lengths: tuple[int, ...]) -> list[Any]:
        if self._side is None:
            raise CorruptFrameError(
                "a frame refers to a file, and this channel cannot receive files"
            )
        # Shared objects are mapped when they are needed, perhaps more than once.
        found: list[Any] = self._side.receive(lengths, mapped=kind is not Kind.SHARE)
        return found

    if sys.platform == "win32":

        def _send_some(self, flags: int) -> int:
            return self._sock.send(self._unsent[0], NO_SIGPIPE | flags)

    else:

        def _send_some(self, flags: int) -> int:
            if len(self._unsent) == 1:
                return self._sock.send(self._unsent[0], NO_SIGPIPE | flags)
            pieces = [self._unsent[i] for i in range(min(len(self._unsent), _PIECES))]
            try:
                return self._sock.sendmsg(pieces, (), NO_SIGPIPE | flags)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise
                return self._sock.send(pieces[0], NO_SIGPIPE | flags)


def _awaiting(sock: socket.socket) -> Callable[[], object]:
    """Return a function that waits until there is something to read, or the other end is gone."""
    if _poll is None:
        return bool
    arrival = _poll()
    arrival.register(sock, _POLLIN)
    wait: Callable[[], object] = arrival.poll
    return wait


def size_of(segment: Segment) -> int:
    """Return the bytes of a segment."""
    return len(segment) if isinstance(segment, Filed) else memoryview(segment).nbytes


def store_large(segments: Sequence[Segment]) -> list[Segment]:
    """Return a payload for several workers, in files if it is large."""
    return store(segments) if _is_large(segments) else list(segments)


def _is_large(segments: Sequence[Segment]) -> bool:
    if any(isinstance(segment, Stored) for segment in segments):
        return False
    return sum(map(size_of, segments)) >= FILE_BYTES
