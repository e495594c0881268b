"""CPython's own tests of ``multiprocessing.Pool`` pass with ours in its place.

They run in a process of their own: see ``support_cpython_pool_suite.py``, which names the classes
that are about a pool. What is left out of them is a row below.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
# Seconds for all of them: fifteen on two CPUs that have nothing else to do.
LIMIT_S = 310.0

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("test") is None
        or importlib.util.find_spec("test._test_multiprocessing") is None,
        reason="this interpreter comes without test._test_multiprocessing",
    ),
    pytest.mark.timeout(400),
    pytest.mark.skipif(sys.platform == "win32", reason="three of four start methods are POSIX's"),
]


@dataclass(frozen=True, slots=True)
class Excluded:
    """A test of the suite that does not hold for ours.

    Attributes:
        why: The difference.
        context: The start method with which it does not; ``None`` is all of them.
    """

    why: str
    context: str | None = None


_COPIES = "a process that has threads by then is not copied: ValueError, as the standard executor"

EXCLUDED = {
    "test_unpickleable_result": Excluded(
        "returns a lambda, which cannot be pickled there, and travels by value here; "
        "test_multiprocessing_pool.py has one that cannot"
    ),
    "test_release_unused_processes": Excluded(
        "makes multiprocessing.pool.Pool itself, of a context that is a mock"
    ),
    "test_pool_worker_lifetime": Excluded(_COPIES, "fork"),
    "test_pool_worker_lifetime_early_close": Excluded(_COPIES, "fork"),
}


@pytest.mark.parametrize(
    "context",
    [
        "default",
        pytest.param("fork", marks=pytest.mark.slow),
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_the_suite_passes(context: str) -> None:
    """Every test of it that is no row of the table."""
    excluded = [name for name, row in EXCLUDED.items() if row.context in (None, context)]
    done = subprocess.run(
        [sys.executable, str(TESTS / "support_cpython_pool_suite.py"), context, *excluded],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended: dict[str, str] = json.loads(done.stdout)

    wrong = {
        name: how
        for name, how in ended.items()
        if how not in ("ok", "excluded") and not how.startswith("skipped: ")
    }
    assert not wrong, "\n".join(f"{name}: {how}" for name, how in wrong.items())
    assert sum(how == "ok" for how in ended.values()) >= 28
    assert {name for name, how in ended.items() if how == "excluded"} == set(excluded)
