"""A test that every stage of CI skips is found."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outcomes import Outcomes

SCRIPT = Path(__file__).parents[2] / ".ci" / "skipped.py"

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not SCRIPT.exists(), reason="only a clone of the repository has .ci"),
]


def report(test: str, outcome: str, **others: Any) -> Any:
    reason = ("file", 1, f"Skipped: {outcome}")
    skipped = outcome not in ("passed", "failed")
    return SimpleNamespace(nodeid=test, skipped=skipped, longrepr=reason, when="call", **others)


# What two stages said of a test, and whether that is right.
STAGES = {
    "ran in one": ([report("f::a", "no fork")], [report("f::a", "passed")], True),
    "failed in one": ([report("f::a", "no fork")], [report("f::a", "failed")], True),
    "fails as expected": ([report("f::a", "no fork")], [report("f::a", "", wasxfail="")], True),
    "skipped in both": ([report("f::a", "no fork")], [report("f::a", "no fork")], False),
    "skipped in the one that has it": ([report("f::a", "no fork")], [report("f::b", "")], False),
    "a reason of the table": (
        [report("f::a", "fish is not installed")],
        [report("f::b", "passed")],
        True,
    ),
    "a file of which tests ran": ([report("f", "no tqdm")], [report("f::a", "passed")], True),
    "a file of which none ran": ([report("f", "no tqdm")], [report("g::a", "passed")], False),
    "nothing ran": ([], [], False),
}


@pytest.mark.parametrize("case", STAGES)
def test_a_test_that_no_stage_ran_needs_a_reason(case: str, tmp_path: Path) -> None:
    *stages, right = STAGES[case]
    for number, reports in enumerate(stages):
        noted = Outcomes(str(tmp_path / str(number)))
        for one in reports:
            (noted.pytest_runtest_logreport if "::" in one.nodeid else noted.pytest_collectreport)(
                one
            )
        noted.pytest_sessionfinish()
        (written,) = (tmp_path / str(number)).iterdir()
        written.rename(tmp_path / f"{number}.json")
        assert {*json.loads((tmp_path / f"{number}.json").read_text())} == {"ran", "skipped"}

    assert (runpy.run_path(str(SCRIPT))["main"](str(tmp_path)) == 0) is right
