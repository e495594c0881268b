"""A thousand tasks with arrays, and every way to die: nothing is left on either side."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_arrays as arrays
import support_tasks as tasks
from support_descriptors import count_descriptors, count_eventfds
from support_processes import kill, wait_until

from safepool import ProcessPool, WorkerDiedError, share
from safepool.workers.methods import find_context

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

ARRAY = np.ones(arrays.ITEMS)


def state() -> dict[str, Any]:
    """Return what must be the same before and after."""
    gc.collect()
    return {
        "descriptors": count_descriptors(),
        "files": arrays.files_here(),
        "/dev/shm": {name for name in os.listdir("/dev/shm") if "safepool" in name},
        "temporary": {n for n in os.listdir(tempfile.gettempdir()) if "safepool" in n},
    }


def state_there(_: object = None) -> dict[str, Any]:
    return state()


def test_a_thousand_tasks_leave_nothing() -> None:
    """Arguments, results, shared arrays and small ones; in the program and in the worker."""
    with ProcessPool(1) as pool:
        pool.submit(arrays.itself, [ARRAY, share(ARRAY)]).result(timeout=60)
        pool.submit(state_there).result(timeout=60)
        before, there = state(), pool.submit(state_there).result(timeout=60)
        for _ in range(25):
            handle = share(np.ones(1000))
            futures = [pool.submit(arrays.itself, ARRAY) for _ in range(4)]
            futures += [pool.submit(arrays.total, handle) for _ in range(18)]
            futures += [pool.submit(arrays.itself, np.ones(8000)) for _ in range(18)]
            for future in futures:
                future.result(timeout=60)
        del future, futures, handle
        assert pool.submit(state_there).result(timeout=60) == there
        assert state() == before


def test_killed_workers_leave_nothing() -> None:
    """In the middle of a task, of an argument, of a result."""
    handle = share(ARRAY)
    with ProcessPool(2) as pool:
        pool.submit(arrays.total, handle).result(timeout=60)
        list(pool.map(tasks.pid, range(100)))
        wait_until(lambda: [one.state for one in pool.workers()] == ["idle", "idle"])
        before = state()
        for round_ in range(8):
            futures = [pool.submit(arrays.itself, ARRAY) for _ in range(6)]
            time.sleep(0.004 * round_)
            kill(list(pool._processes))
            for future in futures:
                error = future.exception(timeout=60)
                if error is not None:
                    assert isinstance(error, WorkerDiedError)
                    assert error.exitcode == -signal.SIGKILL
        del future, futures, error
        list(pool.map(tasks.value_and_pid, range(200)))
        assert pool.submit(arrays.total, handle).result(timeout=60) == arrays.ITEMS
        wait_until(lambda: state()["files"] == before["files"])
        # One that was killed is there until its end was noticed.
        wait_until(lambda: state()["descriptors"] <= before["descriptors"])
        assert count_eventfds() <= 2
    assert count_eventfds() == 0


def test_a_killed_fork_server_leaves_nothing() -> None:
    """Arrays go on to travel between the program and workers of one that is gone."""
    from safepool.workers import forkserver

    if find_context(None).get_start_method() != "safepool":
        pytest.skip("no fork server here")
    with ProcessPool(1) as pool:
        got = pool.submit(arrays.itself, ARRAY).result(timeout=60)
        kill(forkserver.running())
        got = pool.submit(arrays.itself, ARRAY).result(timeout=60)
        assert got.sum() == arrays.ITEMS
        arrays.expect_files(1, 0)
        os.kill(pool.submit(tasks.pid).result(timeout=60), signal.SIGKILL)
        pool.submit(tasks.pid).result(timeout=60)  # a large one might be lost with the old one
        got = pool.submit(arrays.itself, ARRAY).result(timeout=60)
        assert got.sum() == arrays.ITEMS
    del got
    gc.collect()
    arrays.expect_files(0, 0)


def test_a_worker_that_writes_on_its_channel_is_ended_alone() -> None:
    """What it sent cannot be read: its task is lost, the pool and its other tasks are not."""
    with ProcessPool(2) as pool:
        list(pool.map(tasks.pid, range(100)))
        innocent = [pool.submit(tasks.sleep_and_return, 0.2, n) for n in range(3)]
        error = pool.submit(write_to_every_socket).exception(timeout=60)

        assert isinstance(error, WorkerDiedError)
        assert [future.result(timeout=60) for future in innocent] == [0, 1, 2]
        assert pool.submit(arrays.total, ARRAY).result(timeout=60) == arrays.ITEMS


def write_to_every_socket() -> None:
    """Write a frame that tells of a file which was not sent, as a faulty worker would."""
    from safepool.transport.frames import Filed, Kind, encode

    filed = Filed()
    filed.lengths = (1 << 22,)
    frame = b"".join(encode(Kind.RESULT, 1, [filed]))
    for number in os.listdir("/proc/self/fd"):
        try:
            if Path(f"/proc/self/fd/{number}").readlink().name.startswith("socket:"):
                os.write(int(number), frame)
        except OSError:
            pass
    time.sleep(30)
