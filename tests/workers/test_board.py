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

from safepool.workers.board import Board, barrier, records_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no board elsewhere")

STRESS_S = 2.0
POSITIONS = 1 << 24
BEGUN, SKIPPED = 1, 2

# The worker of the stress test: begins as fast as it can, and writes down what it has begun.
CLAIM = f"""
import mmap, sys
from safepool.workers.board import Board, register
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
from safepool.workers.board import Board, register
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


@pytest.fixture
def board() -> Iterator[Board]:
    found = Board.create()
    assert found is not None
    yield found
    found.close()


def begin(script: str, board: Board) -> tuple[subprocess.Popen[bytes], mmap.mmap]:
    descriptor = os.memfd_create("marks")
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
    assert board is not None
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
            assert read(board.peek()) == there
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


def test_records_that_are_flushed_while_they_are_read_are_not_taken(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.publish(1, 0, 6, b"one")
    monkeypatch.setattr("safepool.workers.board.barrier", board.flushed)
    assert board.peek() == b""


def test_the_era_begins_again_when_it_is_full(board: Board) -> None:
    """After a few days of the shortest tasks."""
    board._cells[4] = (2**32 - 1) << 32
    board.publish(1, 0, 6, b"one")
    board.flushed()
    board.publish(2, 0, 6, b"two")
    assert read(board.peek()) == [(2, 0, 6, b"two")]


def test_a_board_that_is_closed_twice_closes_nothing_else(board: Board) -> None:
    board.close()
    assert board.fileno() == -1
    descriptor = os.open(os.devnull, os.O_RDONLY)
    board.close()
    os.close(descriptor)


def test_nothing_is_both_begun_and_taken_back(board: Board) -> None:
    """One process begins as fast as it can, the other takes back what lies ahead of it."""
    process, marks = begin(CLAIM, board)
    taken: list[tuple[int, int]] = []
    last = 0
    try:
        wait_until_it_works(process, board)
        deadline = time.monotonic() + STRESS_S
        while time.monotonic() < deadline and board.claimed < POSITIONS - 100:
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
        while time.monotonic() < deadline:
            records = read(board.peek())
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
