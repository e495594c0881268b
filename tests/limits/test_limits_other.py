"""Memory, processes, descriptors: every level, its use, and what is no limit at all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from safepool.limits import MemoryLimit, PidsLimit, read_limits

if TYPE_CHECKING:
    from pathlib import Path

V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
}
V1 = {
    "proc/self/cgroup": "4:memory:/docker/c1\n3:pids:/docker/c1\n2:cpu:/\n",
    "proc/self/mountinfo": (
        "41 30 0:31 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "42 30 0:32 /docker/c1 /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    ),
}


def capture(root: Path, *parts: dict[str, str]) -> Path:
    """Write a machine's files."""
    for files in parts:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return root


def test_memory_of_version_2(tmp_path: Path) -> None:
    """memory.max and memory.high are ceilings; memory.low and memory.min never are."""
    group = "sys/fs/cgroup/a/b"
    capture(
        tmp_path,
        V2,
        {
            f"{group}/memory.max": "2147483648\n",
            f"{group}/memory.high": "max\n",
            f"{group}/memory.low": "4096\n",
            f"{group}/memory.min": "4096\n",
            f"{group}/memory.current": "1000000\n",
            f"{group}/memory.stat": (
                "anon 1\nfile 9\ninactive_file 300\nactive_file 40\nslab_reclaimable 5\n"
            ),
            "sys/fs/cgroup/a/memory.max": "max\n",
            "sys/fs/cgroup/a/memory.high": "1073741824\n",
            "sys/fs/cgroup/a/memory.current": "7\n",
        },
    )

    memory = read_limits(root=tmp_path).memory

    assert [(limit.name, limit.bytes, limit.used_bytes) for limit in memory] == [
        ("memory.max", 1 << 31, 1_000_000),
        ("memory.high", None, 1_000_000),
        ("memory.max", None, 7),
        ("memory.high", 1 << 30, 7),
    ]
    assert [limit.reclaimable_bytes for limit in memory] == [345, 345, None, None]
    assert memory[0].source == "/sys/fs/cgroup/a/b/memory.max"
    assert memory[0].raw == "2147483648"


def test_memory_of_version_1(tmp_path: Path) -> None:
    """The computed minimum over all ancestors is a limit of its own; 2**63 in pages is none."""
    group = "sys/fs/cgroup/memory"
    capture(
        tmp_path,
        V1,
        {
            f"{group}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{group}/memory.soft_limit_in_bytes": "4096\n",
            f"{group}/memory.usage_in_bytes": "500\n",
            f"{group}/memory.stat": (
                "cache 1\nhierarchical_memory_limit 1073741824\n"
                "hierarchical_memsw_limit 4096\n"
                "inactive_file 1\ntotal_inactive_file 200\ntotal_active_file 30\n"
            ),
        },
    )

    memory = read_limits(root=tmp_path).memory

    assert [(limit.name, limit.bytes) for limit in memory] == [
        ("memory.limit_in_bytes", None),
        ("hierarchical_memory_limit", 1 << 30),
    ]
    assert [(limit.used_bytes, limit.reclaimable_bytes) for limit in memory] == [(500, 230)] * 2
    assert memory[1].source == "/sys/fs/cgroup/memory/memory.stat"
    assert memory[1].raw == "hierarchical_memory_limit 1073741824"


def test_the_computed_minimum_is_the_own_groups_only(tmp_path: Path) -> None:
    """An ancestor computes one too, but the own group's includes it."""
    stat = "hierarchical_memory_limit 4096\n"
    capture(
        tmp_path,
        V1,
        {
            "proc/self/cgroup": "4:memory:/docker/c1/leaf\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
            "sys/fs/cgroup/memory/memory.stat": stat,
            "sys/fs/cgroup/memory/leaf/memory.stat": stat,
        },
    )

    names = [limit.name for limit in read_limits(root=tmp_path).memory]

    assert names == ["hierarchical_memory_limit", "memory.limit_in_bytes"]


def test_garbage_in_memory_files_is_told(tmp_path: Path) -> None:
    """A broken ceiling is no ceiling, a broken use is not known; both are said."""
    capture(
        tmp_path,
        V2,
        {
            "sys/fs/cgroup/a/b/memory.max": "lots\n",
            "sys/fs/cgroup/a/memory.max": "4096\n",
            "sys/fs/cgroup/a/memory.current": "",
        },
    )

    limits = read_limits(root=tmp_path)

    assert [(limit.bytes, limit.used_bytes) for limit in limits.memory] == [(4096, None)]
    assert [entry.source for entry in limits.skipped] == [
        "/sys/fs/cgroup/a/b/memory.max",
        "/sys/fs/cgroup/a/memory.current",
    ]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pids_of_both_versions(version: str, tmp_path: Path) -> None:
    """The files are the same; a level without a ceiling is reported as none."""
    group = "sys/fs/cgroup/pids" if version == "v1" else "sys/fs/cgroup/a/b"
    capture(
        tmp_path,
        V1 if version == "v1" else V2,
        {f"{group}/pids.max": "100\n", f"{group}/pids.current": "7\n"},
    )

    assert read_limits(root=tmp_path).pids == (
        PidsLimit(
            name="pids.max", tasks=100, used_tasks=7, source=f"/{group}/pids.max", raw="100"
        ),
    )


