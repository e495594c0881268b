"""The board: records come back as they were written, and the two agreements hold."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.workers.board import LANE_CALLS, LANES, Board, Left, numbers_of, records_of
from safepool.workers.fence import barrier

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no board elsewhere")

if sys.platform == "linux":
    from safepool import linux

STRESS_S = 2.0
POSITIONS = 1 << 24
BEGUN, SKIPPED = 1, 2

# The worker of the stress test: begins as fast as it can, and writes down what it has begun.
CLAIM = f"""
import mmap, sys
from safepool.workers.board import Board
from safepool.workers.fence import register
board, marks = Board(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), {POSITIONS})
assert register()
claim = board.claim
for position in range(1, {POSITIONS}):
    if claim(position, position):
        marks[position] = {BEGUN}
    else:
        marks[position] = {SKIPPED}
    if marks[0]:
        break
"""

# The worker of the other: leaves results, and uses the space again as soon as it is full.
PUBLISH = f"""
import mmap, sys
from safepool.workers.board import Board
from safepool.workers.fence import register
board, marks = Board(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), {POSITIONS})
assert register()
position = 1
while not marks[0]:
    if not board.publish(position, position % 1000, 6, b"%d" % position * (position % 7)):
        board.flushed()
    elif position % 50 == 0:
        board.flushed()
        position += 1
    else:
        position += 1
"""

# The worker of a third: fills the lane as fast as it can, a few dozen at a time, and writes down
# what it has begun.
LANE = f"""
import mmap, sys
from safepool.workers.board import LANE_CALLS, REVOKED, Board
from safepool.workers.fence import register
board, marks = Board(int(sys.argv[1])), mmap.mmap(int(sys.argv[2]), {POSITIONS})
assert register()
position, count = 1, LANE_CALLS
while not marks[0]:
    if not board.claim(position, position):
        marks[position] = {SKIPPED}
        position += 1
        board.flushed()
        count = LANE_CALLS
        continue
    if count + 30 > LANE_CALLS:
        board.lane_bytes(count)
        board.flushed()
        slots, first, count = board.open_lane(position, 1), position, 0
    cells = board.enter_lane(position + 29)
    for at in range(position, position + 30):
        marks[at] = {BEGUN}
        slots[at - first] = at * 3
        if cells[REVOKED] > at:
            break
    board.leave_lane(at)
    count = at + 1 - first
    position = at + 1
