"""joblib's calls on the nodes of a cluster pool: an executor in this process is the engine."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pickle import PicklingError
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed, effective_n_jobs

import safepool
from safepool.cluster import agent
from safepool.joblib_cluster import _Pool
from safepool.pool.core.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Two nodes, whose agents are in this process and end as soon as nobody uses them."""
    monkeypatch.setattr(agent, "_IDLE_S", 0.0)
    monkeypatch.setattr(agent, "_LOOK_S", 0.02)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    with ThreadPoolExecutor(2) as executor:
        yield executor
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("safepool-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def where() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def fragile(x: int) -> int:
    if x == 1:
        os._exit(7)
    return x


def noted_and_ended(path: str) -> None:
    with open(path, "a") as file:
        file.write("x")
    os._exit(1)


def total(array: Any, factor: int) -> tuple[float, bool]:
    return float(array.sum()) * factor, array.flags.writeable


def total_of_first(arrays: list[Any], factor: int) -> tuple[float, bool]:
    return total(arrays[0], factor)


def nested(x: int) -> tuple[int, int]:
    return sum(Parallel(n_jobs=2)(delayed(abs)(n) for n in range(x))), os.getpid()


# One block for all of it: its workers start once.
def test_calls_of_a_block_run_on_the_nodes(engine: ThreadPoolExecutor, tmp_path: Any) -> None:
    here = os.getpid()
    with safepool.parallel_backend(cluster=engine):
        assert [effective_n_jobs(n) for n in (None, -1, -2, 3, 1)] == [2, 2, 1, 3, 1]
        # One of two workers is no sequential call: this machine may be no node.
        for n_jobs in (-1, -2, 2):
            pids = {pid for pid, _ in Parallel(n_jobs)(delayed(where)() for _ in range(4))}
            assert here not in pids
        assert {*Parallel(1)(delayed(where)() for _ in range(2))} == {where()}
        # A preference gives way; what must share memory cannot.
        threads = Parallel(2, prefer="threads")(delayed(where)() for _ in range(2))
        assert here not in {pid for pid, _ in threads}
        shared = Parallel(2, require="sharedmem")(delayed(where)() for _ in range(2))
        assert {pid for pid, _ in shared} == {here}

        assert Parallel()(delayed(pow)(n, 2) for n in range(50)) == [n**2 for n in range(50)]
        lazy = Parallel(return_as="generator_unordered")(delayed(abs)(-n) for n in range(5))
        assert sorted(lazy) == [0, 1, 2, 3, 4]
        with Parallel() as several:
            assert [several(delayed(abs)(n) for n in range(2)) for _ in range(2)] == [[0, 1]] * 2

        with pytest.raises(safepool.WorkerDiedError) as died:
            Parallel(batch_size=1)(delayed(fragile)(n) for n in range(4))
        assert died.value.exitcode == 7
        starts = tmp_path / "starts"
        with pytest.raises(safepool.WorkerDiedError):
            Parallel(retries=2)(delayed(noted_and_ended)(str(starts)) for _ in range(1))
        assert starts.read_text() == "xxx"
        with pytest.raises(PicklingError, match="Could not pickle the task to send"):
            Parallel()(delayed(abs)(threading.Lock()) for _ in range(2))
        with pytest.raises(TypeError, match="bad operand"):
            Parallel()(delayed(abs)("") for _ in range(2))

        array = np.ones(1 << 18)
        for mode, writable in (("c", True), ("r", False)):
            for function, given in ((total, array), (total_of_first, [array])):
                found = Parallel(mmap_mode=mode)(delayed(function)(given, n) for n in range(3))
                assert found == [(n * 2.0**18, writable) for n in range(3)]
        assert [found for found, _ in Parallel()(delayed(nested)(n) for n in range(3))] == [
            0,
            0,
            1,
        ]
        threads_of_each = Parallel(threads_per_worker=1)(
            delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2)
        )
        assert threads_of_each == ["1", "1"]

        found_pids: list[int] = []
        thread = threading.Thread(
            target=lambda: found_pids.extend(Parallel()(delayed(os.getpid)() for _ in range(2)))
        )
        thread.start()
        thread.join()
        assert found_pids
        assert here not in found_pids
    # Nothing of it holds after the block.
    assert Parallel(1)(delayed(os.getpid)() for _ in range(1)) == [here]
    assert type(joblib.parallel.get_active_backend()[0]).__name__ == "LokyBackend"


def test_what_is_no_engine_is_told_where_the_block_begins() -> None:
    with (
        pytest.raises(TypeError, match=r"must be a distributed.Client or an executor, not 'tcp"),
        safepool.parallel_backend(cluster="tcp://scheduler:8786"),
    ):
        pass


class Nodes:
    """A cluster pool of four workers whose calls end when a test says so."""

    size = 4

    def __init__(self) -> None:
        self.sent: list[Future[Any]] = []
        self._scheduler = self

    def submit(
        self, _: Callable[..., Any], args: Any, *_others: Any, **_words: Any
    ) -> Future[Any]:
        if args[0] is None:
            raise RuntimeError("shut down")
        self.sent.append(Future())
        return self.sent[-1]


def test_no_more_batches_run_than_a_call_has_asked_for() -> None:
    nodes: Any = Nodes()
    pool = _Pool(nodes, 2)
    futures = [pool.begin(where, "name", Policy()) for _ in range(4)]
    assert len(nodes.sent) == 2
    nodes.sent[0].set_result(7)
    assert futures[0].result(0) == 7
    assert len(nodes.sent) == 3
    assert pool.cancel(futures[3])
    nodes.sent[1].set_exception(ValueError("no"))
    nodes.sent[2].cancel()
    nodes.sent[2].set_running_or_notify_cancel()
    assert [type(one.exception(0)).__name__ for one in futures[1:3]] == [
        "ValueError",
        "CancelledError",
    ]
    assert futures[3].cancelled()
    nothing: Any = None
    assert isinstance(pool.begin(nothing, "name", Policy()).exception(0), RuntimeError)
    pool.size_to(4)
    for _ in range(5):
        pool.begin(where, "name", Policy())
    assert len(nodes.sent) == 8
