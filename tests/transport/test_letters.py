"""A letter arrives whole with its descriptors, or leaves none of them behind."""

from __future__ import annotations

import os
import pickle
import resource
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if sys.platform != "linux":
    pytest.skip("letters go to a fork server, on Linux only", allow_module_level=True)

from safepool.transport import letters

HEADER = struct.Struct("!Q")
TEXT = pickle.dumps("a letter")
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Pair]:
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(0.05)
        yield here, there


def open_descriptors() -> set[str]:
    # The listing's own is gone by the time that it is asked about.
    return {
        name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    }


class Raising:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("no number",)


# One row per letter that cannot be read: its bytes, whether the other end is closed then, and
# what the receiver gets: an exception, or nothing.
BROKEN: dict[str, tuple[bytes, bool, type[BaseException] | None]] = {
    "ends in its length": (HEADER.pack(9)[:3], True, None),
    "ends in its text": (HEADER.pack(len(TEXT)) + TEXT[:-1], True, None),
    "has no text": (HEADER.pack(9), True, None),
    "is late": (HEADER.pack(len(TEXT)) + TEXT[:-1], False, TimeoutError),
    "is no pickle": (HEADER.pack(4) + b"what", False, pickle.UnpicklingError),
    "is empty": (HEADER.pack(0), False, EOFError),
    "raises when it is read": (
        HEADER.pack(len(pickle.dumps(Raising()))) + pickle.dumps(Raising()),
        False,
        ValueError,
    ),
    "is longer than memory": (HEADER.pack(1 << 63), True, None),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_letter_that_cannot_be_read_leaves_no_descriptor(case: str, ends: Pair) -> None:
    data, closed, expected = BROKEN[case]
    here, there = ends
    before = open_descriptors()
    socket.send_fds(here, [data], [0, 1, 2] if sys.stdin else [1, 2])
    if closed:
        here.shutdown(socket.SHUT_WR)

    if expected is None:
        assert letters.receive(there) is None
    else:
        with pytest.raises(expected):
            letters.receive(there)

    assert open_descriptors() == before


def test_descriptors_that_find_no_room_are_missing_and_none_is_left(ends: Pair) -> None:
    """The kernel hands over as many as there is room for, and says so with MSG_CTRUNC."""
    here, there = ends
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    letters.send(here, "five", [here.fileno()] * 5)
    free = max(int(name) for name in before) + 1
    spare: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, hard))
        while True:
            try:
                spare.append(os.dup(here.fileno()))
            except OSError:
                break
        for number in spare[-2:]:
            os.close(number)
        del spare[-2:]
        received = letters.receive(there)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in spare:
            os.close(number)

    assert received is not None
    message, descriptors = received
    assert message == "five"
    assert len(descriptors) == 2
    for number in descriptors:
        os.close(number)
    assert open_descriptors() == before


def test_the_most_descriptors_arrive_and_are_closed_on_exec(ends: Pair) -> None:
    here, there = ends
    letters.send(here, bytes(100), [here.fileno()] * 253)

    received = letters.receive(there)

    assert received is not None
    assert received[0] == bytes(100)
    assert len(received[1]) == 253
    for number in received[1]:
        assert not os.get_inheritable(number)
        os.close(number)
    with pytest.raises(ValueError, match="254 descriptors"):
        letters.send(here, "", [here.fileno()] * 254)


def test_what_comes_with_a_later_byte_is_nobodys(ends: Pair) -> None:
    """Descriptors that are no part of a letter are closed by the kernel."""
    here, there = ends
    before = open_descriptors()
    here.send(HEADER.pack(len(TEXT)))
    socket.send_fds(here, [TEXT], [here.fileno()])

    assert letters.receive(there) == ("a letter", [])
    assert open_descriptors() == before


class ReadAtOnce(socket.socket):
    """Whoever is at the other end reads what is sent, and ends, before the sender goes on."""

    other: socket.socket

    def send(self, *arguments: Any) -> int:
        return self._be_read(super().send(*arguments))

    def sendmsg(self, *arguments: Any) -> int:
        return self._be_read(super().sendmsg(*arguments))

    def _be_read(self, sent: int) -> int:
        letter = letters.receive(self.other)
        assert letter is not None
        for descriptor in letter[1]:
            os.close(descriptor)
        self.other.close()
        return sent


@pytest.mark.parametrize("count", [0, 1])
def test_whoever_has_read_a_letter_may_close_at_once(ends: Pair, count: int) -> None:
    """A worker that is started afresh does so; its start failed with a broken pipe."""
    here, there = ends
    with ReadAtOnce(fileno=here.detach()) as sender:
        sender.other = there
        letters.send(sender, "a letter", [sender.fileno()] * count)