def test_pids_without_a_ceiling_and_with_garbage(tmp_path: Path) -> None:
    """The word max is none, and anything else is told."""
    capture(
        tmp_path, V2, {"sys/fs/cgroup/a/b/pids.max": "max\n", "sys/fs/cgroup/a/pids.max": "?\n"}
    )

    limits = read_limits(root=tmp_path)

    assert [limit.tasks for limit in limits.pids] == [None]
    assert [entry.source for entry in limits.skipped] == ["/sys/fs/cgroup/a/pids.max"]


def test_controllers_are_found_one_by_one(tmp_path: Path) -> None:
    """On version 1 memory may sit in another group, at another mount, than cpu."""
    capture(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/m\n2:cpu:/c\n",
            "proc/self/mountinfo": (
                "41 30 0:31 / /mem rw - cgroup cgroup rw,memory\n"
                "42 30 0:32 / /cpu rw - cgroup cgroup rw,cpu\n"
            ),
            "mem/m/memory.limit_in_bytes": "4096\n",
            "cpu/c/cpu.cfs_quota_us": "50000\n",
            "cpu/c/cpu.cfs_period_us": "100000\n",
        },
    )

    limits = read_limits(root=tmp_path)

    assert limits.cpu_quota == 0.5
    assert [limit.bytes for limit in limits.memory] == [4096]
    assert isinstance(limits.memory[0], MemoryLimit)


RESOURCES = """
import os, resource, sys
import safepool.limits as limits
resource.setrlimit(resource.RLIMIT_NPROC, (500, 500))
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
if sys.argv[1] != "same":
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
found = limits.read_limits()
print(found.pids[-1].name, found.pids[-1].tasks, found.open_files.files)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's resource limits")
@pytest.mark.parametrize("user", ["same", "65534"])
def test_resource_limits_of_a_user(user: str) -> None:
    """The kernel enforces RLIMIT_NPROC for everybody but the machine's own root."""
    if user != "same" and os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    program = subprocess.run(
        [sys.executable, "-c", RESOURCES, user],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    root = user == "same" and os.geteuid() == 0
    assert program.stdout.strip() == f"RLIMIT_NPROC {None if root else 500} 200"


USER_NAMESPACE = """
import ctypes, os, resource, sys
import safepool.limits as limits
resource.setrlimit(resource.RLIMIT_NPROC, (500, 500))
libc = ctypes.CDLL(None)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1)  # PR_SET_DUMPABLE: without it /proc/self belongs to root after setuid
user = os.getuid()
if libc.unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("refused")
with open("/proc/self/uid_map", "w") as uid_map:
    uid_map.write(f"0 {user} 1")
print(os.getuid(), limits.read_limits().pids[-1].tasks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces are Linux's")
def test_the_root_of_a_user_namespace_is_an_ordinary_user() -> None:
    """Rootless containers: number 0 inside, somebody else outside, and bound by the limit."""
    program = subprocess.run(
        [sys.executable, "-c", USER_NAMESPACE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if program.stderr.strip() == "refused":
        pytest.skip("this machine allows no user namespaces")

    assert program.stdout.strip() == "0 500", program.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_shared_memory_is_the_file_systems_size() -> None:
    """As the system tells it; docker's is 64 MB unless told otherwise."""
    shared = read_limits().shared_memory
    if not os.path.isdir("/dev/shm"):
        assert shared is None
        return

    size = os.statvfs("/dev/shm")
    assert shared is not None
    assert shared.bytes == size.f_blocks * size.f_frsize
    assert 0 <= shared.free_bytes <= shared.bytes


IMPORTED = """
import sys, os
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
import safepool.limits
read = [path for path in opened if str(path).startswith(("/proc", "/sys"))]
heavy = {"pathlib", "numpy", "joblib", "loky", "psutil", "ctypes"} & set(sys.modules)
print(read, heavy & set(sys.argv[1:]))
"""


def test_nothing_is_read_at_import() -> None:
    """Importing tells nothing about the machine, and brings in nothing from elsewhere."""
    program = subprocess.run(
        [sys.executable, "-S", "-c", IMPORTED, "numpy", "joblib", "loky", "psutil"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert program.stdout.strip() == "[] set()"
