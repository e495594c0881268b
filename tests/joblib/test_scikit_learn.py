"""scikit-learn's own tests of ``n_jobs`` pass with its parallel calls in our workers.

They come with its wheel, and run in a process of their own: see ``support_sklearn_suite.py``.
Chosen are the tests whose source says ``n_jobs``, in the modules below: those that together
take half a minute on two free CPUs. ``SAFEPOOL_TEST_SKLEARN=all`` adds the slow modules.
Nothing is excluded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

MODULES = (
    "compose.tests.test_column_transformer",
    "ensemble.tests.test_bagging",
    "ensemble.tests.test_voting",
    "inspection.tests.test_permutation_importance",
    "model_selection.tests.test_validation",
    "tests.test_calibration",
    "tests.test_multioutput",
    "tests.test_pipeline",
)
SLOW_MODULES = (
    "covariance.tests.test_graphical_lasso",
    "decomposition.tests.test_dict_learning",
    "decomposition.tests.test_online_lda",
    "ensemble.tests.test_forest",
    "ensemble.tests.test_iforest",
    "feature_selection.tests.test_rfe",
    "linear_model.tests.test_coordinate_descent",
    "linear_model.tests.test_logistic",
    "linear_model.tests.test_sgd",
    "metrics.tests.test_pairwise",
    "model_selection.tests.test_search",
    "utils.tests.test_parallel",
)
IN_FULL = os.environ.get("SAFEPOOL_TEST_SKLEARN") == "all"
LIMIT_S = 900 if IN_FULL else 240


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 20)
def test_its_tests_pass() -> None:
    """And their calls did come to ours, or nothing would be said by that."""
    # Here, not at the top: every run would pay for the import, and hardly one runs this test.
    sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    modules = MODULES + SLOW_MODULES if IN_FULL else MODULES
    home = Path(sklearn.__file__).parent
    options = ["-q", "-p", "support_sklearn_suite", "-p", "no:cacheprovider", "--pyargs"]
    # Without this project's configuration: the environment may lie in its folder.
    options += ["-c", os.devnull, "--rootdir", str(home)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"sklearn.{name}" for name in modules)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    calls = re.search(r"parallel calls in safepool's workers: (\d+)", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 30, done.stdout[-500:]
    assert calls is not None
    assert int(calls[1]) >= 30, done.stdout[-500:]
