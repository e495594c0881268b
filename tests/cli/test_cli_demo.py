"""The demo from end to end: both pools, real work, a real quota, and nothing left behind."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import support_cgroups
import support_schemas
from support_processes import still_alive

import safepool
from safepool.cli import demo, main
from safepool.cli.demo_report import Report

if TYPE_CHECKING:
    from safepool.cli.demo_report import Half

REPOSITORY = Path(safepool.__file__).parent.parent
# The bound is for a machine that is busy: a half that it cuts off has no results to compare.
SMALL = ("--tasks", "8", "--points", "30", "--bound", "45")

REASON = support_cgroups.without_control_groups()
needs_groups = pytest.mark.skipif(REASON is not None, reason=str(REASON))
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted on Linux only")

# Key of the JSON object, and the types that it may have.
KEYS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "tasks": (int,),
    "points": (int,),
    "cpus_asked": (float, type(None)),
    "bound_s": (float,),
    "versions": (dict,),
    "pretend_host_cpus": (int, type(None)),
    "machine_cpus": (int,),
    "limit": (dict,),
    "no_group": (str, type(None)),
    "standard": (dict,),
    "safepool": (dict,),
    "ratio": (float, type(None)),
    "ratio_is_lower_bound": (bool,),
    "oversubscribed": (bool, type(None)),
    "nothing_to_win": (bool,),
    "comparison": (dict,),
    "failed": (bool,),
    "verdict": (str,),
}


@pytest.mark.skipif(sys.platform == "win32", reason="has no /tmp")
def test_the_path_of_a_fork_server_s_socket_is_not_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    below = "/safepool-demo-12345678/pymp-12345678/sock-123456789012"
    for length in range(40, 120):
        monkeypatch.setattr(tempfile, "tempdir", "/".ljust(length, "x"))
        folder = demo._short_folder()
        assert folder in (None, "/tmp")
        assert (folder is None) == (length + len(below) <= 107)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "safepool", "demo", *arguments]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=110,
        check=False,
    )


def measured(*arguments: str) -> dict[str, Any]:
    ended = run_demo(*arguments, "--json")
    assert ended.stderr == ""
    assert ended.returncode == 0, ended.stdout
    told: dict[str, Any] = json.loads(ended.stdout)
    support_schemas.check("demo", told)
    return told


@functools.cache
def measured_once() -> dict[str, Any]:
    """Run it as it is, for more than one test."""
    return measured(*SMALL)


def groups_of(pid: int) -> list[Path]:
    """List the control groups of one demo, wherever it made them; others may run meanwhile."""
    # Not by rglob(): it raises when one of the others' is gone before its turn comes.
    folders = os.walk("/sys/fs/cgroup")
    return [Path(folder) for folder, _, _ in folders if folder.endswith(f"/safepool-demo-{pid}")]


def test_json_has_every_key_and_the_results_are_equal() -> None:
    told = measured_once()

    assert {key: isinstance(told.get(key), types) for key, types in KEYS.items()} == dict.fromkeys(
        KEYS, True
    )
    assert set(told) == set(KEYS)
    assert told["comparison"]["compared"] == 8
    assert told["comparison"]["equal"] is True
    assert told["failed"] is False
    for half in (told["standard"], told["safepool"]):
        assert half["tasks_done"] == 8
        assert half["cut_off"] is False
        assert half["error"] is None
        assert half["seconds"] > 0
    assert told["limit"]["source"]


@on_linux
def test_threads_are_counted_in_the_workers() -> None:
    """At least the main thread of each worker; safepool's have the budget's and no more."""
    told = measured_once()

    assert told["standard"]["threads"] >= told["standard"]["workers"] >= 1
    assert told["safepool"]["threads"] >= told["safepool"]["workers"] >= 1
    assert told["safepool"]["workers"] == min(8, safepool.cpu_count())


@needs_groups
@pytest.mark.parametrize("cpus", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_under_a_quota_safepool_has_one_worker(cpus: float) -> None:
    """The standard pool starts as many as ever; the group is gone afterwards."""
    told = measured(*SMALL, "--cpus", str(cpus))

    assert told["no_group"] is None
    assert told["limit"]["cpus"] == cpus
    group = Path(told["limit"]["source"]).parent
    assert group.name.startswith("safepool-demo-")
    assert group.parent.is_dir()
    assert not group.exists()
    assert told["safepool"]["workers"] == 1
    assert told["safepool"]["threads"] == 1
    assert told["standard"]["workers"] == min(8, os.cpu_count() or 1)
    assert told["comparison"] == told["comparison"] | {"compared": 8, "equal": True}
    for half in (told["standard"], told["safepool"]):
        assert half["throttling"]["source"].endswith("/cpu.stat")
        assert half["throttling"]["periods"] >= 0


@needs_groups
def test_without_cpus_the_limit_that_is_there_is_named() -> None:
    code = "import sys; from safepool.cli import main; sys.exit(main(sys.argv[1:]))"
    with support_cgroups.control_group(cpus=1.0) as group:
        told = json.loads(group.run(code, "demo", *SMALL, "--json"))

    assert told["limit"]["cpus"] == 1.0
    assert told["limit"]["source"].startswith(str(group.cpu))
    assert told["safepool"]["workers"] == 1
    assert told["safepool"]["throttling"]["source"].startswith(str(group.cpu))


@pytest.mark.slow
def test_no_group_is_one_line_and_the_demo_still_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(cpus: float) -> None:
        raise demo.host().NoGroupError(f"nobody makes a group of {cpus:g} CPUs here")

    monkeypatch.setattr(demo.host(), "quota_group", refuse)

    assert main(["demo", *SMALL, "--cpus", "0.5"]) == 0

    out, err = capsys.readouterr()
    assert err == ""
    assert "--cpus 0.5 has no effect: nobody makes a group of 0.5 CPUs here\n" in out
    # The table has a row for each pool.
    rows = [line.split() for line in out.splitlines() if "8/8" in line]
    assert [row[0] for row in rows] == ["ProcessPoolExecutor()", "safepool.ProcessPool()"]
    assert rows[1][-1] == "x"
    assert "8 compared, equal" in out
    assert out.isascii()


def test_a_half_that_would_not_end_is_cut_off() -> None:
    """Both are, at so small a bound: shown as such, and nothing is claimed."""
    ended = run_demo("--tasks", "2000", "--bound", "0.05", "--json")
    told = json.loads(ended.stdout)

    assert ended.returncode == 1
    assert told["failed"] is True
    assert "cut off" in told["verdict"]
    for half in (told["standard"], told["safepool"]):
        assert half["cut_off"] is True
        assert half["seconds"] == 0.05
        assert half["tasks_done"] < 2000
        assert half["error"] is None
    assert halves_running() == []


def test_a_half_that_fails_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of its error, in one sentence, and exit code 1."""
    monkeypatch.setattr(demo, "_BOOTSTRAP", "raise RuntimeError('out of luck')")

    assert main(["demo", *SMALL, "--json"]) == 1

    told = json.loads(capsys.readouterr().out)
    assert told["safepool"]["error"] == "RuntimeError: out of luck"
    assert told["safepool"]["seconds"] is None
    assert told["failed"] is True
    assert "out of luck" in told["verdict"]


