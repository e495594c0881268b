"""A map's two sides, without a process: items in, results in whatever order, results out."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import support_inside as inside
import support_tasks
from hypothesis import given
from hypothesis import strategies as st
from support_processes import wait_until

from safepool import ProcessPool
from safepool.pool.calls.mapping import MapRun, Span
from safepool.pool.calls.results import Results, end_failed
from safepool.pool.core.policy import NO_POLICY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from safepool.pool.calls.mapping import Item


def new_run() -> MapRun:
    return MapRun(abs, "abs", NO_POLICY, None)


class Feed:
    """In the place of a pool: works in spans of random lengths, the last first."""

    def __init__(self, number: int, wrong: frozenset[int] = frozenset()) -> None:
        self.rng, self.wrong = random.Random(number), wrong
        self.fed = 0
        self.most_waiting = 0
        self.last = self.given_up = self.closed = False

    def check_may_wait(self) -> None: ...

    def add_items(self, run: MapRun, items: list[Item], *, last: bool) -> None:
        if items and self.closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        assert not self.last
        self.last = last
        self.fed += len(items)
        self.most_waiting = max(self.most_waiting, len(items))
        run.waiting.add(list(items))
        spans = []
        while run.waiting:
            spans.append(run.cut(self.rng.randint(1, 9)))
        for span in sorted(spans, key=lambda span: -span.start):
            self.work(run, span)

    def work(self, run: MapRun, span: Span) -> None:
        values: list[Any] = []
        start = span.start
        for index, (item,) in enumerate(span.items, span.start):
            if index in self.wrong:
                if values:
                    run.put(start, values)
                run.put_error(index, ValueError(item))
                values, start = [], index + 1
            else:
                values.append(item)
        if values:
            run.put(start, values)
        run.tell()

    def give_up(self, run: MapRun) -> None:
        assert not self.given_up
        self.given_up = True
        run.drop()


def outcomes_of(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yield values, and in the place of an error that was raised or returned its index."""
    while True:
        try:
            value = next(iterator)
        except StopIteration:
            return
        except ValueError as error:
            value = error
        yield ("wrong", *value.args) if isinstance(value, ValueError) else value


@given(
    st.integers(0, 2000),
    st.none() | st.integers(1, 40),
    st.integers(0, 99),
    st.frozensets(st.integers(0, 2000), max_size=2),
    st.none() | st.integers(0, 2000),
    st.none() | st.integers(0, 2000),
    st.booleans(),
    st.booleans(),
)
def test_all_results_come_and_errors_in_their_place(
    count: int,
    ahead: int | None,
    number: int,
    wrong: frozenset[int],
    stop_at: int | None,
    finish_at: int | None,
    ordered: bool,
    returned: bool,
) -> None:
    """Also when somebody takes the rest of the items in between, or leaves early."""
    feed = Feed(number, wrong)
    run = MapRun(abs, "abs", NO_POLICY, None, ordered=ordered, returns_errors=returned)
    taken = 0

    def items() -> Iterator[Item]:
        nonlocal taken
        for n in range(count):
            taken += 1
            yield (n,)

    results = Results(run, items(), feed, ahead, None)
    iterator = results.iterate(None)
    found: list[Any] = []
    for outcome in outcomes_of(iterator):
        found.append(outcome)
        assert ahead is None or taken <= len(found) + ahead
        if len(found) == finish_at:
            results.finish()
            assert ahead is not None or taken == count
        if len(found) == stop_at:
            break
    iterator.close()
    assert next(iterator, None) is None

    expected = [("wrong", n) if n in wrong else n for n in range(count)]
    if ordered:
        assert found == expected[: len(found)]
    assert len(set(found)) == len(found) == min(count, stop_at or count)
    assert set(found) <= set(expected)
    everything = run.taken == count and feed.last
    assert feed.given_up == (not everything and results.seen)


def test_an_error_of_a_call_is_not_the_end_and_one_of_the_iterator_is() -> None:
    def items() -> Iterator[Item]:
        yield from [(0,), (1,), (2,)]
        raise OSError("no more items")

    feed = Feed(1, frozenset({0, 2}))
    iterator = Results(new_run(), items(), feed, 1, None).iterate(None)
    for expected in [ValueError, None, ValueError, OSError]:
        if expected is None:
            assert next(iterator) == 1
            continue
        with pytest.raises(expected):
            next(iterator)
    assert list(iterator) == []


def test_an_error_that_is_kept_does_not_keep_the_map() -> None:
    """Else a ``with`` block that it leaves would wait for calls whose results nobody takes."""
    feed = Feed(1, frozenset({0}))
    kept = None
    try:
        list(Results(new_run(), iter([(0,), (1,)]), feed, 1, None).iterate(None))
    except ValueError as error:
        kept = error
    assert kept is not None
    assert feed.given_up