"""


@pytest.fixture
def board() -> Iterator[Board]:
    found = Board.create()
    assert found is not None
    yield found
    found.close()


def begin(script: str, board: Board) -> tuple[subprocess.Popen[bytes], mmap.mmap]:
    descriptor = linux.memfd_create("marks", linux.MFD_CLOEXEC)
    os.ftruncate(descriptor, POSITIONS)
    # The worker's own copies: it owns what it is given.
    shared = [board.fileno(), descriptor]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, shared)], pass_fds=shared)
    marks = mmap.mmap(descriptor, POSITIONS)
    os.close(descriptor)
    return process, marks


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 2000), st.sampled_from([6, 7])),
        st.just(("flush", 0, 0)),
        st.just(("peek", 0, 0)),
    ),
    max_size=120,
)


@given(STEPS)
def test_records_come_back_as_they_were_written(steps: list[tuple[str, int, int]]) -> None:
    """Until they are flushed; what has no room is refused, and costs nothing."""
    board = Board.create()
    there: list[tuple[int, int, int, bytes]] = []
    room = len(board._results)
    for position, (step, size, kind) in enumerate(steps, 1):
        if step == "publish":
            record = (position, size * 3, kind, os.urandom(size))
            fits = sum(17 + len(old[3]) for old in there) + 17 + size <= room
            assert board.publish(record[0], record[1], kind, record[3]) == fits
            there += [record] if fits else []
        elif step == "flush":
            board.flushed()
            there = []
        else:
            assert read(board.peek().records) == there
        assert read(board.published()) == there
    board.close()


def read(data: bytes) -> list[tuple[int, int, int, bytes]]:
    return [(*head, bytes(pickled)) for *head, pickled in records_of(data)]  # type: ignore[misc]


@given(st.binary(max_size=60))
def test_any_bytes_are_records_or_refused(data: bytes) -> None:
    try:
        found = read(data)
    except ValueError:
        return
    assert sum(17 + len(pickled) for *_, pickled in found) == len(data)


def test_what_is_taken_back_cannot_begin(board: Board) -> None:
    assert board.claim(1, 5)
    board.revoke(2)
    assert not board.claim(2, 6)
    assert (board.claimed, board.began, board.since_ns) == (2, 1, 6)
    assert board.claim(3, 7)
    assert board.began == 3


@pytest.mark.parametrize("asked", ["claimed", "began"])
@pytest.mark.parametrize("when", ["before the lane is read", "after"])
def test_a_worker_that_closes_the_lane_during_a_look_is_not_overlooked(
    when: str, asked: str, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has begun there would be taken back, and run twice."""
    board.claim(1, 5)
    slots = board.open_lane(1, LANES[int])
    board.enter_lane(30)
    slots[0:5] = memoryview(bytes(40)).cast("q")
    assert (board.claimed, board.began) == (6, 6)
    look = Board._entered

    def close_the_lane() -> None:
        board.leave_lane(6)
        board.flushed()

    def look_and_be_overtaken(self: Board) -> int:
        if when != "after":
            close_the_lane()
        found = look(self)
        close_the_lane()
        return found

    monkeypatch.setattr(Board, "_entered", look_and_be_overtaken)
    assert getattr(board, asked) == 6


def test_records_that_are_flushed_while_they_are_read_are_not_taken(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.publish(1, 0, 6, b"one")
    monkeypatch.setattr("safepool.workers.board.barrier", board.flushed)
    assert board.peek() == Left(b"", 0, [])


def test_the_era_begins_again_when_it_is_full(board: Board) -> None:
    """After a few days of the shortest tasks."""
    board._cells[4] = (2**32 - 1) << 32
    board.publish(1, 0, 6, b"one")
    board.flushed()
    board.publish(2, 0, 6, b"two")
    assert read(board.peek().records) == [(2, 0, 6, b"two")]


def test_a_board_that_is_closed_twice_closes_nothing_else(board: Board) -> None:
    board.close()
    assert board.fileno() == -1
    descriptor = os.open(os.devnull, os.O_RDONLY)
    board.close()
    os.close(descriptor)


@pytest.mark.parametrize("script", [CLAIM, LANE], ids=["alone", "lane"])
def test_nothing_is_both_begun_and_taken_back(script: str, board: Board) -> None:
    """One process begins as fast as it can, the other takes back what lies ahead of it."""
    process, marks = begin(script, board)
    taken: list[tuple[int, int]] = []
    last = 0
    try:
        wait_until_it_works(process, board)
        deadline = time.monotonic() + STRESS_S
        while board.claimed < POSITIONS - 100 and (
            time.monotonic() < deadline or len(taken) <= 100
        ):
            last = max(last, board.claimed + 1 + len(taken) % 40)  # as a ledger's: never less
            board.revoke(last)
            barrier()
            claimed = board.claimed
            if claimed < last:
                taken.append((claimed, last))
    finally:
        marks[0] = 1
        process.wait(30)
    seen = marks[:]
    marks.close()
    assert len(taken) > 100
    assert all(seen.count(BEGUN, claimed + 1, last + 1) == 0 for claimed, last in taken)
    # And what was not taken back is not lost either: each has begun, or said that it has not.
    assert seen.count(0, 1, board.claimed) == 0


def wait_until_it_works(process: subprocess.Popen[bytes], board: Board) -> None:
    deadline = time.monotonic() + 30
    while not (board.claimed or board.published()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)


def test_what_is_peeked_at_is_whole(board: Board) -> None:
    """One process leaves results and flushes, the other reads: all of it, or nothing."""
    process, marks = begin(PUBLISH, board)
    found = latest = 0
    try:
        wait_until_it_works(process, board)
        deadline = time.monotonic() + STRESS_S
        while time.monotonic() < deadline or found <= 100:
            records = read(board.peek().records)
            positions = [position for position, *_ in records]
            assert positions == [*range(min(positions, default=1), max(positions, default=0) + 1)]
            for position, microseconds, kind, pickled in records:
                assert microseconds == position % 1000
                assert (kind, pickled) == (6, b"%d" % position * (position % 7))
            assert max(positions, default=latest) >= latest
            latest = max(positions, default=latest)
            found += len(records)
    finally:
        marks[0] = 1
        process.wait(30)
        marks.close()
    assert found > 100


def test_what_is_peeked_at_in_the_lane_is_whole(board: Board) -> None:
    """One process fills and flushes the lane, the other reads: all of it, or nothing."""
    process, marks = begin(LANE, board)
    found = latest = 0
    try:
        wait_until_it_works(process, board)
        deadline = time.monotonic() + STRESS_S
        while board.claimed < POSITIONS - 10_000 and (time.monotonic() < deadline or found <= 100):
            left = board.peek()
            assert left.numbers == [(left.first + n) * 3 for n in range(len(left.numbers))]
            if left.numbers:
                assert left.first + len(left.numbers) >= latest
                latest = left.first + len(left.numbers)
            found += len(left.numbers)
    finally:
        marks[0] = 1
        process.wait(30)
        marks.close()
    assert found > 100


LANE_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.integers(1, 100)),
        st.just(("flush", 0)),
        st.just(("peek", 0)),
    ),
    max_size=60,
)


