"""Real control groups: what the reader says is what this kernel was told to enforce.

Every test starts a process in a group that was made for it. Skipped, with the reason, where
none can be made (`support_cgroups`).
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from typing import Any

import pytest
from support_cgroups import ControlGroup, control_group, without_control_groups

from safepool.limits import QuotaWatch, read_cpu_limits, read_limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

READ = """
import json, safepool.limits as limits
found = limits.read_limits(environ={})
print(json.dumps({
    "cpus": found.cpu_quota,
    "quotas": [quota.cpus for quota in found.quotas],
    "sources": [quota.source for quota in found.quotas],
    "memory": [[limit.name, limit.bytes, limit.used_bytes] for limit in found.memory],
    "pids": [[limit.name, limit.tasks, limit.used_tasks] for limit in found.pids],
    "skipped": [[entry.source, entry.reason] for entry in found.skipped],
}))
"""

needs_version_1 = pytest.mark.skipif(
    without_control_groups() is None and not os.path.exists("/sys/fs/cgroup/cpu/tasks"),
    reason="needs version 1's cpu hierarchy at its usual place",
)


def read_in(group: ControlGroup, *, before: str = ":") -> dict[str, Any]:
    """Read all limits in a new process in a group."""
    found: dict[str, Any] = json.loads(group.run(READ, before=before))
    return found


def inside_unshare(options: str, script: str = ":") -> str:
    """Build a `before` that goes on in new namespaces, after a script run in them."""
    return f'exec unshare {options} sh -c \'{script} && exec "$@"\' sh "$@"; false'


@pytest.mark.parametrize("cpus", [0.5, 1.0, 1.5, 2.37])
def test_quota_of_the_own_group(cpus: float) -> None:
    """The group's own quota, exactly, whatever the number of CPUs."""
    with control_group(cpus=cpus) as group:
        found = read_in(group)

    assert found["cpus"] == cpus
    assert found["skipped"] == []


def test_a_limit_on_the_parent_only() -> None:
    """A group gets no more than its parent; its own file says nothing of it."""
    with control_group(cpus=1.5) as parent, control_group(inside=parent) as group:
        found = read_in(group)

    assert found["quotas"][:2] == [None, 1.5]


def test_a_limit_three_levels_up() -> None:
    """Every ancestor is read, not only the first."""
    with (
        control_group(cpus=0.5) as top,
        control_group(inside=top) as second,
        control_group(inside=second) as third,
        control_group(inside=third) as group,
    ):
        found = read_in(group)

    assert found["cpus"] == 0.5
    assert found["quotas"][:4] == [None, None, None, 0.5]


def test_the_tighter_of_two_levels_wins() -> None:
    """The minimum over the levels, wherever it is."""
    with control_group(cpus=1.5) as parent, control_group(cpus=0.5, inside=parent) as group:
        found = read_in(group)

    assert found["quotas"][:2] == [0.5, 1.5]


def test_a_name_with_blanks_colons_and_backslashes() -> None:
    """The own path is raw; systemd's names have all of these."""
    with control_group(cpus=1.0, suffix=" a b:c\\x2dd\\040é") as group:
        found = read_in(group)

    assert found["cpus"] == 1.0
    assert found["sources"][0].startswith(str(group.cpu))


@needs_version_1
def test_a_bind_over_the_mount_point() -> None:
    """As a container's runtime does; the covered mount stays in mountinfo."""
    with control_group(cpus=0.5) as group:
        script = f'mount --bind "{group.cpu}" /sys/fs/cgroup/cpu'
        found = read_in(group, before=inside_unshare("-m", script))

    assert found["quotas"] == [0.5]
    assert found["sources"] == ["/sys/fs/cgroup/cpu/cpu.cfs_quota_us"]


@needs_version_1
def test_a_bind_of_the_parent_keeps_both_levels() -> None:
    """A mount's root is an ancestor of ours: both are visible, below the new mount point."""
    with control_group(cpus=1.0) as parent, control_group(inside=parent) as group:
        script = f'mount --bind "{parent.cpu}" /sys/fs/cgroup/cpu'
        found = read_in(group, before=inside_unshare("-m", script))

    assert found["quotas"] == [None, 1.0]


