"""A pool sized from the limits follows them while it has work; ``resize`` does it by hand."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING

import pytest
import support_tasks as tasks
from support_cgroups import ControlGroup, control_group
from support_processes import wait_until

from safepool import ProcessPool, machine
from safepool.budget import Request
from safepool.limits import QuotaWatch, read_limits
from safepool.limits.waiting import parse_idle

if TYPE_CHECKING:
    from pathlib import Path

# Runs tasks without end and prints the number of workers whenever it changes.
REPORTER = """
import sys, threading, time, safepool
def work(_):
    time.sleep(0.05)
seen = None
def tell(n):
    global seen
    if n != seen:
        seen = n
        print(n, flush=True)
with safepool.ProcessPool() as pool:
    futures = [pool.submit(work, n) for n in range(4)]
    while True:
        futures = [f for f in futures if not f.done()]
        futures += [pool.submit(work, n) for n in range(8 - len(futures))]
        tell((pool._max_workers, len(pool._processes)))
        time.sleep(0.01)
"""


def wait_for(program: subprocess.Popen[str], wanted: str) -> list[str]:
    """Read what the program prints until the wanted line; return what came before."""
    assert program.stdout is not None
    lines: list[str] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        line = program.stdout.readline().rstrip("\n")
        if line == wanted:
            return lines
        lines.append(line)
        assert line, f"the program ended; it said {lines}"
    pytest.fail(f"never {wanted}: {lines}")


def end(program: subprocess.Popen[str]) -> None:
    program.kill()
    program.communicate()


def start(group: ControlGroup) -> subprocess.Popen[str]:
    return group.popen([sys.executable, "-c", REPORTER])


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True,
    reason="needs two CPUs to grow to",
)
def test_a_changed_quota_changes_the_number_of_workers() -> None:
    """Down while it works, and up again: nothing is restarted, no task is lost."""
    with control_group(cpus=2.0) as group:
        program = start(group)
        try:
            wait_for(program, "(2, 2)")
            group.set_cpus(1.0)
            wait_for(program, "(1, 1)")
            group.set_cpus(2.0)
            wait_for(program, "(2, 2)")
        finally:
            end(program)


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True,
    reason="needs two CPUs to grow to",
)
def test_a_move_to_another_group_is_noticed() -> None:
    """The files that were read before say nothing about a process that was moved away."""
    with control_group(cpus=2.0) as wide, control_group(cpus=0.5) as narrow:
        program = start(wide)
        try:
            wait_for(program, "(2, 2)")
            narrow.add(program.pid)
            wait_for(program, "(1, 1)")
        finally:
            end(program)


def test_resize_by_hand_starts_and_ends_workers() -> None:
    with ProcessPool(1) as pool:
        assert len(set(pool.map(tasks.pid, range(20)))) == 1
        pool.resize(3)
        seen: set[int] = set()

        def have_all_worked() -> bool:
            seen.update(pool.map(_pid_after_a_while, range(12)))
            return len(seen) >= 3

        wait_until(have_all_worked)
        assert len(seen) == len(pool._processes) == 3
        pool.resize(1)
        list(pool.map(tasks.pid, range(20)))
        wait_until(lambda: len(pool._processes) == 1)
        assert len(set(pool.map(tasks.pid, range(20)))) == 1


def _pid_after_a_while(_: int) -> int:
    time.sleep(0.15)
    return os.getpid()


def test_shrinking_never_ends_a_running_task() -> None:
    with ProcessPool(3) as pool:
        futures = [pool.submit(tasks.sleep_and_return, 0.4, n) for n in range(9)]
        time.sleep(0.3)
        pool.resize(1)
        assert [future.result(timeout=30) for future in futures] == list(range(9))


@pytest.mark.parametrize("number", [0, -1])
def test_resize_refuses_what_makes_no_sense(number: int) -> None:
    with ProcessPool(1) as pool, pytest.raises(ValueError, match="greater than 0"):
        pool.resize(number)


@pytest.mark.alone
def test_an_idle_pool_uses_no_cpu() -> None:
    """No polling: a pool that has nothing to do sleeps, its workers and its thread."""
    code = (
        "import os, time, safepool\n"
        "pool = safepool.ProcessPool()\n"
        "list(pool.map(abs, range(10)))\n"
        "def switches():\n"
        "    total = 0\n"
        "    for pid in [os.getpid(), *pool._processes]:\n"
        "        for task in os.listdir(f'/proc/{pid}/task'):\n"
        "            if int(task) == os.getpid(): continue\n"
        "            for line in open(f'/proc/{pid}/task/{task}/status'):\n"
        "                if 'ctxt_switches' in line: total += int(line.split()[1])\n"
        "    return total\n"
        "time.sleep(0.5)\n"
        # On a busy machine a worker may still be starting.
        "for _ in range(10):\n"
        "    before = switches()\n"
        "    time.sleep(2)\n"
        "    count = switches() - before\n"
        "    if count <= 2: break\n"
        "print(count)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    # Two for the thread that counted, if any; one wake-up a second would be four and more.
    assert int(done.stdout) <= 2


@pytest.mark.alone
def test_a_quota_that_cannot_be_seen_is_suspected_once() -> None:
    """Half a CPU is granted outside of what the process can see, which shows two.

    A control-group namespace hides the parent; what is left to see is that workers wait
    while CPUs are idle.
    """
    code = (
        "import time, warnings, safepool\n"
        "def burn(_):\n"
        "    end = time.monotonic() + 0.5\n"
        "    while time.monotonic() < end: pass\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    with safepool.ProcessPool() as pool:\n"
        "        workers = pool._max_workers\n"
        "        list(pool.map(burn, range(24)))\n"
        "print(workers, [str(w.message)[:60] for w in caught])\n"
    )
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a CPU that stays idle")
    started, idle = time.monotonic(), _idle_seconds()
    with control_group(cpus=0.5) as parent, control_group(inside=parent) as group:
        found = group.run(code, before=_private_view(group), timeout_s=100)

    workers, _, warned = found.partition(" ")
    assert workers == str(len(os.sched_getaffinity(0)))
    if _idle_seconds() - idle < time.monotonic() - started and "fit the visible" not in warned:
        pytest.skip("other programs use this machine's CPUs: waiting proves nothing")
    assert warned.count("fit the visible limit") == 1


@pytest.mark.alone
def test_a_limit_that_can_be_seen_is_not_suspected() -> None:
    """One worker is the minimum: under half a CPU it is frozen, and everybody knows why."""
    code = (
        "import time, warnings, safepool\n"
        "def burn(_):\n"
        "    end = time.monotonic() + 0.5\n"
        "    while time.monotonic() < end: pass\n"
        "warnings.simplefilter('error')\n"
        "with safepool.ProcessPool() as pool:\n"
        "    list(pool.map(burn, range(10)))\n"
        "print(pool._max_workers, len(safepool.machine._told))\n"
    )
    with control_group(cpus=0.5) as group:
        assert group.run(code, timeout_s=100) == "1 0"


def _idle_seconds() -> float:
    with open("/proc/stat", encoding="ascii") as file:
        return parse_idle(file.read(), os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")


def _private_view(group: ControlGroup) -> str:
    """Return what makes a container's view: the own group, as if nothing were above it.

    In a mount namespace of its own, so that this machine's view stays as it is.
    """
    point = "/sys/fs/cgroup/cpu" if group.version == 1 else "/sys/fs/cgroup"
    mount = f"mount --bind {group.cpu} {point}"
    return f'exec unshare -m sh -c \'{mount} && exec "$@"\' sh "$@"; false'


def test_junk_in_a_variable_is_said_once_and_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_told", set())
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "24(x2)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ProcessPool()
    (warning,) = [one for one in caught if "24(x2)" in str(one.message)]
    assert "SLURM_CPUS_PER_TASK is ignored" in str(warning.message)


def test_a_warning_that_is_filtered_to_an_error_still_costs_no_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_told", set())
    monkeypatch.setenv("NSLOTS", "-3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ProcessPool()._max_workers >= 1


def test_a_dropped_fraction_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safepool.limits import Limit, Limits

    quota = Limit(name="cpu.max", cpus=2.5, source="/a/cpu.max", raw="250000 100000")
    affinity = Limit(name="affinity", cpus=8.0, source="call", raw="0-7")
    monkeypatch.setattr(machine, "_told", set())
    monkeypatch.setattr(machine, "read_limits", lambda: Limits(affinity=affinity, quotas=(quota,)))
    with caplog.at_level(logging.INFO, logger="safepool"):
        for _ in range(3):
            ProcessPool()

    (record,) = caplog.records
    assert record.getMessage() == (
        "2.5 CPUs (cpu.max in /a/cpu.max) make 2 workers: 0.50 CPUs are left to this process. "
        'Pass rounding="ceil" to use them'
    )


def test_what_bounds_the_workers_beside_cpus_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safepool.limits import Limit, Limits, PidsLimit

    affinity = Limit(name="affinity", cpus=8.0, source="call", raw="0-7")
    pids = PidsLimit(name="pids.max", tasks=20, used_tasks=4, source="/a/pids.max", raw="20")
    monkeypatch.setattr(machine, "_told", set())
    monkeypatch.setattr(
        machine, "read_limits", lambda: Limits(affinity=affinity, quotas=(), pids=(pids,))
    )
    with caplog.at_level(logging.INFO, logger="safepool"):
        assert ProcessPool()._max_workers == 2

    (record,) = caplog.records
    assert record.getMessage() == (
        "2 workers: pids.max (20 in /a/pids.max) has no room for more. Raise that limit to start "
        "more"
    )


def test_memory_per_worker_bounds_the_workers() -> None:
    """In a real memory group with 512 MiB, workers of 200 MiB fit twice, of 400 MiB once."""
    code = (
        "import safepool\n"
        "for size in ('100MiB', '200MiB', '400MiB'):\n"
        "    pool = safepool.ProcessPool(memory_per_worker=size)\n"
        "    print(pool._max_workers, pool._budget.because.name, end='; ')\n"
    )
    with control_group(memory_bytes=512 * 2**20) as group:
        found = group.run(code)

    cpus = len(os.sched_getaffinity(0))
    assert "1 memory." in found
    assert found.startswith(f"{min(cpus, 4)} ")


def test_a_pool_under_a_limit_on_processes_works() -> None:
    """Explicitly too many workers for the group: it goes on with those that it gets."""
    code = (
        "import safepool, time\n"
        "with safepool.ProcessPool(20) as pool:\n"
        "    print(sum(pool.map(abs, range(100))), len(pool._processes) < 20)\n"
    )
    with control_group(tasks=10) as group:
        assert group.run(code, timeout_s=90) == "4950 True"


def test_a_limit_that_cannot_be_read_for_lack_of_descriptors_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pool within a quota would grow to the CPUs of the host."""
    for name, text in {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpu.max": "100000 100000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "QuotaWatch", lambda: QuotaWatch(tmp_path))
    watch = machine.BudgetWatch(Request(), read_limits(tmp_path))
    quota = watch.read().because

    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, open_files[1]))
    try:
        unreadable = watch.read().because
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, open_files)

    assert (quota.name, unreadable) == ("cpu.max", quota)
