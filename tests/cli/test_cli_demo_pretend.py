"""A pretended host: what its processes see, what stays real, and where it is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import support_cgroups
import support_natives
from support_processes import still_alive

import safepool
from safepool.budget import fit
from safepool.cli import demo, main
from safepool.limits import Limit, Limits, MemoryLimit, read_limits

host = demo.host()
pretend = host.pretend
NoGroupError, PretendError = host.NoGroupError, host.PretendError

REPOSITORY = Path(safepool.__file__).parent.parent
TWO = Limit(name="affinity", cpus=2.0, source="os.sched_getaffinity(0)", raw="0-1")
QUOTA = Limit(name="cpu.max", cpus=1.5, source="/sys/fs/cgroup/cpu.max", raw="150000 100000")
SLURM = Limit(name="SLURM_CPUS_PER_TASK", cpus=1.0, source="environment variable", raw="1")
LARGE = replace(QUOTA, cpus=8.0, raw="800000 100000")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="a library is preloaded on Linux")
NO_GROUPS = support_cgroups.without_control_groups()
needs_groups = pytest.mark.skipif(NO_GROUPS is not None, reason=str(NO_GROUPS))


@pytest.fixture
def room_for_48() -> None:
    """Skip where the demo would refuse: memory comes and goes with what else runs."""
    try:
        pretend.check_room(read_limits(), 48, 150)
    except PretendError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if support_natives.shim(tmp_path) is None:
        pytest.skip("no compiler to build the library with")
    return tmp_path


def run_demo(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "safepool", "demo", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**support_natives.environment(), **environ},
        timeout=100,
        check=False,
    )


# Eight seconds of a processor at the least.
@pytest.mark.slow
@needs_groups
@pytest.mark.usefixtures("folder", "room_for_48")
def test_a_container_on_a_host_of_48_cpus() -> None:
    """The standard pool as there: 48 workers, native threads in each. safepool's has one thread.

    It is cut off soon: thousands of threads on one CPU would not end in a test's time. A machine
    that is busy with other things gets longer.
    """
    # A fork server (Python 3.14) starts one after the other, and has not done it by then.
    workers = 48 if multiprocessing.get_start_method() == "fork" else 2
    for bound_s in ("4", "40"):
        ended = run_demo(
            *("--pretend-host-cpus", "48", "--cpus", "1", "--tasks", "60", "--points", "30"),
            *("--bound", bound_s, "--json"),
        )
        assert ended.stderr == ""
        told: dict[str, Any] = json.loads(ended.stdout)
        standard, ours = told["standard"], told["safepool"]
        if (standard["workers"] or 0) >= workers and not ours["cut_off"]:
            break

    assert (told["pretend_host_cpus"], told["machine_cpus"]) == (48, os.cpu_count())
    assert told["limit"]["cpus"] == 1.0
    assert workers <= standard["workers"] <= 48
    assert standard["threads"] > (2 * 48 if workers == 48 else 1)
    assert (ours["workers"], ours["threads"], ours["tasks_done"]) == (1, 1, 60)
    assert not Path(told["limit"]["source"]).parent.exists()


@needs_groups
@pytest.mark.usefixtures("folder", "room_for_48")
def test_ctrl_c_ends_all_of_them() -> None:
    """In the middle of the start of 48 workers, on half a CPU; the group is gone, too."""
    # By that bound a fork server has started some on a busy machine, too.
    asked = ["--pretend-host-cpus", "48", "--cpus", "0.5", "--bound", "100"]
    running = subprocess.Popen(
        [sys.executable, "-m", "safepool", "demo", *asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=support_natives.environment(),
    )
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 80
    try:
        while len(family) < 20 and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.05)
            family = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
        running.communicate()

    assert len(family) >= 20
    assert (running.returncode, err) == (130, "")
    assert still_alive([child.pid for child in family], after_s=5) == []
    group = next(line.strip() for line in out.splitlines() if f"demo-{running.pid}" in line)
    assert not Path(group).parent.exists()


@pytest.mark.slow
@needs_groups
@pytest.mark.usefixtures("folder")
def test_a_quota_that_is_there_is_enough() -> None:
    """As in a container in which nobody can make groups: none is made, and the limit is found."""
    program = (
        "import os, sys, safepool.cli.demo as demo; from safepool.cli import main\n"
        "def no_group(cpus, **_): raise AssertionError('a group was made')\n"
        "demo.host().quota_group = no_group\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with support_cgroups.control_group(cpus=1.0) as group:
        told = json.loads(
            group.run(
                program,
                *("demo", "--pretend-host-cpus", "6", "--tasks", "8", "--points", "30"),
                *("--bound", "3", "--json"),
            )
        )

    assert told["limit"]["source"].startswith(str(group.cpu))
    assert (told["safepool"]["workers"], told["safepool"]["tasks_done"]) == (1, 8)
    assert told["standard"]["workers"] == 6


@on_linux
def test_children_see_other_cpus_and_this_process_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody else preloads stays: here a file that is not there, which the loader skips."""
    before = read_limits().affinity
    monkeypatch.setenv("LD_PRELOAD", "/no/such/library.so")
    ask = (
        "import os; from safepool.limits import read_limits as r;"
        "print(os.cpu_count(), r().affinity.raw)"
    )

    variables = pretend.environment(48, folder)
    seen = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=True,
    )

    assert seen.stdout.split() == ["48", "0-47"]
    assert variables["LD_PRELOAD"].endswith(":/no/such/library.so")
    assert read_limits().affinity == before
    assert "FAKE_NCPU" not in os.environ


