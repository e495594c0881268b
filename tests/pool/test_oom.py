"""A worker that the kernel's out-of-memory killer took: the error says so, and which limit."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from typing import Any

import pytest
from support_cgroups import control_group
from support_processes import wait_until

from safepool import OutOfMemory, ProcessPool, WorkerDiedError
from safepool.limits import OutOfMemoryCount
from safepool.pool.shell import loop, oom
from safepool.pool.shell.oom import OutOfMemoryWatch

real = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
LIMIT_BYTES = 160 << 20

EAT = """
import os, pickle, re, signal, time, safepool
def eat():
    held = []
    while True:
        held.append(bytes(range(256)) * 4096 * 4)
def told(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error.exitcode, error.oom and (error.oom.kills - error.oom.kills_before)
"""

# One row per way to lose workers in a group with a limit: what a program does in it, and what
# it prints: the exit code, and how many kills the error tells of.
LOSSES: dict[str, tuple[str, str]] = {
    "out of memory": (
        """
with safepool.ProcessPool(1) as pool:
    error = pool.submit(eat).exception(60)
    print(told(error), error.oom.limit_bytes, error.oom.used_bytes > 130 << 20)
    assert pool.submit(abs, -1).result(60) == 1
""",
        f"(-9, 1) {LIMIT_BYTES} True",
    ),
    "by hand": (
        """
with safepool.ProcessPool(1) as pool:
    pool.submit(abs, -1).result(60)
    future = pool.submit(os.kill, *pool._processes, signal.SIGKILL)
    print(told(future.exception(60)), "often" in str(future.exception()))
""",
        "(-9, None) True",
    ),
    "first by the kernel, then by hand": (
        """
with safepool.ProcessPool(1) as pool:
    print(told(pool.submit(eat).exception(60)))
    print(told(pool.submit(lambda: os.kill(os.getpid(), 9)).exception(60)))
""",
        "(-9, 1)\n(-9, None)",
    ),
    "the program has most": (
        """
data = bytes(range(256)) * 4096 * 90
with safepool.ProcessPool(1) as pool:
    error = pool.submit(eat).exception(60)
    print(told(error), error.oom.limit_bytes, "out-of-memory killer" in str(error))
    assert pool.submit(abs, -1).result(60) == 1
""",
        f"(-9, 1) {LIMIT_BYTES} True",
    ),
    "two workers": (
        """
with safepool.ProcessPool(2) as pool:
    futures = [pool.submit(eat) for _ in range(2)]
    errors = [future.exception(60) for future in futures]
    assert pool.submit(abs, -1).result(60) == 1
print([error.exitcode for error in errors], all(error.oom for error in errors))
""",
        "[-9, -9] True",
    ),
    "run again, and again": (
        """
with safepool.ProcessPool(1, retries=2) as pool:
    error = pool.submit(eat).exception(90)
    print(told(error), error.oom.kills)
""",
        "(-9, 1) 3",
    ),
    "a timeout": (
        """
with safepool.ProcessPool(1, timeout=0.5) as pool:
    print(type(pool.submit(time.sleep, 60).exception(60)).__name__)
""",
        "TaskTimeoutError",
    ),
    "in the initializer": (
        """
from safepool.pool.core import starts
starts._MOST_PAUSE_NS = 50_000_000
with safepool.ProcessPool(1, initializer=eat) as pool:
    error = str(pool.submit(abs, -1).exception(90))
print(type(error).__name__, "20 workers in a row" in error, "limit of 160 MiB" in error)
""",
        "str True True",
    ),
    "breaking the pool": (
        """
with safepool.ProcessPool(1, on_worker_death="break") as pool:
    pool.submit(abs, -1).result(60)
    first, second = pool.submit(eat), pool.submit(abs, -1)
    print(told(first.exception(60)), "out-of-memory killer" in str(second.exception(60)))
""",
        "(-9, 1) True",
    ),
}


@real
@pytest.mark.parametrize("loss", LOSSES)
def test_the_kernel_is_named_when_it_was_the_kernel(loss: str) -> None:
    code, expected = LOSSES[loss]
    with control_group(memory_bytes=LIMIT_BYTES) as group:
        assert group.run(EAT + code, timeout_s=110) == expected


@real
def test_the_group_with_the_limit_is_named_also_if_it_is_an_ancestor() -> None:
    """The kernel counts its kill in the group below, which has no limit."""
    code = """
with safepool.ProcessPool(1) as pool:
    print(pool.submit(eat).exception(60))
"""
    with (
        control_group(memory_bytes=LIMIT_BYTES) as outer,
        control_group(inside=outer) as group,
    ):
        text = group.run(EAT + code, timeout_s=110)

    assert f"the limit of 160 MiB in {outer.directories['memory']} was used up" in text
    assert f"oom_kill 0 -> 1 in {group.directories['memory']}/memory." in text
    assert "__main__.eat" in text


class Groups:
    """Counters and a clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.own: dict[str, Any] = {"kills": 7, "used_up": 0, "limit_bytes": None}
        self.parent: dict[str, Any] = {"kills": 90, "used_up": 3, "limit_bytes": 1 << 30}
        self.watch = OutOfMemoryWatch(self.read, lambda: self.now_s)

    def read(self) -> tuple[OutOfMemoryCount, ...]:
        rows = {"/g/own": self.own, "/g": self.parent}
        return tuple(
            OutOfMemoryCount(
                **row, peak_bytes=row["limit_bytes"], group=group, source=f"{group}/memory.events"
            )
            for group, row in rows.items()
            if row
        )


def test_one_kill_explains_one_worker() -> None:
    """Two were counted at once, a third worker was killed by hand."""
    groups = Groups()
    groups.watch.look()
    groups.own["kills"] = 9
    groups.parent["used_up"] = 5
    first, second, third = (groups.watch.explain() for _ in range(3))

    assert (
        first
        == second
        == OutOfMemory(
            kills_before=7,
            kills=9,
            source="/g/own/memory.events",
            limit_bytes=1 << 30,
            used_bytes=1 << 30,
            group="/g",
        )
    )
    assert third is None


def test_a_kill_that_no_workers_end_followed_is_forgotten() -> None:
    """It was a program that a task had started; what dies a minute later is another matter."""
    groups = Groups()
    groups.watch.look()
    groups.own["kills"] += 1
    groups.now_s += 60
    groups.watch.look()
    groups.now_s += 60

    assert groups.watch.explain() is None


def test_a_kill_while_nothing_ran_is_forgotten() -> None:
    """Nobody knows when it was; a worker's end would have been seen by now."""
    groups = Groups()
    groups.watch.look()
    groups.own["kills"] += 1
    groups.now_s += 60
    groups.watch.look()

    assert groups.watch.explain() is None


def test_a_look_between_the_last_byte_and_the_kill_hides_no_limit() -> None:
    """The kernel counts first that the ceiling was met, and then whom it killed."""
    groups = Groups()
    groups.watch.look()
    groups.parent["used_up"] += 1
    groups.now_s += 1.5
    groups.watch.look()
    groups.own["kills"] += 1
    groups.now_s += 0.1
    explained = groups.watch.explain()

    assert explained is not None
    assert (explained.limit_bytes, explained.group) == (1 << 30, "/g")


@real
def test_the_kernel_is_not_named_for_what_it_took_long_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that a task had started; its worker runs on and is killed by hand later."""
    monkeypatch.setattr(oom, "_LOOK_S", 0.02)
    monkeypatch.setattr(oom, "_CLAIM_S", 0.1)
    groups = Groups()
    watch = OutOfMemoryWatch(groups.read)
    monkeypatch.setattr(loop, "OutOfMemoryWatch", lambda: watch)
    with ProcessPool(1) as pool:
        pool.submit(abs, -1).result(timeout=30)
        future = pool.submit(time.sleep, 60)
        while not (future.running() and pool.workers()[0].task):
            time.sleep(0.01)
        groups.own["kills"] += 1
        wait_until(lambda: watch._latest and time.monotonic() - watch._seen_at > oom._CLAIM_S)
        os.kill(pool.workers()[0].pid, signal.SIGKILL)
        error = future.exception(timeout=30)

    assert isinstance(error, WorkerDiedError)
    assert (error.exitcode, error.oom) == (-signal.SIGKILL, None)


def test_an_ancestors_kills_are_no_evidence() -> None:
    """On version 2 it counts those of all its groups, other people's too."""
    groups = Groups()
    groups.watch.look()
    groups.parent["kills"] += 1

    assert groups.watch.explain() is None


def test_without_a_limit_that_was_used_up_it_was_the_machine() -> None:
    groups = Groups()
    groups.watch.look()
    groups.own["kills"] += 1
    found = groups.watch.explain()

    assert found is not None
    assert (found.limit_bytes, found.group) == (None, "/g/own")
    assert "machine's memory or a limit above /g/own (oom_kill 7 -> 8 in" in str(found)


# One row per reading that is of no use: before and after.
USELESS = {
    "nothing is counted here": (False, False),
    "it was not readable before": (False, True),
    "it is not readable now": (True, False),
}


@pytest.mark.parametrize("case", USELESS)
def test_counters_that_cannot_be_read_explain_nothing(case: str) -> None:
    groups = Groups()
    own, parent = groups.own, groups.parent
    for readable in USELESS[case]:
        groups.own, groups.parent = (own, parent) if readable else ({}, {})
        groups.watch.look()
        own["kills"] += 1

    assert groups.watch.explain() is None


def test_looks_that_follow_each_other_closely_are_one() -> None:
    """Short-lived workers are started many times a second."""
    groups = Groups()
    reads = 0

    def read() -> tuple[OutOfMemoryCount, ...]:
        nonlocal reads
        reads += 1
        return groups.read()

    watch = OutOfMemoryWatch(read, lambda: groups.now_s)
    for _ in range(10):
        watch.look()
        groups.now_s += 0.01

    assert reads == 1


def test_the_error_survives_a_pipe() -> None:
    oom = OutOfMemory(
        kills_before=1,
        kills=2,
        source="/sys/fs/cgroup/a/memory.events",
        limit_bytes=512 << 20,
        used_bytes=None,
        group="/sys/fs/cgroup/a",
    )
    error = WorkerDiedError(4711, -signal.SIGKILL, "f", "", oom)
    again = pickle.loads(pickle.dumps(error))

    assert (again.args, again.oom, str(again)) == (error.args, oom, str(error))
    assert str(error) == (
        "worker 4711 was killed by the kernel's out-of-memory killer while it ran f: the limit "
        "of 512 MiB in /sys/fs/cgroup/a was used up (oom_kill 1 -> 2). Run fewer workers: "
        "see max_workers= and memory_per_worker="
    )
    assert WorkerDiedError(os.getpid(), -9, "f").oom is None
