"""A block reaches every thread, keeps its workers for the next, and lets forests have threads."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
import support_tasks as tasks
from joblib import Parallel, delayed
from support_processes import wait_until

import safepool
from safepool import joblib_pools
from safepool.joblib_backend import SafepoolBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HERE = os.getpid()


class Referable:
    pass


def is_writable(array: Any) -> bool:
    return bool(array.flags.writeable)


def in_a_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result(timeout=90)


def pids(n_jobs: int | None = None, **options: Any) -> set[int]:
    work = [delayed(tasks.pid_after)(0.01) for _ in range(8)]
    return set(Parallel(n_jobs=n_jobs, **options)(work))


def pool(**options: Any) -> Any:
    """Return the pool that a call has here, having used it."""
    with Parallel(**options) as parallel:
        found = parallel._backend._lease.pool
        assert {*parallel([delayed(os.getpid)()] * 4)} <= {*found._processes}
    return found


def active() -> str:
    return type(joblib.parallel.get_active_backend()[0]).__name__


def n_jobs() -> int:
    return int(joblib.effective_n_jobs(None))


# --- every thread


def test_a_call_in_a_thread_has_the_blocks_workers() -> None:
    """A library calls in threads (optuna), and joblib's settings are each thread's own."""
    with safepool.parallel_backend(n_jobs=2):
        ours = pool()
        assert in_a_thread(pool) is ours
        assert in_a_thread(lambda: pool(n_jobs=2)) is ours
        assert in_a_thread(lambda: joblib.effective_n_jobs(None)) == 2
        assert in_a_thread(lambda: joblib.effective_n_jobs(-1)) == safepool.cpu_count()
    assert active() == in_a_thread(active) == "LokyBackend"


def test_threads_that_call_at_the_same_time_share_the_workers() -> None:
    together = threading.Barrier(3)

    def call() -> Any:
        together.wait(timeout=60)
        return pool()

    with safepool.parallel_backend(n_jobs=2), ThreadPoolExecutor(3) as threads:
        found = [threads.submit(call) for _ in range(3)]
        assert len({one.result(timeout=90) for one in found}) == 1


def test_a_thread_from_before_is_reached_and_let_go_again() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(active).result(timeout=60) == "LokyBackend"
        with safepool.parallel_backend(n_jobs=2):
            assert threads.submit(active).result(timeout=60) == "SafepoolBackend"
        assert threads.submit(active).result(timeout=60) == "LokyBackend"


def test_a_threads_own_setting_counts() -> None:
    def own() -> tuple[str, Any]:
        with joblib.parallel_config("threading", n_jobs=3):
            name = active()
        with joblib.parallel_config(n_jobs=3):
            return name, joblib.effective_n_jobs(None)

    with safepool.parallel_backend(n_jobs=2):
        assert in_a_thread(own) == ("ThreadingBackend", 3)
        assert in_a_thread(lambda: pids(2, backend="threading")) == {HERE}


def test_blocks_within_blocks_and_beside_each_other() -> None:
    """The last one to begin counts in threads without a block of their own; in whatever order."""
    first, second = safepool.parallel_backend(n_jobs=3), safepool.parallel_backend(n_jobs=4)
    with safepool.parallel_backend(n_jobs=2):
        with safepool.parallel_backend(n_jobs=2):
            assert in_a_thread(n_jobs) == 2
        assert in_a_thread(n_jobs) == 2
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(first.__enter__).result(timeout=60)
            other.submit(second.__enter__).result(timeout=60)
            assert one.submit(n_jobs).result(timeout=60) == 3
            assert other.submit(n_jobs).result(timeout=60) == 4
            assert in_a_thread(n_jobs) == 4
            one.submit(first.__exit__, None, None, None).result(timeout=60)
            assert in_a_thread(n_jobs) == 4
            other.submit(second.__exit__, None, None, None).result(timeout=60)
            assert in_a_thread(n_jobs) == 2
            assert one.submit(n_jobs).result(timeout=60) == 2
        assert n_jobs() == 2
    assert in_a_thread(active) == "LokyBackend"


def test_a_default_that_the_program_sets_inside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib.parallel, "DEFAULT_BACKEND", "multiprocessing")
    with safepool.parallel_backend(n_jobs=2):
        assert in_a_thread(active) == "SafepoolBackend"
    assert in_a_thread(active) == "MultiprocessingBackend"
    with safepool.parallel_backend(n_jobs=2):
        joblib.parallel.DEFAULT_BACKEND = "threading"
        assert in_a_thread(active) == "ThreadingBackend"
    assert in_a_thread(active) == "ThreadingBackend"


def test_a_block_that_ends_with_an_error_leaves_joblib_as_it_was() -> None:
    before = (joblib.parallel.DEFAULT_BACKEND, joblib.parallel.DEFAULT_THREAD_BACKEND)
    with pytest.raises(ZeroDivisionError), safepool.parallel_backend(n_jobs=2):
        in_a_thread(lambda: 1 / 0)
    with pytest.raises(ValueError, match="prefer must be"):
        safepool.parallel_backend(prefer="threads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mmap_mode must be"):
        safepool.parallel_backend(mmap_mode="x")  # type: ignore[arg-type]
    assert before == (joblib.parallel.DEFAULT_BACKEND, joblib.parallel.DEFAULT_THREAD_BACKEND)


def test_what_a_block_says_of_arrays_holds_in_threads() -> None:
    array = np.zeros(1000)
    with safepool.parallel_backend(n_jobs=2, mmap_mode="r", max_nbytes=100):
        flags = in_a_thread(lambda: Parallel()(delayed(is_writable)(array) for _ in range(2)))
        assert flags == [False, False]
        own = in_a_thread(
            lambda: Parallel(mmap_mode="c")(delayed(is_writable)(array) for _ in range(2))
        )
        assert own == [True, True]


def test_the_input_of_a_call_may_be_a_call_that_is_reached_as_well() -> None:
    """It is computed in a thread of that call's own."""
    seen = set()

    def rows() -> Any:
        for number in range(3):
            seen.add(pool())
            yield delayed(abs)(-number)

    with safepool.parallel_backend(n_jobs=2):
        seen.add(pool())
        assert Parallel(pre_dispatch=1)(rows()) == [0, 1, 2]
    assert len(seen) == 1