def test_leaving_a_pool_by_an_error_of_a_map_ends_that_map() -> None:
    class Shared(Feed):
        def give_up(self, run: MapRun) -> None:
            run.drop()

    left, other = Shared(1, frozenset({0})), Shared(1, frozenset({0}))
    held = [
        Results(new_run(), iter([(0,), (1,), (2,)]), feed, 1, None).iterate(None)
        for feed in (left, left, other)
    ]
    for iterator in held:
        with pytest.raises(ValueError, match="0"):
            next(iterator)
    assert next(held[1]) == 1  # somebody goes on after the error
    end_failed(left)
    assert [next(iterator, None) for iterator in held] == [None, 2, 1]


def test_two_threads_that_ask_one_iterator_do_not_take_it_apart() -> None:
    """As with a generator: the one that comes second is told, and the first gets its result."""

    class Late(Feed):
        def work(self, run: MapRun, span: Span) -> None: ...

    run = new_run()
    iterator = Results(run, iter([(5,)]), Late(1), None, None).iterate(None)
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(iterator))
    reader.start()
    wait_until(lambda: bool(run._waiters._places))
    with pytest.raises(ValueError, match="another thread"):
        next(iterator)
    run.put(0, [5])
    run.tell()
    reader.join(30)
    assert found == [5]


def test_an_iterator_that_raises_does_so_when_its_turn_comes() -> None:
    def items() -> Iterator[Item]:
        yield (0,)
        yield (1,)
        raise OSError("no more items")

    iterator = Results(new_run(), items(), Feed(1), 1, None).iterate(None)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(OSError, match="no more items"):
        next(iterator)
    assert list(iterator) == []


def test_an_iterator_that_raises_at_once_does_so_in_the_call() -> None:
    def items() -> Iterator[Item]:
        raise OSError("no items")
        yield (0,)

    with pytest.raises(OSError, match="no items"):
        Results(new_run(), items(), Feed(1), None, None)


def test_a_shutdown_is_raised_after_the_results_that_are_there() -> None:
    """Neither are they lost, nor does the map seem to have ended well."""
    feed = Feed(1)
    iterator = Results(new_run(), ((n,) for n in itertools.count()), feed, 10, None).iterate(None)
    found = [next(iterator)]
    feed.closed = True
    with pytest.raises(RuntimeError, match="after shutdown"):
        found.extend(iterator)
    assert found == [*range(feed.fed)]


def test_who_finishes_a_map_waits_for_who_takes_its_items() -> None:
    """Two threads take from one iterator: each item once, in order."""
    inside, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[Item]:
        for n in range(40_000):
            if n == 20_000:  # beyond what is taken before the first result is asked for
                inside.set()
                go_on.wait(30)
            yield (n,)

    results = Results(new_run(), items(), Feed(3), None, None)
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(results.iterate(None)))
    finisher = threading.Thread(target=results.finish)
    reader.start()
    assert inside.wait(30)
    finisher.start()
    time.sleep(0.05)
    go_on.set()
    reader.join(30)
    finisher.join(30)
    assert found == [*range(40_000)]


def test_a_result_that_does_not_come_in_time_raises() -> None:
    class Never(Feed):
        def work(self, run: MapRun, span: Span) -> None: ...

    deadline = time.monotonic() + 0.01
    iterator = Results(new_run(), iter([(1,)]), Never(1), None, deadline).iterate(None)
    with pytest.raises(TimeoutError):
        next(iterator)


def test_a_run_that_is_stopped_ends_where_no_worker_has_its_calls() -> None:
    run = new_run()
    run.waiting.add([(n,) for n in range(4)])
    span = run.cut(2)
    run.stop(CancelledError)
    run.put(span.start, [10, 11])

    assert run.take(0, None) == [10, 11]
    with pytest.raises(CancelledError):
        run.take(2, None)


def test_a_span_that_is_given_up_has_an_error_for_each_call() -> None:
    run = new_run()
    run.waiting.add([(n,) for n in range(3)])
    run.give_up(run.cut(2), lambda: ValueError("gone"))

    for index in range(3):
        with pytest.raises(ValueError, match="gone"):
            run.take(index, None)


def test_a_run_that_is_dropped_keeps_nothing() -> None:
    run = new_run()
    run.waiting.add([(n,) for n in range(3)])
    run.drop()
    run.put(0, [1])
    run.put_error(1, ValueError())
    assert not run.waiting
    assert not vars(run)["_results"]


@given(st.integers(2, 9), st.data())
def test_a_span_can_be_divided(count: int, data: st.DataObject) -> None:
    run = new_run()
    run.waiting.add([(n,) for n in range(count + 1)])
    run.cut(1)
    span = run.cut(count)
    span.attempts = 2
    at = data.draw(st.integers(1, count - 1))
    place = data.draw(st.integers(0, count - 1))

    alone = span.only(place)
    rest = span.split(at)

    assert (alone.start, alone.items, alone.alone) == (1 + place, [(1 + place,)], True)
    assert alone.attempts == (2 if place == 0 else 0)
    assert (span.start, span.count) == (1, at)
    assert (rest.start, rest.items) == (1 + at, [(n,) for n in range(1 + at, 1 + count)])
    assert rest.attempts == 0


