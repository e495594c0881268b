"""A picture of a run: good JSON at any moment, one row per worker, nothing over each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from support_cgroups import control_group
from support_processes import wait_until
from support_tasks import touch_and_sleep

import safepool
from safepool.cli import report
from safepool.pool.core.policy import Policy
from safepool.pool.shell import staff
from safepool.pool.tracing import events as trace_events
from safepool.pool.tracing import file as trace_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals end otherwise there")


def read(path: Path, pid: int | None = None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text(), parse_constant=refuse)
    for event in events:
        assert event["ph"] in "XiCM"
        assert event["pid"] == (pid or os.getpid())
        assert event["ts"] >= 0
    rows: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault(event["tid"], []).append(event)
    for row in rows.values():
        begins = [event["ts"] for event in row if event["cat"] == "task"]
        assert begins == sorted(begins)  # the report counts on it
        row.sort(key=lambda event: event["ts"])
        for before, after in pairwise(row):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.001
    return events


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def tasks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("cat") == "task"]


def instants(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event["args"] for event in events if event["ph"] == "i" and event["name"] == name]


def calls(events: list[dict[str, Any]], name: str) -> int:
    return sum(
        event["args"].get("functions", {event["name"]: event["args"].get("calls", 1)}).get(name, 0)
        for event in events
        if event.get("cat") == "task"
    )


def timed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] in "Xi"]


def run(script: str, path: Path) -> int:
    """Run a program that prints its process id."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            textwrap.dedent(script),
            path,
        ],
        timeout=60,
        check=True,
        stdout=subprocess.PIPE,
    )
    return int(done.stdout)


def be_killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed_once(path: str) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
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
        with pytest.raises(safepool.TraceFileError, match="another running pool"):
            safepool.ProcessPool(1, trace=path)
        assert pool.submit(abs, -1).result() == 1
    assert calls(read(path), "builtins.abs") == 1


def test_a_functions_name_is_cut_before_it_fills_the_disk(tmp_path: Path) -> None:
    def named(number: int) -> int:
        return number

    named.__qualname__ = '"\n\ud800' + "x" * 1_000_000
    path = tmp_path / "run.json"
    with safepool.ProcessPool(1, trace=path) as pool:
        assert [pool.submit(named, n).result() for n in range(3)] == [0, 1, 2]

    (name,) = {event["name"] for event in tasks(read(path))}
    assert '"\n\ud800xxx' in name
    assert len(name) <= 200


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
        time.sleep(60)
    """

    def slept() -> int:
        text = path.read_text() if path.exists() else ""
        if not text.endswith("},\n"):
            return 0
        return calls(json.loads(text.removesuffix(",\n") + "]"), "time.sleep")

    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), path]) as program:
        try:
            wait_until(lambda: slept() == 20)
        finally:
            program.kill()
    assert slept() == 20


def test_a_task_that_took_too_long_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def sleep_for_too_long() -> None:
        time.sleep(60)

    Policy(timeout_s=0.2).attach(sleep_for_too_long)
    with safepool.ProcessPool(1, trace=path) as pool:
        with pytest.raises(safepool.TaskTimeoutError):
            pool.submit(sleep_for_too_long).result()
        assert pool.submit(abs, -1).result() == 1

    events = read(path)
    late, good = tasks(events)
    assert late["args"]["outcome"] == "timed out"
    assert 0.1e6 < late["dur"] < 30e6
    assert (good["name"], good["args"]["outcome"]) == ("builtins.abs", "returned")
    assert good["tid"] == late["tid"]  # in the row of the worker that it replaces
    assert len(instants(events, "death")) == 1


def test_a_call_that_is_cancelled_while_it_runs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    with safepool.ProcessPool(1, trace=path) as pool:
        future = pool.submit(touch_and_sleep, str(tmp_path / "begun"), 60)
        while not (tmp_path / "begun").exists():  # one that has not begun is no event
            time.sleep(0.01)
        assert pool.cancel(future, kill=True)
        assert pool.submit(abs, -1).result() == 1

    events = read(path)
    # The end of the first worker may be seen after the second one has returned.
    ended = sorted(tasks(events), key=lambda event: event["ts"])
    assert [event["args"]["outcome"] for event in ended] == ["cancelled", "returned"]
    assert len(instants(events, "death")) == 1


def test_a_call_that_is_run_again_has_both_attempts(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    with safepool.ProcessPool(1, trace=path, retries=1) as pool:
        pool.submit(be_killed_once, str(tmp_path / "mark")).result()

    events = read(path)
    first, second = (event["args"] for event in tasks(events))
    assert (first["outcome"], first.get("attempt", 1)) == ("retried", 1)
    assert (second["outcome"], second["attempt"]) == ("returned", 2)
    assert "SIGKILL" in instants(events, "death")[0]["how"]


def test_calls_of_a_map_that_are_run_again_have_all_attempts(tmp_path: Path) -> None:
    path, mark = tmp_path / "run.json", str(tmp_path / "mark")

    with safepool.ProcessPool(1, trace=path, retries=1) as pool:
        assert list(pool.map(be_killed_once, [mark] * 50, chunksize=10)) == [None] * 50

    counted: dict[str, int] = {}
    for event in tasks(read(path)):
        args = event["args"]
        for outcome, count in args.get(
            "outcomes", {args.get("outcome"): args.get("calls", 1)}
        ).items():
            counted[outcome] = counted.get(outcome, 0) + count
    assert counted == {"retried": 1, "returned": 50}


def test_a_pool_that_breaks_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    monkeypatch.setattr(staff, "_ENDING_S", 30.0)  # for the worker's own end

    with (
        safepool.ProcessPool(1, trace=path, initializer=fail, initargs=(7,)) as pool,
        pytest.raises(safepool.PoolBrokenError),
    ):
        pool.submit(abs, -1).result()

    events = read(path)
    assert tasks(events) == []
    assert len(instants(events, "start")) == 1
    assert [args["how"] for args in instants(events, "end") if args] == ["ended with exit code 0"]
    assert ["initializer" in args["why"] for args in instants(events, "break")] == [True]
    assert events[-1]["name"] == "end"


def test_a_resize_is_told_with_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    with safepool.ProcessPool(2, trace=path) as pool:
        list(pool.map(time.sleep, [0.01] * 4))
        pool.resize(1)
        pool.resize(1)

    events = read(path)
    assert instants(events, "resize") == [{"before": 2, "after": 1, "why": "by hand"}]
    assert instants(events, "death") == []
    assert len([args for args in instants(events, "end") if args]) == 2


def test_a_longer_file_has_coarser_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    monkeypatch.setattr(trace_events, "_DOUBLES_BYTES", 4096)

    with safepool.ProcessPool(1, trace=path) as pool:
        list(pool.map(time.sleep, [0.001] * 500, chunksize=1))

    events = read(path)
    assert calls(events, "time.sleep") == 500
    # Of a millisecond each, so none would have joined another.
    assert len(tasks(events)) < 250
    counts = [event["args"].get("calls", 1) for event in tasks(events)]
    assert sum(counts[: len(counts) // 2]) < sum(counts[len(counts) // 2 :])


def test_what_a_slow_disk_was_not_given_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if there was never room for the counter itself."""
    path = tmp_path / "run.json"
    monkeypatch.setattr(trace_file, "EVERY_S", 60.0)
    monkeypatch.setattr(trace_file, "_MOST_BYTES", 3000)

    with safepool.ProcessPool(1, trace=path) as pool:
        list(pool.map(time.sleep, [0.002] * 100, chunksize=1))

    found = report.read(str(path))
    assert found.dropped_events > 0
    assert found.total().calls < 100 <= found.total().calls + found.dropped_events
    assert f"too slow: {found.dropped_events}" in found.as_text()


