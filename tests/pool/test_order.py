"""Calls begin in the order in which they were submitted, as far as the standard pool's do.

With one worker: in that order, whatever else happens. With several: a call whose arguments take
long to be pickled keeps a worker, so later calls never take the last one from it.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support_inside as inside
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool
from safepool.pool import hands
from safepool.pool.shell import dispatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future


class Beside:
    """Is pickled by code of the program, for so long, and arrives as a number."""

    def __init__(self, number: int, wait: Callable[[], object] = lambda: None) -> None:
        self.number, self.wait = number, wait

    def __reduce__(self) -> tuple[Any, ...]:
        self.wait()
        return int, (self.number,)


class Program:
    """Calls whose order is noted by the worker, in a file."""

    def __init__(self, pool: ProcessPool, path: Path, chance: random.Random) -> None:
        self.pool, self.chance = pool, chance
        self.path = str(path)
        self.other = ThreadPoolExecutor(1)
        self.numbers = itertools.count()
        self.given: list[Future[Any]] = []
        self.read: list[Iterator[object]] = []
        self.expected: list[int] = []

    def submit(
        self, function: Any = tasks.log, *more: object, make: Callable[[int], Any] = int
    ) -> None:
        number = next(self.numbers)
        self.expected.append(number)
        self.given.append(self.pool.submit(function, self.path, make(number), *more))

    def map(self, **options: Any) -> None:
        numbers = [next(self.numbers) for _ in range(self.chance.randint(1, 9))]
        self.expected += numbers
        if self.chance.random() < 0.3:
            numbers[-1] = beside(numbers[-1])
        function = functools.partial(tasks.log, self.path)
        self.read.append(self.pool.map(function, numbers, **options))

    def fail(self) -> None:
        self.given.append(self.pool.submit(tasks.log, self.path, threading.Lock()))

    def cancel(self) -> None:
        self.submit(make=self.chance.choice([int, slow]))
        if self.given[-1].cancel():
            self.expected.pop()
            self.given.pop()

    def die(self) -> None:
        self.submit(tasks.log_and_die_once)
        self.expected.append(self.expected[-1])

    def wait(self) -> None:
        for future in self.given:
            future.exception(timeout=30)

    def wait_for_all(self) -> None:
        for results in self.read:
            assert len([*results]) > 0
        self.read.clear()
        self.wait()

    def resize(self) -> None:
        self.wait_for_all()
        self.pool.resize(2)
        self.pool.submit(abs, -1).result(timeout=30)
        self.pool.resize(1)

    def run(self) -> None:
        ways: list[Callable[[], object]] = [
            self.submit,
            lambda: self.submit(make=beside),
            lambda: self.submit(make=slow),
            lambda: self.submit(tasks.log_with, np.zeros(1 << 17)),
            lambda: self.submit(lambda *args: tasks.log(*args)),  # noqa: PLW0108 -- by value
            lambda: self.other.submit(self.submit).result(timeout=30),
            self.map,
            lambda: self.map(chunksize=self.chance.randint(2, 5)),
            lambda: self.map(ordered=False),
            self.fail,
            self.cancel,
            self.wait,
        ]
        weights = [4] * len(ways)
        ways += [self.die, self.resize]
        weights += [1, 1]
        with self.other:
            for way in self.chance.choices(ways, weights, k=60):
                way()
            self.wait_for_all()
        found = Path(self.path).read_text().split()
        assert [*map(int, found)] == self.expected


def beside(number: int, wait: Callable[[], object] = lambda: None) -> Any:
    """Return what stands for a number, for the type checkers too."""
    return Beside(number, wait)


def slow(number: int) -> Any:
    return beside(number, lambda: time.sleep(0.02))


@pytest.mark.parametrize("seed", range(4))
def test_the_only_worker_begins_calls_in_their_order(tmp_path: Path, seed: int) -> None:
    """Whatever else happens; a call that is run again keeps its place."""
    with ProcessPool(1, retries=1) as pool:
        Program(pool, tmp_path / "lines", random.Random(seed)).run()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What waits for it may wait for ever, as if it used its processor."""
    monkeypatch.setattr(hands, "STANDS_S", float("inf"))
    monkeypatch.setattr(dispatch, "HELD_UP_S", 0.0)
    monkeypatch.setattr(dispatch, "_LOOK_S", 0.001)
    made = threading.Event()
    yield made
    made.set()


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that returns when the scheduler has looked several times."""
    looks = itertools.count()
    next_look = dispatch.Dispatch.next_look

    def counted(self: dispatch.Dispatch) -> float | None:
        next(looks)
        return next_look(self)

    monkeypatch.setattr(dispatch.Dispatch, "next_look", counted)

    def wait() -> None:
        end = next(looks) + 20
        wait_until(lambda: next(looks) > end)

    return wait


@pytest.mark.parametrize("first", ["submit", "map"])
def test_nothing_overtakes_to_the_only_worker(
    gate: threading.Event, look_often: Callable[[], None], first: str
) -> None:
    with ProcessPool(1, initializer=tasks.remember_order) as pool:
        waits = beside(0, gate.wait)
        if first == "submit":
            pool.submit(tasks.note_order, waits)
        else:
            pool.map(tasks.note_order, [waits])
        later = pool.submit(tasks.note_order, 1)
        results = pool.map(tasks.note_order, [2, 3], ordered=False)
        last = pool.submit(tasks.note_order, beside(4))
        look_often()
        assert [later.running(), last.running()] == [False, False]
        gate.set()
        assert (later.result(timeout=30), {*results}, last.result(timeout=30)) == (1, {2, 3}, 4)
        assert pool.submit(tasks.order).result(timeout=30) == [0, 1, 2, 3, 4]


def test_no_later_call_takes_the_last_worker(
    gate: threading.Event, look_often: Callable[[], None], tmp_path: Path
) -> None:
    """They wait for what the first makes, which would have no worker."""
    made = tmp_path / "made"
    with ProcessPool(2) as pool:
        first = pool.submit(tasks.touch_and_sleep, str(made), beside(0, gate.wait))
        later = [pool.submit(tasks.wait_for, str(made)) for _ in range(3)]
        wait_until(later[0].running)
        look_often()
        assert [future.running() for future in later] == [True, False, False]
        gate.set()
        first.result(timeout=30)
        assert [future.result(timeout=30) for future in later] == [None] * 3


def test_a_call_that_is_pickled_late_is_not_kept(gate: threading.Event) -> None:
    """Nor its result, not even until the next collection."""
    reached = threading.Event()
    gc.disable()
    try:
        with ProcessPool(1) as pool:
            future = pool.submit(abs, beside(3, lambda: (reached.set(), gate.wait())))
            assert reached.wait(30)
            wait_until(lambda: inside.has_calls_aside(pool))
            gate.set()
            assert future.result(timeout=30) == 3
            gone = weakref.ref(future)
            del future
            wait_until(lambda: gone() is None)
    finally:
        gc.enable()


def test_a_cancelled_call_keeps_no_worker(gate: threading.Event) -> None:
    with ProcessPool(1) as pool:
        reached = threading.Event()
        first = pool.submit(abs, beside(0, lambda: (reached.set(), gate.wait())))
        later = pool.submit(abs, -1)
        assert reached.wait(30)
        wait_until(first.cancel)
        assert later.result(timeout=30) == 1
        gate.set()


# One row per way in which pickling may ask the pool for something, and wait for it.
ASKS: dict[str, Callable[[ProcessPool], object]] = {
    "submit": lambda pool: pool.submit(abs, -5).result(timeout=30),
    "map": lambda pool: [*pool.map(abs, [-5, -6], timeout=30)],
    "a pickling that asks": lambda pool: pool.submit(
        abs, beside(0, lambda: ASKS["submit"](pool))
    ).result(timeout=30),
    "a generator": lambda pool: [*pool.map(abs, iter([-5]), timeout=30)],
}


@pytest.mark.usefixtures("gate")
@pytest.mark.parametrize("way", ASKS)
def test_pickling_that_asks_the_pool_waits_for_nothing_behind_it(way: str) -> None:
    with ProcessPool(1) as pool:
        first = pool.submit(abs, beside(-3, lambda: ASKS[way](pool)))
        assert pool.submit(abs, -1).result(timeout=30) == 1
        assert first.result(timeout=30) == 3


def test_pickling_that_stands_still_is_passed(gate: threading.Event) -> None:
    """One that uses its processor is not, nor one that has ended and is not yet sent."""
    ended, working = threading.Event(), hands.Hands("safepool-test", lambda: None, 2)

    def spin() -> None:
        while not ended.is_set():
            pass

    spins, waits = (
        working.do(run, lambda: None, 0.0) for run in (spin, lambda: gate.wait() and None)
    )
    assert spins is not None
    assert waits is not None
    wait_until(lambda: waits.rests_since(1.0) == waits.rests_since(2.0))
    wait_until(lambda: spins.rests_since(3.0) == 3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hands, "STANDS_S", 5.0)
        assert not spins.may_be_passed(7.9)
        assert waits.may_be_passed(8.1)
        ended.set()
        wait_until(lambda: spins.ended)
        assert not spins.may_be_passed(1000.0)
    gate.set()
    working.close()
