"""The limits screen: every value with its source, one arrow, and the same as JSON."""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import support_schemas

import safepool
from safepool.budget import fit
from safepool.cli import limits_screen, main
from safepool.cli.limits_screen import NativeLibrary, OtherProcess, Screen, read_screen
from safepool.limits import (
    Limit,
    Limits,
    MemoryLimit,
    OpenFilesLimit,
    PidsLimit,
    SharedMemory,
    Skipped,
    Throttling,
)

SCREENS = Path(__file__).parent / "screens"

GIB = 1 << 30


def affinity(cpus: float | None, raw: str) -> Limit:
    return Limit(name="affinity", cpus=cpus, source="os.sched_getaffinity(0)", raw=raw)


def cpu_max(cpus: float | None, directory: str, raw: str) -> Limit:
    return Limit(name="cpu.max", cpus=cpus, source=f"{directory}/cpu.max", raw=raw)


POD = (
    "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/"
    "kubepods-burstable-pod9a4c0d52_6a3e_4a53_9d7f_0e1d6f2c8b11.slice/"
    "cri-containerd-5b1f0c6f8d8a4e3f.scope"
)

# One row per file in screens/: what was read, how often it was throttled, and how many
# workers the standard pool would start.
MACHINES: dict[str, tuple[Limits, Throttling | None, int]] = {
    "laptop": (
        Limits(
            affinity=affinity(8.0, "0-7"),
            quotas=(cpu_max(None, "/sys/fs/cgroup/user.slice", "max 100000"),),
            open_files=OpenFilesLimit(
                files=1024, used_files=5, source="resource.getrlimit(RLIMIT_NOFILE)", raw="1024"
            ),
            shared_memory=SharedMemory(
                bytes=8 * GIB, free_bytes=8 * GIB - 4096, source="/dev/shm"
            ),
        ),
        None,
        8,
    ),
    "container": (
        Limits(
            affinity=affinity(48.0, "0-47"),
            quotas=(cpu_max(2.5, "/sys/fs/cgroup", "250000 100000"),),
            bounds=(
                Limit(
                    name="LOKY_MAX_CPU_COUNT",
                    cpus=4.0,
                    source="environment variable LOKY_MAX_CPU_COUNT",
                    raw="4",
                ),
            ),
            memory=(
                MemoryLimit(
                    name="memory.max",
                    bytes=4 * GIB,
                    used_bytes=GIB + 300_000_000,
                    reclaimable_bytes=200_000_000,
                    source="/sys/fs/cgroup/memory.max",
                    raw=str(4 * GIB),
                ),
                MemoryLimit(
                    name="memory.high",
                    bytes=None,
                    used_bytes=None,
                    reclaimable_bytes=None,
                    source="/sys/fs/cgroup/memory.high",
                    raw="max",
                ),
            ),
            pids=(
                PidsLimit(
                    name="pids.max",
                    tasks=200,
                    used_tasks=34,
                    source="/sys/fs/cgroup/pids.max",
                    raw="200",
                ),
                PidsLimit(
                    name="RLIMIT_NPROC",
                    tasks=None,
                    used_tasks=None,
                    source="resource.getrlimit(RLIMIT_NPROC)",
                    raw="unlimited",
                ),
            ),
            open_files=OpenFilesLimit(
                files=None,
                used_files=None,
                source="resource.getrlimit(RLIMIT_NOFILE)",
                raw="unlimited",
            ),
            shared_memory=SharedMemory(
                bytes=64 << 20, free_bytes=(64 << 20) - 4096, source="/dev/shm"
            ),
        ),
        Throttling(
            periods=340,
            throttled_periods=12,
            throttled_us=1_204_000,
            source="/sys/fs/cgroup/cpu.stat",
        ),
        48,
    ),
    "two-groups-say-the-same": (
        Limits(
            affinity=affinity(4.0, "0-3"),
            quotas=(
                cpu_max(1.0, "/sys/fs/cgroup/a", "100000 100000"),
                cpu_max(1.0, "/sys/fs/cgroup/a", "100000 100000"),
            ),
        ),
        None,
        4,
    ),
    "kubernetes-pod": (
        Limits(affinity=affinity(2.0, "3,17"), quotas=(cpu_max(0.5, POD, "50000 100000"),)),
        Throttling(periods=10, throttled_periods=10, throttled_us=7, source=f"{POD}/cpu.stat"),
        64,
    ),
    "processes-are-scarcer-than-cpus": (
        Limits(
            affinity=affinity(16.0, "0-15"),
            quotas=(),
            pids=(
                PidsLimit(
                    name="pids.max",
                    tasks=24,
                    used_tasks=7,
                    source="/sys/fs/cgroup/pids.max",
                    raw="24",
                ),
            ),
        ),
        None,
        16,
    ),
    "exact-workers": (
        Limits(
            affinity=affinity(2.0, "0-1"),
            quotas=(),
            exact_workers=Limit(
                name="SAFEPOOL_MAX_WORKERS",
                cpus=3.0,
                source="environment variable SAFEPOOL_MAX_WORKERS",
                raw="3",
            ),
        ),
        None,
        2,
    ),
    "much-is-skipped": (
        Limits(
            affinity=affinity(1.0, "0"),
            quotas=(),
            skipped=(
                Skipped(
                    source="environment variable SLURM_CPUS_PER_TASK",
                    reason="expected a positive whole number, found 'all of them, please, and "
                    "some more if there are any left over'",
                ),
                Skipped(source="/sys/fs/cgroup/gr\u00fcn/cpu.max", reason="Permission denied"),
            ),
        ),
        None,
        1,
    ),
    "frozen-just-now": (
        Limits(
            affinity=affinity(48.0, "0-47"),
            quotas=(cpu_max(2.5, "/sys/fs/cgroup", "250000 100000"),),
            memory=(
                MemoryLimit(
                    name="memory.max",
                    bytes=GIB,
                    used_bytes=GIB - 1,
                    reclaimable_bytes=4096,
                    source="/sys/fs/cgroup/memory.max",
                    raw="1073741824",
                ),
            ),
        ),
        Throttling(
            periods=100, throttled_periods=60, throttled_us=9_500_000, source="/x/cpu.stat"
        ),
        48,
    ),
    "another-process": (
        Limits(
            affinity=affinity(4.0, "0-3"),
            quotas=(cpu_max(4.0, "/sys/fs/cgroup", "400000 100000"),),
        ),
        None,
        4,
    ),
    "captured-without-affinity": (
        Limits(affinity=affinity(None, "nothing was captured"), quotas=()),
        None,
        2,
    ),
}


