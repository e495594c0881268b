"""Tasks that are cancelled, and pools that are given up: what ends, and what goes on."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Callable


def is_gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def test_a_running_task_is_left_alone_unless_it_is_to_be_killed(tmp_path: Path) -> None:
    """Without ``kill`` it is ``future.cancel()``; with it the future is cancelled at once."""
    started = tmp_path / "started"
    with ProcessPool(1) as pool:
        future = pool.submit(tasks.touch_and_sleep, str(started), 60)
        wait_until(started.exists)

        assert not pool.cancel(future)
        assert pool.cancel(future, kill=True)
        assert future.cancelled()
        assert pool.cancel(future, kill=True)  # again is fine
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


def test_everybody_who_waits_learns_of_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    called: list[Future[object]] = []
    with ProcessPool(1) as pool, ThreadPoolExecutor(1) as thread:
        future = pool.submit(tasks.touch_and_sleep, str(started), 60)
        future.add_done_callback(called.append)
        waiting = thread.submit(wait, [future], 30)
        wait_until(started.exists)
        pool.cancel(future, kill=True)

        assert waiting.result(timeout=30).done == {future}
        assert called == [future]


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
def test_what_the_task_has_started_ends_with_it(tmp_path: Path) -> None:
    """The worker's process tree is killed, not the worker alone."""
    started = tmp_path / "started"
    with ProcessPool(1) as pool:
        future = pool.submit(tasks.start_a_child_and_sleep, str(started), 60)
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        worker, child = (int(word) for word in started.read_text().split())
        pool.cancel(future, kill=True)

        wait_until(lambda: is_gone(worker) and is_gone(child))


def test_only_that_task_is_killed(tmp_path: Path) -> None:
    """Whatever waits, also behind it in the same worker, is run once and returns."""
    log = tmp_path / "log"
    with ProcessPool(1) as pool:
        # Known to be short, so that the next ones are sent ahead.
        [future.result(timeout=30) for future in [pool.submit(tasks.log, str(log), -1)] * 2]
        for round_ in range(10):
            futures = [pool.submit(tasks.log, str(log), 100 * round_ + n) for n in range(60)]
            futures.insert(20, victim := pool.submit(tasks.log, str(log), 100 * round_ + 99, 0.05))
            if round_ % 2:
                wait_until(lambda: victim.running() or victim.done())
            cancelled = pool.cancel(victim, kill=True)

            assert cancelled == victim.cancelled()
            futures.remove(victim)
            assert [f.result(timeout=30) for f in futures] == [100 * round_ + n for n in range(60)]

    ran = [int(line) for line in log.read_text().split()]
    others = [n for n in ran if n % 100 != 99]
    assert sorted(others) == sorted({*others})
    assert set(others) >= {100 * round_ + n for round_ in range(10) for n in range(60)}


def test_one_that_no_worker_has_is_cancelled_without_a_kill(tmp_path: Path) -> None:
    started, gate = tmp_path / "started", tmp_path / "gate"
    with ProcessPool(1) as pool:
        first = pool.submit(tasks.touch_and_wait_for, str(started), str(gate))
        last = pool.submit(tasks.pid)
        wait_until(started.exists)
        before = {*pool._processes}

        assert pool.cancel(last, kill=True)
        assert last.cancelled()
        gate.touch()
        assert first.result(timeout=30) is None
        assert {*pool._processes} == before


def test_one_that_has_ended_is_not_cancelled() -> None:
    with ProcessPool(1) as pool:
        future = pool.submit(tasks.square, 3)
        assert future.result(timeout=30) == 9

        assert not pool.cancel(future, kill=True)
        assert not pool.cancel(future)


def test_the_future_of_another_pool_is_refused() -> None:
    """Else it would be cancelled while its task ran on."""
    with ProcessPool(1) as pool, ProcessPool(1) as other:
        future = other.submit(tasks.square, 3)

        for foreign in (future, Future[int]()):
            with pytest.raises(ValueError, match="does not belong to this pool"):
                pool.cancel(foreign, kill=True)
        assert future.result(timeout=30) == 9


