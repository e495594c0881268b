"""The watch in control groups of version 2, as constructed trees whose counters grow.

Real groups of version 2 with the cpu controller are not at hand on every machine; what is read
here has the shape that the kernel writes (cgroup-v2.rst, "cpu.stat").
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import support_schemas

from safepool.cli import limits_screen, main, watch
from safepool.limits.files import Machine

if sys.platform == "linux":
    from safepool.limits.process import ProcessView

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

MOUNTINFO = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/root rw\n"
    "23 22 0:21 / /sys rw - sysfs sysfs rw\n"
    "24 22 0:19 / /proc rw - proc proc rw\n"
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
)
BEFORE = {"usage_usec": 5_000_000, "user_usec": 4_000_000, "system_usec": 1_000_000}
NO_QUOTA = {"nr_periods": 0, "nr_throttled": 0, "throttled_usec": 0}
QUOTA_BEFORE = {"nr_periods": 100, "nr_throttled": 60, "throttled_usec": 9_500_000}
QUOTA_AFTER = {"nr_periods": 110, "nr_throttled": 67, "throttled_usec": 9_950_000}
LATER = {**BEFORE, "usage_usec": 7_500_000}


def stat(*parts: dict[str, int]) -> str:
    return "".join(f"{name} {n}\n" for part in parts for name, n in part.items())


# One row per machine: the files of its groups before and a second later (relative to the mount),
# the CPUs that are shown, and the line.
MACHINES: dict[str, tuple[dict[str, str], dict[str, str], float, str]] = {
    "a quota of its own": (
        {"app/cpu.max": "250000 100000\n", "app/cpu.stat": stat(BEFORE, QUOTA_BEFORE)},
        {"app/cpu.stat": stat(LATER, QUOTA_AFTER)},
        2.5,
        "used [####################] 2.50 of 2.5 CPUs  frozen [#######...] 7/10 periods",
    ),
    "a quota above: that group's counters": (
        {
            "app/cpu.max": "max 100000\n",
            "app/cpu.stat": stat(BEFORE, NO_QUOTA),
            "cpu.max": "500000 100000\n",
            "cpu.stat": stat(BEFORE, QUOTA_BEFORE),
        },
        {"app/cpu.stat": stat(BEFORE, NO_QUOTA), "cpu.stat": stat(LATER, QUOTA_AFTER)},
        5.0,
        "used [##########..........] 2.50 of 5 CPUs  frozen [#######...] 7/10 periods",
    ),
    "no quota: used is told all the same": (
        {"app/cpu.max": "max 100000\n", "app/cpu.stat": stat(BEFORE, NO_QUOTA)},
        {"app/cpu.stat": stat(LATER, NO_QUOTA)},
        10.0,
        "used [#####...............] 2.50 of 10 CPUs",
    ),
    "the controller is not enabled: no cpu.max, and cpu.stat without periods": (
        {"app/cpu.stat": stat(BEFORE)},
        {"app/cpu.stat": stat(LATER)},
        10.0,
        "used [#####...............] 2.50 of 10 CPUs",
    ),
    "the quota came in between": (
        {"app/cpu.max": "max 100000\n", "app/cpu.stat": stat(BEFORE, NO_QUOTA)},
        {"app/cpu.max": "250000 100000\n", "app/cpu.stat": stat(LATER, QUOTA_AFTER)},
        10.0,
        "used [#####...............] 2.50 of 10 CPUs",
    ),
    "no cpu.stat": (
        {"app/cpu.max": "250000 100000\n"},
        {},
        2.5,
        "used ?                      ? of 2.5 CPUs",
    ),
}


class Tree:
    """A machine's files, and a view of the process in it whose group is ``/app``."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self._root = root
        self._write("proc/self/cgroup", "0::/app\n")
        self._write("proc/self/mountinfo", MOUNTINFO)
        self.change({"app/cgroup.controllers": "cpu memory\n", **files})
        self.view = ProcessView(1)
        self.view._machine = Machine(root)  # type: ignore[assignment]

    def change(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            self._write(f"sys/fs/cgroup/{name}", text)

    def _write(self, name: str, text: str) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_line_tells_what_the_counters_grew_by(
    machine: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, changed, cpus, expected = MACHINES[machine]
    tree = Tree(tmp_path, files)
    clock = [100.0]

    def pass_a_second(seconds: float) -> None:
        clock[0] += seconds
        tree.change(changed)

    monkeypatch.setattr(watch.time, "sleep", pass_a_second)
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])

    watch.watch(tree.view, cpus, as_json=False, lines=1)

    assert capsys.readouterr().out == f"{expected}\n"


def test_the_command_watches_such_a_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the arguments on: the CPUs of its quota, a line for each second, then its end."""
    files, changed, _, _ = MACHINES["a quota of its own"]
    tree = Tree(tmp_path, files)
    alive = iter([1, 1, 1, 0])
    monkeypatch.setattr(tree.view, "threads", lambda: next(alive), raising=False)
    monkeypatch.setattr(limits_screen, "_view", lambda _: tree.view)
    monkeypatch.setattr(limits_screen, "_SAMPLE_S", 0.0)
    monkeypatch.setattr(watch.time, "sleep", lambda _: tree.change(changed))

    assert main(["--pid", "1", "--watch", "--json"]) == 0

    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    support_schemas.check("watch", first)
    assert (first["cpus"], second["cpus"]) == (2.5, 2.5)
    assert (first["periods"], first["throttled_periods"]) == (10, 7)
    assert first["throttled_us"] == 450_000
    assert (second["periods"], second["used_cpus"]) == (0, 0.0)
