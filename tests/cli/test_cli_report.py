"""The report: of a whole trace, of one torn off anywhere, and of what is none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import safepool
from safepool.cli import main
from safepool.cli.report import ReportError, read

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("trace") / "run.json"
    with safepool.ProcessPool(1, trace=path) as pool:
        list(pool.map(abs, range(1000)))
    return path


def test_a_trace_is_reported(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trace)]) == 0
    text = capsys.readouterr().out
    assert "1000 calls, 1 workers" in text
    assert [line for line in text.splitlines() if len(line) > 80 or not line.isascii()] == []
    assert main(["report", "--json", str(trace)]) == 0
    assert json.loads(capsys.readouterr().out)["calls"] == 1000


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_a_torn_trace_is_reported_or_refused(trace: Path, tmp_path: Path, share: float) -> None:
    data = trace.read_bytes()
    torn = tmp_path / "torn.json"
    torn.write_bytes(data[: int(len(data) * share)])
    try:
        read(str(torn)).as_text()
    except ReportError:
        assert share < 0.5


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"name": 3}', "text"])
def test_what_is_no_trace_is_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