@needs_version_1
def test_a_fresh_mount_in_a_cgroup_namespace() -> None:
    """A private namespace with its own mount, as docker's on version 2."""
    with control_group(cpus=0.5) as group:
        script = "umount -l /sys/fs/cgroup/cpu && mount -t cgroup -o cpu none /sys/fs/cgroup/cpu"
        found = read_in(group, before=inside_unshare("-Cm", script))

    assert found["quotas"] == [0.5]


@needs_version_1
def test_a_namespace_without_a_remount() -> None:
    """The own directory has no name in /proc; it is found by looking, ancestors included."""
    with control_group(cpus=1.5) as parent, control_group(cpus=0.5, inside=parent) as group:
        found = read_in(group, before=inside_unshare("-C"))

    assert found["quotas"][:2] == [0.5, 1.5]
    assert found["sources"][0].startswith(str(group.cpu))


@needs_version_1
def test_a_level_between_two_mounts_is_found() -> None:
    """One mount shows the own group, another the top; the level between has no name."""
    with control_group(cpus=1.5) as parent, control_group(inside=parent) as group:
        script = (
            "mount -t tmpfs none /mnt && mkdir /mnt/cpu && mount -t cgroup -o cpu none /mnt/cpu"
        )
        found = read_in(group, before=inside_unshare("-Cm", script))

    assert found["quotas"][:2] == [None, 1.5]


@needs_version_1
def test_hidden_by_a_tmpfs_nothing_is_claimed() -> None:
    """A sandbox that covers /sys/fs/cgroup leaves nothing to read, and no exception."""
    with control_group(cpus=0.5) as group:
        found = read_in(group, before=inside_unshare("-m", "mount -t tmpfs none /sys/fs/cgroup"))

    assert found["quotas"] == []


def test_memory_and_pids_of_the_group() -> None:
    """The ceilings on memory and on tasks come with what is used of them."""
    with control_group(cpus=1.0, memory_bytes=1 << 30, tasks=50) as group:
        found = read_in(group)

    name, ceiling, used = found["memory"][0]
    assert ceiling == 1 << 30
    assert 0 < used < 1 << 30
    assert name in {"memory.max", "memory.limit_in_bytes"}
    assert found["pids"][0] == ["pids.max", 50, 1]


def test_memory_and_pids_of_the_parent() -> None:
    """Every level is reported, with its own use."""
    with (
        control_group(cpus=1.0, memory_bytes=1 << 30, tasks=50) as parent,
        control_group(inside=parent) as group,
    ):
        found = read_in(group)

    assert 1 << 30 in [ceiling for _, ceiling, _ in found["memory"]]
    assert found["pids"][0] == ["pids.max", None, None]
    assert found["pids"][1] == ["pids.max", 50, 1]


@needs_version_1
def test_the_hierarchical_memory_limit_sees_hidden_ancestors() -> None:
    """Version 1 computes the minimum over all ancestors itself, mounted or not."""
    with (
        control_group(memory_bytes=1 << 30) as parent,
        control_group(inside=parent) as group,
    ):
        own = group.directories["memory"]
        script = f'mount --bind "{own}" /sys/fs/cgroup/memory'
        found = read_in(group, before=inside_unshare("-m", script))

    ceilings = {name: ceiling for name, ceiling, _ in found["memory"]}
    assert ceilings == {"memory.limit_in_bytes": None, "hierarchical_memory_limit": 1 << 30}


@needs_version_1
def test_a_thread_in_another_group() -> None:
    """The calling thread's group counts: what it starts is born there."""
    entered, moved = threading.Event(), threading.Event()
    numbers: list[int] = []
    seen: list[float | None] = []

    def work() -> None:
        numbers.append(threading.get_native_id())
        entered.set()
        moved.wait(30)
        seen.append(read_cpu_limits().cpu_quota)

    with control_group(cpus=0.5) as group:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert entered.wait(30)
            group.add_thread(numbers[0])
        finally:
            moved.set()
            thread.join(30)

    assert seen == [0.5]
    assert read_cpu_limits().cpu_quota != 0.5


