"""Which CPUs a worker is bound to: a table, properties, and what the kernel says of workers."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import support_natives as natives
import support_tasks as tasks
from hypothesis import given
from hypothesis import strategies as st
from support_processes import wait_until

import safepool.machine
from safepool import ProcessPool
from safepool.pool import executor
from safepool.threads import placement
from safepool.threads.placement import Placement, choose_cpus

if TYPE_CHECKING:
    from pathlib import Path

# One row per situation: the mask, threads, workers bound to each CPU, where to begin, and
# what is chosen.
CHOICES: dict[str, tuple[set[int], int, dict[int, int], int, tuple[int, ...]]] = {
    "the first of all": ({0, 1, 2, 3}, 1, {}, 0, (0,)),
    "the next one": ({0, 1, 2, 3}, 1, {0: 1}, 0, (1,)),
    "neighbours": ({0, 1, 2, 3}, 2, {0: 1, 1: 1}, 0, (2, 3)),
    "a mask with holes": ({3, 17, 40}, 2, {3: 1}, 0, (17, 40)),
    "from the third on": ({0, 1, 2, 3}, 1, {}, 2, (2,)),
    "round the end": ({0, 1, 2, 3}, 3, {}, 2, (0, 2, 3)),
    "a beginning beyond the end": ({0, 1, 2, 3}, 1, {}, 4001, (1,)),
    "one that went left a gap": ({0, 1, 2, 3}, 1, {0: 1, 2: 1, 3: 1}, 2, (1,)),
    "all taken once": ({0, 1}, 1, {0: 1, 1: 1}, 0, (0,)),
    "one taken twice": ({0, 1}, 1, {0: 2, 1: 1}, 0, (1,)),
    "a share that does not divide": ({0, 1, 2}, 2, {0: 1, 1: 1}, 0, (0, 2)),
    "more threads than CPUs": ({0, 5}, 8, {0: 1}, 1, (0, 5)),
    "load elsewhere": ({4, 5}, 1, {0: 9, 4: 1}, 0, (5,)),
}


@pytest.mark.parametrize("situation", CHOICES)
def test_the_least_loaded_are_chosen(situation: str) -> None:
    mask, threads, load, first, expected = CHOICES[situation]

    assert choose_cpus(mask, threads, load, first) == expected


@pytest.mark.parametrize(("mask", "threads"), [(set(), 1), ({0}, 0)])
def test_there_is_nothing_to_choose_from(mask: set[int], threads: int) -> None:
    with pytest.raises(ValueError, match="no CPUs to choose"):
        choose_cpus(mask, threads, {})


@given(
    mask=st.sets(st.integers(0, 200), min_size=1, max_size=40),
    threads=st.integers(1, 12),
    workers=st.integers(1, 30),
    first=st.integers(0, 500),
    gone=st.integers(0, 29),
)
def test_workers_spread_evenly_and_a_replacement_keeps_it_so(
    mask: set[int], threads: int, workers: int, first: int, gone: int
) -> None:
    placed: list[tuple[int, ...]] = []

    def load() -> Counter[int]:
        return Counter(cpu for cpus in placed for cpu in cpus)

    for _ in range(workers):
        placed.append(choose_cpus(mask, threads, load(), first))
        assert set(placed[-1]) <= mask
        assert len(placed[-1]) == min(threads, len(mask))
        assert list(placed[-1]) == sorted(placed[-1])
        counts = [load()[cpu] for cpu in mask]
        assert max(counts) - min(counts) <= 1

    if workers * threads <= len(mask):
        left = placed.pop(gone % workers)
        assert choose_cpus(mask, threads, load(), first) == left


def test_small_pools_of_several_programs_do_not_all_begin_at_the_same_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "own_cpus", lambda: set(range(64)))

    assert len({Placement(1).choose([]) for _ in range(50)}) > 5


def test_where_nothing_can_be_bound_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that asks for it must run on a laptop as well."""
    monkeypatch.setattr(executor, "why_not_bound", lambda: "the system is another")
    monkeypatch.setattr(safepool.machine, "_told", set())

    with pytest.warns(RuntimeWarning, match="binds no worker to CPUs: the system is another"):
        pool = ProcessPool(1, pin_workers=True)
    pool.shutdown()
    with ProcessPool(1, pin_workers=True) as pool:
        assert pool.submit(abs, -1).result(60) == 1


linux = pytest.mark.skipif(sys.platform != "linux", reason="binding is Linux's")


def masks(pool: ProcessPool) -> list[set[int]]:
    assert sys.platform == "linux"
    return [os.sched_getaffinity(pid) for pid in pool._processes]