# One row per way to give a pool up: the call, and the signal that its workers get.
GIVING_UP: dict[str, tuple[Callable[[ProcessPool], None], int]] = {
    "terminate_workers": (ProcessPool.terminate_workers, signal.SIGTERM),
    "kill_workers": (ProcessPool.kill_workers, getattr(signal, "SIGKILL", signal.SIGTERM)),
}
both_ways = pytest.mark.parametrize("how", GIVING_UP)


@both_ways
def test_a_pool_that_is_given_up_ends_every_future(how: str, tmp_path: Path) -> None:
    """Running tasks are lost, all others cancelled, also those that were sent ahead."""
    give_up, number = GIVING_UP[how]
    started = tmp_path / "started"
    pool = ProcessPool(1)
    assert pool.submit(tasks.square, 1).result(timeout=30) == 1  # known to be short
    running = pool.submit(tasks.touch_and_sleep, str(started), 60)
    others = [pool.submit(tasks.square, n) for n in range(50)]
    results = pool.map(tasks.square, range(50))
    wait_until(started.exists)
    give_up(pool)

    lost = running.exception(timeout=30)
    assert isinstance(lost, WorkerDiedError)
    assert (lost.exitcode, lost.by_pool) == (-number, True)
    assert f"{signal.Signals(number).name} (sent by the pool) while it ran" in str(lost)
    assert str(pickle.loads(pickle.dumps(lost))) == str(lost)
    assert wait(others, timeout=30).not_done == set()
    assert all(future.cancelled() for future in others)
    with pytest.raises(BaseException, match=r"^$"):  # CancelledError
        next(results)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(tasks.square, 1)
    pool.shutdown()
    assert pool._processes == {}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@both_ways
def test_a_signal_of_somebody_else_is_not_the_pools(how: str, tmp_path: Path) -> None:
    """The worker heeds no SIGTERM, or was killed before the pool was given up."""
    started = tmp_path / "started"
    pool = ProcessPool(1)
    running = pool.submit(tasks.ignore_sigterm_and_sleep, str(started), 60)
    wait_until(started.exists)
    if how == "terminate_workers":
        pool.terminate_workers()
    os.kill(int(started.read_text()), signal.SIGKILL)
    lost = running.exception(timeout=30)
    pool.kill_workers()
    pool.shutdown()

    assert isinstance(lost, WorkerDiedError)
    assert (lost.exitcode, lost.by_pool) == (-signal.SIGKILL, False)
    assert "sent by the pool" not in str(lost)


@both_ways
def test_it_may_be_given_up_unused_again_or_when_it_has_ended(how: str) -> None:
    give_up, _ = GIVING_UP[how]
    pool = ProcessPool(1)
    give_up(pool)
    give_up(pool)
    pool.shutdown()
    with ProcessPool(1) as used:
        assert used.submit(tasks.square, 2).result(timeout=30) == 4
    give_up(used)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to heed")
def test_a_worker_that_heeds_sigterm_has_its_time(tmp_path: Path) -> None:
    """A handler may clean up; the standard pool waits for it as well."""
    cleaned = tmp_path / "cleaned"
    started = tmp_path / "started"
    with ProcessPool(1) as pool:
        pool.submit(tasks.clean_up_on_sigterm, str(started), str(cleaned), 1.0)
        wait_until(started.exists)
        pool.terminate_workers()

    assert cleaned.read_text() == "done"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to ignore")
def test_killing_is_sharper_than_terminating(tmp_path: Path) -> None:
    """Who is too polite at first may still be quick."""
    started = tmp_path / "started"
    with ProcessPool(1) as pool:
        pool.submit(tasks.clean_up_on_sigterm, str(started), os.devnull, 25.0)
        wait_until(started.exists)
        began = time.monotonic()
        pool.terminate_workers()
        pool.kill_workers()

    assert time.monotonic() - began < 20
