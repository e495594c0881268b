"""The example of a moved scikit-learn script runs, and says what it said before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "scikit_learn_search.py"


def _printed(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not beside the tests")
def test_the_moved_script_says_what_it_said_before() -> None:
    now = _printed()
    assert now.startswith("best: {'logisticregression__C': ")
    assert now == _printed("--before")
