"""Copies are held against the memory that is left: what is refused, and how often one looks."""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

import pytest

from safepool import MemoryLimitError, SafepoolError
from safepool.transport import _memfd, room

if TYPE_CHECKING:
    from collections.abc import Iterator

if sys.platform == "linux":
    from safepool.limits.left import MemoryLeft

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is left is Linux's to tell")

MIB = 1 << 20
LIMIT = 1024 * MIB
KEPT = LIMIT // 32


class Watch:
    """Tells what a test says is left, and counts how often it was asked."""

    def __init__(self) -> None:
        self.left: int | None = 0
        self.asked = 0
        self.now_s = 1000.0

    def be_full(self) -> None:
        """Leave nothing, and let the next copy look."""
        self.left = 0
        self.now_s += 1
        with pytest.raises(MemoryLimitError):
            room.require(8 * MIB)

    def read(self) -> MemoryLeft | None:
        self.asked += 1
        if self.left is None:
            return None
        return MemoryLeft(bytes=self.left + KEPT, limit_bytes=LIMIT, source="/g/memory.max")

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    fake = Watch()
    fresh: Any = room._Room()
    fresh._watch = fake
    monkeypatch.setattr(room, "_room", fresh)
    monkeypatch.setattr(room, "time", fake)
    return fake


def test_a_copy_that_does_not_fit_is_refused_with_both_figures(watch: Watch) -> None:
    watch.left = 100 * MIB
    room.require(100 * MIB)
    with pytest.raises(MemoryLimitError) as raised:
        room.require(100 * MIB + 1)

    error = raised.value
    assert (error.wanted_bytes, error.left_bytes) == (100 * MIB + 1, 100 * MIB)
    assert (error.limit_bytes, error.source) == (LIMIT, "/g/memory.max")
    assert isinstance(error, MemoryError)
    assert isinstance(error, SafepoolError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.args, str(again)) == (error.args, str(error))


def test_a_step_of_a_long_copy_counts_what_was_copied_before(watch: Watch) -> None:
    """The other processes of the group have used what was there at its beginning."""
    watch.left = 60 * MIB
    room.require(16 * MIB, 0, 50 * MIB)
    watch.left = 20 * MIB
    with pytest.raises(MemoryLimitError) as raised:
        room.require(16 * MIB, 16 * MIB, 50 * MIB)

    assert (raised.value.wanted_bytes, raised.value.left_bytes) == (50 * MIB, 36 * MIB)


def test_small_copies_look_seldom_and_are_counted(watch: Watch) -> None:
    """A sixteenth of what was left is copied without another look."""
    watch.left = 160 * MIB
    for _ in range(4):
        room.require(MIB)
    assert watch.asked == 0
    for _ in range(10):
        room.require(MIB)
    assert watch.asked == 1
    watch.left = 0
    with pytest.raises(MemoryLimitError):
        room.require(MIB)
    with pytest.raises(MemoryLimitError):  # and the next is looked at as well
        room.require(1)
    watch.left = 160 * MIB
    room.require(MIB)
    assert (
        watch.asked == 6
    )  # twice where it is refused: once more when freed memory was given back


def test_a_look_holds_for_a_second(watch: Watch) -> None:
    watch.left = 1000 * MIB
    room.require(8 * MIB)
    watch.left = 0
    room.require(8 * MIB)
    watch.now_s += 1
    with pytest.raises(MemoryLimitError):
        room.require(8 * MIB)


def test_where_nothing_is_told_nothing_is_refused(watch: Watch) -> None:
    watch.left = None
    for _ in range(3):
        room.require(1 << 50)
    assert watch.asked == 1
    assert room.held_at_most(7) == 7


def test_a_look_that_fails_refuses_nothing(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "read", lambda: int("x"))
    room.require(1 << 50)


def test_results_that_wait_may_hold_a_part_of_what_is_left(watch: Watch) -> None:
    watch.left = 100 * MIB - KEPT
    assert room.held_at_most(256 * MIB) == 25 * MIB
    watch.left = 100 << 30
    assert room.held_at_most(256 * MIB) == 256 * MIB


WIDE = "\u20ac" * (2 * MIB) + "x" * (2 * MIB)

# One row per argument, and how much its pickle takes on its way, in MiB.
ARGUMENTS: dict[str, tuple[object, int]] = {
    "bytes": (bytes(8 * MIB), 8),
    "bytearray": (bytearray(8 * MIB), 8),
    "text": ("x" * (8 * MIB), 16),
    "text that is encoded, and kept so": (WIDE, 3 * 8),
    "text in a dict": ({"text": WIDE, "n": 1}, 3 * 8),
    "bytes in a tuple": ((1, bytes(8 * MIB)), 8),
    "little": (b"x", 0),
    "a number": (10**9, 0),
    "a list": ([0] * 10, 0),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_pickle_in_one_piece_needs_as_much_again(argument: str, watch: Watch) -> None:
    value, size_mib = ARGUMENTS[argument]
    watch.left = MIB
    try:
        room.require_to_pickle([1, value])
    except MemoryLimitError as error:
        refused = error.wanted_bytes
    else:
        refused = 0
    assert round(refused / MIB) == size_mib


def test_what_was_copied_is_freed_when_the_rest_is_refused(watch: Watch) -> None:
    """The error may be kept; the file of what came before must not be."""
    before = len(os.listdir("/proc/self/fd"))
    watch.left = 40 * MIB
    kept = []
    for step in (9 * MIB, 3 * MIB):  # a file of its own, and one of several
        buffers = [bytearray(step) for _ in range(8)]
        watch.left = 100 * MIB
        steps = iter(range(8))

        def given_up(steps: Iterator[int] = steps) -> bool:
            if next(steps) == 4:
                watch.left = 0
            return False

        with pytest.raises(MemoryLimitError) as raised:
            _memfd.store([b"pickle", *map(memoryview, buffers)], given_up)
        kept.append(raised.value)
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(error.wanted_bytes in (72 * MIB, 24 * MIB) for error in kept)


def test_what_was_freed_meanwhile_is_given_back_at_once(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the last attempt has taken."""
    attempts: list[float] = []

    def give_back() -> None:
        attempts.append(watch.now_s)
        watch.now_s += 10

    monkeypatch.setattr(room, "_give_back", give_back)
    results = [bytes(1000) for _ in range(1000)]
    watch.be_full()
    watch.be_full()
    assert len(attempts) == 1
    del results
    watch.be_full()
    assert len(attempts) == 2


def test_what_was_freed_is_given_back_before_others_need_it(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as there is no room, here or where a worker has looked."""
    attempts: list[float] = []
    monkeypatch.setattr(room, "_give_back", lambda: attempts.append(watch.now_s))
    room.make_room()
    assert not attempts
    room.be_full()
    room.make_room()
    assert len(attempts) == 1
    watch.left = 100 * MIB
    watch.now_s += 1
    room.make_room()
    room.make_room()
    assert len(attempts) == 2


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_a_system_that_takes_nothing_back_is_left_alone(
    error: type[Exception], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has no C library that a program could ask so (TypeError)."""

    def refuse(_name: None) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", refuse)
    watch.left = None
    room.be_full()
    room.make_room()
    assert not room._room.full