WATCH = """
import sys, safepool.limits as limits
watch = limits.QuotaWatch()
for _ in sys.stdin:
    print(watch.read().cpu_quota, flush=True)
"""


def test_a_watch_follows_a_changed_quota_and_a_move() -> None:
    """A pool sized from a watch sees a resize in place and a move to another group."""
    with control_group(cpus=1.0) as one, control_group(cpus=1.5) as other:
        program = one.popen([sys.executable, "-c", WATCH])
        assert program.stdin is not None
        assert program.stdout is not None

        def ask() -> str:
            program.stdin.write("\n")  # type: ignore[union-attr]
            program.stdin.flush()  # type: ignore[union-attr]
            return program.stdout.readline().strip()  # type: ignore[union-attr]

        try:
            seen = [ask()]
            one.set_cpus(0.5)
            seen.append(ask())
            one.set_cpus(None)
            seen.append(ask())
            other.add(program.pid)
            seen.append(ask())
            other.set_cpus(2.0)
            seen.append(ask())
        finally:
            program.communicate(timeout=30)

    assert seen == ["1.0", "0.5", "None", "1.5", "2.0"]


def test_a_watch_reads_what_a_full_reading_reads() -> None:
    """The short way and the long way agree, also the second time."""
    watch = QuotaWatch()

    for _ in range(2):
        assert watch.read() == read_cpu_limits()


def test_a_watch_keeps_no_descriptor_open() -> None:
    """It may live as long as its pool, in any number."""
    gc.collect()  # what others have left to it may hold some
    before = len(os.listdir("/proc/self/fd"))
    watches = [QuotaWatch() for _ in range(20)]
    for watch in watches:
        watch.read()

    assert len(os.listdir("/proc/self/fd")) == before


# Busy until it was frozen three times, which takes as many periods where it comes first.
THROTTLED = """
import time, safepool.limits as limits
before = limits.read_throttling()
now = before
end = time.monotonic() + 40
while now.throttled_periods < before.throttled_periods + 3 and time.monotonic() < end:
    pause = time.monotonic() + 0.05
    while time.monotonic() < pause:
        pass
    now = limits.read_throttling()
found = now - before
print(found.periods, found.throttled_periods, found.throttled_us)
"""


def test_throttling_is_counted_where_the_quota_is() -> None:
    """A busy process is frozen by its parent group's quota, and the counters say so."""
    with control_group(cpus=0.2) as parent, control_group(inside=parent) as group:
        periods, frozen, microseconds = map(int, group.run(THROTTLED).split())

    assert frozen >= 3
    assert periods >= frozen
    # Each time until the end of a tenth of a second, of which it ran at most a fifth.
    assert microseconds > 10_000


def test_without_a_quota_there_is_no_throttling() -> None:
    """No group that sets a quota: nothing to count."""
    code = "import safepool.limits as limits; print(limits.read_throttling())"
    with control_group() as group:
        if read_in(group)["cpus"] is not None:
            pytest.skip("this machine has a quota above the group")
        assert group.run(code) == "None"


def test_reading_leaves_nothing_open_and_asks_for_this_process() -> None:
    """Affinity, descriptors and shared memory are this process's own."""
    gc.collect()  # what others have left to it may hold some
    limits = read_limits()

    assert limits.affinity.cpus == len(os.sched_getaffinity(0))
    assert limits.open_files is not None
    assert limits.open_files.used_files == len(os.listdir("/proc/self/fd")) - 1
    assert limits.pids[-1].name == "RLIMIT_NPROC"


def test_affinity_is_the_calling_threads_mask() -> None:
    """Taskset and a cpuset lower it; the raw text names the CPUs."""
    mask = os.sched_getaffinity(0)
    one = {min(mask)}
    try:
        os.sched_setaffinity(0, one)
        affinity = read_limits().affinity
    finally:
        os.sched_setaffinity(0, mask)

    assert (affinity.cpus, affinity.raw) == (1.0, str(min(mask)))
