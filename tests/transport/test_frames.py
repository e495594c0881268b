"""Frames survive whatever pieces they arrive in, and nothing else passes for one."""

from __future__ import annotations

import contextlib
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.transport.frames import (
    CorruptFrameError,
    Filed,
    Frame,
    FrameReader,
    Kind,
    Missing,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class InFile(Filed):
    """Stands for a file; what is fetched from it is the lengths and the frame's kind."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


def fetch(kind: Kind, lengths: tuple[int, ...]) -> list[Any]:
    return [bytearray(f"{kind} {length} of {lengths}", "ascii") for length in lengths]


def read(stream: bytes, cuts: list[int], hold: Callable[[int], None] | None = None) -> list[Frame]:
    """Feed a stream to a reader in pieces that end at the given places."""
    reader = FrameReader(fetch, hold)
    frames: list[Frame] = []
    position = 0
    for end in [*sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]:
        while position < end:
            target = reader.buffer()
            piece = stream[position : min(end, position + len(target))]
            target[: len(piece)] = piece
            target.release()
            frames.extend(reader.received(len(piece)))
            position += len(piece)
    return frames


messages = st.tuples(
    st.sampled_from(list(Kind)),
    st.integers(0, 2**64 - 1),
    st.lists(st.binary(max_size=300), max_size=5),
)


@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 10**6), max_size=12))
def test_frames_survive_any_split(
    sent: list[tuple[Kind, int, list[bytes]]], cuts: list[int]
) -> None:
    """What is read is what was encoded, wherever the stream was cut."""
    stream = b"".join(piece for message in sent for piece in encode(*message))

    assert read(stream, cuts) == [
        (kind, task, [bytearray(segment) for segment in segments]) for kind, task, segments in sent
    ]


files = st.lists(st.integers(1, 2**47), min_size=1, max_size=4).map(tuple).map(InFile)


def arrived(message: tuple[Kind, int, list[Any]]) -> Frame:
    kind, task, segments = message
    found: list[Any] = []
    for segment in segments:
        found += fetch(kind, segment.lengths) if isinstance(segment, Filed) else [segment]
    return Frame(kind, task, [bytearray(segment) for segment in found])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Kind)),
            st.integers(0, 2**64 - 1),
            st.lists(st.binary(max_size=300) | files, max_size=5),
        ),
        max_size=4,
    )
)
def test_frames_with_files_survive_a_cut_at_every_byte(
    sent: list[tuple[Kind, int, list[Any]]],
) -> None:
    """Segments in files come at their place among those of the stream, each file by itself."""
    stream = b"".join(piece for message in sent for piece in encode(*message))
    expected = [arrived(message) for message in sent]

    for cut in range(0, len(stream) + 1, max(1, len(stream) // 200)):
        assert read(stream, [cut]) == expected
    assert read(stream, list(range(len(stream)))) == expected


def test_a_cut_off_frame_is_none() -> None:
    """Whatever is missing at its end, nothing passes for the frame."""
    stream = b"".join(encode(Kind.TASK, 3, [b"abc", InFile((5, 7)), b"", b"x" * 40_000]))

    for end in range(0, len(stream), 97):
        assert read(stream[:end], []) == []
    assert len(read(stream, [])) == 1


# One row per size that takes another path through the reader: scratch buffer (64 KiB),
# straight into the segment (from 16 KiB on), more lengths than the scratch buffer holds.
SHAPES: dict[str, list[int]] = {
    "empty segments": [0, 0, 0],
    "exactly the scratch buffer": [65536 - 16 - 8],
    "one byte more": [65536 - 16 - 8 + 1],
    "large, then small, then large": [300_000, 3, 200_000],
    "just below direct": [16 * 1024 - 1] * 9,
    "ten thousand segments": [1] * 10_000,
    "memory that grows": [40_000_000, 16_777_217, 5],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_segments_of_every_size_arrive_whole(shape: str) -> None:
    """Each path of the reader gives the same bytes, also with a frame right behind it."""
    segments = [bytes([i % 251]) * size for i, size in enumerate(SHAPES[shape])]
    stream = b"".join([*encode(Kind.TASK, 1, segments), *encode(Kind.STOP, 2)])

    first, second = read(stream, [17, 70_000, 70_001, 131_072])

    assert [bytes(segment) for segment in first.segments] == segments
    assert second == (Kind.STOP, 2, [])


# One row per way in which bytes are not a frame.
CORRUPT: dict[str, bytes] = {
    "another magic": b"xx" + b"".join(encode(Kind.STOP, 0))[2:],
    "another version": b"sp\x03" + b"".join(encode(Kind.STOP, 0))[3:],
    "an unknown kind": b"sp\x02\xff" + b"".join(encode(Kind.STOP, 0))[4:],
    "too many segments": struct.pack("!2sBBIQ", b"sp", 2, 2, 2**32 - 1, 0),
    "a segment beyond memory": struct.pack("!2sBBIQQ", b"sp", 2, 2, 1, 0, 2**62 - 1),
    "segments that are beyond memory together": struct.pack(
        "!2sBBIQ2Q", b"sp", 2, 2, 2, 0, *[2**46 + 1] * 2
    ),
    "a file beyond memory": struct.pack("!2sBBIQQ", b"sp", 2, 2, 1, 0, 2**64 - 1),
    "in a file, and in none": struct.pack("!2sBBIQQ", b"sp", 2, 2, 1, 0, 1 << 63),
    "a file that is not one": struct.pack("!2sBBIQQ", b"sp", 2, 2, 1, 0, 1 << 62),
    "a file, then a segment of it behind another": struct.pack(
        "!2sBBIQQQQ", b"sp", 2, 2, 3, 0, 3 << 62 | 5, 0, 1 << 63 | 5
    ),
    "printed text": b"Hello from a task that writes to descriptor 5\n",
}


@pytest.mark.parametrize("case", CORRUPT)
def test_bytes_that_are_no_frame_are_refused(case: str) -> None:
    """The reader raises its own error; it neither waits nor allocates."""
    with pytest.raises(CorruptFrameError):
        read(CORRUPT[case], [])


# One row per frame that announces far more than arrives.
ANNOUNCED: dict[str, list[int]] = {
    "one segment": [2**29],
    "each of many": [2**19] * 2**10,
    "behind another": [5, 2**29],
    "more than there is": [2**47],
    "more than there is, in many": [2**27] * 2**12,
}


@pytest.mark.parametrize("case", ANNOUNCED)
@pytest.mark.parametrize("refuses", [False, True])
def test_what_is_announced_takes_no_memory_before_it_arrives(case: str, refuses: bool) -> None:
    """A length may be anything if a task has written to the socket: the pool must survive it."""

    def hold(_size_bytes: int) -> None:
        if refuses:
            raise MemoryError("no room")

    lengths = ANNOUNCED[case]
    head = struct.pack(f"!2sBBIQ{len(lengths)}Q", b"sp", 2, 6, len(lengths), 0, *lengths)
    stream = head + bytes(20 << 20)
    tracemalloc.start()
    try:
        # Where the system tells that there is not so much, it is refused at once.
        with contextlib.suppress(CorruptFrameError):
            assert read(stream, [1 << 20, 15 << 20], hold) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 6 * len(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems promise any length")
def test_a_frame_larger_than_the_machine_is_refused_at_once() -> None:
    """Otherwise it would be waited for, and every later frame would be a part of it."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system promises any length")
    stream = struct.pack("!2sBBIQ2Q", b"sp", 2, 6, 2, 0, 2**46, 2**46)

    with pytest.raises(CorruptFrameError, match="140,737,488,355,328 bytes"):
        read(stream, [])


