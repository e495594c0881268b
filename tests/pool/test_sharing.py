"""``share``: placed once, mapped once by each worker, there under its own name in every task."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support_arrays as arrays
import support_tasks as tasks

import safepool
from safepool import ProcessPool, share
from safepool.transport import _memfd, references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

METHODS = ["safepool", "loky", "spawn", "forkserver", "fork"]
LARGE = np.arange(float(arrays.ITEMS))

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="files need memfd_create")


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as opened:
        opened.submit(arrays.total, np.ones(3)).result(timeout=60)
        yield opened


def item_of(table: Any, key: Any) -> Any:
    return table[key]


def write_to_first(held: list[Any]) -> None:
    held[0][0] = 1


def total_of_all(things: dict[str, list[Any]]) -> float:
    return sum(float(thing.sum()) for thing in things["all"])


def nested_total(array: Any) -> tuple[float, tuple[int, int]]:
    with ProcessPool(1) as pool:
        return pool.submit(total_and_files, array).result(timeout=60)


def total_and_files(array: Any) -> tuple[float, tuple[int, int]]:
    return float(array.sum()), arrays.files_here()


def captured(handle: Any) -> Callable[[int], float]:
    return lambda index: float(handle[index])


def first(results: Iterator[float]) -> float:
    found = list(results)
    return found[0]


# One row per way in which a handle reaches a task: what must come back is the array's item 7.
WAYS: dict[str, Callable[[ProcessPool, Any], Any]] = {
    "submit": lambda pool, handle: pool.submit(item_of, handle, 7).result(timeout=60),
    "keyword": lambda pool, handle: pool.submit(item_of, table=handle, key=7).result(timeout=60),
    "map": lambda pool, handle: first(pool.map(item_of, [handle] * 3, [7, 8, 9])),
    "map in chunks": lambda pool, handle: first(
        pool.map(item_of, [handle] * 3, [7] * 3, chunksize=3)
    ),
    "partial": lambda pool, handle: first(pool.map(functools.partial(item_of, handle), [7])),
    "closure": lambda pool, handle: first(pool.map(captured(handle), [7])),
    "submitted closure": lambda pool, handle: pool.submit(captured(handle), 7).result(timeout=60),
    "container": lambda pool, handle: pool.submit(
        total_of_all, {"all": [np.array([7.0]), np.zeros(2)], "more": (handle,)}
    ).result(timeout=60),
    "value": lambda pool, handle: pool.submit(item_of, handle.value, 7).result(timeout=60),
    "view of the value": lambda pool, handle: pool.submit(
        item_of, handle.value[3:100:2], 2
    ).result(timeout=60),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork.*")
@on_linux
def test_a_handle_arrives_as_the_object(method: str) -> None:
    """However it is handed over; the worker maps it once, and no task brings it again."""
    handle = share(LARGE)
    with ProcessPool(1, mp_context=method) as pool:
        for way in WAYS.values():
            assert way(pool, handle) == 7
        inherited = 1 if method == "fork" else 0
        assert pool.submit(arrays.files_here).result(timeout=60) == (1, 1 + inherited)
    assert handle.value[7] == 7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_an_initializer_gets_the_object(method: str) -> None:
    handle = share(LARGE)
    with ProcessPool(1, mp_context=method, initializer=keep, initargs=(handle,)) as pool:
        assert pool.submit(kept_item, 5).result(timeout=60) == 5


_kept: Any = None


def keep(thing: Any) -> None:
    global _kept  # noqa: PLW0603 -- what initializers do
    _kept = thing


def kept_item(index: int) -> float:
    return float(_kept[index])


# One row per shape in which an array may travel: inside of the pickle, or beside it.
SHAPES = {
    "small": np.zeros(3),
    "large": np.zeros(arrays.ITEMS),
    "in pieces": np.zeros(2 * arrays.ITEMS)[::2],
    "of objects": np.array([0, None]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_array_can_be_written_to(shape: str, pool: ProcessPool) -> None:
    """A task would see what another one has written."""
    handle = share([SHAPES[shape]])

    with pytest.raises(ValueError, match="read-only"):
        pool.submit(write_to_first, handle).result(timeout=60)
    with pytest.raises(ValueError, match="read-only"):
        write_to_first(handle.value)


def test_arrays_are_read_only_and_the_same_in_all_tasks(pool: ProcessPool) -> None:
    """By default nobody can change what all see."""
    handle = share(LARGE)

    assert not pool.submit(arrays.flags, handle).result(timeout=60)[0]
    with pytest.raises(ValueError, match="read-only"):
        pool.submit(arrays.overwrite, handle).result(timeout=60)
    assert len(set(pool.map(arrays.address, [handle] * 10))) == 1
    assert not handle.value.flags.writeable


def test_a_writable_one_is_new_for_each_task(pool: ProcessPool) -> None:
    """Each task may write, into a view of its own."""
    handle = share(LARGE + 4, writable=True)

    assert [pool.submit(arrays.overwrite, handle).result(timeout=60) for _ in range(3)] == [4] * 3
    assert handle.value[0] == 4
    assert list(pool.map(arrays.overwrite, [handle] * 3)) == [4] * 3


def test_what_is_shared_is_what_it_was_then(pool: ProcessPool) -> None:
    """What the program changes afterwards is not seen: a small array is copied as well."""
    for given in (np.zeros(3), np.zeros(arrays.ITEMS)):
        handle = share(given)
        given[:] = 1
        assert pool.submit(arrays.total, handle).result(timeout=60) == 0


def test_anything_that_can_be_pickled_is_shared(pool: ProcessPool) -> None:
    """Also without a buffer; a task gets the object, unpickled once for each worker."""
    table = {n: str(n) for n in range(1000)}
    handle = share(table)

    assert list(pool.map(item_of, [handle] * 3, [1, 2, 3])) == ["1", "2", "3"]
    assert handle.value == table
    assert pool.submit(item_of, share({"a": [LARGE]}), "a").result(timeout=60)[0][9] == 9
    with pytest.raises(TypeError, match="lock"):
        share(threading.Lock())


@on_linux
def test_memory_is_freed_with_the_last_handle(pool: ProcessPool) -> None:
    """In this process at once, in workers with their next message; a task that runs keeps it."""
    handle = share(LARGE)
    future = pool.submit(tasks.sleep_and_return, 0.2, handle)
    for _ in range(3):
        assert pool.submit(arrays.total, handle).result(timeout=60) == LARGE.sum()
    del handle
    gc.collect()

    assert future.result(timeout=60)[5] == 5
    assert wait_for_files(pool, (0, 0)) == (0, 0)
    del future
    gc.collect()
    assert arrays.files_here() == (0, 0)


def wait_for_files(pool: ProcessPool, wanted: tuple[int, int]) -> tuple[int, int]:
    deadline = time.monotonic() + 10
    while True:
        found: tuple[int, int] = pool.submit(arrays.files_here).result(timeout=60)
        if found == wanted or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def test_a_handle_dropped_at_once_is_there_for_what_was_submitted() -> None:
    """Tasks that wait, that are sent ahead, and that move to another worker."""
    with ProcessPool(2) as pool:
        futures = []
        for n in range(200):
            futures.append(pool.submit(item_of, share(np.full(10, n)), 3))
            futures.append(pool.submit(tasks.sleep_and_return, 0.001))
        assert [int(future.result(timeout=60)) for future in futures[::2]] == list(range(200))


def test_a_replaced_worker_gets_it_as_well() -> None:
    """A worker that was killed costs its task, not what was shared."""
    handle = share(LARGE)
    with ProcessPool(1, retries=1) as pool:
        assert pool.submit(item_of, handle, 1).result(timeout=60) == 1
        os.kill(pool.submit(tasks.pid).result(timeout=60), signal.SIGKILL)
        assert pool.submit(item_of, handle, 2).result(timeout=60) == 2


@on_linux
def test_a_nested_pool_maps_it_too(pool: ProcessPool) -> None:
    """The array that a task was given is no copy in the workers of its own pool either."""
    handle = share(LARGE)

    assert pool.submit(nested_total, handle).result(timeout=60) == (LARGE.sum(), (1, 1))


def test_joblib_hands_it_over() -> None:
    joblib = pytest.importorskip("joblib")
    handle = share(LARGE)
    with safepool.parallel_backend():
        found = joblib.Parallel(2)(joblib.delayed(item_of)(handle, n) for n in range(20))
    assert found == list(range(20))


def test_another_pickler_copies_it() -> None:
    """The standard pool, a file: the object travels as itself."""
    handle = share(LARGE)

    np.testing.assert_array_equal(pickle.loads(pickle.dumps(handle)), LARGE)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(item_of, handle, 6).result(timeout=60) == 6


def test_where_files_are_refused_each_worker_is_sent_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError("no files here")

    if sys.platform == "linux":
        monkeypatch.setattr(_memfd, "_create", refuse)
    handle, writable = share(LARGE), share(LARGE + 1, writable=True)
    with ProcessPool(1) as pool:
        assert pool.submit(item_of, handle, 3).result(timeout=60) == 3
        assert len(set(pool.map(arrays.address, [handle] * 10))) == 1
        assert not pool.submit(arrays.flags, handle).result(timeout=60)[0]
        got = [pool.submit(arrays.overwrite, writable).result(timeout=60) for _ in range(2)]
        assert got == [1, 1]


def test_a_number_that_is_nobodys_is_an_error() -> None:
    with pytest.raises(LookupError, match="shared object 999999"):
        references.attach(999_999)


def test_a_handle_says_what_it_is() -> None:
    assert repr(share(LARGE)).endswith(f", read-only, {share(LARGE).nbytes:,} bytes>")
    assert "writable" in repr(share(1, writable=True))
