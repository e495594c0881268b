"""The pytest plugin, in runs of pytest-xdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from safepool.pytest_plugin import share_of

ROOT = Path(__file__).parents[1]

SUITE = textwrap.dedent("""
    import json, os, pathlib
    import pytest

    @pytest.mark.parametrize("number", range(4))
    def test_look(number):
        import scipy.linalg
        import threadpoolctl
        sizes = sorted({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})
        names = "PYTEST_XDIST_WORKER_COUNT", "OMP_NUM_THREADS"
        told = [sizes, *(os.environ.get(name) for name in names)]
        pathlib.Path(f"{number}.json").write_text(json.dumps(told))
""")

# One row per run: its options and variables, and what each test finds: how many threads native
# pools have, how many workers there are, and the variable.
RUNS: dict[str, tuple[list[str], dict[str, str], list[object]]] = {
    "auto": (["-n", "auto"], {"SAFEPOOL_MAX_WORKERS": "3"}, [[1], "3", "1"]),
    "a number of its own": (
        ["-n", "auto"],
        {"SAFEPOOL_MAX_WORKERS": "3", "PYTEST_XDIST_AUTO_NUM_WORKERS": "2"},
        [[1], "2", "1"],
    ),
    "no workers": ([], {"LOKY_MAX_CPU_COUNT": "1"}, [[1], None, "1"]),
}


@pytest.mark.parametrize("run", RUNS)
def test_workers_fit_and_hold_their_share_of_native_threads(run: str, tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    pytest.importorskip("scipy")
    options, variables, expected = RUNS[run]
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    # The limit is not to depend on the machine.
    limit = {"LOKY_MAX_CPU_COUNT": "2", "PYTHONPATH": str(ROOT)}
    plugins = ["-p", "safepool.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *options],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=keep | limit | variables,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(4)]
    assert found == [expected] * 4


# One row per number of CPUs and of workers, and the threads of each.
SHARES = {(8.0, 2): 4, (2.5, 2): 1, (2.0, 1): 2, (1.0, 4): 1, (0.5, 1): 1, (7.9, 2): 3}


@pytest.mark.parametrize("case", SHARES)
def test_shares(case: tuple[float, int]) -> None:
    assert share_of(*case) == SHARES[case]