# What else is to be said, where it is not what every machine says.
FURTHER: dict[str, dict[str, Any]] = {
    "frozen-just-now": {
        "sample": Throttling(
            periods=3, throttled_periods=2, throttled_us=150_000, source="/x/cpu.stat"
        ),
        "joblib_workers": 3,
        "variables": {"NUMEXPR_NUM_THREADS": "s\u00e4x"},
    },
    "another-process": {
        "process": OtherProcess(
            pid=4711,
            threads=9,
            libraries=(NativeLibrary(runtime="openmp", library="/usr/lib/libgomp.so.1.0.0"),),
        ),
    },
    "laptop": {"joblib_workers": 8},
    "kubernetes-pod": {"standard_reads_variable": False},
}


def screen_of(machine: str) -> Screen:
    limits, throttling, standard_workers = MACHINES[machine]
    return Screen(
        limits=limits,
        budget=fit(limits),
        throttling=throttling,
        standard_workers=standard_workers,
        native_threads=int(limits.affinity.cpus or 1),
        **{"standard_reads_variable": True, **FURTHER.get(machine, {})},
    )


def every_limit(limits: Limits) -> list[object]:
    """Return everything on the screen that has a source."""
    single = (limits.affinity, limits.exact_workers, limits.open_files, limits.shared_memory)
    several = (*limits.quotas, *limits.bounds, *limits.memory, *limits.pids, *limits.skipped)
    return [limit for limit in (*single, *several) if limit is not None]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_screen_reads_as_its_file(machine: str) -> None:
    expected = (SCREENS / f"{machine}.txt").read_text()

    text = screen_of(machine).as_text().replace(safepool.__version__, "VERSION")

    assert f"{text}\n" == expected