@linux
def test_a_refused_call_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    assert placement.why_not_bound() == ""
    monkeypatch.setattr(os, "sched_setaffinity", refuse)

    assert placement.why_not_bound() == (
        "sched_setaffinity is refused here: Operation not permitted"
    )
    placement.bind([0])  # CPUs that were taken away since are no error in a worker


@linux
def test_workers_are_bound_to_cpus_of_their_own() -> None:
    assert sys.platform == "linux"
    mask = os.sched_getaffinity(0)
    with ProcessPool(len(mask), pin_workers=True) as pool:
        seen = pool.map(tasks.cpus_after_a_while, [0.3] * len(mask), timeout=60)
        inside = {tuple(cpus) for cpus in seen}
        wait_until(lambda: all(worker.state != "starting" for worker in pool.workers()))
        outside = masks(pool)

    assert len(outside) == len(mask)
    assert sorted(next(iter(cpus)) for cpus in outside) == sorted(mask)
    assert {len(cpus) for cpus in outside} == {1}
    assert inside <= {tuple(cpus) for cpus in outside}
    assert os.sched_getaffinity(0) == mask


@linux
def test_without_it_a_worker_runs_where_this_process_does() -> None:
    assert sys.platform == "linux"
    with ProcessPool(1) as pool:
        assert pool.submit(tasks.cpus_after_a_while, 0).result(60) == sorted(
            os.sched_getaffinity(0)
        )


@linux
def test_a_worker_that_follows_another_takes_its_cpus() -> None:
    with ProcessPool(2, pin_workers=True) as pool:
        list(pool.map(tasks.cpus_after_a_while, [0.2] * 4, timeout=60))
        wait_until(lambda: all(worker.state != "starting" for worker in pool.workers()))
        before = dict(zip(pool._processes, masks(pool), strict=True))
        gone = next(iter(before))
        os.kill(gone, signal.SIGKILL)
        wait_until(lambda: gone not in pool._processes)
        list(pool.map(tasks.cpus_after_a_while, [0.2] * 4, timeout=60))
        wait_until(lambda: all(worker.state != "starting" for worker in pool.workers()))
        after = dict(zip(pool._processes, masks(pool), strict=True))

    (new,) = after.keys() - before.keys()
    assert after[new] == before[gone]


@linux
def test_two_pools_of_a_program_share_the_cpus_out() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU for both")
    with ProcessPool(1, pin_workers=True) as one, ProcessPool(1, pin_workers=True) as other:
        first = one.submit(tasks.cpus_after_a_while, 0).result(60)
        second = other.submit(tasks.cpus_after_a_while, 0).result(60)

    assert set(first).isdisjoint(second)


# Nothing but the mask says how many threads NumPy is to start: both variables are empty.
NO_VARIABLE = """
import json, multiprocessing, os, sys, safepool, support_natives as n
method, threads, pinned = sys.argv[1], int(sys.argv[2]), "pinned" in sys.argv
def look(seconds):
    return os.getpid(), n.mask_with_numpy(seconds)
if __name__ != "__main__":
    n.load("numpy")  # spawn and forkserver import the program before anything of ours
if __name__ == "__main__":
    with safepool.ProcessPool(
        2, method, threads_per_worker=threads, pin_workers=pinned,
        env={"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": ""},
    ) as pool:
        found = []
        while len({pid for pid, _ in found}) < 2:
            found += pool.map(look, [0.5] * 4, timeout=90)
        masks = [mask for _, mask in found]
        print(json.dumps([masks, [n.threads_of(pid) for pid in pool._processes]]))
"""


@linux
@pytest.mark.parametrize("method", natives.METHODS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_library_that_is_sized_by_the_mask_starts_as_many_threads(
    method: str, threads: int, tmp_path: Path
) -> None:
    skip_without_numpy_and_shim(tmp_path)

    found, counts = natives.run(
        NO_VARIABLE, folder=tmp_path, arguments=(method, str(threads), "pinned")
    )

    assert {len(mask) for mask in found} == {threads}
    assert len({cpu for mask in found for cpu in mask}) == 2 * threads
    assert counts == [threads, threads]


@linux
def test_unbound_it_starts_one_for_each_cpu_of_the_machine(tmp_path: Path) -> None:
    """The test above could not fail if this one did."""
    skip_without_numpy_and_shim(tmp_path)

    found, counts = natives.run(NO_VARIABLE, folder=tmp_path, arguments=("loky", "1"))

    assert ({len(mask) for mask in found}, counts) == ({48}, [48, 48])


def skip_without_numpy_and_shim(folder: Path) -> None:
    if natives.missing("numpy") or natives.shim(folder.parent) is None:
        pytest.skip("needs NumPy, and a compiler to build the shim with")