# --- kept from block to block


def pool_of_a_block(**arguments: Any) -> Any:
    with safepool.parallel_backend(n_jobs=2, **arguments):
        return pool()


def test_the_next_block_has_the_same_workers() -> None:
    first = pool_of_a_block()
    workers = {*first._processes}
    assert pool_of_a_block() is first
    with joblib.parallel_config("safepool", n_jobs=2):
        assert pool() is first
    assert workers <= {*first._processes}


CONFIGURED = {"level": 1}


def configure(options: dict[str, int]) -> None:
    tasks.mark(str(options["level"]))


def change_environment(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setenv("SAFEPOOL_TEST_BLOCK", "2")


def change_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)


def change_path(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.syspath_prepend(str(folder))


def change_arguments(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setitem(CONFIGURED, "level", 2)


# One row per change between two blocks of the same arguments, after which workers are new.
CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "environment": change_environment,
    "working directory": change_folder,
    "sys.path": change_path,
    "contents of an initializer's argument": change_arguments,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_workers_were_born_with_is_never_old(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"initializer": configure, "initargs": (CONFIGURED,)}
    first = pool_of_a_block(**arguments)
    assert pool_of_a_block(**arguments) is first
    CHANGES[change](monkeypatch, tmp_path)
    assert pool_of_a_block(**arguments) is not first
    # The old ones wait for nobody.
    assert len(joblib_pools.SHARED._leases) == 1


# One row per argument that workers are made by.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "threads_per_worker": {"threads_per_worker": 2},
    "preload": {"preload": []},
    "initializer": {"initializer": int},
    "another initializer": {"initializer": float},
    "initargs": {"initializer": int, "initargs": ("7",)},
    "idle_worker_timeout": {"idle_worker_timeout": 60},
    **({"end_subprocesses": {"end_subprocesses": True}} if sys.platform == "linux" else {}),
}


def test_blocks_of_other_arguments_have_other_workers() -> None:
    pools = [pool_of_a_block(), *(pool_of_a_block(**row) for row in ARGUMENTS.values())]
    assert len(set(pools)) == 1 + len(ARGUMENTS)


@pytest.mark.parametrize("argument", [{"timeout": 60}, {"retries": 1}, {"progress": False}])
def test_what_is_each_calls_makes_no_other_workers(argument: dict[str, Any]) -> None:
    assert pool_of_a_block() is pool_of_a_block(**argument)


def test_idle_workers_end_after_the_block() -> None:
    with safepool.parallel_backend(n_jobs=2, idle_worker_timeout=0.5):
        Parallel()(delayed(abs)(n) for n in range(4))
    (lease,) = joblib_pools.SHARED._leases
    wait_until(lambda: not lease.pool.workers())


def test_workers_end_with_the_block_on_request() -> None:
    with safepool.parallel_backend(n_jobs=2, idle_worker_timeout=0):
        found = {*pool()._processes}
        assert found <= {*pool()._processes}
    assert not joblib_pools.SHARED._leases
    assert not any(os.path.exists(f"/proc/{pid}") for pid in found)


def test_an_interrupted_block_ends_its_own_workers_alone() -> None:
    other = pool_of_a_block()

    def interrupted() -> None:
        with safepool.parallel_backend(2, preload=[]):
            assert pool() is not other
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert pool_of_a_block() is other
    assert len(joblib_pools.SHARED._leases) == 1


def test_a_generator_goes_on_after_its_block() -> None:
    with safepool.parallel_backend(n_jobs=2):
        results = Parallel(return_as="generator")(delayed(abs)(-n) for n in range(50))
        assert next(results) == 0
    assert list(results) == [*range(1, 50)]


def test_a_block_keeps_nothing_of_its_calls_alive() -> None:
    array = Referable()
    with safepool.parallel_backend(n_jobs=2):
        Parallel()(delayed(type)(array) for _ in range(4))
    gone = weakref.ref(array)
    del array
    wait_until(lambda: gc.collect() >= 0 and gone() is None)


# --- threads


def directly(function: Callable[[], Any]) -> Any:
    return function()


@pytest.mark.parametrize("where", [directly, in_a_thread])
@pytest.mark.parametrize("asked", [{"prefer": "threads"}, {"require": "sharedmem"}])
def test_calls_that_ask_for_threads_have_them_with_one_native_thread_each(
    asked: dict[str, Any], where: Callable[[Callable[[], Any]], Any]
) -> None:
    import threadpoolctl

    together = threading.Barrier(2)

    def look() -> tuple[int, int, set[int]]:
        numbers = {row["num_threads"] for row in threadpoolctl.threadpool_info()}
        together.wait(timeout=60)
        return os.getpid(), threading.get_ident(), numbers

    with safepool.parallel_backend(n_jobs=2):
        found = where(lambda: Parallel(n_jobs=2, **asked)(delayed(look)() for _ in range(4)))
    assert {pid for pid, _, _ in found} == {HERE}
    assert len({thread for _, thread, _ in found}) == 2
    assert {number for *_, numbers in found for number in numbers} == {1}


def test_all_that_fit_are_the_blocks_number_of_threads() -> None:
    with safepool.parallel_backend(n_jobs=3):
        parallel = Parallel(prefer="threads")
        with parallel:
            assert type(parallel._backend).__name__ == "HeldThreads"
            assert parallel._backend.effective_n_jobs(-1) == safepool.cpu_count()
            assert parallel.n_jobs == 3


# One row per reason to have workers all the same: arguments of the block, and of the call.
WORKERS_ALL_THE_SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the block insists": ({"prefer": "processes"}, {}),
    "a timeout": ({"timeout": 60}, {}),
    "retries": ({"retries": 1}, {}),
    "an initializer": ({"initializer": int}, {}),
    "the call names its backend": ({}, {"backend": "safepool"}),
    "an initializer of the call": ({}, {"initializer": int}),
}