@given(LANE_STEPS)
def test_a_lane_claims_what_follows_each_result(steps: list[tuple[str, int]]) -> None:
    """Up to its last call; and what was flushed is not there any more."""
    board = Board.create()
    position, there = 1, 0
    slots = first = None
    for step, count in steps:
        if step == "fill":
            assert board.claim(position, 5)
            if slots is None or there + count > LANE_CALLS:
                board.flushed()
                slots, first, there = board.open_lane(position, LANES[int]), position, 0
            assert first is not None
            board.enter_lane(position + count - 1)
            for at in range(position, position + count):
                assert (board.claimed, board.began) == (at, at)
                slots[at - first] = at - 50
            assert board.claimed == position + count - 1
            board.leave_lane(position + count - 1)
            position += count
            there += count
        elif step == "flush":
            board.lane_bytes(there)
            board.flushed()
            slots, there = None, 0
        left = board.peek()
        assert left.numbers == ([n - 50 for n in range(position - there, position)])
        assert board.claimed == board.began == position - 1
    board.close()


# One row per kind: what comes back is what was stored, to the last bit.
NUMBERS: dict[type, list[object]] = {
    int: [0, -1, 2**63 - 1, -(2**63)],
    float: [0.0, -0.0, 1e-320, float("inf"), 0.1],
    bool: [True, False],
    type(None): [None, None, None],
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_lane_gives_back_what_was_stored(kind: type, board: Board) -> None:
    values = NUMBERS[kind]
    slots = board.open_lane(1, LANES[kind])
    board.enter_lane(len(values))
    for place, value in enumerate(values):
        slots[place] = 0 if value is None else value
    board.leave_lane(len(values))

    found = board.peek().numbers
    assert [*map(repr, found)] == [*map(repr, values)]
    assert [*map(repr, numbers_of(LANES[kind], board.lane_bytes(len(values))))] == [
        *map(repr, values)
    ]


@pytest.mark.parametrize(("kind", "data"), [(0, b""), (5, b"\0" * 8), (1, b"\0" * 7)])
def test_what_is_no_lane_is_refused(kind: int, data: bytes) -> None:
    with pytest.raises(ValueError, match="content of a result slot"):
        numbers_of(kind, data)
