"""joblib's own tests of parallel calls, with safepool's backend in the place of loky's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import joblib
import pytest

TESTS = Path(__file__).parent.parent
MODULE = "joblib.test.test_parallel"
JOBLIB = Path(joblib.__file__).parent
LIMIT_S = 400

_NAMES_LOKY = "names loky's backend or looks into its executor"
_MEMMAP = "wants arrays in joblib's temporary folder: ours travel over the worker's channel"
_NESTED = "wants threads for a nested call: the workers are the budget, so it is sequential"

# One row per test that cannot pass: why.
EXCLUDED = {
    "test_nested_parallel_warnings": "wants loky's warning of nested calls, which ours takes",
    "test_error_capture": _NAMES_LOKY,
    "test_backend_context_manager": _NAMES_LOKY,
    "test_backend_hinting_and_constraints": _NAMES_LOKY,
    "test_nested_backend_context_manager": _NESTED,
    "test_nested_parallelism_limit": _NESTED,
    "test_multiple_generator_call_separated_gc": (
        "wants an error when the generator of another call was dropped: ours goes on"
    ),
    "test_threadpool_limitation_in_child_override": (
        "wants OMP_NUM_THREADS of the program in the workers: the cap holds whatever the program "
        "was started with; inner_max_num_threads= says otherwise"
    ),
    "test_auto_memmap_on_arrays_from_generator": _MEMMAP,
    "test_memmapping_leaks": _MEMMAP,
}
# And so many must: of joblib 1.5 and later.
PASSED_AT_LEAST = 100

# With a /dev/shm of its own: some tests kill processes that have names there.
IN_A_FOLDER_OF_ITS_OWN = 'mount -t tmpfs none /dev/shm && exec "$@"'


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "support_joblib_suite"]
    if sys.platform == "linux" and os.geteuid() == 0:
        command = ["unshare", "-m", "sh", "-c", IN_A_FOLDER_OF_ITS_OWN, "sh", *command]
    return subprocess.run(
        # Without this project's configuration: the environment may lie in its folder.
        [*command, "-c", os.devnull, "--rootdir", str(JOBLIB), *options, "--pyargs", MODULE],
        cwd=JOBLIB,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 10)
def test_the_suite_passes() -> None:
    """Every test that asks for loky and is no row of the table."""
    done = run("-k", " and ".join(["loky", *(f"not {name}" for name in EXCLUDED)]))

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(done.stdout.rpartition(" passed")[0].rpartition("\n")[2].split()[-1])
    assert passed >= PASSED_AT_LEAST


def test_what_is_excluded_exists() -> None:
    """Else the table would say more than is true."""
    done = run("--collect-only", "-k", " or ".join(EXCLUDED))

    assert {name for name in EXCLUDED if f"::{name}[" in done.stdout} == set(EXCLUDED)
