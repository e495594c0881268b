"""The trace of a cluster pool: what ran on which node's worker, in one file."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from support_processes import wait_until

import safepool
from safepool.cli import report
from safepool.cluster import ClusterPool, agent
from safepool.cluster.core import Answer
from safepool.cluster.messages import Ran, Source
from safepool.cluster.tracing import ClusterTrace
from safepool.pool.core.policy import Policy
from safepool.pool.core.work import Call
from safepool.pool.tracing.costs import note_brought

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def events_of(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())
    assert all(event["ts"] >= 0 for event in events)
    read = report.read(str(path))
    assert read.damaged_lines == 0
    return events


def outcomes(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Row, name, outcome and attempt of each call, in the order of the file."""
    return [
        (one["tid"], one["name"], one["args"]["outcome"], one["args"].get("attempt", 1))
        for one in events
        if one.get("cat") == "task"
    ]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """One node, whose agent is in this process and ends as soon as nobody uses it."""
    monkeypatch.setattr(agent, "_IDLE_S", 0.0)
    monkeypatch.setattr(agent, "_LOOK_S", 0.02)
    with ThreadPoolExecutor(1) as executor:
        yield executor
    wait_until(lambda: not any("safepool-" in thread.name for thread in threading.enumerate()))


def fragile(x: int) -> int:
    if x == 5:
        os._exit(3)
    return x


def unknown(x: int) -> int:
    raise KeyError(x)


def test_each_call_is_in_the_row_of_its_worker(engine: ThreadPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with ClusterPool(engine, workers_per_node=1, retries=1, trace=path) as pool:
        assert sum(pool.map(abs, range(-300, 0))) == 45150
        found = list(pool.map(fragile, range(4, 7), return_exceptions=True))
        assert [type(one).__name__ for one in found] == ["int", "WorkerDiedError", "int"]
        assert isinstance(pool.submit(unknown, 3).exception(), KeyError)
        late = pool.submit(safepool.worker(time.sleep, timeout=0.1), 60)
        assert isinstance(late.exception(), safepool.TaskTimeoutError)
        pid = pool.submit(os.getpid).result()
        with pytest.raises(safepool.TraceFileError, match="another running pool"):
            ClusterPool(engine, trace=path)
    events = events_of(path)
    tasks = [one for one in events if one.get("cat") == "task"]
    assert sum(one["args"].get("functions", {}).get("builtins.abs", 0)
               or (one["name"] == "builtins.abs") * one["args"].get("calls", 1)
               for one in tasks) == 300  # fmt: skip
    name = f"{__name__}.fragile"
    fives = [(outcome, attempt) for _, one, outcome, attempt in outcomes(events) if one == name]
    assert ("retried", 1) in fives
    assert ("died", 2) in fives
    (raised,) = [one["args"] for one in tasks if one["args"].get("error")]
    assert (raised["outcome"], raised["error"]) == ("raised", "KeyError")
    (slept,) = [one for one in tasks if one["name"] == "time.sleep"]
    assert slept["args"]["outcome"] == "timed out"
    assert slept["dur"] >= 100_000
    (node,) = {one["pid"] for one in tasks}
    assert node != os.getpid()
    (called,) = [
        one["args"]["name"]
        for one in events
        if one["name"] == "process_name" and one["pid"] == node
    ]
    assert called.endswith(f", process {os.getpid()}")
    pids = [one["args"]["pid"] for one in events if one["name"] == "start"]
    assert len(pids) == len(set(pids)) == 4  # it died twice, and was ended once
    assert pids[-1] == pid
    read = report.read(str(path))
    assert [*read.workers] == ["worker 1"]
    assert read.workers["worker 1"].node == called
    assert read.deaths == 3


def test_a_pool_that_was_never_used_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    executor = ThreadPoolExecutor(1)
    for _ in range(2):
        ClusterPool(executor, trace=path).shutdown()
        assert events_of(path)[-1]["name"] == "end"
    with pytest.raises(safepool.TraceFileError, match="No such file"):
        ClusterPool(executor, trace=tmp_path / "missing" / "run.json")
    executor.shutdown()


def new_call() -> Call:
    call = Call("f", Policy())
    note_brought(call)
    return call


def end(trace: ClusterTrace, place: str, pid: int, worker: int | None, ms: int) -> None:
    """A call has ended after so many milliseconds of the clock of its node, which starts at 0."""
    ran = Ran(pid, worker, ms * 10**6, (ms + 5) * 10**6, 0, 0)
    trace.ended(place, new_call(), Answer(1, 0.005, False, None, tuple(ran)), "returned")


def test_rows_are_places_of_workers_on_nodes(tmp_path: Path) -> None:
    """Two nodes have the same process ids, and clocks of their own."""
    path = tmp_path / "run.json"
    trace = ClusterTrace(path)
    trace.opened("p", 2)
    for place in "pq":
        trace.reported(place, place, Source(f"host {place}", 7, 5 * 10**6))
        end(trace, place, 11, 0, 10)
        end(trace, place, 12, 1, 10)
    # This one was on its way for longer: the clock is set by the first.
    trace.reported("p", "p", Source("host p", 7, 10**6))
    end(trace, "p", 13, 0, 20)  # another worker has taken the place of the first
    trace.ended("p", new_call(), Answer(1, -1.0, False, None), "cancelled")  # had none
    # One that has ended nothing takes the place of the one that has died.
    died = Answer(1, -1.0, True, None, (12, None, 40 * 10**6, 40 * 10**6, 0, 0))
    trace.ended("p", new_call(), died, "raised", safepool.WorkerDiedError(12, -9, "f"))
    trace.ended(
        "p", new_call(), died._replace(ran=(14, None, 5 * 10**7, 5 * 10**7, 0, 0)), "raised"
    )
    trace.lost("p", "connection closed", 3)
    trace.close()
    trace.close()

    events = events_of(path)
    starts = [(one["pid"] - os.getpid(), one["tid"], one["args"]["pid"])
              for one in events if one["name"] == "start"]  # fmt: skip
    assert starts == [(1, 1, 11), (1, 2, 12), (2, 3, 11), (2, 4, 12), (1, 1, 13), (1, 2, 14)]
    rows = [(one["tid"], one["args"]["outcome"]) for one in events if one.get("cat") == "task"]
    assert sorted(rows) == [
        (1, "returned"), (1, "returned"), (2, "died"), (2, "died"), (2, "returned"),
        (3, "returned"), (4, "returned"),
    ]  # fmt: skip
    (lost,) = [one["args"] for one in events if one["name"] == "node lost"]
    assert lost == {"node": "p", "why": "connection closed", "calls": 3}
    first, second = [one["ts"] for one in events if one.get("cat") == "task" and one["tid"] == 1]
    assert abs(second - first - 10_000) < 1
