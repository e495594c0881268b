"""What the memory limits leave: captured groups of both versions, and a real one."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from support_cgroups import control_group

if sys.platform == "linux":
    from safepool.limits.left import MemoryWatch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

V1 = "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2 = "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
MACHINE = "MemTotal:       16777216 kB\nMemFree:  12 kB\nMemAvailable:    8388608 kB\n"
NO_SWAP = f"{MACHINE}SwapTotal:             0 kB\nSwapFree:              0 kB\n"
SWAP = f"{MACHINE}SwapTotal:       4194304 kB\nSwapFree:        2097152 kB\n"
MIB = 1 << 20
# A row's group uses 300 MiB, of which 50 are page cache.
USED_V2 = {
    "a/memory.current": f"{300 * MIB}\n",
    "a/memory.stat": f"anon 1\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\n",
}
USED_V1 = {
    "memory/a/memory.usage_in_bytes": f"{300 * MIB}\n",
    "memory/a/memory.stat": (
        f"total_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}\n"
        f"hierarchical_memory_limit {512 * MIB}\n"
    ),
}

# One row per machine: the process's groups, its mounts, /proc/meminfo, the groups' files, and what
# is left with the ceiling that leaves it, in MiB, and that ceiling's file.
MACHINES: dict[str, tuple[str, str, str, dict[str, str], tuple[int, int, str] | None]] = {
    "version 2": (
        "0::/a",
        V2,
        NO_SWAP,
        {"a/memory.max": f"{512 * MIB}\n", **USED_V2},
        (262, 512, "a/memory.max"),
    ),
    "version 2, an ancestor leaves less": (
        "0::/a/b",
        V2,
        NO_SWAP,
        {
            "a/memory.max": f"{310 * MIB}\n",
            **USED_V2,
            "a/b/memory.max": f"{256 * MIB}\n",
            "a/b/memory.current": f"{100 * MIB}\n",
            "a/b/memory.stat": "inactive_file 0\nactive_file 0\n",
        },
        (60, 310, "a/memory.max"),
    ),
    "version 2, more is used than the limit that was lowered": (
        "0::/a",
        V2,
        NO_SWAP,
        {"a/memory.max": f"{128 * MIB}\n", **USED_V2},
        (0, 128, "a/memory.max"),
    ),
    "version 2, memory.high ends nothing": (
        "0::/a",
        V2,
        NO_SWAP,
        {"a/memory.max": "max\n", "a/memory.high": f"{310 * MIB}\n", **USED_V2},
        (8192, 16384, "/proc/meminfo"),
    ),
    "version 2, all of the machine's swap": (
        "0::/a",
        V2,
        SWAP,
        {"a/memory.max": f"{512 * MIB}\n", "a/memory.swap.max": "max\n", **USED_V2},
        (262 + 2048, 512, "a/memory.max"),
    ),
    "version 2, a little swap": (
        "0::/a",
        V2,
        SWAP,
        {
            "a/memory.max": f"{512 * MIB}\n",
            "a/memory.swap.max": f"{100 * MIB}\n",
            "a/memory.swap.current": f"{40 * MIB}\n",
            **USED_V2,
        },
        (262 + 60, 512, "a/memory.max"),
    ),
    "version 2, no swap for this group": (
        "0::/a",
        V2,
        SWAP,
        {
            "a/memory.max": f"{512 * MIB}\n",
            "a/memory.swap.max": "0\n",
            "a/memory.swap.current": "0\n",
            **USED_V2,
        },
        (262, 512, "a/memory.max"),
    ),
    "version 1": (
        "4:memory:/a",
        V1,
        NO_SWAP,
        {"memory/a/memory.limit_in_bytes": f"{512 * MIB}\n", **USED_V1},
        (262, 512, "memory/a/memory.limit_in_bytes"),
    ),
    "version 1, the limit is a hidden ancestor's": (
        "4:memory:/a",
        V1,
        NO_SWAP,
        {"memory/a/memory.limit_in_bytes": "9223372036854771712\n", **USED_V1},
        (262, 512, "memory/a/memory.stat"),
    ),
    "version 1, memory and swap together": (
        "4:memory:/a",
        V1,
        SWAP,
        {
            "memory/a/memory.limit_in_bytes": f"{512 * MIB}\n",
            "memory/a/memory.memsw.limit_in_bytes": f"{600 * MIB}\n",
            "memory/a/memory.memsw.usage_in_bytes": f"{340 * MIB}\n",
            **USED_V1,
        },
        (600 - 340 + 50, 512, "memory/a/memory.limit_in_bytes"),
    ),
    "no limit, and the machine is full": (
        "0::/a",
        V2,
        NO_SWAP.replace("8388608", "1024"),
        {"a/memory.max": "max\n"},
        (1, 16384, "/proc/meminfo"),
    ),
    "nothing is told": ("0::/a", V2, "", {"a/memory.max": "max\n"}, None),
    "words where numbers should be": (
        "0::/a",
        V2,
        "MemTotal: much\n",
        {"a/memory.max": "much\n", **USED_V2},
        None,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_left_on_a_captured_machine(name: str, tmp_path: Path) -> None:
    own, mounts, meminfo, files, expected = MACHINES[name]
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(f"{own}\n")
    (proc / "self/mountinfo").write_text(mounts)
    (proc / "meminfo").write_text(meminfo)
    for path, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    watch = MemoryWatch(tmp_path)
    found = watch.read()

    assert found == watch.read()
    told = None
    if found is not None:
        source = found.source.removeprefix("/sys/fs/cgroup/")
        told = (found.bytes // MIB, found.limit_bytes // MIB, source)
    assert told == expected


FILL = """
import json, os, sys
from safepool.limits.left import MemoryWatch
watch = MemoryWatch()
before = watch.read()
with open(sys.argv[1], "wb") as file:
    for _ in range(50):
        file.write(bytes(1 << 20))
    file.flush()
    os.fsync(file.fileno())
cached = watch.read()
held = bytearray(os.urandom(1 << 20)) * 100
after = watch.read()
print(json.dumps([before.limit_bytes, before.bytes, cached.bytes, after.bytes]))
"""


def test_page_cache_is_left_and_held_memory_is_not(tmp_path: Path) -> None:
    with control_group(memory_bytes=400 << 20) as group:
        told = group.run(FILL, str(tmp_path / "file"))
    limit, before, cached, after = json.loads(told)

    assert limit == 400 << 20
    assert abs(cached - before) < 30 << 20
    assert 80 << 20 < cached - after < 120 << 20
