"""What the out-of-memory killer has counted: in captured groups of both versions, and for real."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from support_cgroups import control_group

from safepool.limits import read_oom_counts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

V1 = "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"

# One row per group as it was captured: the process's own group, its mounts, the group's files,
# and (kills, used_up, limit_bytes, peak_bytes), None where there is nothing to report.
GROUPS: dict[str, tuple[str, str, dict[str, str], tuple[int | None, ...] | None]] = {
    "version 1": (
        "4:memory:/a",
        V1,
        {
            "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            "memory/a/memory.failcnt": "134\n",
            "memory/a/memory.limit_in_bytes": "67108864\n",
            "memory/a/memory.max_usage_in_bytes": "67108864\n",
        },
        (3, 134, 67108864, 67108864),
    ),
    "version 1 with the same ceiling for memory and swap": (
        "4:memory:/a",
        V1,
        {
            "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            "memory/a/memory.failcnt": "0\n",
            "memory/a/memory.memsw.failcnt": "134\n",
            "memory/a/memory.limit_in_bytes": "67108864\n",
            "memory/a/memory.max_usage_in_bytes": "67108864\n",
        },
        (3, 134, 67108864, 67108864),
    ),
    "version 1 without a limit": (
        "4:memory:/a",
        V1,
        {
            "memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
            "memory/a/memory.failcnt": "0\n",
            "memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        },
        (0, 0, None, None),
    ),
    "version 1 before Linux 4.13": (
        "4:memory:/a",
        V1,
        {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},
        None,
    ),
    "version 2": (
        "0::/a",
        V2,
        {
            "a/memory.events": "low 0\nhigh 0\nmax 64\noom 5\noom_kill 4\noom_group_kill 0\n",
            "a/memory.events.local": "low 0\nhigh 0\nmax 64\noom 2\noom_kill 4\n",
            "a/memory.max": "1073741824\n",
            "a/memory.peak": "1073741000\n",
        },
        (4, 2, 1073741824, 1073741000),
    ),
    "version 2 before Linux 5.2": (
        "0::/a",
        V2,
        {"a/memory.events": "max 64\noom 5\noom_kill 4\n", "a/memory.max": "max\n"},
        (4, 5, None, None),
    ),
    "garbage": (
        "0::/a",
        V2,
        {"a/memory.events": "oom_kill many\n", "a/memory.max": "\0"},
        None,
    ),
    "garbage beside the counter": (
        "0::/a",
        V2,
        {"a/memory.events": "oom_kill 1\n", "a/memory.max": "1G\n", "a/memory.peak": "\0"},
        (1, None, None, None),
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_counts_of_a_captured_group(case: str, tmp_path: Path) -> None:
    """Each number comes from its documented file; what is missing or garbage is left out."""
    own, mounts, files, expected = GROUPS[case]
    _write(tmp_path, own, mounts, files)

    found = [count for count in read_oom_counts(tmp_path) if count.group.endswith("/a")]

    assert [(c.kills, c.used_up, c.limit_bytes, c.peak_bytes) for c in found] == (
        [] if expected is None else [expected]
    )


def test_ancestors_follow_the_own_group(tmp_path: Path) -> None:
    """All groups up to the mount point, in that order, each with the file that tells."""
    events = "oom 0\noom_kill 0\n"
    files = {f"{group}memory.events": events for group in ("a/b/", "a/", "")}
    _write(tmp_path, "0::/a/b", V2, files)

    assert [(count.group, count.source) for count in read_oom_counts(tmp_path)] == [
        (f"/sys/fs/cgroup{group}", f"/sys/fs/cgroup{group}/memory.events")
        for group in ("/a/b", "/a", "")
    ]


def test_this_kernel_counts_its_kill_in_the_group_of_the_victim() -> None:
    """The ceiling is the parent's, the process is in the group below."""
    read = (
        "import dataclasses, json, subprocess, sys, safepool.limits as limits\n"
        "told = [limits.read_oom_counts()]\n"
        "eat = 'a = []\\nwhile True: a.append(bytes(range(256)) * 4096)'\n"
        "code = subprocess.call([sys.executable, '-c', eat])\n"
        "told.append(limits.read_oom_counts())\n"
        "told = [[dataclasses.asdict(count) for count in counts] for counts in told]\n"
        "print(json.dumps([code, *told]))\n"
    )
    with (
        control_group(memory_bytes=100 << 20) as outer,
        control_group(inside=outer) as group,
    ):
        code, before, after = json.loads(group.run(read))

    assert code == -9
    assert (before[0]["kills"], after[0]["kills"]) == (0, 1)
    assert before[0]["limit_bytes"] is None
    assert after[1]["limit_bytes"] == 100 << 20
    assert after[1]["used_up"] > before[1]["used_up"]


def _write(root: Path, own: str, mounts: str, files: dict[str, str]) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files |= {"proc/self/cgroup": f"{own}\n", "proc/self/mountinfo": mounts}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
