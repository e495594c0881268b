"""Descriptors and what they lead to: nothing is lost, leaked, or taken for something else."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import pytest
import support_arrays as arrays

from safepool.transport.channel import Channel
from safepool.transport.frames import CorruptFrameError, Kind, Missing, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files need memfd_create")

if sys.platform == "linux":
    from safepool import linux
    from safepool.transport import _memfd
    from safepool.transport.files import Stored, accept, invite, store

BUFFER = bytes(range(256)) * 256


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    here, there = Channel(ours, invite(ours)), Channel(theirs, accept(theirs))
    yield here, there
    here.close()
    there.close()


def send(channel: Channel, segments: list[Any], kind: Kind = Kind.RESULT) -> None:
    channel.send(encode(kind, 1, channel.hand_over(segments)))


def test_files_come_in_the_order_of_their_frames(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    for sender, receiver in ((here, there), (there, here)):
        for n in range(3):
            send(sender, [b"head", *store([BUFFER[n:]] * (n + 1)), b"tail"])
        for n, frame in enumerate(take(receiver, 3)):
            found = [bytes(segment) for segment in frame.segments]
            assert found == [b"head", *[BUFFER[n:]] * (n + 1), b"tail"]
        del frame
    assert arrays.files_here() == (0, 0)


def take(channel: Channel, count: int) -> list[Any]:
    found: list[Any] = []
    for frame in channel.receive(everything=True):
        found.append(frame)
        if len(found) == count:
            break
    return found


def test_segments_are_the_sender_s_bytes(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    send(here, [b"head", *store([BUFFER, BUFFER[1:], b"small", BUFFER[2:]])])
    (frame,) = take(there, 1)

    assert [bytes(segment) for segment in frame.segments] == [
        b"head",
        BUFFER,
        BUFFER[1:],
        b"small",
        BUFFER[2:],
    ]
    del frame
    assert arrays.files_here() == (0, 0)


def test_a_file_can_be_changed_by_nobody() -> None:
    """Neither written nor made shorter, which would end whoever maps it by SIGBUS."""
    (stored,) = store([BUFFER])
    assert isinstance(stored, Stored)
    with pytest.raises(PermissionError):
        os.write(stored.fileno(), b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(stored.fileno(), 0)
    first, second = stored.segments()[0], stored.segments()[0]
    first[0] = 99
    assert bytes(second) == BUFFER
    stored.close()
    stored.close()


def test_a_descriptor_that_cannot_be_taken_now_is_taken_when_one_is_free(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no spare one either, the segments are missing, and what follows is whole."""
    here, there = ends
    for _ in range(2):
        send(here, [b"head", *store([BUFFER])])
    monkeypatch.setattr(_memfd._spare, "give_back", lambda: None)
    taken = arrays.use_up_descriptors()
    try:
        frames = there.receive(everything=True)
        first = next(frames)
    finally:
        for descriptor in taken:
            os.close(descriptor)
    second = next(frames)

    assert isinstance(first.segments[1], Missing)
    assert "cannot receive" in str(first.segments[1].error)
    assert bytes(second.segments[1]) == BUFFER


def _unsealed(size: int) -> Any:
    descriptor = linux.memfd_create("safepool-arrays", linux.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return Stored(descriptor, (size,))


def _short() -> Any:
    (stored,) = store([BUFFER])
    assert isinstance(stored, Stored)
    return Stored(os.dup(stored.fileno()), (len(BUFFER) + 1,))


# One row per way in which a worker may tell of a file that is none, or not that.
WRONG: dict[str, Any] = {
    "nothing was sent": lambda _: None,
    "a file that can be made shorter": lambda side: side.send(_unsealed(len(BUFFER))),
    "a shorter file": lambda side: side.send(_short()),
    "no descriptor": lambda side: side._sock.send(struct.pack("!Q", 1)),
    "another number": lambda side: side._sock.send(struct.pack("!Q", 7)),
    "something else": lambda side: side._sock.send(b"?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_the_file_is_refused(ends: tuple[Channel, Channel], case: str) -> None:
    """It neither waits nor maps, and leaves no descriptor behind."""
    here, there = ends
    length = len(BUFFER) + (case == "a shorter file")
    side = there._side
    assert side is not None
    WRONG[case](side)
    there.send(encode(Kind.RESULT, 1, [Stored(-1, (length,))]))

    with pytest.raises(CorruptFrameError):
        take(here, 1)
    assert arrays.files_here() == (0, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_the_program_keeps_its_locks(ends: tuple[Channel, Channel]) -> None:
    """Another thread may hold the lock of the spare descriptor when the program forks."""
    with _memfd._spare:
        pid = os.fork()
        if not pid:
            try:
                with _memfd._spare:
                    os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert ends
