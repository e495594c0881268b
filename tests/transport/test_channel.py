"""A channel whose other end does not read, is gone, or was closed by somebody else."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import CorruptFrameError, Kind, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# More than any socket's buffer takes.
LARGE = bytes(8 << 20)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def read_all(channel: Channel, theirs: socket.socket, count: int) -> bytes:
    """Read this much from the other end, while the channel sends what waits."""
    found = b""
    while len(found) < count:
        channel.flush()
        found += theirs.recv(1 << 20)
    return found


def test_what_the_other_end_does_not_take_now_is_sent_later(
    ends: tuple[Channel, socket.socket],
) -> None:
    """First the rest of a frame, and then those behind it."""
    channel, theirs = ends
    channel._sock.setblocking(False)
    channel.send([LARGE])
    assert channel.unsent
    channel.send([b"second"])
    channel.send([b"third"])

    found = read_all(channel, theirs, len(LARGE) + len(b"secondthird"))
    assert found == LARGE + b"secondthird"
    assert not channel.unsent
    channel.send([LARGE])
    assert read_all(channel, theirs, len(LARGE)) == LARGE


def test_a_full_socket_takes_a_frame_later(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    channel._sock.setblocking(False)
    filled = 0
    try:
        while True:
            filled += channel._sock.send(LARGE)
    except BlockingIOError:
        pass
    channel.send([b"frame"])
    assert read_all(channel, theirs, filled + len(b"frame"))[filled:] == b"frame"


def test_a_worker_waits_for_the_end_of_a_large_frame(ends: tuple[Channel, socket.socket]) -> None:
    """In one call: it can do nothing else meanwhile, and a socket takes 0.2 MB at a time."""
    channel, theirs = ends
    frame = b"".join(encode(Kind.TASK, 1, [LARGE]))
    sender = threading.Thread(target=theirs.sendall, args=(frame,))
    sender.start()

    (found,) = channel.receive()
    sender.join()
    assert found == (Kind.TASK, 1, [LARGE])
    theirs.sendall(frame[:100])
    theirs.close()
    with pytest.raises(ChannelClosedError):
        [*channel.receive()]


# One row per use of a channel of which the other end is gone.
USES: dict[str, Callable[[Channel], object]] = {
    "send": lambda channel: channel.send([b"frame"]),
    "offer": lambda channel: channel.offer(b"frame"),
    "receive": lambda channel: [*channel.receive()],
    "receive_raw": lambda channel: channel.receive_raw(),
}


@pytest.mark.parametrize("how", ["the other end is gone", "this end is closed"])
@pytest.mark.parametrize("use", USES)
def test_each_use_says_that_the_other_end_is_gone(
    use: str, how: str, ends: tuple[Channel, socket.socket]
) -> None:
    channel, theirs = ends
    if how == "this end is closed":
        channel._sock.close()
    theirs.close()
    with pytest.raises(ChannelClosedError):
        USES[use](channel)


def test_a_descriptor_that_a_task_has_closed_is_no_error(
    ends: tuple[Channel, socket.socket],
) -> None:
    os.close(ends[0].fileno())
    ends[0].close()


def test_a_channel_without_files_refuses_one(ends: tuple[Channel, socket.socket]) -> None:
    channel: Any = ends[0]
    with pytest.raises(CorruptFrameError, match="cannot receive files"):
        channel._fetch(Kind.RESULT, (1,))
