"""A pool in OCI containers: limits, no /dev/shm, no such user, filters; each ends cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support_cgroups
from support_containers import Settings, container, find_engine, shared_folders

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="containers are Linux's")

MIB = 1 << 20
KEY = "SAFEPOOL_TEST_CONTAINER"

# The core of the suite, by the first process of the container. What it says is in one line of
# JSON; what it starts besides, it leaves behind on purpose.
PROGRAM = """
import json, os, signal, subprocess, sys, time
import numpy as np
import safepool
import threadpoolctl
from safepool.workers import forkserver

def square(x):
    return x * x

def total(array):
    return float(array.sum())

def caps(_):
    time.sleep(0.05)  # the next call is for another worker
    return [one["num_threads"] for one in threadpoolctl.threadpool_info()]

def eat():
    return len([b"x" * (8 << 20) for _ in range(128)])

def leave_a_child():
    child = subprocess.Popen(["sleep", "1000"])
    os.kill(os.getpid(), signal.SIGKILL)

def stats():
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                yield int(pid), file.read().rpartition(")")[2].split()[0]
        except OSError:
            pass  # it has ended

def until_no_zombie():
    for _ in range(1000):
        if not (zombies := [pid for pid, state in stats() if state == "Z"]):
            break
        time.sleep(0.01)
    return zombies

if __name__ == "__main__":
    wanted = sys.argv[1:]
    said = {"pid": os.getpid(), "user": os.getuid()}
    try:
        with safepool.ProcessPool(end_subprocesses=True) as pool:
            said["workers"] = pool._max_workers
            said["map"] = sum(pool.map(square, range(1000)))
            said["array"] = pool.submit(total, np.ones(1 << 19)).result(60)
            said["caps"] = sorted({n for found in pool.map(caps, range(4)) for n in found})
            said["death"] = str(pool.submit(os._exit, 3).exception(60)).partition(" ended")[2]
            pool.submit(leave_a_child).exception(60)
            if "oom" in wanted:
                said["oom"] = str(pool.submit(eat).exception(60))
            said["after"] = pool.submit(square, 3).result(60)
        if "servers" in wanted:  # whose workers become children of this process
            with safepool.ProcessPool() as pool:
                pool.submit(square, 1).result(60)
                for server in forkserver.running():
                    os.kill(server, signal.SIGKILL)
                said["servers"] = type(pool.submit(os._exit, 3).exception(60)).__name__
                said["servers"] += f" {pool.submit(square, 4).result(60)}"
        said["zombies"] = until_no_zombie()
        said["named"] = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    except safepool.SafepoolError as error:
        said["error"] = str(error)
    print(json.dumps(said))
"""

# What the container lacks, found without a pool.
LOOK = """
import ctypes, errno, json, os, pwd, socket, sys
import safepool

def refusal(call):
    try:
        return call() and "" or ""
    except OSError as error:
        return errno.errorcode[error.errno]

def membarrier():
    if ctypes.CDLL(None, use_errno=True).syscall(int(sys.argv[1]), 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "membarrier")

with open("/proc/self/status") as file:
    status = {name: text.strip() for name, _, text in (line.partition(":") for line in file)}
try:
    user = pwd.getpwuid(os.getuid()).pw_name
except KeyError:
    user = None