# One row per machine: its quotas and bounds, and the limit that a child finds to bind which
# believes in 48 CPUs; None where it is refused.
SEEN: dict[str, tuple[tuple[Limit, ...], tuple[Limit, ...], Limit | None]] = {
    "a quota": ((QUOTA,), (), QUOTA),
    "a quota and a scheduler's bound": ((QUOTA,), (SLURM,), SLURM),
    "an outer quota": ((LARGE, QUOTA), (), QUOTA),
    "no quota": ((), (), None),
    "a quota of more CPUs than there are": ((LARGE,), (), None),
    "nothing but a bound": ((), (SLURM,), None),
}


@pytest.mark.parametrize("machine", SEEN)
def test_the_quota_is_what_binds_as_on_a_large_host(machine: str) -> None:
    quotas, bounds, expected = SEEN[machine]
    limits = Limits(affinity=TWO, quotas=quotas, bounds=bounds)

    if expected is None:
        with pytest.raises(PretendError, match="needs a quota of at most the 2 CPUs"):
            pretend.seen_from_inside(limits, 48)
        return
    seen = pretend.seen_from_inside(limits, 48)
    assert seen.affinity.cpus == 48.0
    assert seen.binding == expected
    assert fit(seen).workers == 1


def write_proc(proc: Path, *, threads: int = 32768) -> None:
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\n")
    (proc / "sys" / "kernel").mkdir(parents=True)
    (proc / "sys" / "kernel" / "pid_max").write_text("32768\n")
    (proc / "sys" / "kernel" / "threads-max").write_text(f"{threads}\n")


def test_where_threads_are_short_it_is_refused(tmp_path: Path) -> None:
    """Half of them stay for everybody else on the machine."""
    write_proc(tmp_path, threads=8000)
    limits = Limits(affinity=TWO, quotas=(QUOTA,))

    pretend.check_room(limits, 44, 150, proc=tmp_path)
    with pytest.raises(PretendError, match=r"48 workers have about 4608 threads.* has 8000 for"):
        pretend.check_room(limits, 48, 150, proc=tmp_path)


def test_where_memory_is_short_it_is_refused(tmp_path: Path) -> None:
    memory = MemoryLimit(
        name="memory.max",
        bytes=1 << 30,
        used_bytes=900 << 20,
        reclaimable_bytes=100 << 20,
        source="/sys/fs/cgroup/memory.max",
        raw="1073741824",
    )
    write_proc(tmp_path)
    limits = Limits(affinity=TWO, quotas=(QUOTA,), memory=(memory,))

    pretend.check_room(limits, 8, 150, proc=tmp_path)
    pretend.check_room(replace(limits, memory=()), 48, 150, proc=tmp_path)
    with pytest.raises(PretendError, match=r"48 workers need .*memory.max leaves 224\."):
        pretend.check_room(limits, 48, 150, proc=tmp_path)
    with pytest.raises(PretendError, match="meminfo leaves 4096"):
        pretend.check_room(replace(limits, memory=()), 48, 2000, proc=tmp_path)


# One row per machine where it cannot be: variables, and what the line says.
REFUSED = {
    "no compiler": ({"PATH": "", "CC": ""}, "there is no cc, gcc or clang here"),
    "a compiler that is not there": ({"CC": "no-such-cc"}, "no-such-cc does not run"),
    "a compiler that fails": ({"CC": "false"}, "false cannot compile"),
    "a file that is no library": ({"CC": "true"}, "does not report 48 CPUs"),
}


@on_linux
@pytest.mark.parametrize("machine", REFUSED)
def test_what_is_missing_is_one_line(
    machine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, said = REFUSED[machine]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert main(["demo", "--pretend-host-cpus", "48"]) == 2

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--pretend-host-cpus: " in err
    assert said in err


@on_linux
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("quota", [None, 0.5])
def test_without_any_quota_it_is_refused(
    quota: float | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no group can be made: nothing would tell safepool's half of the real CPUs."""
    if read_limits().cpu_quota is not None:
        pytest.skip("there is a quota here")

    def refuse(cpus: float) -> None:
        raise NoGroupError(f"nobody makes a group of {cpus:g} CPUs here")

    monkeypatch.setattr(host, "quota_group", refuse)
    cpus = [] if quota is None else ["--cpus", str(quota)]

    assert main(["demo", "--pretend-host-cpus", "48", *cpus]) == 2
    assert "needs a quota of at most" in capsys.readouterr().err


@on_linux
@pytest.mark.usefixtures("folder")
def test_more_cpus_than_there_are_cannot_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    many = str(int(read_limits().affinity.cpus or 1) + 1)

    assert main(["demo", "--pretend-host-cpus", "48", "--cpus", many]) == 2
    assert f"--cpus {many} is more than the" in capsys.readouterr().err
