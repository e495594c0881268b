"""What calls and workers cost, in counts: pickles, blocks of memory, switches, imports. No times.

The calls of the system in one round trip are counted in test_turns.py.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import support_born
import support_inside as inside
from support_processes import wait_until

import safepool
from safepool.pool.shell.staff import Staff

if TYPE_CHECKING:
    from safepool.pool.shell.worker import Worker

resource = pytest.importorskip("resource", reason="Windows has none")

CALLS = 1000


class Counted:
    """Notes each time that one of its objects is pickled in this process."""

    pickled: ClassVar[list[str]] = []

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        self.pickled.append(type(self).__name__)
        return type(self), (self.number,)


class Function(Counted):
    """Is noted as well."""

    def __call__(self, item: Counted) -> Counted:
        return Counted(item.number + self.number)


def pickled_here() -> list[str]:
    return [*Counted.pickled]


def forget() -> None:
    Counted.pickled.clear()


@pytest.mark.parametrize("way", ["map", "submit"])
def test_arguments_and_results_are_pickled_once(way: str) -> None:
    """Or few more often: on a busy machine a pool takes calls back and sends them again."""
    count = 100
    expected = ["Counted"] * count + ["Function"] * (1 if way == "map" else count)
    with safepool.ProcessPool(1) as pool:
        for _ in range(50):
            pool.submit(forget).result()
            forget()
            function, items = Function(1), [Counted(n) for n in range(count)]
            if way == "map":
                results = [*pool.map(function, items)]
            else:
                results = [one.result() for one in [pool.submit(function, item) for item in items]]
            assert [one.number for one in results] == [*range(1, count + 1)]
            assert pool.submit(pickled_here).result() == ["Counted"] * count
            if len(Counted.pickled) <= 2 * len(expected):
                break
        else:
            pytest.fail(f"{len(Counted.pickled)} objects were pickled, of {len(expected)}")


def test_a_call_that_waits_takes_few_blocks_of_memory() -> None:
    """It takes 9 or 10: future, call, arguments, name, and what they are kept in."""
    with safepool.ProcessPool(1) as pool:
        running = pool.submit(time.sleep, 600)
        wait_until(running.running)
        gc.collect()
        before = sys.getallocatedblocks()
        waiting = [pool.submit(abs, n) for n in range(CALLS)]
        gc.collect()
        taken = sys.getallocatedblocks() - before
        pool.kill_workers()
    assert all(one.done() for one in waiting)
    assert taken < 16 * CALLS


@pytest.mark.parametrize("way", ["map", "submit"])
def test_calls_that_are_done_keep_no_memory(way: str) -> None:
    """Some 300 kB in all: a map reads ahead, and a thread has its own."""
    count = CALLS if way == "submit" else 5 * CALLS

    def call(count: int) -> None:
        if way == "map":
            for _ in pool.map(abs, range(count)):
                pass
        else:
            for number in range(count):
                pool.submit(abs, number).result()

    with safepool.ProcessPool(1) as pool:
        call(count)
        gc.collect()
        before = sys.getallocatedblocks()
        tracemalloc.start()
        try:
            call(count)
            most_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        gc.collect()
        kept = sys.getallocatedblocks() - before
    assert kept < count // 2
    assert most_bytes < 10**6


def test_calls_of_a_map_share_their_switches() -> None:
    """Messages have many calls: neither the program nor a worker waits for each."""

    def map_again() -> tuple[int, int]:
        """Switches in this process, and in the worker."""
        here, there = switches(), pool.submit(switches).result()
        list(pool.map(abs, range(10 * CALLS)))
        return switches() - here, pool.submit(switches).result() - there

    with safepool.ProcessPool(1) as pool:
        # Some 20 and 3; more on a busy machine.
        counts = [map_again() for _ in range(5)]
    assert min(here for here, _ in counts) < CALLS
    assert min(there for _, there in counts) < CALLS


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere recv() waits for data alone")
def test_a_worker_wakes_up_once_for_each_call() -> None:
    """It sleeps on when the program reads its answer, which wakes a thread in recv()."""

    def call_again() -> int:
        before: int = pool.submit(switches).result()
        for number in range(CALLS):
            pool.submit(abs, number).result()
        return pool.submit(switches).result() - before

    with safepool.ProcessPool(1) as pool:
        assert min(call_again() for _ in range(5)) < 1.25 * CALLS


@pytest.mark.skipif(sys.platform != "linux", reason="lanes need eventfd(2) and the board")
def test_a_call_finds_a_lane_as_soon_as_another_thread_may_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler's system call, which makes lanes callers' own, lets the next call come."""
    found: list[bool] = []
    look_away = Staff.look_away

    def seen(staff: Staff, worker: Worker) -> None:
        found.append(inside.may_send_alone(pool))
        look_away(staff, worker)

    monkeypatch.setattr(Staff, "look_away", seen)
    with safepool.ProcessPool(1) as pool:
        while not found:
            pool.submit(abs, -1).result()
    assert found[0]


def switches() -> int:
    """How often this process has given its CPU away to wait for something."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked from a server on Linux")
def test_a_worker_imports_and_compiles_nothing_that_its_fork_server_could() -> None:
    """Each worker would do it again: imports, and the patterns of the libraries' filters."""
    warnings.filterwarnings("ignore", message=support_born.PATTERN)
    with safepool.ProcessPool(1, preload=["support_born"]) as pool:
        imported = pool.submit(support_born.imported).result()
        compiled = pool.submit(support_born.compiled).result()
        assert pool.submit(has_filter).result()

    assert imported == set()
    assert support_born.PATTERN not in compiled


def has_filter() -> bool:
    """Whether the program's filter has arrived, and been read."""
    return any(getattr(one[1], "pattern", "") == support_born.PATTERN for one in warnings.filters)
