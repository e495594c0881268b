"""``safepool.ThreadPool``: a ``ThreadPoolExecutor`` that fits, its calls capped."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import safepool


@pytest.fixture
def native() -> Any:
    """Native pools that have more than one thread in this process, and who tells it."""
    pytest.importorskip("scipy.linalg")
    control = pytest.importorskip("threadpoolctl")

    def sizes() -> set[int]:
        return {pool["num_threads"] for pool in control.threadpool_info()}

    with control.threadpool_limits(2):
        yield sizes


def test_it_has_as_many_threads_as_fit() -> None:
    with safepool.ThreadPool() as pool:
        assert isinstance(pool, ThreadPoolExecutor)
        assert pool._max_workers == safepool.cpu_count()
    with safepool.ThreadPool(3, "mine") as pool:
        assert pool._max_workers == 3
        name = pool.submit(lambda: threading.current_thread().name).result(timeout=60)
        assert name.startswith("mine")


def test_native_pools_are_held_in_each_of_its_threads_at_once(native: Any) -> None:
    """And have their size again when no call runs."""
    together = threading.Barrier(2)

    def look(_: object = None) -> tuple[set[int], int]:
        together.wait(timeout=60)
        found = native()
        together.wait(timeout=60)
        return found, threading.get_ident()

    before = native()
    with safepool.ThreadPool(2) as pool:
        found = list(pool.map(look, range(4)))
        assert [sizes for sizes, _ in found] == [{1}] * 4
        assert len({thread for _, thread in found}) == 2
        assert native() == before != {1}


def test_threads_per_worker_is_what_each_call_may_have(native: Any) -> None:
    with safepool.ThreadPool(1, threads_per_worker=2) as pool:
        assert pool.submit(native).result(timeout=60) == {2}


def test_calls_end_as_in_the_standard_pool() -> None:
    marks: list[str] = []
    argument = object()
    for new in (ThreadPoolExecutor, safepool.ThreadPool):
        with new(1, initializer=marks.append, initargs=("begun",)) as pool:
            assert pool.submit(lambda x: x, argument).result(timeout=60) is argument
            assert isinstance(pool.submit(int, "x").exception(timeout=60), ValueError)
            assert list(pool.map(pow, [2, 3], [3, 2])) == [8, 9]
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            pool.submit(abs, 1)
    assert marks == ["begun"] * 2
