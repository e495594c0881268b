"""CPython's own tests of process pools pass with ours in the standard pool's place.

They are the interpreter's (its ``test`` package, which many distributions leave out), and run in
processes of their own: see ``support_cpython_suite.py``. What is left out is a row below.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("test") is None
        or importlib.util.find_spec("test.test_concurrent_futures") is None
        or importlib.util.find_spec("test.test_concurrent_futures.util") is None,
        reason="this interpreter comes without test.test_concurrent_futures, or with an old one",
    ),
    # Half a minute on two CPUs that have nothing else to do; ten times as long on busy ones.
    pytest.mark.timeout(700),
    pytest.mark.skipif(sys.platform == "win32", reason="three of four start methods are POSIX's"),
]

MODULES = (
    "test_as_completed",
    "test_deadlock",
    "test_init",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
)
# At a time: they sleep for half of it.
AT_ONCE = 4
# Seconds for one module: its worst takes 35 of CPU time, by spawn.
LIMIT_S = 310.0


@dataclass(frozen=True, slots=True)
class Excluded:
    """A test of the suite that does not hold for ours.

    Attributes:
        module: Where it is.
        why: The difference.
        since: The first Python that has it in each of its releases.
        with_break: It passes with ``on_worker_death="break"``, and is run so.
    """

    module: str
    why: str
    since: tuple[int, int] = (3, 11)
    with_break: bool = False


_DEATH = "a worker that dies costs its own task, and the pool goes on"
_OWN_ERROR = "what cannot be unpickled costs its own task, which raises that error"
_COUNTS = (
    "counts the workers that submit() has started for tasks that cannot be pickled; ours start "
    "in a thread, while tasks wait. That processes can be joined is tested in test_drop_in.py"
)
_MOCKS = "mocks a method of the standard pool's own"

EXCLUDED = {
    "test_killed_child": Excluded("test_process_pool", _DEATH, with_break=True),
    "test_broken_process_pool_traceback": Excluded(
        "test_process_pool", _DEATH, (3, 14), with_break=True
    ),
    "test_error_at_task_unpickle": Excluded("test_deadlock", _OWN_ERROR),
    "test_exit_at_task_unpickle": Excluded("test_deadlock", _OWN_ERROR),
    "test_error_during_result_unpickle_in_result_handler": Excluded("test_deadlock", _OWN_ERROR),
    "test_exit_during_result_unpickle_in_result_handler": Excluded("test_deadlock", _OWN_ERROR),
    "test_max_tasks_per_child_defaults_to_spawn_context": Excluded(
        "test_process_pool", "reads _mp_context: ours by default is no context of multiprocessing"
    ),
    "test_python_finalization_error": Excluded(
        "test_process_pool", "lets the second thread fail that the pool starts; ours has one"
    ),
    "test_cancel_futures": Excluded(
        "test_shutdown",
        "wants some tasks to have begun before any worker can have started: what the standard "
        "pool has put into its queue counts there. test_drop_in.py waits for one to begin",
    ),
    "test_processes_terminate": Excluded("test_shutdown", _COUNTS),
    "test_saturation": Excluded("test_process_pool", _COUNTS),
    "test_shutdown_no_wait_max_tasks_gh119592": Excluded(
        "test_process_pool", "wants a dropped pool to fail its tasks; ours runs them", (3, 15)
    ),
    "test_gc_during_max_tasks_worker_exit_gh152967": Excluded(
        "test_process_pool", "wants a dropped pool to fail its tasks; ours runs them", (3, 15)
    ),
    "test_force_shutdown_during_max_tasks_worker_exit": Excluded(
        "test_process_pool", _MOCKS, (3, 15)
    ),
    "test_failed_worker_replacement_breaks_pool": Excluded("test_process_pool", _MOCKS, (3, 15)),
    "test_terminate_workers": Excluded("test_process_pool", _MOCKS, (3, 14)),
    "test_kill_workers": Excluded("test_process_pool", _MOCKS, (3, 14)),
    "test_force_shutdown_workers_invalid_op": Excluded("test_process_pool", _MOCKS, (3, 14)),
    "test_force_shutdown_workers": Excluded("test_process_pool", _MOCKS, (3, 14)),
}


def run(module: str, context: str, on_worker_death: str, excluded: list[str]) -> dict[str, str]:
    """Run one module; return how each of its tests ended."""
    try:
        done = subprocess.run(
            [
                sys.executable,
                str(TESTS / "support_cpython_suite.py"),
                *(module, context, on_worker_death, *excluded),
            ],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return {module: f"not done in time: {error.stderr!r}"}
    if done.returncode:
        return {module: f"exit code {done.returncode}: {done.stderr}"}
    found: dict[str, str] = json.loads(done.stdout)
    return found


# The start methods of the suite, and ours; the slow ones start an interpreter for each worker.
CONTEXTS = [
    "default",
    "fork",
    pytest.param("spawn", marks=pytest.mark.slow),
    pytest.param("forkserver", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_suite_passes(context: str) -> None:
    """Every test of it that is no row of the table."""
    excluded = [*EXCLUDED]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = [*pool.map(lambda name: run(name, context, "replace", excluded), MODULES)]
    ended = {name: how for found in outcomes for name, how in found.items()}

    wrong = {
        name: how
        for name, how in ended.items()
        if how not in ("ok", "excluded") and not how.startswith("skipped: ")
    }
    assert not wrong, "\n".join(f"{name}: {how}" for name, how in wrong.items())
    assert sum(how == "ok" for how in ended.values()) >= 40
    existing = {name for name in excluded if sys.version_info >= EXCLUDED[name].since}
    # Patch releases of older versions get some of them, too.
    assert existing <= {name for name, how in ended.items() if how == "excluded"}


def test_a_pool_that_breaks_on_death_is_like_the_standard_one() -> None:
    """What is excluded for the difference that we want passes without it."""
    rows = {
        name: row
        for name, row in EXCLUDED.items()
        if row.with_break and sys.version_info >= row.since
    }
    for name, row in rows.items():
        ended = run(row.module, "default", "break", ["--only", name])

        assert ended == {name: "ok"}
