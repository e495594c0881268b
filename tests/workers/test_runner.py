"""A worker's loop, without a process: messages in, messages out."""

from __future__ import annotations

import pickle
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from safepool.threads.cap import WorkerCap
from safepool.transport.frames import Frame, FrameReader, Kind
from safepool.workers.board import Board, records_of
from safepool.workers.messages import batch_frame, read_values, tasks_frame
from safepool.workers.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.transport.channel import Channel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no board")

# What a call of revoke_all() writes to; the pool's side of the board.
boards: list[Board] = []


def revoke_all(value: int) -> int:
    """Let the pool take back everything, in the middle of the first call."""
    boards[-1].revoke(10)
    return value


class Recorder:
    """A channel that delivers what it is given, and keeps what it is to send."""

    def __init__(self, pieces: list[bytes | memoryview]) -> None:
        self._arriving = b"".join(pieces)
        self.sent: list[Frame] = []

    def receive(self) -> Iterator[Frame]:
        yield from frames_of(self._arriving)
        yield Frame(Kind.STOP, 0, [])

    def send(self, pieces: list[bytes | memoryview]) -> None:
        self.sent += frames_of(b"".join(pieces))


def frames_of(data: bytes) -> Iterator[Frame]:
    reader = FrameReader()
    while data:
        buffer = reader.buffer()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        yield from reader.received(count)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create()
    if board is None:
        pytest.skip("there is no board")
    boards.append(board)
    yield board
    boards.remove(board)
    board.close()


def serve(board: Board, pieces: list[bytes | memoryview]) -> list[Frame]:
    channel = Recorder(pieces)
    runner = Runner(cast("Channel", channel), board, WorkerCap(1, {}))
    runner._functions[1] = revoke_all
    # The cap would be this process's.
    cast("Any", runner)._cap = type("NoCap", (), {"recheck": lambda _self: None})()
    runner._flushed_ns = time.monotonic_ns() + 10**12  # nothing is flushed for its age
    runner.serve()
    return channel.sent


def test_a_batch_tells_what_it_has_done_before_what_it_skips(board: Board) -> None:
    """Else the pool, which knows of no end of the first call, would pass the second over."""
    items = pickle.dumps([(3,), (4,)], 5)

    sent = serve(board, batch_frame(1, 1, [items]))

    assert [(frame.kind, frame.task) for frame in sent] == [(Kind.VALUES, 1), (Kind.SKIPPED, 2)]
    assert read_values(sent[0].segments)[1] == [3]


def test_tasks_tell_what_they_have_done_before_what_they_skip(board: Board) -> None:
    call = pickle.dumps(((3,), {}), 5)

    sent = serve(board, tasks_frame(1, [(1, call), (1, call)]))

    assert [frame.kind for frame in sent] == [Kind.RESULTS, Kind.SKIPPED]
    assert [position for position, *_ in records_of(sent[0].segments[0])] == [1]
    assert sent[1].task == 2