def test_what_was_taken_is_not_kept() -> None:
    """Neither by the run nor by the generator."""

    class Value:
        alive = 0

        def __init__(self) -> None:
            Value.alive += 1

        def __del__(self) -> None:
            Value.alive -= 1

    results = Results(new_run(), ((Value(),) for _ in range(100)), Feed(1), 5, None)
    for value in results.iterate(None):
        del value
        gc.collect(0)
        assert Value.alive <= 20
    assert Value.alive == 0


# One row per way in which two calls of a map come to the same object: the items, and whether they
# are the arguments of one iterable. Each call appends to what it is given, and returns its length.
IN_COMMON: dict[str, tuple[Any, ...]] = {
    "the same argument": ([[]] * 40,),
    "a part of an argument": ([([], 1)] * 40,),
    "one of several arguments": ([[]] * 40, range(40)),
    "deep inside of each": ([{"deep": [one]} for one in [[]] * 40],),
    "an instance of what the worker imports": ([SimpleNamespace(found=[])] * 40,),
}


@pytest.mark.parametrize("case", IN_COMMON)
def test_no_call_sees_what_another_has_changed(case: str) -> None:
    """As with the standard pool, whose calls travel one by one."""
    with ProcessPool(1) as pool:
        list(pool.map(support_tasks.append_somewhere, [[]] * 3))  # so short that many go at once
        assert set(pool.map(support_tasks.append_somewhere, *IN_COMMON[case])) == {1}


def test_what_a_chunk_has_in_common_stays_so() -> None:
    """As with the standard pool, which pickles a chunk in one piece."""
    with ProcessPool(1) as pool:
        lengths = list(pool.map(support_tasks.append_somewhere, [[]] * 4, chunksize=2))
    assert lengths == [1, 2, 1, 2]


@pytest.mark.parametrize("resized", [False, True])
def test_a_chunk_whose_calls_have_something_in_common_is_not_divided(resized: bool) -> None:
    """Though it takes long, and another worker has nothing to do, or is to have nothing."""

    def append_slowly(found: list[int]) -> int:
        time.sleep(0.05)
        return support_tasks.append_somewhere(found)

    with ProcessPool(2) as pool:
        inside.start_all(pool)
        wait_until(lambda: [one.state for one in pool.workers()] == ["idle"] * 2)
        results = pool.map(append_slowly, [[]] * 12, chunksize=4)
        first = next(results)
        if resized:
            pool.resize(1)
        assert [first, *results] == [1, 2, 3, 4] * 3


def wait_for(path: Path, number: int) -> int:
    """Return the number; the first when there is a file at the path."""
    while number == 0 and not path.exists():
        time.sleep(0.005)
    return number


# One row per way in which the items come.
UNORDERED: dict[str, tuple[Callable[[], Iterable[int]], dict[str, int]]] = {
    "a list": (lambda: [*range(300)], {}),
    "a generator": (lambda: (n for n in range(300)), {}),
    # Each of them waits until its result is asked for: not many, for a machine that is busy.
    "a few ahead": (lambda: (n for n in range(40)), {"buffersize": 3}),
    "chunks": (lambda: [*range(300)], {"chunksize": 2}),
}


def test_no_result_waits_for_a_slow_first_call(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        for number, (items, options) in enumerate(UNORDERED.values()):
            go_on = tmp_path / str(number)
            call, others = partial(wait_for, go_on), {*items()} - {0}
            results = pool.map(call, items(), ordered=False, timeout=60, **options)  # type: ignore[call-overload]
            try:
                found = {next(results) for _ in others}
            finally:
                go_on.touch()
            assert found == others
            assert list(results) == [0]


def end_or_fail(number: int) -> int:
    if number == 1:
        raise ValueError(number)
    if number == 3:
        os._exit(3)
    if number == 5:
        raise SystemExit(5)
    return number


@pytest.mark.parametrize("ordered", [True, False])
def test_exceptions_are_results_if_asked_for(ordered: bool) -> None:
    with ProcessPool(2) as pool:
        for progress in (False, "a bar"):
            results = list(
                pool.map(
                    end_or_fail,
                    (n for n in range(8)),
                    ordered=ordered,
                    return_exceptions=True,
                    progress=progress,
                )
            )
            names = [
                type(one).__name__ if isinstance(one, BaseException) else str(one)
                for one in results
            ]
            expected = ["0", "ValueError", "2", "WorkerDiedError", "4", "SystemExit", "6", "7"]
            assert sorted(names) == sorted(expected)
            assert not ordered or names == expected


def test_calls_that_were_cancelled_are_exceptions_in_their_place() -> None:
    with ProcessPool(1) as pool:
        results = pool.map(time.sleep, [60] * 5, return_exceptions=True)
        pool.kill_workers()
        names = [type(one).__name__ for one in results]
    assert set(names) <= {"CancelledError", "WorkerDiedError"}
    assert len(names) == 5