@given(st.binary(max_size=200))
def test_no_input_raises_anything_else(garbage: bytes) -> None:
    """Whatever arrives is frames, part of a frame, or a CorruptFrameError."""
    try:
        read(garbage, [])
    except CorruptFrameError:
        pass


def test_a_file_where_there_are_none_is_refused() -> None:
    reader = FrameReader()
    stream = b"".join(encode(Kind.RESULT, 1, [InFile((9,))]))
    reader.buffer()[: len(stream)] = stream
    with pytest.raises(CorruptFrameError, match="refers to a file"):
        list(reader.received(len(stream)))


def test_an_answer_that_there_is_no_room_for_is_read_and_dropped() -> None:
    """What comes behind it is read as ever; what is small, or no answer, is not asked about."""
    asked: list[int] = []

    def hold(size_bytes: int) -> None:
        asked.append(size_bytes)
        if size_bytes > 3 << 20:
            raise MemoryError("no room")

    large, filed = bytes(5 << 20), InFile((7,))
    sent: list[tuple[Kind, int, list[Any]]] = [
        (Kind.RESULT, 1, [large, filed, b"abc"]),
        (Kind.RESULT, 2, [b"abc"]),
        (Kind.EXCEPTION, 3, [large]),
        (Kind.RESULT, 4, [large[: 2 << 20], b"de"]),
        (Kind.LOG, 5, [large]),
        (Kind.RESULT, 6, [b"fg"]),
    ]
    stream = b"".join(piece for message in sent for piece in encode(*message))
    for cuts in ([], [10, 100_000, 3 << 20], [*range(0, len(stream), 300_001)]):
        asked.clear()
        frames = read(stream, cuts, hold)
        assert asked == [len(large) + 3, len(large), (2 << 20) + 2]
        assert [frame.task for frame in frames] == [1, 2, 3, 4, 5, 6]
        first, _, third, *others = frames
        missing = [*first.segments[:1], *first.segments[2:], *third.segments]
        assert [str(one.error) for one in missing if isinstance(one, Missing)] == ["no room"] * 3
        assert first.segments[1] == fetch(Kind.RESULT, (7,))[0]
        assert [bytes(frame.segments[0]) for frame in others] == [large[: 2 << 20], large, b"fg"]