def test_the_workers_of_another_start_method_tell_their_times(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    with safepool.ProcessPool(1, trace=path, mp_context="spawn") as pool:
        list(pool.map(time.sleep, [0.01] * 5))

    events = read(path)
    assert calls(events, "time.sleep") == 5
    assert all(event["dur"] >= 0.01e6 * event["args"].get("calls", 1) for event in tasks(events))


def test_a_fork_of_the_program_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    script = """
        import os, sys, safepool
        def fork():
            global pool
            child = os.fork()
            if not child:
                pool.resize(2)
                pool.shutdown()
                del pool
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
        pool = safepool.ProcessPool(1, trace=sys.argv[1])
        fork()  # before it works
        list(pool.map(abs, range(100)))
        fork()
        list(pool.map(abs, range(100)))
        pool.shutdown()
        print(os.getpid())
    """

    events = read(path, run(script, path))
    assert calls(events, "builtins.abs") == 200
    assert instants(events, "resize") == []
    assert [event["name"] for event in events].count("safepool") == 1
    assert len(
        {(event["ts"], event["tid"], event["name"], event["ph"]) for event in timed(events)}
    ) == len(timed(events))


def test_a_pool_left_open_is_whole_when_the_program_ends(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    script = """
        import os, sys, safepool
        pool = safepool.ProcessPool(1, trace=sys.argv[1])
        for number in range(50):
            pool.submit(abs, number)
        print(os.getpid())
    """

    events = read(path, run(script, path))
    assert calls(events, "builtins.abs") == 50
    assert events[-1]["name"] == "end"


def test_a_quota_that_holds_up_the_workers_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_LEAST_S", 0.0)  # a run as short as this is not judged
    path = tmp_path / "run.json"
    script = """
        import os, sys, time, safepool
        def burn(until):
            while time.monotonic() < until:
                pass
        with safepool.ProcessPool(2, trace=sys.argv[1]) as pool:
            list(pool.map(burn, [time.monotonic() + 0.8] * 2))
        print(os.getpid())
    """

    with control_group(cpus=0.5) as group:
        pid = int(group.run(textwrap.dedent(script), str(path)))

    events = read(path, pid)
    counted = [event["args"] for event in events if event["name"] == "throttled"]
    assert sum(args["ms"] for args in counted) > 0
    assert sum(e["args"]["frozen"] for e in events if e["name"] == "periods") > 0
    assert "The kernel froze" in report.read(str(path)).conclusion()


def test_a_pool_that_breaks_with_a_worker_tells_whose_call_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    with safepool.ProcessPool(1, trace=path, on_worker_death="break") as pool:
        futures = [pool.submit(abs, -1), pool.submit(be_killed, 1)]
        with pytest.raises(safepool.PoolBrokenError):  # by either
            pool.submit(abs, -2).result()
    assert [type(future.exception()) for future in futures] == [
        type(None),
        safepool.WorkerDiedError,
    ]

    events = read(path)
    assert [event["args"]["outcome"] for event in tasks(events)] == ["returned", "died"]
    assert len(instants(events, "death")) == len(instants(events, "break")) == 1


def test_a_fork_that_lives_on_does_not_keep_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    script = """
        import os, sys, safepool
        reading, writing = os.pipe()
        with safepool.ProcessPool(1, trace=sys.argv[1]) as pool:
            pool.submit(abs, -1).result()
            child = os.fork()
            if not child:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
        with safepool.ProcessPool(1, trace=sys.argv[1]) as pool:
            pool.submit(abs, -1).result()
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0
        print(os.getpid())
    """

    assert calls(read(path, run(script, path)), "builtins.abs") == 1
