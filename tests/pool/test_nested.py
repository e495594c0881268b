"""The budget travels down: pools inside workers see the worker's share."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import safepool
from safepool import ProcessPool


def sizes() -> dict[str, int]:
    """Return what everybody in this process believes about the number of CPUs."""
    import multiprocessing

    import joblib
    import loky

    found = {
        "safepool": safepool.cpu_count(),
        "loky": loky.cpu_count(),
        "joblib": joblib.cpu_count(),
        "os": os.cpu_count() or 0,
        "multiprocessing": multiprocessing.cpu_count(),
        "ProcessPool": ProcessPool()._max_workers,
        "ProcessPoolExecutor": ProcessPoolExecutor()._max_workers,  # type: ignore[attr-defined]
    }
    if sys.version_info >= (3, 13):
        found["os.process_cpu_count"] = os.process_cpu_count() or 0
    return found


def test_everybody_in_a_worker_sees_its_share() -> None:
    with ProcessPool(2) as pool:
        found = pool.submit(sizes).result(timeout=60)

    assert found == dict.fromkeys(found, 1)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_also_with_the_other_start_methods(method: str) -> None:
    import multiprocessing
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPool(2, mp_context=multiprocessing.get_context(method)) as pool:
            found = pool.submit(sizes).result(timeout=60)

    assert found == dict.fromkeys(found, 1)


def test_threads_of_a_worker_are_its_share() -> None:
    with ProcessPool(1, threads_per_worker=2) as pool:
        assert pool.submit(os.cpu_count).result(timeout=60) == 2


def inner_pool(_: int) -> set[int]:
    with ProcessPool() as pool:
        return set(pool.map(_pid, range(6)))


def inner_standard_pool(_: int) -> set[int]:
    with ProcessPoolExecutor() as pool:
        return set(pool.map(_pid, range(6)))


def inner_joblib(_: int) -> set[int]:
    from joblib import Parallel, delayed

    return set(Parallel(n_jobs=-1)(delayed(_pid)(n) for n in range(6)))


def _pid(_: int) -> int:
    import time

    time.sleep(0.02)
    return os.getpid()


@pytest.mark.parametrize("inner", [inner_pool, inner_standard_pool, inner_joblib])
def test_pools_inside_workers_do_not_multiply(inner: Any) -> None:
    """Two workers with a pool of their own each: two processes that work, not four."""
    with ProcessPool(2) as pool:
        for found in pool.map(inner, range(2)):
            assert len(found) == 1


def test_after_a_pool_in_a_task_the_script_is_still_there() -> None:
    """A worker's first frame is its launcher's, whose globals are not those of the script."""

    def use_a_pool() -> bool:
        from safepool.transport.marks import main_space

        with ProcessPool(1) as inner:
            assert inner.submit(pow, 2, 3).result(timeout=60) == 8
        return main_space() is vars(sys.modules["__main__"])

    with ProcessPool(1) as pool:
        assert pool.submit(use_a_pool).result(timeout=60)


def test_a_pool_inside_joblib_does_not_multiply() -> None:
    from joblib import Parallel, delayed

    with safepool.parallel_backend(n_jobs=2):
        for found in Parallel()(delayed(inner_pool)(n) for n in range(2)):
            assert len(found) == 1
