"""A worker's number and name, by which tasks choose a GPU, a port or a line on the screen."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import support_natives as natives
import support_tasks as tasks

import safepool
from safepool import ProcessPool

if TYPE_CHECKING:
    from pathlib import Path

METHODS = ["safepool", "loky", "spawn", "forkserver", "fork"]

PROGRAM = """
import json, multiprocessing, os, sys, time, warnings
from concurrent.futures import ProcessPoolExecutor

def child(queue):
    me = multiprocessing.current_process()
    queue.put([*me._identity])

def who(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while len(os.listdir(folder)) < 2:
        time.sleep(0.001)
    me = multiprocessing.current_process()
    return [*me._identity], me.name

def of_a_child(_):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join()
    return queue.get()

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    which, method, folder = sys.argv[1:]
    if which == "standard":
        context = multiprocessing.get_context(method)
        make = lambda: ProcessPoolExecutor(2, mp_context=context)
    else:
        import safepool
        make = lambda: safepool.ProcessPool(2, mp_context=method)
    found = []
    for number in range(2):
        os.mkdir(f"{folder}/{number}")
        with make() as pool:
            seen = list(pool.map(who, [f"{folder}/{number}"] * 2))
            found.append(sorted(identity for identity, _ in seen))
            names = sorted(name.rpartition("-")[2] for _, name in seen)
            assert names == [str(identity[0]) for identity in found[-1]]
            of_child = pool.submit(of_a_child, 0).result(60)
            assert of_child[:1] in found[-1] and of_child[1:] == [1], of_child
    print(json.dumps(found))
"""


@pytest.mark.parametrize("method", METHODS)
def test_workers_are_numbered_as_the_standard_pool_s(method: str, tmp_path: Path) -> None:
    """From 1, all pools of a program together, each number once; their children from 1."""
    pools = ["safepool"] if method in ("safepool", "loky") else ["safepool", "standard"]
    found = []
    for pool in pools:
        (tmp_path / pool).mkdir()
        arguments = (pool, method, str(tmp_path / pool))
        found.append(natives.run(PROGRAM, cpus=None, folder=tmp_path, arguments=arguments))

    assert found == [[[[1], [2]], [[3], [4]]]] * len(pools)


def identity(_: int) -> tuple[Any, str]:
    me: Any = multiprocessing.current_process()
    return me._identity, me.name


def inner(_: int) -> tuple[Any, Any]:
    with ProcessPool(1) as pool:
        return identity(0)[0], pool.submit(identity, 0).result(timeout=60)


@pytest.mark.parametrize("method", METHODS[:3])
def test_one_in_the_place_of_another_has_a_number_of_its_own(method: str) -> None:
    with ProcessPool(1, mp_context=method) as pool:
        (first,), _ = pool.submit(identity, 0).result(timeout=60)
        with pytest.raises(safepool.WorkerDiedError):
            pool.submit(tasks.end_without_cleanup).result(timeout=60)
        (second,), name = pool.submit(identity, 0).result(timeout=60)

    assert second > first
    assert name.endswith(f"-{second}")


def test_a_worker_of_a_worker_has_both_numbers() -> None:
    with ProcessPool(1) as pool:
        outer, ((first, second), name) = pool.submit(inner, 0).result(timeout=60)

    assert (outer, second) == ((first,), 1)
    assert name == f"safepool-{first}:1"


def test_it_is_a_process_pool_for_who_asks() -> None:
    """Programs choose by the class how many workers there are, and what can be pickled."""
    with ProcessPool(1) as pool:
        assert isinstance(pool, ProcessPoolExecutor)
        assert pool._max_workers == 1
