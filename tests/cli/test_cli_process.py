"""Other processes and the watch: what they may use, what they have, in real groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support_cgroups import control_group, without_control_groups

from safepool.cli import main, watch
from safepool.cli.watch import Line

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

SPIN = "import threading\nprint('ready', flush=True)\nwhile True: pass\n"
WAIT = "print('ready', flush=True); input()"


def started(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process.pid


def python(code: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    code = main(["--json", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def test_another_process_has_its_own_variables_affinity_and_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = min(os.sched_getaffinity(0))
    code = f"import os, threading; os.sched_setaffinity(0, {{{first}}})\n"
    code += "threading.Thread(target=threading.Event().wait, daemon=True).start()\n" + WAIT
    process = python(code, OMP_NUM_THREADS="1", NSLOTS="many")
    try:
        status, screen = told(capsys, "--pid", str(started(process)))
    finally:
        ended(process)

    assert status == 1
    limits = screen["limits"]
    assert isinstance(limits, dict)
    assert limits["affinity"]["cpus"] == 1.0
    assert limits["affinity"]["source"] == f"/proc/{process.pid}/status"
    assert screen["process"] == {"pid": process.pid, "threads": 2, "libraries": []}
    assert screen["variables"] == {"OMP_NUM_THREADS": "1"}
    assert [finding["code"] for finding in screen["findings"]] == ["variable-ignored"]  # type: ignore[attr-defined]


def test_native_libraries_of_another_process_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("numpy")
    process = python("import numpy\n" + WAIT)
    try:
        _, screen = told(capsys, "--pid", str(started(process)))
        assert main(["--pid", str(process.pid)]) in {0, 1}
    finally:
        ended(process)

    libraries = screen["process"]["libraries"]  # type: ignore[index]
    if not any("numpy" in library["library"] for library in libraries):
        pytest.skip("this NumPy brings no library of its own")
    assert {library["runtime"] for library in libraries} == {"openblas"}
    assert f"what process {process.pid} may use" in capsys.readouterr().out


def test_the_quota_and_the_throttling_of_another_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A process that wants a whole CPU and gets a fifth is frozen in nearly every period."""
    if reason := without_control_groups():
        pytest.skip(reason)
    with control_group(cpus=0.2) as group:
        process = group.popen([sys.executable, "-c", SPIN])
        try:
            status, screen = told(capsys, "--pid", str(started(process)))
            lines = watched(capsys, process.pid)
        finally:
            ended(process)

    assert status == 1
    assert screen["budget"]["cpus"] == pytest.approx(0.2)  # type: ignore[index]
    assert screen["findings"][0]["code"] == "throttled"  # type: ignore[index]
    assert [line["cpus"] for line in lines] == [pytest.approx(0.2)] * 2
    assert all(line["throttled_periods"] > 0 for line in lines)
    assert all(line["periods"] >= line["throttled_periods"] for line in lines)


def test_the_time_of_another_group_is_not_taken_for_that_of_the_quotas() -> None:
    """Of version 1, what counts the time may be mounted apart, with all processes in one group."""
    from safepool.limits.process import ProcessView

    if reason := without_control_groups():
        pytest.skip(reason)
    with control_group(cpus=0.5) as group:
        process = group.popen([sys.executable, "-c", WAIT])
        try:
            usage = ProcessView(started(process)).read_usage()
        finally:
            ended(process)

    assert usage is None or usage.source.startswith(f"{group.cpu}/")


def test_a_process_without_native_libraries_has_none_of_their_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is wrong with it, however few CPUs it has."""
    if reason := without_control_groups():
        pytest.skip(reason)
    with control_group(cpus=0.5) as group:
        process = group.popen([sys.executable, "-c", WAIT])
        try:
            started(process)
            time.sleep(0.3)  # its start may have been frozen: not in the sample
            status, screen = told(capsys, "--pid", str(process.pid))
        finally:
            ended(process)

    assert screen["process"]["libraries"] == []  # type: ignore[index]
    assert (status, screen["findings"]) == (0, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried by root only")
def test_what_another_user_may_not_read_is_skipped_aloud(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No library is seen then, which must not pass for none being there."""
    process = python(WAIT)
    try:
        started(process)
        os.seteuid(65534)
        try:
            _, screen = told(capsys, "--pid", str(process.pid))
        finally:
            os.seteuid(0)
    finally:
        ended(process)

    skipped = {entry["source"] for entry in screen["limits"]["skipped"]}  # type: ignore[index]
    assert {f"/proc/{process.pid}/environ", f"/proc/{process.pid}/maps"} <= skipped


