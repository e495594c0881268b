"""joblib finds the backend by its name, whichever of the two was imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = """
print(Parallel(n_jobs=2, backend="safepool")(delayed(pow)(n, 2) for n in range(4)))
with parallel_config(backend="safepool", n_jobs=2, retries=1, inner_max_num_threads=1):
    print(type(Parallel()._backend).__name__)
"""
# One row per order of imports.
ORDERS = {
    "safepool first": "import safepool\nfrom joblib import Parallel, delayed, parallel_config",
    "joblib first": "from joblib import Parallel, delayed, parallel_config\nimport safepool",
    "a module of joblib's first": (
        "import safepool, joblib.logger\nfrom joblib import Parallel, delayed, parallel_config"
    ),
}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_the_backend_is_known_by_name(order: str) -> None:
    assert run(ORDERS[order] + USE) == "[0, 1, 4, 9]\nSafepoolBackend\n"


def test_the_finder_is_gone_when_joblib_is_there() -> None:
    code = """
import sys, safepool
before = [type(finder).__name__ for finder in sys.meta_path]
assert "joblib" not in sys.modules
import joblib
after = [type(finder).__name__ for finder in sys.meta_path]
print(before.count("AfterImport"), after.count("AfterImport"))
"""
    assert run(code) == "1 0\n"


def test_workers_end_when_they_have_been_idle() -> None:
    code = """
import os, time, safepool
from joblib import Parallel, delayed, parallel_config
def pids(**more):
    return set(Parallel(n_jobs=2, **more)(delayed(os.getpid)() for _ in range(20)))
with parallel_config(backend="safepool", idle_worker_timeout=0.5):
    begun = time.monotonic()
    first = pids()
    again = pids()
    # On a busy machine they may have been idle for long enough between the two.
    assert len(first | again) <= 2 or time.monotonic() - begun > 0.5, (first, again)
    deadline = time.monotonic() + 30
    def alive():
        return [pid for pid in first if os.path.exists(f"/proc/{pid}/stat")]
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()
    print(len(pids() & first))
"""
    assert run(code) == "0\n"
