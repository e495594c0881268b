"""A worker answers in the order of positions: the pool takes what it reads in no other."""

from __future__ import annotations

import logging
import pickle
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Frame, Kind, encode
from safepool.workers import answers
from safepool.workers.board import Board, records_of
from safepool.workers.messages import batch_frame, read_values, tasks_frame
from safepool.workers.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no board")

_boards: list[Board] = []
_runners: list[Runner] = []
_published: list[int] = []


class NoCap:
    """Nothing to cap."""

    def recheck(self) -> None:
        pass

    apply = recheck


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create()
    assert made is not None
    _boards.append(made)
    yield made
    _boards.clear()
    made.close()


def read_all(channel: Channel) -> Iterator[Frame]:
    try:
        yield from channel.receive(everything=True)
    except ChannelClosedError:
        pass


def positions(frame: Frame) -> list[tuple[str, int]]:
    if frame.kind is Kind.RESULTS:
        return [("done", place) for place, *_ in records_of(frame.segments[0])]
    if frame.kind is Kind.VALUES:
        return [("done", frame.task + n) for n in range(len(read_values(frame.segments)[1]))]
    return [(frame.kind.name, frame.task)]


def serve(board: Board, frame: list[bytes | memoryview]) -> list[tuple[str, int]]:
    """Let a worker's loop run in this process; return what it says, in order."""
    ours, theirs = socket.socketpair()
    channel, worker = Channel(ours), Channel(theirs)
    channel.send(encode(Kind.FUNCTION, 1, [pickle.dumps(count_published)]))
    channel.send(frame)
    channel.send(encode(Kind.STOP, 0))
    _runners[:] = [Runner(worker, board, NoCap())]  # type: ignore[arg-type]
    try:
        _runners[0].serve()
    finally:
        worker.close()
        _runners.clear()
    said = [answer for frame in read_all(channel) for answer in positions(frame)]
    channel.close()
    return said


def count_published(number: int) -> int:
    """Log in the second call; note how many results lie on the board then."""
    if number == 2:
        record = logging.makeLogRecord({"name": "x", "msg": "second"})
        _runners[0]._outbox.add(record, filtered=False)
    left = _boards[0].left()
    _published.append(len(list(records_of(left.records))) + len(left.numbers))
    return number


def revoke(position: int) -> str:
    """Do what the pool does in that moment: take back everything up to this position."""
    (board,) = _boards
    board.revoke(position)
    return "done"


def test_what_is_on_the_board_is_answered_before_a_skipped_task(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task has ended and lies on the board when the second is found taken back."""
    monkeypatch.setattr(answers, "_FLUSH_NS", sys.maxsize)  # not because of its age
    calls = [(0, pickle.dumps((revoke, (3,), {}))) for _ in range(3)]
    said = serve(board, tasks_frame(1, calls))

    assert said == [("done", 1), ("SKIPPED", 2), ("SKIPPED", 3)]


# One row per way in which short calls arrive.
FRAMES = {
    "tasks": lambda: tasks_frame(1, [(1, pickle.dumps(((n,), {}))) for n in range(1, 5)]),
    "a batch": lambda: batch_frame(1, 1, [pickle.dumps([1, 2, 3, 4])], starred=False, timed=False),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_the_result_of_a_call_that_logged_is_not_left_on_the_board(
    frame: str, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool may look at the board at any time, before it has read what was logged."""
    monkeypatch.setattr(answers, "_FLUSH_NS", sys.maxsize)
    said = serve(board, FRAMES[frame]())
    published, _published[:] = [*_published], []

    done = [("done", position) for position in range(1, 5)]
    if frame == "a batch":
        # The first goes by itself: of which type the results are was not known.
        assert published == [0, 0, 0, 1]
        assert said == [done[0], ("LOG", 0), *done[1:]]
    else:
        assert published == [0, 1, 0, 1]
        assert said == [("LOG", 0), *done]
