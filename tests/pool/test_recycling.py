"""Workers are replaced between two tasks, silently, and nothing is lost."""

from __future__ import annotations

import logging
import os
import sysconfig
import time
from typing import TYPE_CHECKING

import pytest
import support_logging as support
import support_tasks as tasks

from safepool import ProcessPool
from safepool.pool.core import starts
from safepool.pool.shell import staff
from safepool.pool.shell.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_statm = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="the system does not tell a process's memory"
)
MIB = 2**20


@pytest.fixture
def kept() -> Iterator[support.Kept]:
    """Everything that the pool logs."""
    handler = support.Kept()
    log = logging.getLogger("safepool")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.setLevel(logging.NOTSET)
    log.removeHandler(handler)


def is_quiet(kept: support.Kept) -> bool:
    return bool(kept.records) and max(record.levelno for record in kept.records) <= logging.INFO


@needs_statm
def test_a_worker_that_grows_is_replaced_and_nothing_is_lost(kept: support.Kept) -> None:
    """Among 60 tasks on two workers, three hold 200 MB each: who has one is replaced, once."""
    with ProcessPool(2, max_memory_per_worker="150MiB") as pool:
        futures = []
        for number in range(60):
            futures.append(pool.submit(tasks.value_and_pid, number))
            if number % 20 == 10:
                futures.append(pool.submit(support.hold, 200 * MIB))
        results = [future.result(timeout=60) for future in futures]

    answers = [result for result in results if isinstance(result, tuple)]
    assert [value for value, _ in answers] == list(range(60))
    grown = {result for result in results if isinstance(result, int)}
    replaced = [text for text in kept.messages if "MiB and is replaced" in text]
    # One may have had two of them, if the second was begun before the first was heard of.
    assert 1 <= len(grown) <= 3
    assert sorted(int(text.split()[1]) for text in replaced) == sorted(grown)
    assert is_quiet(kept)


@needs_statm
def test_a_worker_that_has_grown_runs_no_further_task(kept: support.Kept) -> None:
    """Nor when it grew within the fifth of a second in which it was just looked at."""
    with ProcessPool(1, max_memory_per_worker="150MiB") as pool:
        for _ in range(3):
            assert pool.submit(tasks.square, 3).result(timeout=30) == 9
            grown = pool.submit(support.hold, 200 * MIB).result(timeout=30)
            assert pool.submit(tasks.pid).result(timeout=30) != grown
    assert is_quiet(kept)


@needs_statm
def test_a_worker_that_falls_idle_does_not_keep_its_memory(kept: support.Kept) -> None:
    with ProcessPool(1, max_memory_per_worker="150MiB") as pool:
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9
        pool.submit(support.hold, 200 * MIB).result(timeout=30)
        deadline = time.monotonic() + 30
        while pool.workers() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert pool.workers() == ()
    assert is_quiet(kept)


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="free-threaded builds keep what was freed for a while: the worker holds it",
)
@needs_statm
def test_memory_that_a_task_gives_back_does_not_count(kept: support.Kept) -> None:
    with ProcessPool(1, max_memory_per_worker="150MiB") as pool:
        pids = {pool.submit(support.hold_for_a_moment, 200 * MIB).result(timeout=30)}
        pids |= {pool.submit(tasks.pid).result(timeout=30) for _ in range(5)}
    assert len(pids) == 1
    assert is_quiet(kept)


@needs_statm
def test_calls_of_a_map_outlive_their_workers(kept: support.Kept) -> None:
    """Each worker takes some calls, grows by 20 MB with each, and is replaced in between."""
    # A worker shares pages with its server, which holds the libraries of the tests before.
    with ProcessPool(1) as pool:
        pool.submit(tasks.pid).result(timeout=30)
        fresh = pool.workers()[0].resident_bytes or 0
    with ProcessPool(2, max_memory_per_worker=fresh + 90 * MIB) as pool:
        pids = list(pool.map(support.hold, [20 * MIB] * 60))
    assert len(pids) == 60
    assert 4 < len(set(pids)) < 30
    assert is_quiet(kept)


# One row per way to hand tasks over.
WAYS = {
    "submit": lambda pool, count: [pool.submit(tasks.pid) for _ in range(count)],
    "map": lambda pool, count: list(pool.map(tasks.pid, range(count))),
    "map in chunks": lambda pool, count: list(pool.map(tasks.pid, range(count), chunksize=7)),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_worker_does_more_tasks_than_it_may(way: str, kept: support.Kept) -> None:
    with ProcessPool(2, max_tasks_per_child=5) as pool:
        found = WAYS[way](pool, 60)
        pids = [pid if isinstance(pid, int) else pid.result(timeout=60) for pid in found]

    assert len(pids) == 60
    # A chunk is one task, and the last one is a part of it.
    most = 5 * 7 + 6 if way == "map in chunks" else 5
    assert max(pids.count(pid) for pid in pids) <= most
    assert is_quiet(kept)


@needs_statm
def test_both_limits_hold_together(kept: support.Kept) -> None:
    with ProcessPool(1, max_tasks_per_child=3, max_memory_per_worker="150MiB") as pool:
        pids = [pool.submit(tasks.pid).result(timeout=30) for _ in range(4)]
        grown = pool.submit(support.hold, 200 * MIB).result(timeout=30)
        last = pool.submit(tasks.pid).result(timeout=30)

    assert pids[0] == pids[2] != pids[3] == grown != last
    assert is_quiet(kept)


def test_a_limit_that_cannot_be_checked_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell what a process holds."""
    monkeypatch.setattr(Worker, "resident_bytes", lambda _: None)
    with ProcessPool(1, max_memory_per_worker=1) as pool:
        assert len({pool.submit(tasks.pid).result(timeout=30) for _ in range(3)}) == 1


def test_workers_that_never_end_by_themselves_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that a task has left keeps each from its end; they have time, not all of them."""
    monkeypatch.setattr(staff, "_STOPPING_S", 1000.0)
    monkeypatch.setattr(starts, "_PLACE_NS", 1_000_000)
    pool = ProcessPool(1, max_tasks_per_child=1)
    for _ in range(4):
        pool.submit(tasks.leave_a_thread).result(timeout=30)
    deadline = time.monotonic() + 30
    while len(pool.workers()) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    left = len(pool.workers())
    pool.kill_workers()
    pool.shutdown()

    assert left == 2
