"""``safepool.worker_index()``: which worker of its pool a task runs in.

With each start method: ``test_variables``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import joblib
import pytest
import support_tasks as tasks
from joblib import delayed
from support_processes import wait_until

import safepool
from safepool import ProcessPool, WorkerDiedError, worker_index
from safepool.pool.core.events import Died, Hired, Step
from safepool.pool.core.machine import Core
from safepool.pool.core.worker import Member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def index_after(path: str) -> tuple[int | None, int]:
    tasks.wait_for(path)
    return worker_index(), os.getpid()


def busy(pool: Any) -> int:
    return sum(worker.state == "busy" for worker in pool.workers())


@contextlib.contextmanager
def all_busy(pool: ProcessPool, gate: Path) -> Iterator[list[tuple[int | None, int]]]:
    """Let each worker run a call; afterwards there is the index of each, and its process."""
    found: list[tuple[int | None, int]] = []
    gate.unlink(missing_ok=True)
    futures = [pool.submit(index_after, str(gate)) for _ in range(pool.size)]
    try:
        wait_until(lambda: busy(pool) == pool.size)
        yield found
    finally:
        gate.touch()
    found += [future.result(timeout=60) for future in futures]


def test_that_of_the_dead_is_given_again_and_none_beyond_the_size(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(3) as pool:
        with all_busy(pool, gate) as before:
            told = {worker.pid: worker.index for worker in pool.workers()}
        assert sorted(told.values()) == [0, 1, 2]

        lost = pool.submit(os._exit, 3).exception(timeout=60)
        assert isinstance(lost, WorkerDiedError)
        with all_busy(pool, gate) as after:
            pass
        assert sorted(str(index) for index, _ in after) == ["0", "1", "2"]
        assert {*after} - {*before} == {(told[lost.pid], pid) for _, pid in {*after} - {*before}}

        pool.resize(2)
        wait_until(lambda: len(pool.workers()) == 2)
        assert sorted(worker.index for worker in pool.workers()) == [0, 1]
        pool.resize(3)
        with all_busy(pool, gate) as grown:
            pass
        assert sorted(str(index) for index, _ in grown) == ["0", "1", "2"]


def test_who_is_beyond_the_new_size_ends_after_its_task(tmp_path: Path) -> None:
    """Also when it is the last one that is busy; another has its place meanwhile."""
    gate, other = tmp_path / "gate", tmp_path / "other"
    with ProcessPool(2) as pool:
        try:
            first = pool.submit(index_after, str(gate))
            wait_until(lambda: busy(pool) == 1)
            second = pool.submit(index_after, str(other))
            wait_until(lambda: busy(pool) == 2)
            pool.resize(1)
            gate.touch()
            assert first.result(timeout=60)[0] == 0
            third = pool.submit(worker_index)
            assert not second.done()
        finally:
            gate.touch()
            other.touch()
        assert second.result(timeout=60)[0] == 1
        assert third.result(timeout=60) == 0


def test_with_one_worker_it_is_0_whoever_takes_its_place() -> None:
    with ProcessPool(1, max_tasks_per_child=1) as pool:
        found = {pool.submit(index_after, __file__).result(timeout=60) for _ in range(3)}
    assert [index for index, _ in found] == [0, 0, 0]
    with safepool.Pool(1) as ours:
        assert ours.apply(worker_index) == 0


def test_in_joblibs_calls() -> None:
    with safepool.parallel_backend(n_jobs=2):
        found = joblib.Parallel()(delayed(worker_index)() for _ in range(8))
    assert {*found} <= {0, 1}
    with safepool.parallel_backend(n_jobs=1):
        assert joblib.Parallel()(delayed(worker_index)() for _ in range(2)) == [None, None]


def note_index() -> None:
    tasks.mark(str(worker_index()))


def in_children() -> tuple[str, int | None, str]:
    """Return what is said in a fork of a worker, in a pool of its own, by a new interpreter."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, str(worker_index()).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    said = os.read(reading, 10).decode()
    os.close(reading)
    os.close(writing)
    with ProcessPool(1) as pool:
        below = pool.submit(worker_index).result(timeout=60)
    code = "import safepool; print(safepool.worker_index())"
    fresh = subprocess.check_output([sys.executable, "-c", code], text=True)
    return said, below, fresh.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_in_initializers_and_in_what_a_task_starts() -> None:
    """A worker's own pool counts anew; a process that is no worker has no number."""
    with ProcessPool(1, initializer=note_index) as pool:
        assert pool.submit(tasks.marks).result(timeout=60) == ["0"]
        assert pool.submit(in_children).result(timeout=60) == ("0", 0, "None")
    assert worker_index() is None


MS = 1_000_000


def hire(core: Core, now_ns: int = 0) -> Member:
    member = Member()
    member.pid = 1
    member.index = core.place_of_next()
    core.handle(Hired(member, has_board=True), now_ns)
    return member


@pytest.mark.unit
def test_the_lowest_place_of_no_process_is_given() -> None:
    core = Core(4)
    members = [hire(core) for _ in range(4)]
    assert [member.index for member in members] == [0, 1, 2, 3]
    for gone in (2, 1):
        core.handle(Died(members[gone], 0), 0)
    assert [hire(core).index for _ in range(2)] == [1, 2]


@pytest.mark.unit
def test_the_place_of_one_that_cannot_be_ended_is_given_last() -> None:
    """It may hold the device that it hangs in."""
    core = Core(2)
    first, _ = hire(core), hire(core)
    core.handle(Died(first, None, lost=1), 0)
    core.handle(Step(3, lost=1), 0)
    assert core.place_of_next() == 2
    core.handle(Step(2, lost=1), 0)
    assert core.place_of_next() == 0  # no other is left
    core.handle(Step(3, lost=0), 0)
    assert core.place_of_next() == 0
