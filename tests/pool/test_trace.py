"""A picture of a run: good JSON at any moment, one row per worker, nothing over each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import safepool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals end otherwise there")


def read(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    for event in events:
        assert event["ph"] in "XiCM"
        assert event["pid"] == os.getpid()
        assert event["ts"] >= 0
    rows: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    for row in rows.values():
        row.sort(key=lambda event: event["ts"])
        for before, after in pairwise(row):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.001
    return events


def calls(events: list[dict[str, Any]], name: str) -> int:
    return sum(
        event["args"].get("functions", {event["name"]: event["args"].get("calls", 1)}).get(name, 0)
        for event in events
        if event.get("cat") == "task"
    )


def be_killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> None:
    raise ValueError(number)


def test_every_kind_of_event_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("what was there before")

    with safepool.ProcessPool(2, trace=path, retries=1) as pool:
        assert sum(pool.map(abs, range(20_000))) == sum(range(20_000))
        with pytest.raises(ValueError, match="7"):
            pool.submit(fail, 7).result()
        with pytest.raises(safepool.WorkerDiedError):
            pool.submit(be_killed, 1).result()
        pool.resize(1)

    events = read(path)
    assert calls(events, "builtins.abs") == 20_000
    tasks = [event for event in events if event.get("cat") == "task"]
    ends = {event["args"].get("outcome"): event["args"] for event in tasks}
    assert {"returned", "raised", "retried", "died"} <= ends.keys()
    assert ends["raised"]["error"] == "ValueError"
    assert ends["died"]["attempt"] == 2
    instants = [event["name"] for event in events if event["ph"] == "i"]
    assert instants.count("death") == 2
    assert {"start", "end", "resize"} <= set(instants)
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"queue", "workers"}


def test_a_file_that_cannot_be_written_is_an_error_of_the_constructor(tmp_path: Path) -> None:
    with pytest.raises(safepool.TraceFileError, match="No such file") as caught:
        safepool.ProcessPool(1, trace=tmp_path / "missing" / "run.json")
    assert isinstance(caught.value, OSError)


def test_a_file_of_a_running_pool_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with safepool.ProcessPool(1, trace=path) as pool:
        with pytest.raises(safepool.TraceFileError, match="another pool"):
            safepool.ProcessPool(1, trace=path)
        assert pool.submit(abs, -1).result() == 1
    assert calls(read(path), "builtins.abs") == 1


def test_a_pool_without_work_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    pool = safepool.ProcessPool(1, trace=path)
    del pool
    assert read(path)[-1]["name"] == "end"


def test_a_full_disk_costs_the_trace_and_not_the_pool(caplog: pytest.LogCaptureFixture) -> None:
    with safepool.ProcessPool(1, trace="/dev/full") as pool:
        assert list(pool.map(abs, range(100))) == list(range(100))
    assert [r.levelname for r in caplog.records if "trace" in r.message] == ["WARNING"]


def test_what_a_killed_program_leaves_is_an_array_without_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    script = """
        import os, signal, sys, time, safepool
        pool = safepool.ProcessPool(1, trace=sys.argv[1])
        list(pool.map(time.sleep, [0.01] * 20))
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], timeout=60, check=False)

    text = path.read_text()
    assert text.endswith("},\n")
    events = json.loads(text.removesuffix(",\n") + "]")
    assert calls(events, "time.sleep") == 20
