"""The backlog and the pace: order, bounds, and that nothing is lost or doubled."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.calls.tasks import PoolFuture, Task
from safepool.pool.core.backlog import Backlog
from safepool.pool.core.pace import Pace
from safepool.pool.core.policy import NO_POLICY

pytestmark = pytest.mark.unit


def new_task(name: int) -> Task:
    return Task(PoolFuture(), (abs, (name,), {}), f"f{name % 2}", NO_POLICY)


def names_of(taken: Span | list[Task]) -> list[int]:
    if isinstance(taken, Span):
        return [item[0] for item in taken.items]
    return [task.call[1][0] for task in taken if task.call]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["task", "items", "take", "take", "take and put back"]),
        st.integers(1, 9),
        st.integers(1, 4),
        st.integers(0, 9),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([None, 1, 3]))
def test_what_waits_is_taken_once_and_in_order(
    steps: list[tuple[str, int, int, int]], at_once: int | None
) -> None:
    """Each source is a queue: what was put back comes before what came later."""
    backlog = Backlog()
    names = itertools.count()
    run = MapRun(abs, "run", NO_POLICY, at_once)
    waiting: dict[bool, list[int]] = {True: [], False: []}  # calls of the run, tasks
    for step, count, among, room in steps:
        if step == "task":
            name = next(names)
            waiting[False].append(name)
            backlog.add(new_task(name))
        elif step == "items":
            items = [next(names) for _ in range(count)]
            waiting[True] += items
            backlog.add_items(run, [(item,) for item in items])
        else:
            taken = backlog.take(
                lambda _, held, room=room: max(0, room - held), lambda _: 1, among, count
            )
            is_run = isinstance(taken, Span)
            found = names_of(taken)
            assert len(found) <= count * ((at_once or 1) if is_run else 1)
            assert len(found) <= room or (is_run and at_once is not None)
            assert bool(found) == bool(backlog or found) * (room > 0)
            assert found == waiting[is_run][: len(found)]
            if step == "take":
                del waiting[is_run][: len(found)]
            elif found:
                backlog.put_back([taken] if isinstance(taken, Span) else taken)
        left = len(waiting[True]) + len(waiting[False])
        assert backlog.at_most(10**6) == left
        assert backlog.at_most(2) == min(2, left)
        assert bool(backlog) >= bool(left)


def test_calls_of_a_run_that_nobody_wants_are_passed_over() -> None:
    backlog = Backlog()
    unwanted, wanted = MapRun(abs, "a", NO_POLICY, None), MapRun(abs, "b", NO_POLICY, None)
    backlog.add_items(unwanted, [(1,), (2,), (3,)])
    backlog.add_items(wanted, [(4,)])
    span = backlog.take(lambda *_: 2, lambda _: 1, 1, 9)
    assert isinstance(span, Span)
    backlog.put_back([span])
    unwanted.drop()

    assert names_of(backlog.take(lambda *_: 2, lambda _: 1, 1, 9)) == [4]
    assert not backlog


def test_nothing_waits_once_nobody_wants_what_does() -> None:
    """Asked without a worker who would take it: a pool that ends waits for what waits."""
    backlog = Backlog()
    run, held = MapRun(abs, "a", NO_POLICY, None), MapRun(abs, "b", NO_POLICY, None)
    backlog.add_items(held, [(1,)])
    held.put(0, ["large"], 1 << 40)
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9) == []
    assert held.held
    backlog.add_items(run, [(2,)])
    assert backlog.is_wanted()
    run.drop()
    assert not backlog.is_wanted()
    assert backlog
    held.drop()
    assert not backlog.is_wanted()
    assert not backlog


def test_what_is_cleared_can_be_queued_again() -> None:
    backlog = Backlog()
    run = MapRun(abs, "run", NO_POLICY, None)
    backlog.add_items(run, [(1,)])
    assert backlog.clear() == [run]
    backlog.add_items(run, [(2,)])

    assert names_of(backlog.take(lambda *_: 9, lambda _: 1, 1, 9)) == [1, 2]


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 1000)), max_size=20),
    st.integers(0, 10**8),
)
def test_room_is_bounded_by_time_and_by_number(notes: list[tuple[int, int]], held_ns: int) -> None:
    """An idle worker always gets a call; a busy one never more than ten milliseconds of them."""
    pace = Pace()
    for nanoseconds, count in notes:
        pace.note("f", nanoseconds, count)
    each_ns = pace.expected_ns("f")
    idle, busy = pace.room("f", held_ns, idle=True), pace.room("f", held_ns, idle=False)

    assert 1 <= idle <= 2048
    assert 0 <= busy <= idle
    assert held_ns + busy * each_ns <= 10_000_000 or busy == 0
    if notes:
        averages = [nanoseconds / count for nanoseconds, count in notes]
        assert min(averages) - 1 <= each_ns <= max(averages) + 1
    else:
        assert (idle, busy, each_ns) == (1, 0, 0)


def test_functions_without_end_do_not_fill_the_memory() -> None:
    pace = Pace()
    for number in range(10_000):
        pace.note(f"f{number}", 5)
    kept: dict[str, Any] = vars(pace)["_nanoseconds"]
    assert len(kept) <= 4096
    assert pace.expected_ns("f9999") == 5


def test_chunks_that_came_back_in_one_piece_are_still_so_many_tasks() -> None:
    """Else a worker that may do one more does all of them."""
    backlog = Backlog()
    run = MapRun(abs, "abs", NO_POLICY, 7)
    backlog.add_items(run, [(n,) for n in range(21)])
    first, second = (backlog.take(lambda *_: 9, lambda _: 1, 1, 9) for _ in range(2))
    assert isinstance(first, Span)
    assert isinstance(second, Span)
    backlog.put_back([first, second])

    taken = backlog.take(lambda *_: 99, lambda _: 1, 1, 1)

    assert isinstance(taken, Span)
    assert taken.count == 7


def test_of_very_many_entries_each_further_one_counts_as_one_call() -> None:
    backlog = Backlog()
    held, first, last = (MapRun(abs, name, NO_POLICY, None) for name in "abc")
    backlog.add_items(held, [(1,), (2,)])
    held.put(0, ["large"], 1 << 40)
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9) == []
    assert backlog.waiting() == 2
    for number in range(999):
        backlog.add(new_task(number))
    backlog.add_items(first, [(1,), (2,), (3,)])
    assert backlog.waiting() == 2 + 999 + 3
    backlog.add_items(last, [(1,), (2,), (3,)])
    assert backlog.waiting() == 2 + 999 + 3 + 1


def tasks(*names: str) -> tuple[Backlog, list[Task]]:
    backlog = Backlog()
    queued = [Task(PoolFuture(), (abs, (1,), {}), name, NO_POLICY) for name in names]
    for task in queued:
        backlog.add(task)
    return backlog, queued


def test_the_place_before_which_work_came_is_a_bound() -> None:
    backlog, queued = tasks("f", "f", "f")
    for last in (0, 1, 2):
        assert queued[last].number == last + 1
        assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9, queued[0].number) == []
    assert backlog.first == 1
    run = MapRun(abs, "run", NO_POLICY, None)
    backlog.add_items(run, [(1,)])
    assert run.number == 4
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9, queued[2].number) == queued[:2]
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9) == queued[2:]
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9, 4) == []


@pytest.mark.parametrize("at_once", [None, 2])
def test_of_a_run_nothing_is_taken_without_room_or_tasks_left(at_once: int | None) -> None:
    backlog, run = Backlog(), MapRun(abs, "run", NO_POLICY, at_once)
    backlog.add_items(run, [(1,), (2,)])
    assert backlog.take(lambda *_: 0, lambda _: 1, 1, 9) == []
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 0) == []
    assert names_of(backlog.take(lambda *_: 1, lambda _: 1, 1, 9)) == [1, 2][: at_once or 1]


def test_each_name_has_its_room_and_its_time() -> None:
    """What was taken before is asked for; nothing, which a task takes at first, counts as 1."""
    backlog, queued = tasks("f", "f", "g", "h", "g")
    asked: list[object] = []

    def room(*about: object) -> int:
        asked.append(about)
        return 0 if about[0] == "h" else 5

    taken = backlog.take(room, lambda name: 0 if name == "f" else 7, 1, 9)
    assert taken == queued[:3]
    assert asked == [("f", 0), ("g", 2), ("h", 9)]
    assert [task.expected_ns for task in queued[:3]] == [0, 0, 7]


# One row per number of tasks that wait, workers, and tasks that one may get: how many it gets.
SHARES = [(5, 2, 9, 3), (4, 2, 9, 2), (5, 1, 3, 3), (1, 4, 9, 1), (9, 9, 9, 1)]


@pytest.mark.parametrize(("waiting", "among", "most", "taken"), SHARES)
def test_what_waits_is_shared(waiting: int, among: int, most: int, taken: int) -> None:
    backlog, queued = tasks(*"f" * waiting)
    assert backlog.take(lambda *_: 9, lambda _: 1, among, most) == queued[:taken]
    run = MapRun(abs, "run", NO_POLICY, None)
    backlog = Backlog()
    backlog.add_items(run, [(n,) for n in range(waiting)])
    assert len(names_of(backlog.take(lambda *_: 9, lambda _: 1, among, most))) == taken


def test_a_run_is_queued_once_and_again_when_it_was_empty() -> None:
    backlog, run = Backlog(), MapRun(abs, "run", NO_POLICY, None)
    backlog.add_items(run, [(1,)])
    assert backlog.is_wanted()
    backlog.add_items(run, [(2,)])
    assert ([*backlog], run.fed) == ([run], False)
    assert names_of(backlog.take(lambda *_: 9, lambda _: 1, 1, 9)) == [1, 2]
    assert [*backlog] == []
    backlog.add_items(run, [])
    assert [*backlog] == []
    backlog.add_items(run, [(3,)])
    assert [*backlog] == [run]


def test_what_is_held_waits_before_all_else() -> None:
    backlog, held = Backlog(), MapRun(abs, "held", NO_POLICY, None)
    backlog.add_items(held, [(1,)])
    held.put(0, ["large"], 1 << 40)
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9) == []
    task = new_task(5)
    backlog.add(task)
    assert [*backlog] == [held, task]
    assert backlog.clear() == [held, task]
    assert not backlog


def test_waiting_calls_are_counted_up_to_a_limit() -> None:
    backlog, _ = tasks("f", "f")
    backlog.add_items(MapRun(abs, "run", NO_POLICY, None), [(1,), (2,), (3,)])
    assert [backlog.at_most(limit) for limit in (1, 2, 4, 5, 6)] == [1, 2, 4, 5, 5]


def test_the_time_of_a_call_is_that_of_all_and_more_of_the_last() -> None:
    pace = Pace()
    pace.note("f", 300, 3)
    assert pace.expected_ns("f") == 100
    pace.note("f", 400, 2)
    assert pace.expected_ns("f") == 130
    assert pace.expected_ns("g") == 0


def test_the_time_of_so_many_functions_is_remembered() -> None:
    pace = Pace()
    for number in range(4096):
        pace.note(f"f{number}", 5)
    assert (pace.expected_ns("f0"), pace.expected_ns("f4095")) == (5, 5)
    pace.note("f0", 5)
    pace.note("f4096", 5)
    assert (pace.expected_ns("f0"), pace.expected_ns("f4096")) == (0, 5)


# One row per time of a call, time that a worker holds of a hundred, and whether it is idle: how
# many more calls it is sent.
ROOMS = [
    (10, 0, True, 10),
    (10, 50, False, 5),
    (10, 51, False, 0),
    (10, 95, True, 1),
    (300, 0, True, 1),
    (300, 0, False, 0),
    (1, 0, False, 100),
    (0.1, 0, False, 100),
]


@pytest.mark.parametrize(("each_ns", "held_ns", "idle", "calls"), ROOMS)
def test_how_many_calls_a_worker_is_sent(
    each_ns: float, held_ns: int, idle: bool, calls: int
) -> None:
    pace = Pace()
    pace.ahead_ns = 100
    pace.note("f", each_ns)
    assert pace.room("f", held_ns, idle=idle) == calls


def test_what_comes_of_a_run_that_was_left_is_passed_over() -> None:
    backlog, run = Backlog(), MapRun(abs, "run", NO_POLICY, None)
    backlog.add_items(run, [(1,), (2,)])
    span = backlog.take(lambda *_: 1, lambda _: 1, 1, 9)
    assert isinstance(span, Span)
    backlog.put_back([span])
    assert backlog.is_wanted()
    run.drop()
    backlog.add_items(run, [(3,)])
    assert not backlog.is_wanted()
    backlog.add_items(run, [(4,)])
    assert backlog.take(lambda *_: 1, lambda _: 1, 1, 9) == []
    assert ([*backlog], run.queued, backlog.first) == ([], False, 0)


def test_a_call_that_was_cancelled_is_not_wanted() -> None:
    backlog, (task, _) = tasks("f", "f")
    assert task.future.cancel()
    assert backlog.is_wanted()
    assert backlog.at_most(9) == 1


def test_a_run_is_cut_where_its_arguments_fill_a_message() -> None:
    backlog, run = Backlog(), MapRun(abs, "run", NO_POLICY, None)
    backlog.add_items(run, [(1,), (2,), (3,)])
    run.most_at_once = 2
    assert names_of(backlog.take(lambda *_: 9, lambda _: 1, 1, 9)) == [1, 2]


def test_what_comes_after_a_held_run_is_taken() -> None:
    backlog, held, task = Backlog(), MapRun(abs, "held", NO_POLICY, None), new_task(5)
    backlog.add_items(held, [(1,)])
    held.put(0, ["large"], 1 << 40)
    backlog.add(task)
    assert backlog.take(lambda *_: 9, lambda _: 1, 1, 9) == [task]