def test_every_file_has_a_machine() -> None:
    """A screen without a row is a test that never ran."""
    assert {path.name for path in SCREENS.iterdir()} == {f"{name}.txt" for name in MACHINES}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_limit_shows_its_source_and_raw_text(machine: str) -> None:
    screen = screen_of(machine)
    text = screen.as_text()

    for limit in every_limit(screen.limits):
        assert str(limit.source).encode("ascii", "backslashreplace").decode() in text
        if hasattr(limit, "raw"):
            assert f"says {limit.raw!a}" in text


@pytest.mark.parametrize("machine", MACHINES)
def test_one_arrow_points_at_the_limit_that_decides(machine: str) -> None:
    screen = screen_of(machine)

    pointed = [line for line in screen.as_text().splitlines() if "->" in line]

    assert len(pointed) == 1
    assert pointed[0].split()[:2] == ["->", screen.budget.because.name]


@pytest.mark.parametrize("machine", MACHINES)
def test_the_screen_is_ascii_of_80_columns_but_for_long_paths(machine: str) -> None:
    text = screen_of(machine).as_text()

    assert text.isascii()
    assert [line for line in text.splitlines() if len(line) > 80 and POD not in line] == []


# Schema 1. Whoever removes one raises the number.
SCHEMA = {
    *("schema", "version", "limits", "because", "budget", "throttling", "sample"),
    *("standard_workers", "joblib_workers", "native_threads", "variables", "process", "findings"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_json_holds_every_field(machine: str) -> None:
    screen = screen_of(machine)

    told = json.loads(screen.as_json())

    support_schemas.check("limits", told)
    assert set(told) == SCHEMA
    assert told["schema"] == 1
    assert told["findings"] == [asdict(finding) for finding in screen.findings]
    assert set(told["limits"]) == {field.name for field in fields(Limits)}
    # Through JSON, so that tuples are lists on both sides.
    assert told["limits"] == json.loads(json.dumps(asdict(screen.limits)))
    assert {**told["budget"], "because": told["because"]} == asdict(screen.budget)
    assert (told["throttling"] is None) == (screen.throttling is None)


@pytest.mark.parametrize("arguments", [[], ["limits"]])
def test_this_machine_is_shown(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a command the limits are what is shown."""
    # Read once: whether this machine has a problem changes from one moment to the next.
    screen = read_screen(sample_s=0.1)
    monkeypatch.setattr(limits_screen, "read_screen", lambda **_: screen)

    assert main(arguments) == int(screen.has_problem)

    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("->") == 1
    for limit in every_limit(screen.limits):
        assert str(limit.source).encode("ascii", "backslashreplace").decode() in out


@pytest.mark.parametrize("value", ["", "abc", "1.5"])
def test_a_variable_that_stops_joblib_does_not_stop_the_screen(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", value)

    assert main(["--json"]) == 1

    screen = json.loads(capsys.readouterr().out)
    assert screen["joblib_workers"] is None
    assert any("LOKY_MAX_CPU_COUNT" in finding["text"] for finding in screen["findings"])


def test_joblib_is_counted_as_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from joblib.externals.loky import cpu_count

    monkeypatch.setitem(sys.modules, "loky", None)

    before = multiprocessing.get_context("loky"), {*sys.modules}
    assert limits_screen._joblib_count() == cpu_count()
    assert (multiprocessing.get_context("loky"), {*sys.modules}) == before


def counters(periods: int, throttled: int) -> Throttling:
    return Throttling(
        periods=periods, throttled_periods=throttled, throttled_us=throttled, source="cpu.stat"
    )


# One row per course of the counters: what is read, and the sample that is judged.
COURSES = {
    "nothing": ([(10, 4), (13, 4)], (3, 0)),
    "a burst, looked at for longer": ([(10, 4), (13, 5), (25, 5)], (15, 1)),
    "again and again": ([(10, 4), (13, 7), (25, 19)], (15, 15)),
}


@pytest.mark.parametrize("course", COURSES)
def test_one_burst_is_looked_at_for_longer(course: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, (periods, throttled) = COURSES[course]
    readings = [counters(*one) for one in read]
    slept: list[float] = []
    monkeypatch.setattr(limits_screen.time, "sleep", slept.append)
    monkeypatch.setattr(limits_screen, "read_throttling", lambda: readings.pop(0))

    screen = read_screen(sample_s=0.3)

    assert screen.sample is not None
    assert (screen.sample.periods, screen.sample.throttled_periods) == (periods, throttled)
    assert readings == []
    assert len(slept) == len(read) - 1