limits = safepool.read_limits()
print(json.dumps({
    "first": (os.getpid(), os.getppid()),
    "user": user,
    "home": os.path.expanduser("~"),
    "root": refusal(lambda: open("/file", "w")),
    "named": os.path.exists("/dev/shm"),
    "capabilities": sum(int(status[f"Cap{one}"], 16) for one in ("Eff", "Prm", "Bnd", "Inh")),
    "filter": status["Seccomp"],
    "cpus": min(one.cpus for one in limits.quotas if one.cpus is not None),
    "memory": min(one.bytes for one in limits.memory if one.bytes is not None),
    "tasks": min(one.tasks for one in limits.pids if one.tasks is not None),
    "memfd_create": refusal(lambda: os.memfd_create("")),
    "pidfd_open": refusal(lambda: os.pidfd_open(os.getpid())),
    "membarrier": refusal(membarrier),
    "sched_getaffinity": refusal(lambda: os.sched_getaffinity(0)),
    "sockets": refusal(socket.socketpair),
}))
"""
# Where the table of system calls is the one that architectures since 2012 share, or x86-64's.
MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}

CPUS = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
GOOD: dict[str, Any] = {
    "pid": 1,
    "user": 0,
    "workers": min(2, CPUS),
    "map": 332833500,
    "array": 1 << 19,
    "caps": [1],
    "death": " with exit code 3 while it ran posix._exit",
    "after": 9,
    "zombies": [],
    "named": [],
}
OOM = "was killed by the kernel's out-of-memory killer"


def run(folder: Path, settings: Settings, *wanted: str, program: str = PROGRAM) -> dict[str, Any]:
    """Run a program in a container, and look for what is left of it.

    Returns:
        What it said.
    """
    engine = find_engine()
    key = f"{os.getpid()}-{folder.name}"
    (folder / "app").mkdir()
    (folder / "app" / "program.py").write_text(program)
    # More than a worker is to have, and fewer than there may be processes.
    settings = replace(settings, environ={KEY: key, "OPENBLAS_NUM_THREADS": "2"})
    command = [sys.executable, "/app/program.py", *wanted]
    with container(engine, folder, command, settings) as words:
        ran = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert processes_with(key) == []
    assert groups_with(f"{support_cgroups.PREFIX}{key}") == []
    assert sorted(path.name for path in (folder / "app").iterdir()) == ["program.py"]
    left = {path.name for path in (folder / "rootfs").rglob("*safepool-*")}
    assert left <= {part for one in shared_folders() for part in Path(one).parts}  # mounted there
    said: dict[str, Any] = json.loads(ran.stdout)
    return said


def processes_with(key: str) -> list[int]:
    """Return the processes that were born with the key."""
    found = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if f"{KEY}={key}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def groups_with(name: str) -> list[str]:
    tops = {path for _, path in support_cgroups._mounted().values()}
    return [str(top / name) for top in tops if (top / name).exists()]


# What each container has and lacks; what its program says beside, or otherwise than, GOOD.
Case = tuple[Settings, dict[str, Any]]
CASES: dict[str, Case] = {
    "no limit": (Settings(cpus=None), {"workers": CPUS}),
    "quota of 1": (Settings(cpus=1), {"workers": 1}),
    "quota of 0.5": (Settings(cpus=0.5), {"workers": 1}),
    "killed servers": (Settings(), {"servers": "WorkerDiedError 16"}),
    "32 pids": (Settings(tasks=32), {}),
    "memory": (Settings(memory_bytes=256 * MIB), {"oom": OOM}),
    "read-only root": (Settings(read_only=True), {}),
    "no /dev/shm": (Settings(shared_memory=False), {}),
    "a random user": (Settings(user=123456), {"user": 123456}),
    "no capabilities": (Settings(capabilities=False), {}),
    "no capabilities, a random user": (Settings(capabilities=False, user=99), {"user": 99}),
    **{
        f"without {name}": (Settings(refused=(name,)), {})
        for name in (
            "memfd_create",
            "pidfd_open",
            "membarrier",
            "sched_getaffinity",
            "sched_setaffinity",
            "prctl",
            "setpriority",
        )
    },
}
ALL = Settings(
    cpus=1,
    memory_bytes=256 * MIB,
    tasks=32,
    read_only=True,
    shared_memory=False,
    user=123456,
    capabilities=False,
    refused=("memfd_create", "pidfd_open", "membarrier", "sched_getaffinity"),
)


def test_a_pool_works_in_a_container_that_has_next_to_nothing(tmp_path: Path) -> None:
    """All limits, and nothing of what a pool can do without."""
    said = run(tmp_path, ALL, "oom")

    assert OOM in said.pop("oom")
    assert said == {**GOOD, "workers": 1, "user": 123456}


def test_that_container_lacks_all_that_it_is_to_lack(tmp_path: Path) -> None:
    """So that the test before can fail."""
    number = MEMBARRIER.get(os.uname().machine)
    if number is None:
        pytest.skip("unknown numbers of system calls")
    said = run(tmp_path, replace(ALL, refused_family=socket.AF_UNIX), str(number), program=LOOK)

    assert said == {
        "first": [1, 0],
        "user": None,
        "home": "/",  # where nothing can be written
        "root": "EROFS",
        "named": False,
        "capabilities": 0,
        "filter": "2",
        "cpus": 1.0,
        "memory": 256 * MIB,
        "tasks": 32,
        **dict.fromkeys(ALL.refused, "EPERM"),
        "sockets": "EPERM",
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_pool_works_in_a_container(case: str, tmp_path: Path) -> None:
    settings, expected = CASES[case]
    said = run(tmp_path, settings, *expected)

    text = said.pop("oom", "")
    assert expected.get("oom", "") in text
    assert said == {**GOOD, **{name: what for name, what in expected.items() if name != "oom"}}


SUITE = ("pool/test_drop_in.py", "pool/test_worker_death.py", "workers/test_forked.py")
POOR = Settings(cpus=1, read_only=True, temporary=True, user=123456, capabilities=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings", [Settings(cpus=1, temporary=True), POOR], ids=["root", "poor"]
)
def test_the_core_of_the_suite_passes_in_a_container(settings: Settings, tmp_path: Path) -> None:
    """Without ``/dev/shm`` the standard pool, which is compared with, does not work."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c"]
    command += [str(tests.parent / "pyproject.toml"), *(str(tests / name) for name in SUITE)]
    with container(find_engine(), tmp_path / "core", command, settings) as words:
        ran = subprocess.run(words, capture_output=True, text=True, timeout=580, check=False)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout


def test_a_container_without_unix_sockets_is_named(tmp_path: Path) -> None:
    """A pool cannot do without."""
    said = run(tmp_path, Settings(refused_family=socket.AF_UNIX))

    assert said["error"].startswith("the system refuses socketpair(): Operation not permitted.")
