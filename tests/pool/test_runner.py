"""The worker's side without a worker: messages in, answers out, in one process."""

from __future__ import annotations

import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from safepool.transport import payloads
from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Kind, encode
from safepool.workers.board import Board, records_of
from safepool.workers.messages import batch_frame, read_values, tasks_frame
from safepool.workers.runner import Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from safepool.transport.frames import Frame

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a board")


class NoCap:
    def apply(self) -> None: ...

    def recheck(self) -> None: ...


class Desk:
    """A runner, its board, and the other end of its channel."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        board = Board.create()
        assert board is not None
        self.board = board
        self.pool = Channel(ours)
        self.worker = Channel(theirs)
        self.runner = Runner(self.worker, board, NoCap())  # type: ignore[arg-type]
        self.runner._flushed_ns = time.monotonic_ns() + 10**12  # no flush for the time's sake

    def keep(self, number: int, function: Callable[..., Any]) -> None:
        self.runner._functions[number] = function

    def serve(self) -> list[Frame]:
        """Let it do what it was sent, and return what it says."""
        self.pool.send(encode(Kind.STOP, 0))
        self.runner.serve()
        self.worker.close()
        found: list[Frame] = []
        try:
            while True:
                found += self.pool.receive()
        except ChannelClosedError:
            return found

    def close(self) -> None:
        self.pool.close()
        self.worker.close()
        self.board.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def test_what_ended_is_said_before_what_was_taken_back(desk: Desk) -> None:
    """A batch: the pool takes a call that is said to be taken back for its turn only."""
    desk.keep(1, lambda n: desk.board.revoke(3) or n if n == 2 else n)
    desk.pool.send(batch_frame(1, 1, payloads.dumps([(n,) for n in (1, 2, 3)])))

    values, skipped = desk.serve()

    assert (values.kind, values.task, read_values(values.segments)[1]) == (Kind.VALUES, 1, [1, 2])
    assert (skipped.kind, skipped.task) == (Kind.SKIPPED, 3)


def test_what_ended_is_said_before_what_was_taken_back_of_tasks(desk: Desk) -> None:
    """Tasks: the same, and each of those behind it is said to be taken back as well."""
    desk.keep(1, lambda n: desk.board.revoke(4) or [n] if n == 2 else [n])
    call = [payloads.dumps(((n,), {}))[0] for n in (1, 2, 3, 4)]
    desk.pool.send(tasks_frame(1, [(1, pickled) for pickled in call]))

    *results, third, fourth = desk.serve()

    positions = [p for frame in results for p, *_ in records_of(frame.segments[0])]
    assert positions == [1, 2]
    assert [(f.kind, f.task) for f in (third, fourth)] == [(Kind.SKIPPED, 3), (Kind.SKIPPED, 4)]
