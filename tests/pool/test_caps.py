"""Native threads in a worker: one per pool, whenever the library was imported."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import support_tasks as tasks

from safepool import ProcessPool
from safepool.threads.table import RUNTIMES

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [one.name for row in RUNTIMES for one in row.variables if one.off is None]

pytestmark = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else False,
    reason="on one CPU every native pool has one thread by itself",
)


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller has set nothing, so whatever caps a worker is ours."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_pool_the_libraries_start_several_threads() -> None:
    """The other tests here could not fail on a machine where this one does."""
    code = "import support_tasks as t; print(max(n for _, n in t.native_pools('scipy.linalg')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(tasks.__file__)},
    )

    assert int(done.stdout) > 1


@pytest.mark.parametrize("library", ["numpy", "scipy.linalg", "sklearn.ensemble"])
def test_a_library_first_imported_inside_a_task_has_one_thread(library: str) -> None:
    """With threadpoolctl in an initializer alone it is missed: there is nothing to cap yet."""
    with ProcessPool(1) as pool:
        pools = pool.submit(tasks.native_pools, library).result(timeout=60)
        threads = pool.submit(tasks.threads_of_this_process).result(timeout=60)

    assert pools
    assert {count for _, count in pools} == {1}
    assert threads == 1


def test_a_library_imported_by_the_initializer_has_one_thread() -> None:
    with ProcessPool(1, initializer=tasks.native_pools, initargs=("scipy.linalg",)) as pool:
        pools = pool.submit(tasks.native_pools).result(timeout=60)

    assert pools
    assert {count for _, count in pools} == {1}


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_every_start_method_caps_what_the_program_has_imported(
    method: str, tmp_path: os.PathLike[str]
) -> None:
    """With spawn, the child imports the script, and so NumPy, before an initializer could run."""
    script = os.path.join(tmp_path, "script.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(
            "import multiprocessing, warnings\n"
            "import numpy, scipy.linalg, support_tasks, safepool\n"
            "warnings.simplefilter('ignore')\n"  # fork from a process with threads is warned of
            "if __name__ == '__main__':\n"
            f"    context = multiprocessing.get_context({method!r})\n"
            "    with safepool.ProcessPool(1, mp_context=context) as pool:\n"
            "        pools = pool.submit(support_tasks.native_pools).result(60)\n"
            "        print(sorted({count for _, count in pools}))\n"
        )
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**environment, "PYTHONPATH": os.path.dirname(tasks.__file__)},
    )

    assert (done.stdout, done.stderr) == ("[1]\n", "")


# A library whose threads no variable rules: it starts them when they are needed first.
BLOSC2 = """
threads = 48

def set_nthreads(number):
    global threads
    threads = number
"""

AT_IMPORT = """
import concurrent.futures, multiprocessing, os, sys
import blosc2
SEEN = os.environ.get("OMP_NUM_THREADS"), blosc2.threads
import safepool

def seen_when_imported():
    return sys.modules["__mp_main__"].SEEN

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    before = dict(os.environ)
    for pool_type in (
        safepool.ProcessPool, concurrent.futures.ProcessPoolExecutor, safepool.ProcessPool
    ):
        with pool_type(1, mp_context=context) as pool:
            print(*pool.submit(seen_when_imported).result(60))
    print(dict(os.environ) == before, SEEN == (None, 48))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_is_imported_with_the_caps_in_place(method: str, tmp_path: Path) -> None:
    """In our pool's workers alone: the program and its other pools have servers of their own."""
    (tmp_path / "blosc2.py").write_text(BLOSC2)
    (tmp_path / "script.py").write_text(AT_IMPORT)
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    done = subprocess.run(
        [sys.executable, "script.py", method],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=environment,
    )

    assert (done.stdout, done.stderr) == ("1 1\nNone 48\n1 1\nTrue True\n", "")


def test_workers_are_born_with_the_variables_and_the_caller_is_untouched() -> None:
    before = dict(os.environ)
    with ProcessPool(1) as pool:
        found = pool.submit(tasks.environment).result(timeout=60)

    assert {name: found.get(name) for name in NAMES} == dict.fromkeys(NAMES, "1")
    assert dict(os.environ) == before


def test_the_callers_own_pools_keep_their_size() -> None:
    """Only workers are capped; what the main process computes runs as before."""
    code = (
        "import support_tasks as t, safepool\n"
        "before = t.native_pools('scipy.linalg')\n"
        "with safepool.ProcessPool(1) as pool: pool.submit(t.native_pools).result(60)\n"
        "print(before == t.native_pools(), max(n for _, n in before) > 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(tasks.__file__)},
    )

    assert done.stdout == "True True\n"


def test_the_cap_comes_before_the_users_initializer() -> None:
    """What an initializer computes runs in a capped worker already."""
    with ProcessPool(1, initializer=_remember_pools) as pool:
        assert set(pool.submit(tasks.marks).result(timeout=60)) == {"1"}


def _remember_pools() -> None:
    for _, count in tasks.native_pools("scipy.linalg"):
        tasks.mark(str(count))


def test_a_worker_carries_its_share_down() -> None:
    """A pool that a task makes is sized to the worker's share, not to the machine."""

    def counts() -> tuple[int, int, int]:
        import joblib
        import loky

        import safepool

        return safepool.cpu_count(), loky.cpu_count(), joblib.cpu_count()

    with ProcessPool(2) as pool:
        assert pool.submit(counts).result(timeout=60) == (1, 1, 1)