def watched(capsys: pytest.CaptureFixture[str], pid: int) -> Sequence[dict[str, float]]:
    from safepool.limits.process import ProcessView

    watch.watch(ProcessView(pid), 0.2, as_json=True, lines=2)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_watch_ends_with_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    process = python("import time; print('ready', flush=True); time.sleep(2.5)")
    try:
        started(process)
        # Somebody must take its exit status for it to be gone.
        waiting = subprocess.Popen(
            [sys.executable, "-m", "safepool", "--pid", str(process.pid), "--watch"],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.wait(timeout=60)
        out, _ = waiting.communicate(timeout=60)
    finally:
        ended(process)

    assert waiting.returncode == 0
    assert all(line.startswith("used ") for line in out.splitlines())
    assert capsys.readouterr() == ("", "")


def test_a_process_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    process = python("pass")
    process.communicate()

    assert main(["--pid", str(process.pid)]) == 2

    assert capsys.readouterr() == ("", f"safepool: error: there is no process {process.pid}\n")


def test_without_proc_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.path.isdir", lambda _: False)

    assert main(["--watch"]) == 2

    assert "/proc is not mounted" in capsys.readouterr().err


def test_a_process_whose_end_nobody_has_asked_for_has_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = python("import time; print('ready', flush=True); time.sleep(1.5)")
    try:
        assert main(["--pid", str(started(process)), "--watch"]) == 0
        capsys.readouterr()
        assert main(["--pid", str(process.pid)]) == 2
    finally:
        ended(process)

    assert capsys.readouterr() == ("", f"safepool: error: process {process.pid} has ended\n")


def test_a_process_whose_first_thread_has_ended_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import ctypes, threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    code += "print('ready', flush=True); ctypes.CDLL(None).pthread_exit(None)"
    process = python(code, OMP_NUM_THREADS="1")
    try:
        stat = Path(f"/proc/{started(process)}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        _, screen = told(capsys, "--pid", str(process.pid))
    finally:
        ended(process)

    limits = screen["limits"]
    assert isinstance(limits, dict)
    assert screen["variables"] == {"OMP_NUM_THREADS": "1"}
    assert screen["process"] == {"pid": process.pid, "threads": 1, "libraries": []}
    assert limits["skipped"] == []
    assert limits["open_files"]["used_files"] >= 3


# One row per line of the watch: what was measured, and how it reads.
LINES = {
    "idle": (
        Line(seconds=1.0, cpus=2.5, used_cpus=0.0),
        "used [....................] 0.00 of 2.5 CPUs",
    ),
    "frozen": (
        Line(
            seconds=1.0,
            cpus=2.5,
            used_cpus=2.5,
            periods=10,
            throttled_periods=7,
            throttled_us=400_000,
        ),
        "used [####################] 2.50 of 2.5 CPUs  frozen [#######...] 7/10 periods",
    ),
    "above its quota for a moment": (
        Line(seconds=1.0, cpus=1.0, used_cpus=1.5, periods=0, throttled_periods=0, throttled_us=0),
        "used [####################] 1.50 of 1 CPU  frozen [..........] 0/0 periods",
    ),
    "not told": (
        Line(seconds=1.0, cpus=64.0, used_cpus=None),
        "used ?                      ? of 64 CPUs",
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_watch_reads_so(line: str) -> None:
    measured, text = LINES[line]

    assert measured.as_text() == text
    assert len(text) <= 80
    assert json.loads(measured.as_json())["cpus"] == measured.cpus
