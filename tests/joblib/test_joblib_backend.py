"""joblib and scikit-learn on safepool's workers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import joblib
import pytest
import support_tasks as tasks
from joblib import Parallel, delayed
from support_processes import in_a_fork

import safepool

if TYPE_CHECKING:
    from pathlib import Path


def test_results_come_in_order_from_other_processes() -> None:
    with safepool.parallel_backend():
        assert Parallel(n_jobs=2)(delayed(pow)(n, 2) for n in range(300)) == [
            n**2 for n in range(300)
        ]
        pids = set(Parallel(n_jobs=2)(delayed(tasks.pid)() for _ in range(20)))
    assert os.getpid() not in pids


def test_the_end_of_a_call_is_told_and_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joblib's loop sleeps 10 ms between two looks; a call of short tasks would be mostly that."""
    looks: list[float] = []
    clock = SimpleNamespace(time=time.time, sleep=lambda s: (looks.append(s), time.sleep(s)))
    monkeypatch.setattr(joblib.parallel, "time", clock)
    with safepool.parallel_backend(n_jobs=2):
        for _ in range(5):
            work = [delayed(tasks.sleep_and_return)(0.05, n) for n in range(6)]
            assert Parallel()(work) == [*range(6)]
            assert Parallel(pre_dispatch=1)(work) == [*range(6)]
        with pytest.raises(ZeroDivisionError):
            Parallel()(delayed(divmod)(1, n) for n in (1, 2, 0, 3))
        assert looks == []
        # Only there a time-out, or the first results of many, are seen.
        with pytest.raises(multiprocessing.TimeoutError):
            Parallel(timeout=0.2)([delayed(tasks.sleep_and_return)(30)])
        assert looks


# One row per way to count jobs: what is asked, what joblib gives for a budget of workers.
COUNTS = {
    "-1 is the budget": (-1, lambda budget: budget),
    "-2 is one less, never none": (-2, lambda budget: max(1, budget - 1)),
    "1": (1, lambda _budget: 1),
    "more than the budget, as asked": (7, lambda _budget: 7),
}


@pytest.mark.parametrize("count", COUNTS)
def test_n_jobs_counts_the_budget(count: str) -> None:
    n_jobs, expected = COUNTS[count]
    with safepool.parallel_backend():
        assert joblib.effective_n_jobs(n_jobs) == expected(safepool.cpu_count())


def test_the_block_sets_the_default() -> None:
    with safepool.parallel_backend(n_jobs=2):
        pids = set(Parallel()(delayed(tasks.sleep_and_return)(0.05, n) for n in range(4)))
        assert pids == {0, 1, 2, 3}
        assert Parallel().n_jobs in (2, None)
        assert os.getpid() not in set(Parallel()(delayed(tasks.pid)() for _ in range(4)))


@pytest.mark.parametrize("where", ["block", "call"])
def test_no_jobs_is_an_error(where: str) -> None:
    def use() -> None:
        with safepool.parallel_backend(n_jobs=0 if where == "block" else 2):
            Parallel(n_jobs=0)(delayed(abs)(n) for n in range(2))

    with pytest.raises(ValueError, match="n_jobs == 0"):
        use()


def test_workers_are_shared_by_the_calls_of_a_block() -> None:
    with safepool.parallel_backend():
        first = set(Parallel(n_jobs=2)(delayed(tasks.pid)() for _ in range(30)))
        second = set(Parallel(n_jobs=2)(delayed(tasks.pid)() for _ in range(30)))
    assert len(first | second) <= 2


def test_an_exception_is_itself_and_the_next_call_works() -> None:
    with safepool.parallel_backend():
        with pytest.raises(ValueError, match="broken on purpose"):
            Parallel(n_jobs=2)(
                delayed(tasks.raise_value_error if n == 3 else tasks.pid)() for n in range(50)
            )
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(5)) == [0, 1, 2, 3, 4]


def test_a_killed_worker_is_an_error_of_this_call_alone() -> None:
    """The default backend loses every result and says that memory may be short."""
    with safepool.parallel_backend():
        with pytest.raises(safepool.WorkerDiedError, match="SIGKILL"):
            Parallel(n_jobs=2)(
                delayed(tasks.be_killed if n == 3 else tasks.pid)() for n in range(50)
            )
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(5)) == [0, 1, 2, 3, 4]


def test_the_first_error_ends_the_running_tasks() -> None:
    """Nobody waits a minute for results that joblib throws away."""
    started = time.monotonic()
    with safepool.parallel_backend(), pytest.raises(ValueError, match="broken"):
        Parallel(n_jobs=2, batch_size=1)(
            delayed(tasks.raise_value_error)() if n == 0 else delayed(time.sleep)(60)
            for n in range(4)
        )
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_generators(return_as: str) -> None:
    with safepool.parallel_backend():
        results = Parallel(n_jobs=2, return_as=return_as)(delayed(pow)(n, 2) for n in range(20))
        assert sorted(results) == [n**2 for n in range(20)]


def test_generators_and_a_failing_call_at_the_same_time() -> None:
    """In one block, of which joblib gives every call the same backend object."""
    with safepool.parallel_backend(n_jobs=2):
        first, second = (
            Parallel(return_as="generator")(delayed(pow)(n, 2) for n in range(200))
            for _ in range(2)
        )
        assert Parallel()(delayed(abs)(-n) for n in range(10)) == [*range(10)]
        with pytest.raises(ZeroDivisionError):
            Parallel()(delayed(divmod)(1, n) for n in (1, 0, 1))
        assert [*zip(first, second, strict=True)] == [(n**2, n**2) for n in range(200)]


