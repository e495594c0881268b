"""A worker answers in the order of positions: the pool takes what it reads in no other."""

from __future__ import annotations

import pickle
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Frame, Kind, encode
from safepool.workers import runner
from safepool.workers.board import Board, records_of
from safepool.workers.messages import tasks_frame
from safepool.workers.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no board")

_boards: list[Board] = []


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
    return [(frame.kind.name, frame.task)]


def revoke(position: int) -> str:
    """Do what the pool does in that moment: take back everything up to this position."""
    (board,) = _boards
    board.revoke(position)
    return "done"


def test_what_is_on_the_board_is_answered_before_a_skipped_task(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first task has ended and lies on the board when the second is found taken back."""
    monkeypatch.setattr(runner, "_FLUSH_NS", sys.maxsize)  # not because of its age
    ours, theirs = socket.socketpair()
    calls = [(0, pickle.dumps((revoke, (3,), {}))) for _ in range(3)]
    channel = Channel(ours)
    channel.send(tasks_frame(1, calls))
    channel.send(encode(Kind.STOP, 0))
    worker = Channel(theirs)
    try:
        Runner(worker, board, NoCap()).serve()  # type: ignore[arg-type]
    finally:
        worker.close()

    answers = [answer for frame in read_all(channel) for answer in positions(frame)]
    channel.close()

    assert answers == [("done", 1), ("SKIPPED", 2), ("SKIPPED", 3)]
