"""``@safepool.worker`` caps native threads around a function in any process."""

from __future__ import annotations

import inspect
import multiprocessing
import operator
import os
import pickle
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import support_decorated as decorated
import support_tasks as tasks

import safepool

if TYPE_CHECKING:
    from pathlib import Path


def uncapped() -> list[tuple[str, int]]:
    return tasks.native_pools("scipy.linalg")


def test_the_body_is_capped_and_the_process_restored() -> None:
    before = uncapped()
    inside = decorated.pools()

    assert inside
    assert {count for _, count in inside} == {1}
    assert uncapped() == before


def test_a_standard_pool_runs_it_capped() -> None:
    """The standard pickler takes it by name, as it takes the function itself."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        pools = pool.submit(decorated.pools).result(timeout=60)

    assert pools
    assert {count for _, count in pools} == {1}


def test_calls_that_overlap_in_two_threads_are_capped_and_restored() -> None:
    """The first to leave must not lift the other's cap, nor the last keep it for ever."""
    before = uncapped()
    first_in, first_may_go, second_in = (threading.Event() for _ in range(3))
    found: list[list[tuple[str, int]]] = []
    first = threading.Thread(target=decorated.wait, args=(first_in, first_may_go))

    def look() -> None:
        first_in.wait(30)
        found.append(decorated.pools_after(second_in, first))

    second = threading.Thread(target=look)
    first.start()
    second.start()
    second_in.wait(30)
    first_may_go.set()
    for thread in (first, second):
        thread.join(30)

    blas = [count for api, count in found[0] if api == "openblas"]
    assert blas
    assert set(blas) == {1}
    assert uncapped() == before


def test_the_environment_is_restored() -> None:
    """Also when blocks are nested: the variables hold inside, and not a moment longer."""
    before = dict(os.environ)
    outer, inner = decorated.nested_variables()

    assert outer == inner == "1"
    assert dict(os.environ) == before


def test_it_runs_in_our_pool() -> None:
    with safepool.ProcessPool(1) as pool:
        assert pool.submit(decorated.add, 1, y=2).result(timeout=60) == 3
        assert pool.submit(safepool.worker(lambda x: x + 1), 2).result(timeout=60) == 3


def test_it_survives_pickling_by_the_standard_pickler() -> None:
    assert pickle.loads(pickle.dumps(decorated.add)) is decorated.add


def test_it_looks_like_the_function() -> None:
    assert decorated.add.__name__ == "add"
    assert decorated.add.__doc__ == "Add two numbers."
    assert str(inspect.signature(decorated.add)) == "(x: 'int', y: 'int' = 0) -> 'int'"


def test_what_the_function_raises_passes_and_the_cap_is_lifted() -> None:
    before = uncapped()
    with pytest.raises(ZeroDivisionError):
        decorated.divide(1, 0)
    assert uncapped() == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs the affinity mask")
def test_uncapped_pools_have_several_threads_here() -> None:
    """Otherwise the tests above could not fail."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("on one CPU every native pool has one thread by itself")
    if any(os.environ.get(name) == "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")):
        pytest.skip("the environment caps this process already")
    assert max(count for _, count in uncapped()) > 1


# Not less: on a busy machine a call that does not sleep takes its time, too.
@safepool.worker(timeout=1.5)
def _sleeps(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@safepool.worker(retries=2)
def _dies_at_first(marks: str) -> int:
    with open(marks, "a+") as file:
        file.write("x")
        file.seek(0)
        count = len(file.read())
    if count < 3:
        os._exit(1)
    return count


def test_its_timeout_ends_the_call_and_nothing_else() -> None:
    with safepool.ProcessPool(1) as pool:
        late, early = pool.submit(_sleeps, 30), pool.submit(_sleeps, 0)
        with pytest.raises(safepool.TaskTimeoutError, match=r"_sleeps ran for more than 1\.5 s"):
            late.result(timeout=60)
        assert early.result(timeout=60) == "slept"


def test_its_timeout_takes_the_place_of_the_pools() -> None:
    with safepool.ProcessPool(1, timeout=0.2) as pool:
        assert pool.submit(safepool.worker(time.sleep, timeout=30), 0.5).result(timeout=60) is None
        with pytest.raises(TimeoutError):
            pool.submit(time.sleep, 30).result(timeout=60)
        with pytest.raises(TimeoutError):
            list(pool.map(time.sleep, [30]))


def test_its_retries_are_for_lost_workers_only(tmp_path: Path) -> None:
    with safepool.ProcessPool(1) as pool:
        marks = tmp_path / "marks"
        assert pool.submit(_dies_at_first, str(marks)).result(timeout=60) == 3
        divide = safepool.worker(operator.truediv, retries=5)
        with pytest.raises(ZeroDivisionError):
            pool.submit(divide, 1, 0).result(timeout=60)


def test_its_threads_are_those_of_the_body() -> None:
    """Two threads where it asks for two, and one again afterwards."""
    two = safepool.worker(tasks.native_pools, threads=2)
    before = uncapped()
    if max(count for _, count in before) < 2:
        pytest.skip("on one CPU every native pool has one thread by itself")
    assert {count for _, count in two("scipy.linalg")} == {2}
    with safepool.ProcessPool(1) as pool:
        inside = pool.submit(two, "scipy.linalg").result(timeout=60)
        after = pool.submit(tasks.native_pools, "scipy.linalg").result(timeout=60)
    assert {count for api, count in inside if api == "openblas"} == {2}
    assert {count for _, count in after} == {1}


# One row per wrong argument: what is passed, and what is raised.
WRONG: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "no time": ({"timeout": 0}, ValueError),
    "an endless time": ({"timeout": float("inf")}, ValueError),
    "negative retries": ({"retries": -1}, ValueError),
    "retries in words": ({"retries": "many"}, TypeError),
    "no threads": ({"threads": 0}, ValueError),
    "half a thread": ({"threads": 0.5}, TypeError),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_told_where_they_are_written(case: str) -> None:
    arguments, error = WRONG[case]
    with pytest.raises(error, match=f"{next(iter(arguments))} must be "):
        safepool.worker(**arguments)


def test_it_takes_only_what_can_be_called() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="not 3"):
        safepool.worker(wrong)
