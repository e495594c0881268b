"""What waits for a worker: order, and the pieces in which it is taken."""

from __future__ import annotations

import pytest
import support_tasks

from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.core.backlog import Backlog
from safepool.pool.core.policy import NO_POLICY

pytestmark = pytest.mark.unit


def run_of(count: int, at_once: int | None = None) -> tuple[Backlog, MapRun]:
    backlog, run = Backlog(), MapRun(support_tasks.square, "square", NO_POLICY, at_once)
    backlog.add_items(run, [(n,) for n in range(count)])
    return backlog, run


def take(backlog: Backlog, room: int, among: int = 1) -> Span:
    taken = backlog.take(lambda _name, _held: room, lambda _name: 0, among, 10**6)
    assert isinstance(taken, Span)
    return taken


def test_spans_that_follow_each_other_are_one_again() -> None:
    """In whatever order the workers give them back."""
    backlog, _ = run_of(10)
    first, second, third = (take(backlog, 3) for _ in range(3))

    backlog.put_back([second])
    backlog.put_back([third])
    backlog.put_back([first])

    whole = take(backlog, 100)
    assert (whole.start, whole.items) == (0, [(n,) for n in range(9)])
    assert take(backlog, 100).items == [(9,)]


def test_chunks_stay_apart_and_their_parts_come_together() -> None:
    """In one pickle two chunks would have in common what they have not with the standard pool."""
    backlog, _ = run_of(8, at_once=4)
    first, second = take(backlog, 100), take(backlog, 100)
    rest = first.split(2)

    backlog.put_back([second])
    backlog.put_back([rest])
    backlog.put_back([first])

    assert [take(backlog, 100).items for _ in range(2)] == [
        [(n,) for n in range(4)],
        [(n,) for n in range(4, 8)],
    ]


def test_a_bound_chunk_is_taken_whole() -> None:
    backlog, _ = run_of(4, at_once=4)
    chunk = take(backlog, 100)
    chunk.bound = True
    backlog.put_back([chunk])

    assert take(backlog, 1, among=2).count == 4


def test_a_bound_chunk_waits_for_room() -> None:
    backlog, _ = run_of(4, at_once=4)
    chunk = take(backlog, 100)
    chunk.bound = True
    backlog.put_back([chunk])

    assert backlog.take(lambda *_: 0, lambda _: 0, 1, 10**6) == []
    assert take(backlog, 1).count == 4


def test_room_and_time_are_those_of_the_function() -> None:
    """Nothing is held yet; of calls that are no chunks, at most so many are taken."""
    backlog, _ = run_of(10)
    asked: list[object] = []

    def room(*about: object) -> int:
        asked.append(about)
        return 9

    def expected_ns(name: str) -> int:
        asked.append(name)
        return 7

    for most in (4, 3):  # cut from the run, and of a span that came back
        asked.clear()
        taken = backlog.take(room, expected_ns, 1, most)
        assert isinstance(taken, Span)
        assert (taken.count, taken.expected_ns) == (most, 7)
        assert asked == [("square", 0), "square"]
        backlog.put_back([taken])


def test_a_call_that_was_lost_once_keeps_its_count() -> None:
    """Joined to those before it, its earlier attempt would be forgotten."""
    backlog, _ = run_of(4)
    first, second = take(backlog, 2), take(backlog, 2)
    again = second.only(0)
    again.attempts = 1

    backlog.put_back([again])
    backlog.put_back([first])

    assert take(backlog, 100).count == 2
    assert take(backlog, 100).attempts == 1


def test_a_span_is_divided_only_when_little_waits_behind_it() -> None:
    backlog, _ = run_of(100)
    backlog.put_back([take(backlog, 20)])

    assert take(backlog, 100, among=2).count == 20

    backlog, _ = run_of(20)
    backlog.put_back([take(backlog, 20)])

    assert take(backlog, 100, among=2).count == 10
