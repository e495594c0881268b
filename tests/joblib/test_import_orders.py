"""Whoever imports joblib, and if nobody does: the backend's name costs what it is used for."""

from __future__ import annotations

import subprocess
import sys

import pytest

USE = "assert joblib.Parallel(2, backend='safepool')(map(joblib.delayed(abs), [-1, -2])) == [1, 2]"
NO_FINDER = "assert not [f for f in sys.meta_path if type(f).__module__.startswith('safepool')]"

# One row per order of imports: a program that ends with exit code 0.
ORDERS = {
    "joblib by somebody else, later": (
        f"import safepool, sklearn.utils, joblib; {USE}; {NO_FINDER}"
    ),
    "by a setting of a block": (
        "import safepool, joblib\n"
        "with joblib.parallel_config(backend='safepool', n_jobs=2, timeout=60, retries=1):\n"
        "    assert joblib.Parallel()(map(joblib.delayed(abs), [-1, -2])) == [1, 2]"
    ),
    "joblib by a thread, at the same time": (
        "import threading\n"
        "thread = threading.Thread(target=__import__, args=['joblib'])\n"
        "thread.start()\n"
        "import safepool\n"
        "thread.join()\n"
        f"import joblib; {USE}; {NO_FINDER}"
    ),
    "joblib never": (
        "import safepool\n"
        "assert 'joblib' not in sys.modules\n"
        "assert safepool.ProcessPool(1).submit(abs, -1).result(30) == 1\n"
        "assert 'joblib' not in sys.modules"
    ),
    "registering loads neither the backend nor a pool": (
        "import safepool, joblib\n"
        "assert 'safepool' in joblib.parallel.BACKENDS\n"
        "assert 'safepool.joblib_backend' not in sys.modules\n"
        "assert 'safepool.pool' not in sys.modules"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_known(order: str) -> None:
    """Else the name that the README gives is an error, or joblib's import is everybody's."""
    if "sklearn" in ORDERS[order]:
        pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{ORDERS[order]}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
