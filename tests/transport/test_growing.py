"""Pickles that grow, and objects that are made of them, are held against what is left."""

from __future__ import annotations

import array
import io
import os
import pickle
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from safepool.transport import growing, payloads, trusted
from safepool.transport.growing import Sink, Source, load, loaded_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20


@dataclass
class Holder:
    """An object of the program."""

    data: object


class Room:
    """Tells what it was asked for, and has room for so much."""

    def __init__(self) -> None:
        self.left = 1 << 60
        self.asked: list[int] = []

    def require(self, size_bytes: int, done_bytes: int = 0, whole_bytes: int = 0) -> None:
        assert whole_bytes == done_bytes + size_bytes
        self.asked.append(size_bytes)
        if whole_bytes > self.left:
            raise MemoryError("full")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    fake = Room()
    monkeypatch.setattr(growing, "require", fake.require)
    monkeypatch.setattr(growing, "_COPIED_BYTES", 0)  # has a test of its own
    return fake


# One row per shape: some hundred KiB of each.
SHAPES: dict[str, Any] = {
    "bytes": bytes(MIB),
    "bytearray": bytearray(MIB),
    "text": "x" * MIB,
    "wide text": "\u20ac" * (MIB // 2),
    "several texts": ["x" * 200_000, "y" * 100_000, "z" * 300_000],
    "bytes in a list": [bytes([n]) * 200_000 for n in range(4)],
    "bytes in a dict": {n: os.urandom(70_000) for n in range(9)},
    "bytes in an object": Holder(Holder([os.urandom(MIB)])),
    "small pieces of bytes": [os.urandom(8000) for _ in range(80)],
    "numbers": [float(number) for number in range(80_000)],
    "objects": {n: Holder([n, str(n)]) for n in range(8_000)},
    "array": array.array("d", range(80_000)),
    "numpy, of objects": np.array([str(n) * 3 for n in range(40_000)], dtype=object),
    "numpy, small": [np.full(500, n) for n in range(50)],
    "an exception": ValueError(bytes(MIB), [str(n) for n in range(1000)]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_large_is_asked_for_step_by_step(shape: str, room: Room) -> None:
    """And is as without it: by reference, by value, and by what runs no code of the program."""
    value = SHAPES[shape]
    plain = pickle.dumps(value, protocol=5)
    ways: list[Callable[[], Any]] = [
        lambda: payloads.dumps(value, by_value=True),
        lambda: payloads.dumps(value),
        lambda: trusted.dumps(value),
    ]
    for dumps in ways:
        room.asked.clear()
        try:
            segments = dumps()
        except trusted.UntrustedError:
            continue
        asked = sum(room.asked)
        # Without a file there is one step, which the copy that follows is held for.
        assert asked == 0 or len(plain) - 2 * growing.STEP_BYTES <= asked
        # The other ends: in any thread, and in the scheduler's.
        room.asked.clear()
        assert repr(payloads.loads(segments)) == repr(value)
        assert sum(room.asked) >= 0.9 * len(segments[0])
        try:
            assert repr(trusted.loads(segments)) == repr(value)
        except trusted.UntrustedError:
            pass
    assert asked


def test_what_is_small_asks_for_nothing(room: Room) -> None:
    for value in (1, "x" * 1000, [*range(1000)], {"a": bytes(10_000)}, bytes(60_000)):
        segments = payloads.dumps(value, by_value=True)
        assert trusted.loads(trusted.dumps(value)) == payloads.loads(segments) == value
    assert room.asked == []


@pytest.mark.parametrize("shape", SHAPES)
def test_what_does_not_fit_is_not_made(shape: str, room: Room) -> None:
    """Neither a pickle that nobody can take, nor the objects of one."""
    value = SHAPES[shape]
    segments = payloads.dumps(value, by_value=True)
    room.left = 100_000
    for attempt in (
        lambda: payloads.dumps(value, by_value=True),
        lambda: payloads.loads(segments),
    ):
        room.asked.clear()
        with pytest.raises(MemoryError, match="full"):
            attempt()
        # All but the last was there.
        assert sum(room.asked[:-1]) <= room.left


def test_what_was_written_is_dropped_when_the_rest_is_refused(room: Room) -> None:
    """The error may be kept, and the file with it."""
    room.left = MIB
    file = Sink()
    with pytest.raises(MemoryError):
        pickle.Pickler(file, protocol=5).dump([bytes(200_000) for _ in range(10)])
    assert file.getvalue() == b""


def test_text_is_asked_for_before_it_is_copied(room: Room) -> None:
    """Between header and text, whatever is before the header in one step."""
    for before in ([], [1], ["y" * 100], [b"z" * 70_000], ["a", "b"], [*range(40_000)]):
        value = [*before, "x" * (2 * MIB), *before, "y" * 300_000]
        room.asked.clear()
        file = Sink()
        pickle.Pickler(file, protocol=5).dump(value)
        assert pickle.loads(file.getvalue()) == value
        assert any(2 * 2 * MIB <= size < 5 * MIB for size in room.asked)
        assert any(600_000 <= size < MIB for size in room.asked)


def test_the_table_of_what_was_pickled_is_asked_for(room: Room) -> None:
    """It doubles when two thirds are used: 8 MiB more at 175,000 objects."""
    pickle.Pickler(Sink(), protocol=5).dump([(n,) for n in range(160_000)])
    few = max(room.asked)
    pickle.Pickler(Sink(), protocol=5).dump([(n,) for n in range(180_000)])
    assert few < MIB
    assert 8 * MIB <= max(room.asked) < 9 * MIB


def test_what_a_buffer_copies_when_it_grows_is_asked_for(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both blocks are there meanwhile, below the size from which on pages are moved."""
    monkeypatch.setattr(growing, "_COPIED_BYTES", 2 * MIB)
    file, step, grown = Sink(), bytes(growing.STEP_BYTES), []
    for done in range(0, 4 * MIB, len(step)):
        before = file.__sizeof__()
        room.asked.clear()
        file.write(step)
        copied = 0
        if file.__sizeof__() > before:
            grown.append(done)
            copied = done if done < 2 * MIB else 0
        assert room.asked == [len(step) + copied]
    assert grown[0] == 0
    assert grown[-1] > 2 * MIB


def test_the_last_step_is_asked_for_if_it_makes_a_buffer_grow(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be small, and what is there is copied all the same."""
    monkeypatch.setattr(growing, "_COPIED_BYTES", 2 * MIB)
    file = Sink()
    file.write(bytes(MIB))
    while file.tell() < file.__sizeof__() - growing._EMPTY_BYTES:
        file.write(b"x")
    done = file.tell()
    file.write(b"2.")

    assert room.asked[-1] == done + 2


def test_a_file_is_what_an_unpickler_expects() -> None:
    """Also with names by line, from pickles that were not made by this module."""
    for value in (Holder([1, 2]), [os.urandom(100_000), "x" * 100_000, Holder("y")]):
        for protocol in (2, 4, 5):
            pickled = pickle.dumps(value, protocol=protocol)
            assert pickle.Unpickler(Source(pickled)).load() == value
            assert load(memoryview(pickled)) == value
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        load(pickle.dumps(bytes(100_000))[:-5])
    assert io.BytesIO(b"ab\nc").readline() == Source(b"ab\nc").readline()


# One row per object: of what its parts take, the least and the most that its pickle is taken for.
LOADED: dict[str, tuple[Any, float, float]] = {
    "bytes": (bytes(4 * MIB), 0.99, 1.01),
    "text": ("x" * (4 * MIB), 0.99, 1.01),
    "several in a list": ([bytes(2 * MIB), "y" * (3 * MIB), bytearray(MIB)], 0.99, 1.01),
    "numbers": ([float(number) for number in range(500_000)], 0.8, 1.5),
    "numbers beside bytes": ([bytes(4 * MIB), *map(float, range(300_000))], 0.8, 1.5),
    "a tuple of both": ((bytes(4 * MIB), list(map(float, range(300_000)))), 0.8, 1.5),
}


def size_of(value: Any) -> int:
    parts = value if isinstance(value, (list, tuple)) else ()
    return sys.getsizeof(value) + sum(map(size_of, parts))


@pytest.mark.parametrize("kind", LOADED)
def test_what_a_pickle_becomes_is_estimated(kind: str) -> None:
    """Floats take four times as much as in their pickle, bytes the same."""
    value, least, most = LOADED[kind]
    estimate = loaded_bytes(pickle.dumps(value, protocol=5))

    assert least <= estimate / size_of(value) <= most


def test_a_pickle_that_is_none_is_taken_for_its_size() -> None:
    for noise in (os.urandom(MIB), b"\x80\x05\x95" + b"\xff" * MIB):
        assert loaded_bytes(noise) >= len(noise)