def test_a_timeout_is_joblibs_timeout() -> None:
    with safepool.parallel_backend(), pytest.raises(multiprocessing.TimeoutError):
        Parallel(n_jobs=2, timeout=0.3)(delayed(time.sleep)(20) for _ in range(2))


def test_a_nested_call_stays_within_its_worker() -> None:
    """Two levels of Parallel do not become workers times workers."""

    def outer(_n: int) -> tuple[int, set[int]]:
        inner = Parallel(n_jobs=-1)(delayed(tasks.pid)() for _ in range(4))
        return os.getpid(), set(inner)

    with safepool.parallel_backend():
        for pid, inner in Parallel(n_jobs=2)(delayed(outer)(n) for n in range(4)):
            assert inner == {pid}


def test_shared_memory_is_asked_of_threads() -> None:
    """``require="sharedmem"`` cannot be had from processes; joblib takes threads."""
    found: list[int] = []
    with safepool.parallel_backend():
        Parallel(n_jobs=2, require="sharedmem")(delayed(found.append)(n) for n in range(5))
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_native_threads_are_capped_in_joblibs_workers() -> None:
    with safepool.parallel_backend():
        for pools in Parallel(n_jobs=2)(
            delayed(tasks.native_pools)("scipy.linalg") for _ in range(2)
        ):
            assert pools
            assert {count for _, count in pools} == {1}


def test_inner_max_num_threads_is_what_a_worker_may_use() -> None:
    from joblib import parallel_config

    from safepool.joblib_backend import SafepoolBackend

    backend = SafepoolBackend(nesting_level=0, inner_max_num_threads=2)
    try:
        with parallel_config(backend=backend, n_jobs=2):
            found = Parallel()(delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2))
    finally:
        backend.close()
    assert found == ["2", "2"]


def test_cross_validation_gives_the_sequential_scores() -> None:
    import numpy as np
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    data: Any = make_classification(200, random_state=0)
    with safepool.parallel_backend(n_jobs=2):
        parallel = cross_val_score(LogisticRegression(), *data, cv=4, n_jobs=-1)
        also = cross_val_score(LogisticRegression(), *data, cv=4, n_jobs=2)
    sequential = cross_val_score(LogisticRegression(), *data, cv=4)

    np.testing.assert_allclose(parallel, sequential)
    np.testing.assert_allclose(also, sequential)


def test_an_interrupted_block_leaves_no_worker() -> None:
    """The prompt is back, whatever the workers were doing."""
    code = (
        "import os, signal, threading, time, safepool\n"
        "from joblib import Parallel, delayed\n"
        "threading.Timer(1.5, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "with safepool.parallel_backend():\n"
        "    Parallel(n_jobs=2)(delayed(time.sleep)(60) for _ in range(4))\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False
    )

    assert time.monotonic() - started < 50
    assert "KeyboardInterrupt" in done.stderr


def test_initializers_that_are_made_for_each_call_leave_few_pools() -> None:
    from safepool.joblib_pools import _MOST_UNUSED, SHARED

    try:
        for n in range(_MOST_UNUSED + 3):
            with joblib.parallel_config("safepool", n_jobs=2, initializer=lambda n=n: n):
                assert Parallel()(delayed(abs)(n) for n in range(2)) == [0, 1]
        assert len(SHARED._leases) <= _MOST_UNUSED
    finally:
        SHARED.close(end=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.parametrize("kind", ["generator", "generator_unordered"])
def test_a_call_that_a_fork_has_inherited_raises_there(kind: str, tmp_path: Path) -> None:
    """Nothing ends its batches in the fork. A call of the fork's own runs."""
    gate = str(tmp_path / "gate")
    with safepool.parallel_backend():
        call = Parallel(n_jobs=2, return_as=kind)
        results = call(delayed(tasks.wait_for)(gate, n) for n in range(8))

        with ThreadPoolExecutor(1) as other:  # holds the lock at the moment of the fork
            other.submit(call._lock.acquire).result()
            told = in_a_fork(lambda: next(results))
            other.submit(call._lock.release).result()
        again = in_a_fork(lambda: Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(3)))

        (tmp_path / "gate").touch()
        assert sorted(results) == [*range(8)]
    assert told.startswith(f"RuntimeError: this Parallel call belongs to process {os.getpid()}, ")
    assert told.endswith("Start the call again in the fork")
    assert again == "[0, 1, 2]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
def test_a_fork_inside_a_block_has_a_pool_of_its_own() -> None:
    """In a program of its own: without NumPy, whose threads a fork would lose."""
    code = (
        "import os, warnings, joblib, safepool\n"
        "from joblib import Parallel, delayed\n"
        "warnings.simplefilter('ignore')\n"
        "with safepool.parallel_backend(n_jobs=2):\n"
        "    mine = set(Parallel()(delayed(os.getppid)() for _ in range(4)))\n"
        "    pid = os.fork()\n"
        "    theirs = Parallel()(delayed(abs)(n) for n in range(9))\n"
        "    assert theirs == list(range(9))\n"
        "if pid:\n"
        "    print(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr
