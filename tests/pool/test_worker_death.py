"""One dead worker costs one task; every other result arrives, and the pool goes on."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
import support_inside as inside
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable

# One row per way to die: what runs, with which arguments, and the exit code it leaves.
DEATHS: dict[str, tuple[Callable[..., object], tuple[object, ...], int]] = {
    "SIGKILL": (tasks.be_killed, (), -signal.SIGKILL),
    "SIGSEGV": (tasks.segfault, (), -signal.SIGSEGV),
    "os._exit": (tasks.end_without_cleanup, (), 7),
    "while writing 80 MB": (tasks.be_killed_while_answering, (80_000_000,), -signal.SIGKILL),
    "while reading its argument": (
        tasks.square,
        (tasks.SlowToUnpickle(os.getpid()),),
        -signal.SIGKILL,
    ),
}


@pytest.mark.parametrize("death", DEATHS)
def test_only_the_dead_workers_task_is_lost(death: str) -> None:
    """Twenty tasks around the fatal one return, and so does one submitted later."""
    function, arguments, exitcode = DEATHS[death]
    with ProcessPool(2) as pool:
        before = [pool.submit(tasks.sleep_and_return, 0.01, n) for n in range(10)]
        fatal = pool.submit(function, *arguments)
        after = [pool.submit(tasks.sleep_and_return, 0.01, n) for n in range(10)]

        error = fatal.exception(timeout=30)
        assert [f.result(timeout=30) for f in before + after] == [*range(10), *range(10)]
        assert pool.submit(tasks.square, 9).result(timeout=30) == 81

    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == exitcode
    assert error.pid > 0
    assert error.task.startswith("support_tasks.")
    assert error.begun


def test_every_lost_task_has_an_error_of_its_own() -> None:
    with ProcessPool(2) as pool:
        errors = [pool.submit(tasks.be_killed).exception(timeout=30) for _ in range(3)]

    assert len({id(error) for error in errors}) == 3
    assert len({error.pid for error in errors if isinstance(error, WorkerDiedError)}) == 3


def test_an_idle_worker_that_dies_costs_nothing() -> None:
    with ProcessPool(1) as pool:
        first = pool.submit(tasks.pid).result(timeout=30)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not pool._processes)
        assert pool.submit(tasks.pid).result(timeout=30) != first


def test_a_pool_ends_whose_workers_are_all_dead_and_whose_map_nobody_wants() -> None:
    """What is left of the map is no reason to start a worker, nor to wait for one."""
    large = "x" * 1_000_000  # such a call is alone with its worker, which takes nothing ahead
    with ProcessPool(1) as pool:
        results = pool.map(tasks.sleep_and_return, [0.0, 60.0, 60.0], [large] * 3)
        next(results)
        (pid,) = pool._processes
        results.close()  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGKILL)
        _wait_until_gone(pid)


def test_a_program_whose_map_kills_every_worker_goes_on() -> None:
    """However the ends of the workers, of the map and of the pool fall together."""
    for _ in range(20):
        with ProcessPool(2) as pool, pytest.raises(WorkerDiedError):
            list(pool.map(tasks.be_killed_with, ["x" * 4_000_000] * 10))


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc to see a zombie")
def test_a_task_for_a_worker_that_is_gone_already_is_not_lost() -> None:
    """It has not begun, so it goes to the next worker, whoever notices the death first."""
    with ProcessPool(1) as pool:
        for n in range(15):
            pid = pool.submit(tasks.pid).result(timeout=30)
            os.kill(pid, signal.SIGKILL)
            _wait_until_gone(pid)
            assert pool.submit(tasks.square, n).result(timeout=30) == n * n


def _wait_until_gone(pid: int) -> None:
    """A zombie has closed its descriptors."""
    while True:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (FileNotFoundError, ProcessLookupError):
            return


def test_a_stopped_worker_holds_up_nobody_else() -> None:
    """SIGSTOP, with a large argument on the way to it: the other worker goes on."""
    with ProcessPool(2) as pool:
        pids = set()
        while len(pids) < 2:
            futures = [pool.submit(tasks.sleep_and_return, 0.05, None) for _ in range(2)]
            for future in futures:
                future.result(timeout=30)
            pids = set(pool._processes)
        stopped = min(pids)
        os.kill(stopped, signal.SIGSTOP)
        try:
            large = [pool.submit(len, bytes(20_000_000)) for _ in range(2)]
            others = [pool.submit(tasks.square, n) for n in range(50)]
            assert [f.result(timeout=30) for f in others] == [n * n for n in range(50)]
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert [f.result(timeout=30) for f in large] == [20_000_000] * 2


@pytest.mark.parametrize("retries", [0, 1])
def test_a_large_task_that_was_on_its_way_is_not_said_to_have_run(retries: int) -> None:
    """It may be submitted again without a thought; with retries it was kept, and is sent again."""
    with ProcessPool(1, retries=retries) as pool:
        pid = pool.submit(os.getpid).result(timeout=30)
        os.kill(pid, signal.SIGSTOP)
        large = pool.submit(len, bytes(20_000_000))
        (worker,) = inside.workers_of(pool)
        # Its copy was made and handed over, and its pickle is kept for a retry alone.
        wait_until(lambda: worker.ledger.owed and not worker.unsent)
        wait_until(lambda: retries or getattr(worker.ledger.head, "pickled", 0) is None)
        os.kill(pid, signal.SIGKILL)
        error = large.exception(timeout=30)

    if retries:
        assert large.result() == 20_000_000
        return
    assert isinstance(error, WorkerDiedError)
    assert not error.begun
    assert "before it began builtins.len" in str(error)


def test_a_worker_that_closes_its_channel_is_replaced() -> None:
    """What it computed is on the board and not lost; the next task gets another worker."""
    with ProcessPool(1) as pool:
        before = pool.submit(os.getpid).result(timeout=30)
        assert pool.submit(os.closerange, 3, 1000).result(timeout=30) is None
        assert pool.submit(os.getpid).result(timeout=30) != before
        assert pool.submit(tasks.square, 2).result(timeout=30) == 4


@pytest.mark.slow
def test_every_task_of_a_storm_is_accounted_for() -> None:
    """While random workers are killed, each future ends once: a result or its own loss."""
    import random

    rng = random.Random(7)
    kills = 0
    with ProcessPool(2) as pool:
        futures = [pool.submit(tasks.value_and_pid, n) for n in range(3000)]
        while (left := sum(not future.done() for future in futures)) > 0:
            time.sleep(0.02)
            # Only workers that have done something: three killed in a row before they have
            # begun would rightly break the pool.
            recent = [f for f in futures[: 3000 - left] if f.done() and not f.exception()][-20:]
            grown = {f.result()[1] for f in recent} & set(pool._processes)
            if grown and kills < 12:
                try:
                    os.kill(rng.choice(sorted(grown)), signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    pass  # killed before, and not yet noticed
    lost = 0
    for n, future in enumerate(futures):
        if (error := future.exception(timeout=0)) is None:
            assert future.result()[0] == n
        else:
            assert isinstance(error, WorkerDiedError)
            lost += 1
    assert 0 < lost <= kills