@pytest.mark.parametrize("reason", WORKERS_ALL_THE_SAME)
def test_a_mere_preference_gives_way(reason: str) -> None:
    block, call = WORKERS_ALL_THE_SAME[reason]
    with safepool.parallel_backend(2, **block):
        assert HERE not in pids(2, prefer="threads", **call)


def test_a_task_in_a_thread_starts_no_further_ones() -> None:
    def outer() -> int:
        inner = Parallel(n_jobs=2)(delayed(threading.get_ident)() for _ in range(2))
        return len({*inner, threading.get_ident()})

    with safepool.parallel_backend(n_jobs=2):
        assert Parallel(n_jobs=2, prefer="threads")(delayed(outer)() for _ in range(3)) == [1] * 3


def test_threads_raise_and_go_on() -> None:
    with safepool.parallel_backend(n_jobs=2):
        with pytest.raises(ZeroDivisionError):
            Parallel(prefer="threads")(delayed(divmod)(1, n) for n in (1, 0, 2))
        assert Parallel(prefer="threads")(delayed(abs)(-n) for n in range(3)) == [0, 1, 2]
        results = Parallel(prefer="threads", return_as="generator")(
            delayed(abs)(-n) for n in range(3)
        )
        assert list(results) == [0, 1, 2]


def test_a_bar_counts_threads_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    with safepool.parallel_backend(n_jobs=2, progress="trees"):
        Parallel(prefer="threads")(delayed(abs)(n) for n in range(7))
        with pytest.raises(ZeroDivisionError):
            Parallel(prefer="threads")(delayed(divmod)(1, n) for n in (1, 0, 2))
    said = capfd.readouterr().err
    assert "trees" in said
    assert "7/7" in said
    assert "failed" in said


def test_a_forest_in_a_block_is_the_same_forest() -> None:
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier

    data: Any = make_classification(200, random_state=0)
    expected = RandomForestClassifier(20, random_state=0).fit(*data).predict_proba(data[0])
    with safepool.parallel_backend():
        forest = RandomForestClassifier(20, random_state=0, n_jobs=-1).fit(*data)
        found = forest.predict_proba(data[0])
        also = in_a_thread(lambda: forest.fit(*data).predict_proba(data[0]))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(also, expected)


def test_a_backend_of_a_joblib_context_takes_the_hint_too() -> None:
    with joblib.parallel_config("safepool", n_jobs=2):
        assert pids(prefer="threads") == {HERE}
        assert HERE not in pids(2)
    assert SafepoolBackend.supports_sharedmem
    assert joblib.parallel.DEFAULT_BACKEND == "loky"