def test_a_half_that_dies_without_a_word_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_BOOTSTRAP", "import os; os._exit(7)")

    half = measure_small(tmp_path)

    assert half.error == "ended with exit code 7"
    assert (half.seconds, half.cut_off, half.tasks_done) == (None, False, 0)


def test_what_else_a_half_prints_is_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native libraries write to standard output; the count must not suffer from it."""
    noise = "print('{OpenBLAS warning}'); print('[1, 2]')\n"
    monkeypatch.setattr(demo, "_BOOTSTRAP", noise + demo._BOOTSTRAP)

    half = measure_small(tmp_path)

    assert (half.error, half.tasks_done) == (None, 4)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_half_works_with_every_start_method(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other Pythons and systems have other defaults; helpers of theirs are no workers."""
    choose = f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
    monkeypatch.setattr(demo, "_BOOTSTRAP", choose + demo._BOOTSTRAP)

    # Not in tmp_path: a socket of multiprocessing's is there, whose path may have 107 characters.
    with tempfile.TemporaryDirectory() as folder:
        half = measure_small(Path(folder))

    assert (half.error, half.tasks_done, half.start_method) == (None, 4, method)
    assert half.workers is not None
    assert 1 <= half.workers <= (os.cpu_count() or 1)


def test_a_start_that_takes_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_BOOTSTRAP", "import time; time.sleep(60)")
    monkeypatch.setattr(demo, "_START_WITHIN_S", 0.2)
    monkeypatch.setattr(demo, "_LEAVE_WITHIN_S", 0.2)

    half = measure_small(tmp_path)

    assert half.error is not None
    assert "imports took more than" in half.error


