"""Notes for ``.ci/run`` which tests ran and which were skipped: a test that none runs is no test.

A file of JSON for each run of the tests, in the folder that a variable names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

FOLDER_VARIABLE = "SAFEPOOL_CI_OUTCOMES"


class Outcomes:
    """What came of each test of this run."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._ran: set[str] = set()
        # Why, by the test, or by the file whose tests were not even collected.
        self._skipped: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that was skipped as a whole."""
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test, also where another process has run it."""
        self._note(report)
        # One that is expected to fail is reported as skipped, but ran.
        if report.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
            self._ran |= {report.nodeid, report.nodeid.partition("::")[0]}

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            assert isinstance(report.longrepr, tuple)
            self._skipped[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        """Write it down."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"ran": sorted(self._ran), "skipped": self._skipped})
        (self._folder / f"{os.getpid()}.json").write_text(text)
