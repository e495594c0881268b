"""Results that nobody fetches: a map waits for its reader, and for nobody who cannot come."""

from __future__ import annotations

import gc
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support_arrays as arrays
import support_inside as inside
import support_tasks as tasks
from support_processes import kill, wait_until

from safepool import ProcessPool
from safepool.pool.calls import mapping

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 40


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "MOST_HELD_BYTES", 3 * 8 * arrays.ITEMS)


def mark_and_ones(folder: Path, number: int) -> Any:
    (folder / str(number)).touch()
    return np.full(arrays.ITEMS, number)


def begun(folder: Path) -> int:
    """Return how many calls have begun."""
    return len(list(folder.iterdir()))


def wait_until_full(pool: ProcessPool) -> None:
    wait_until(lambda: inside.waits_for_its_reader(pool))


def test_a_map_waits_for_its_reader_and_all_results_come(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        pool.submit(arrays.ones, 3).result(timeout=60)
        results = pool.map(mark_and_ones, itertools.repeat(tmp_path, COUNT), range(COUNT))
        wait_until_full(pool)
        assert 3 <= begun(tmp_path) < COUNT - 10

        for number, array in enumerate(results):
            assert array[-1] == number
            del array
        assert number == COUNT - 1


def test_others_go_on_meanwhile(tmp_path: Path) -> None:
    """Tasks and other maps, before and after; also one that fills up as well."""
    with ProcessPool(2) as pool:
        first = pool.map(mark_and_ones, [tmp_path] * COUNT, range(COUNT))
        wait_until_full(pool)
        second = pool.map(arrays.ones, [arrays.ITEMS] * COUNT)
        assert pool.submit(tasks.square, 3).result(timeout=60) == 9
        assert list(pool.map(tasks.square, range(100), timeout=60))[-1] == 99 * 99
        assert sum(int(array[0]) for array in second) == COUNT
        assert [int(array[0]) for array in first] == list(range(COUNT))


def test_a_pool_that_is_shut_down_runs_everything(tmp_path: Path) -> None:
    """As the standard pool: the results are there for who still has the iterator."""
    with ProcessPool(2) as pool:
        results = pool.map(mark_and_ones, [tmp_path] * COUNT, range(COUNT))
    assert begun(tmp_path) == COUNT
    assert [int(array[0]) for array in results] == list(range(COUNT))


def test_a_map_that_nobody_can_read_runs_to_its_end_and_keeps_nothing(tmp_path: Path) -> None:
    """It is there for what its calls do."""
    with ProcessPool(2) as pool:
        results = pool.map(mark_and_ones, [tmp_path] * COUNT, range(COUNT))
        wait_until_full(pool)
        del results
        gc.collect()
        wait_until(lambda: begun(tmp_path) == COUNT)
        pool.submit(tasks.square, 1).result(timeout=60)
        assert begun(tmp_path) == COUNT


def test_a_full_map_goes_on_when_the_idle_workers_were_killed(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        results = pool.map(mark_and_ones, [tmp_path] * COUNT, range(COUNT))
        wait_until_full(pool)
        kill(list(pool._processes))
        wait_until(lambda: not pool._processes)
        assert [int(array[0]) for array in results] == list(range(COUNT))


def test_leaving_a_full_map_early_frees_what_is_there(tmp_path: Path) -> None:
    with ProcessPool(2) as pool:
        results = pool.map(mark_and_ones, [tmp_path] * COUNT, range(COUNT))
        assert next(results)[0] == 0
        wait_until_full(pool)
        results.close()  # type: ignore[attr-defined]
        assert pool.submit(tasks.square, 1).result(timeout=60) == 1
        time.sleep(0.4)  # no call may begin meanwhile
        assert begun(tmp_path) < COUNT


def test_errors_of_a_full_map_are_raised_in_their_turn() -> None:
    with ProcessPool(1) as pool:
        results = pool.map(ones_or_error, range(COUNT))
        time.sleep(0.3)
        with pytest.raises(ValueError, match="no 20"):
            list(results)


def ones_or_error(number: int) -> Any:
    if number == 20:
        raise ValueError("no 20")
    return np.ones(arrays.ITEMS)
