"""The worker's side without a worker: messages in, answers out, in one process."""

from __future__ import annotations

import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from safepool.pool.calls.tasks import rebuild
from safepool.transport import payloads
from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Kind, encode
from safepool.workers.board import RECORD, Board, records_of
from safepool.workers.messages import (
    answer_frame,
    batch_frame,
    call_frame,
    read_call,
    read_values,
    tasks_frame,
)
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
        self.board = board = Board.create()
        self.pool = Channel(ours)
        self.worker = Channel(theirs)
        self.runner = Runner(self.worker, board, NoCap())  # type: ignore[arg-type]
        # No flush because of its age.
        self.runner._answers._flushed_ns = time.monotonic_ns() + 10**12

    def keep(self, number: int, function: Callable[..., Any]) -> None:
        self.runner._functions[number] = function

    def send_batch(self, items: list[Any], *, starred: bool = False) -> None:
        pickled = payloads.dumps(items)
        self.pool.send(batch_frame(1, 1, pickled, starred=starred, timed=False))

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
    desk.send_batch([1, 2, 3])

    *said, skipped = desk.serve()

    assert values_of(said) == {1: 1, 2: 2}
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


@pytest.mark.parametrize("value", [7, [7], None])
def test_a_call_that_arrives_alone_is_answered_at_once_without_the_board(
    desk: Desk, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is one record in a frame of its own."""
    monkeypatch.setattr(Board, "publish", None)
    desk.keep(1, lambda: desk.pool.send(encode(Kind.STOP, 0)) or value)
    desk.pool.send([call_frame(1, 1, payloads.dumps(((), {}))[0])])

    desk.runner.serve()

    (answer,) = desk.pool.receive()
    ((position, _, kind, pickled),) = records_of(answer.segments[0])
    assert (position, kind, payloads.loads([pickled])) == (1, Kind.RESULT, value)


def test_a_frame_that_comes_in_pieces_is_no_lone_call(desk: Desk) -> None:
    """Its first bytes go to the frame reader, which gets the others as well."""
    frame = call_frame(1, 1, payloads.dumps(((b"x" * 3000,), {}))[0])
    desk.keep(1, len)
    desk.pool.send([frame[:1000]])
    desk.runner._run_alone()
    assert list(desk.worker.receive()) == []
    desk.pool.send([frame[1000:]])

    (answer,) = desk.serve()

    assert [payloads.loads([p]) for _, _, _, p in records_of(answer.segments[0])] == [3000]


def test_frames_in_one_piece_are_what_the_others_are() -> None:
    """The two ways to make a frame, and to read it, must not part."""
    pickled = b"abc"
    (usual,) = tasks_frame(7, [(3, pickled)])

    assert call_frame(7, 3, pickled) == usual
    record = RECORD.pack(7, 5, len(pickled), 6) + pickled
    assert answer_frame(7, 5, 6, pickled) == encode(Kind.RESULTS, 0, [record])[0]
    two = tasks_frame(7, [(3, pickled), (3, pickled)])[0]
    assert isinstance(two, bytes)
    for other in (usual[:-1], usual + b"\0", usual + usual, two, b""):
        assert isinstance(other, bytes)
        assert read_call(other) is None


def values_of(frames: list[Frame]) -> dict[int, Any]:
    """Return what calls ended with, by position; an exception by its text. None has two ends."""
    found: dict[int, Any] = {}
    for frame in frames:
        if frame.kind is Kind.VALUES:
            values = read_values(frame.segments)[1]
            ends = dict(enumerate(values, frame.task))
        elif frame.kind is Kind.RESULTS:
            ends = {
                position: payloads.loads([pickled])
                for position, _, kind, pickled in records_of(frame.segments[0])
                if kind == Kind.RESULT
            }
            ends |= {
                position: str(rebuild([pickled]))
                for position, _, kind, pickled in records_of(frame.segments[0])
                if kind == Kind.EXCEPTION
            }
        else:
            assert frame.kind is Kind.RESULT
            ends = {frame.task: payloads.loads(frame.segments)}
        assert not found.keys() & ends.keys()
        found |= ends
    return found


def unless_13(value: Any) -> Any:
    if value == 13:
        raise ValueError("thirteen")
    return value


# One row per sequence of results: what the calls of a batch return, at least 40 of them, so that
# several begin at once.
RESULTS: dict[str, list[Any]] = {
    "small numbers": [*range(14, 100)],
    "no results": [None] * 50,
    "floats": [n / 7 for n in range(50)],
    "truth values": [n % 3 == 0 for n in range(50)],
    "numbers, one of them too large": [*range(14, 60), 2**63, -(2**63) - 1, *range(60, 90)],
    "numbers, and what is none": [*range(14, 60), "x", *range(60, 90), None, 1.5, [1], 2, 3],
    "in turn": [1, None] * 40,
    "texts": ["x" * n for n in range(60)],
    "numbers, then large results": [*range(14, 60), bytes(20_000), bytes(20_000), *range(20, 30)],
    "more than the lane has room for": [*range(14, 9000)],
}


@pytest.mark.parametrize("results", RESULTS)
def test_a_batch_of_short_calls_returns_what_they_return(results: str, desk: Desk) -> None:
    expected = RESULTS[results]
    desk.keep(1, unless_13)
    desk.send_batch(expected)

    said = values_of(desk.serve())

    assert [*map(repr, said.values())] == [*map(repr, expected)]
    assert [*said] == [*range(1, len(expected) + 1)]


def test_a_batch_of_short_calls_goes_on_after_one_that_raises(desk: Desk) -> None:
    desk.keep(1, unless_13)
    desk.send_batch([*range(100), lambda: 0, 13, *range(100, 120)])

    said = values_of(desk.serve())

    assert said.pop(14) == "thirteen"
    assert said.pop(102) == "thirteen"
    assert callable(said.pop(101))
    expected = [*range(13), *range(14, 100), *range(100, 120)]
    assert [*said.values()] == expected


def test_a_batch_passes_all_arguments_of_a_call(desk: Desk) -> None:
    desk.keep(1, lambda *values: sum(values))
    desk.send_batch([(n, 1, 2) for n in range(100)], starred=True)

    assert [*values_of(desk.serve()).values()] == [n + 3 for n in range(100)]


def test_a_result_that_cannot_be_pickled_is_told_of_in_a_batch_of_short_calls(desk: Desk) -> None:
    desk.keep(1, lambda n: (x for x in ()) if n == 50 else n)
    desk.send_batch([*range(100)])

    said = values_of(desk.serve())

    assert "generator" in said.pop(51)
    assert [*said.values()] == [n for n in range(100) if n != 50]


@pytest.mark.parametrize("at", [1, 2, 20, 40, 63, 64, 99])
def test_what_is_taken_back_amid_short_calls_does_not_begin(at: int, desk: Desk) -> None:
    begun: list[int] = []

    def note(value: int) -> int:
        begun.append(value)
        if value == at:
            desk.board.revoke(100)
        return value

    desk.keep(1, note)
    desk.send_batch([*range(1, 101)])
    *said, skipped = desk.serve()

    assert begun == [*range(1, at + 1)]
    assert (skipped.kind, skipped.task) == (Kind.SKIPPED, at + 1)
    assert values_of(said) == {n: n for n in range(1, at + 1)}
    assert desk.board.began == at


def test_each_call_with_a_timeout_says_when_it_begins(desk: Desk) -> None:
    since: list[int] = []
    desk.keep(1, lambda _: since.append(desk.board.since_ns))
    desk.pool.send(batch_frame(1, 1, payloads.dumps([0] * 40), starred=False, timed=True))
    desk.serve()

    assert len(set(since)) == 40
