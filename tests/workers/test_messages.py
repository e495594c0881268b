"""What pool and worker say about calls: written, cut into frames, and read again."""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.transport.frames import CorruptFrameError, Frame, FrameReader, Kind
from safepool.workers.messages import (
    batch_frame,
    function_of,
    numbers_frame,
    read_batch,
    read_tasks,
    read_values,
    task_frame,
    tasks_frame,
    values_frame,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMBERS = st.integers(0, 2**32 - 1)
PLAIN = st.none() | st.booleans() | st.integers() | st.text() | st.binary()


def received(pieces: Sequence[bytes | memoryview]) -> Frame:
    data = b"".join(pieces)
    reader = FrameReader()
    frames: list[Frame] = []
    while data:
        buffer = reader.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        frames += reader.received(count)
    (frame,) = frames
    return frame


@given(st.integers(1, 2**63), st.lists(st.tuples(NUMBERS, st.binary(max_size=300)), min_size=1))
def test_tasks_arrive_as_they_were_sent(position: int, calls: list[tuple[int, bytes]]) -> None:
    frame = received(tasks_frame(position, calls))

    assert (frame.kind, frame.task) == (Kind.TASKS, position)
    assert [(number, bytes(pickled)) for number, pickled in read_tasks(frame.segments)] == calls


@given(NUMBERS, st.lists(st.binary(max_size=5000), min_size=1, max_size=5))
def test_a_task_and_a_batch_name_their_function(number: int, segments: list[bytes]) -> None:
    frame = received(task_frame(1, number, segments))
    assert function_of(frame.segments) == number
    assert [bytes(segment) for segment in frame.segments[1:]] == segments

    starred, timed = number % 2 == 0, number % 3 == 0
    apart = number % 5 == 0
    frame = received(batch_frame(1, number, segments, starred=starred, timed=timed, apart=apart))
    assert read_batch(frame.segments) == (number, starred, timed, apart)
    assert [bytes(segment) for segment in frame.segments[1:]] == segments


@given(st.integers(0, 2**40), st.lists(PLAIN, min_size=1))
def test_values_arrive_as_they_were_sent(spent: int, values: list[Any]) -> None:
    frame = received(values_frame(7, spent, values))

    assert frame.task == 7
    assert read_values(frame.segments) == (min(spent, 2**32 - 1), values)


def test_numbers_arrive_as_the_lane_held_them() -> None:
    frame = received(numbers_frame(7, 2**40, 1, struct.pack("=qqq", 1, -2, 3)))

    assert read_values(frame.segments) == (2**32 - 1, [1, -2, 3])


# One row per frame that no worker sends: its segments.
NO_VALUES: dict[str, list[bytes]] = {
    "nothing": [],
    "one segment": [b"\0" * 5],
    "a short head": [b"\0", pickle.dumps([1])],
    "no pickle": [b"\0" * 5, b"?"],
    "no list": [b"\0" * 5, pickle.dumps(1)],
    "an empty list": [b"\0" * 5, pickle.dumps([])],
    "no kind of lane": [b"\0\0\0\0\x09", bytes(8)],
    "half a number": [b"\0\0\0\0\1", bytes(12)],
    "no numbers": [b"\0\0\0\0\1", b""],
}


@pytest.mark.parametrize("frame", NO_VALUES)
def test_a_frame_that_holds_no_values_is_refused(frame: str) -> None:
    """By the one error for which a worker is ended, and not the pool."""
    with pytest.raises(CorruptFrameError):
        read_values(NO_VALUES[frame])


# One row per frame that no pool sends: its segments.
NO_TASKS: dict[str, list[bytes]] = {
    "nothing": [],
    "half a row": [b"\0" * 5, b""],
    "more than announced": [struct.pack("<II", 1, 2), b"abc"],
    "less than announced": [struct.pack("<II", 1, 4), b"abc"],
}


@pytest.mark.parametrize("frame", NO_TASKS)
def test_a_frame_that_holds_no_tasks_is_refused(frame: str) -> None:
    with pytest.raises(CorruptFrameError):
        list(read_tasks(NO_TASKS[frame]))
