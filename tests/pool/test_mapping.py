"""A map's two sides, without a process: items in, results in whatever order, results out."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks
from hypothesis import given
from hypothesis import strategies as st
from support_processes import wait_until

from safepool import ProcessPool
from safepool.pool.core.policy import NO_POLICY
from safepool.pool.mapping import MapRun, Results, Span

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.pool.mapping import Item


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


@given(
    st.integers(0, 2000),
    st.none() | st.integers(1, 40),
    st.integers(0, 99),
    st.frozensets(st.integers(0, 2000), max_size=2),
    st.none() | st.integers(0, 2000),
    st.none() | st.integers(0, 2000),
)
def test_results_come_in_order_up_to_the_first_error(
    count: int,
    ahead: int | None,
    number: int,
    wrong: frozenset[int],
    stop_at: int | None,
    finish_at: int | None,
) -> None:
    """Also when somebody takes the rest of the items in between, or leaves early."""
    feed, run = Feed(number, wrong), new_run()
    taken = 0

    def items() -> Iterator[Item]:
        nonlocal taken
        for n in range(count):
            taken += 1
            yield (n,)

    results = Results(run, items(), feed, ahead, None)
    iterator = results.iterate(None)
    found, raised = [], None
    right = min([index for index in wrong if index < count], default=count)
    try:
        while stop_at is None or len(found) < stop_at:
            found.append(next(iterator))
            assert ahead is None or taken <= len(found) + ahead
            if len(found) == finish_at:
                results.finish()
                assert ahead is not None or taken == count
    except StopIteration:
        assert right == count
    except ValueError as error:
        raised = error.args
    iterator.close()

    assert found == [*range(right)][:stop_at]
    assert raised in (None, (right,))
    everything = len(found) == count and feed.last
    assert feed.given_up == (not everything and results.seen)


def test_an_iterator_that_raises_does_so_when_its_turn_comes() -> None:
    def items() -> Iterator[Item]:
        yield (0,)
        yield (1,)
        raise OSError("no more items")

    iterator = Results(new_run(), items(), Feed(1), 1, None).iterate(None)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(OSError, match="no more items"):
        next(iterator)


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
        wait = [pool.submit(time.sleep, 0.05) for _ in range(2)]
        wait_until(lambda: sum(one.ready for one in pool._scheduler.workers()) == 2)
        assert [future.result(timeout=30) for future in wait] == [None, None]
        results = pool.map(append_slowly, [[]] * 12, chunksize=4)
        first = next(results)
        if resized:
            pool.resize(1)
        assert [first, *results] == [1, 2, 3, 4] * 3