def measure_small(folder: Path) -> Half:
    setting = demo.Setting()
    asked = Report(
        tasks=4, points=30, bound_s=80.0, versions={}, machine_cpus=1, limit=setting.limit
    )
    return demo.measure("standard", asked, setting, folder / "standard.npy")


def test_the_environment_of_a_half_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread variable comes or goes on the way to the standard pool."""
    show = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[-1], 'w'))"
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # Compared with a plain child's: native code (readline) may have set what os.environ
    # does not show.
    plain = tmp_path / "plain.json"
    subprocess.run([sys.executable, "-c", show, str(plain)], check=True, timeout=60)
    monkeypatch.setattr(demo, "_BOOTSTRAP", show)

    measure_small(tmp_path)

    environment = json.loads((tmp_path / "standard.npy").read_text())
    assert environment == json.loads(plain.read_text())
    assert environment["MKL_NUM_THREADS"] == "3"


# One row per way to end a demo from outside: the signal, and the exit code it leaves.
ENDINGS: dict[str, tuple[int, int]] = {
    "Ctrl-C": (signal.SIGINT, 130),
    "kill": (signal.SIGTERM, 128 + signal.SIGTERM),
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ended_demo_leaves_no_process_and_no_group(ending: str) -> None:
    """In the middle of a half, with workers at work, in a group where one can be made."""
    number, exitcode = ENDINGS[ending]
    running = subprocess.Popen(
        command("--tasks", "100000", "--cpus", "0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        family = wait_for_workers(running)
        in_group = groups_of(running.pid)
        running.send_signal(number)
        _, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
        running.communicate()

    assert (running.returncode, stderr) == (exitcode, "")
    assert still_alive([process.pid for process in family], after_s=5) == []
    assert bool(in_group) == (REASON is None)
    assert groups_of(running.pid) == []


def wait_for_workers(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait until the half under test has worker processes; return the whole family."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.poll() is None:
        family = psutil.Process(running.pid).children(recursive=True)
        if len(family) >= 2:
            return family
        time.sleep(0.02)
    pytest.fail("the demo never came to have workers")


def halves_running() -> list[str]:
    """List this session's processes that belong to a demo's half."""
    found = []
    for process in psutil.process_iter():
        try:
            # The session's own temporary folder: others may run demos meanwhile.
            words = " ".join(process.cmdline())
            if "demo_half" in words and tempfile.gettempdir() in words:
                found.append(f"{process.pid} {process.status()}")
        except psutil.Error:
            continue
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
def test_a_reader_that_leaves_ends_the_demo_in_silence() -> None:
    running = subprocess.Popen(
        command(*SMALL), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("8 tasks")
    running.stdout.close()
    _, stderr = running.communicate(timeout=60)

    assert (running.returncode, stderr) == (0, "")


def test_without_results_nothing_is_compared_and_numpy_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)

    assert demo.compare(tmp_path / "standard.npy", tmp_path / "safepool.npy").compared == 0
