"""A worker that holds more than ``memory_limit`` in the middle of a task is ended, and alone."""

from __future__ import annotations

import logging
import pickle
import sys
import time
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
import support_inside as inside
import support_logging
import support_tasks as tasks
from joblib import delayed
from support_processes import wait_until

import safepool
from safepool import ProcessPool, WorkerDiedError
from safepool.pool.core.gauge import Gauge
from safepool.pool.shell import memory
from safepool.pool.shell.memory import MemoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system tells of no memory")
MIB = 1 << 20
LIMIT = "96MiB"


def eat(path: str | None = None) -> None:
    """Hold 200 MiB, and then do nothing until somebody ends it."""
    if path is not None:
        tasks.append_line(path, "begun")
    held = bytearray(b"x") * (200 * MIB)
    while held:
        time.sleep(0.01)


def check(error: BaseException | None, name: str = f"{__name__}.eat") -> None:
    assert isinstance(error, WorkerDiedError)
    found = error.exceeded
    assert found is not None
    assert found.limit_bytes == 96 * MIB < found.held_bytes
    assert found.source == f"/proc/{error.pid}/statm"
    assert (error.exitcode, error.by_pool, error.oom) == (-9, True, None)
    assert f"was killed by the pool for its memory while it ran {name}: it held " in str(error)
    assert "and memory_limit= is 96 MiB" in str(error)
    # A machine that is busy has no time for it.
    assert not error.stack or "in eat" in error.stack
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exceeded) == (str(error), found)


@pytest.mark.parametrize("method", [None, "loky", "spawn", "forkserver", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork")
def test_who_takes_too_much_is_ended_and_the_others_go_on(
    method: str | None, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(2, method, memory_limit=LIMIT) as pool:
        try:
            other = pool.submit(tasks.wait_for, str(gate), 42)
            check(pool.submit(eat).exception(timeout=60))
            assert not other.done()
        finally:
            gate.touch()
        assert other.result(timeout=60) == 42
        assert pool.submit(tasks.square, 3).result(timeout=60) == 9


def test_a_call_of_a_map_is_lost_alone() -> None:
    with ProcessPool(1, memory_limit=LIMIT) as pool:
        calls = [tasks.square, tasks.square, eat, tasks.square]
        results = pool.map(call, calls, return_exceptions=True)
        first, second, third, fourth = results

    assert (first, second, fourth) == (9, 9, 9)
    check(third if isinstance(third, BaseException) else None, f"{__name__}.call")


def call(function: Callable[..., Any]) -> Any:
    return function() if function is eat else function(3)


def test_it_is_run_again_as_after_the_kernels_out_of_memory_killer(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with ProcessPool(1, memory_limit=LIMIT, retries=1) as pool:
        check(pool.submit(eat, str(path)).exception(timeout=60))
    assert path.read_text().split() == ["begun", "begun"]


def test_it_breaks_a_pool_that_one_death_breaks() -> None:
    with ProcessPool(1, memory_limit=LIMIT, on_worker_death="break") as pool:
        check(pool.submit(eat).exception(timeout=60))
        wait_until(lambda: pool._broken)
    assert "killed by the pool for its memory" in str(pool._broken)


def test_with_joblib_and_in_the_place_of_multiprocessings_pool() -> None:
    with (
        safepool.parallel_backend(n_jobs=2, memory_limit=LIMIT),
        pytest.raises(WorkerDiedError) as caught,
    ):
        joblib.Parallel()(delayed(eat)() for _ in range(1))
    check(caught.value)
    with safepool.Pool(1, memory_limit=LIMIT) as pool, pytest.raises(WorkerDiedError) as caught:
        pool.apply(eat)
    check(caught.value)


def test_a_sequential_call_of_joblib_says_that_it_has_no_limit() -> None:
    with (
        safepool.parallel_backend(n_jobs=1, memory_limit=LIMIT),
        pytest.warns(RuntimeWarning, match="memory_limit= of the joblib backend .* in workers"),
    ):
        assert joblib.Parallel()(delayed(abs)(n) for n in (-1, -2)) == [1, 2]


def private_bytes(pool: ProcessPool) -> int:
    (worker,) = inside.workers_of(pool)
    assert worker.memory is not None
    return worker.memory.private_bytes() or 0


def held(array: Any) -> int:
    """Read all of an array, and keep it."""
    support_logging.__dict__.setdefault("kept", []).append(array)
    return int(array.sum())


def test_what_is_shared_or_was_there_at_its_birth_does_not_count() -> None:
    ours = np.ones(64 * MIB, np.uint8)
    with ProcessPool(1, memory_limit="100PB") as pool:
        pool.submit(held, ours[:10]).result(timeout=60)
        before = private_bytes(pool)
        shared = safepool.share(ours)
        for array in (shared, ours):
            assert pool.submit(held, array).result(timeout=60) == 64 * MIB
        assert private_bytes(pool) - before < 16 * MIB
        pool.submit(support_logging.hold, 64 * MIB).result(timeout=60)
        assert private_bytes(pool) - before > 48 * MIB


@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_a_fork_has_of_its_parent_does_not_count() -> None:
    ours = bytearray(b"x") * (200 * MIB)
    with ProcessPool(1, "fork", memory_limit=LIMIT) as pool:
        assert pool.submit(abs, -1).result(timeout=60) == 1
        (worker,) = inside.workers_of(pool)
        assert worker.gauge is not None
        assert worker.gauge.born_bytes > len(ours)
        watch = inside.memory_watch_of(pool)
        assert watch.next_look([worker]) is None  # it runs nothing
        assert not watch.has_outgrown(worker)
        assert len(pool.workers()) == 1


def test_a_worker_that_still_holds_too_much_after_a_task_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next task would be ended for it. Here no look meets the task itself."""
    monkeypatch.setattr(MemoryWatch, "look", lambda *_: [])
    with ProcessPool(1, memory_limit=LIMIT) as pool:
        grown = pool.submit(support_logging.hold, 200 * MIB).result(timeout=60)
        assert pool.submit(tasks.pid).result(timeout=60) != grown


class NoFile:
    def __init__(self, process: int | str) -> None:
        raise FileNotFoundError(2, "No such file", f"/proc/{process}/statm")


def test_without_the_file_an_error_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MemoryFile", NoFile)
    with pytest.raises(ValueError, match=r"^memory_limit= needs /proc/PID/statm, .* Leave"):
        ProcessPool(1, memory_limit="1GiB")


def test_a_worker_whose_file_is_hidden_has_no_limit_and_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ProcessPool(1, memory_limit=1) as pool:
        monkeypatch.setattr(memory, "MemoryFile", NoFile)
        with caplog.at_level(logging.WARNING, "safepool"):
            assert pool.submit(tasks.square, 3).result(timeout=60) == 9
    assert "memory_limit= is not enforced for worker " in caplog.text


def test_an_ended_process_holds_nothing() -> None:
    file = memory.MemoryFile("self")
    assert Gauge(1, 0).note(file.private_bytes() or 0, 0)
    file.close()
    assert file.private_bytes() is None
