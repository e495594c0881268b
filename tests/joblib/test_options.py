"""Every argument of ``Parallel`` means with our workers what it means with joblib's."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import Any

import joblib
import numpy as np
import pytest
import support_tasks as tasks
from joblib import Parallel, delayed
from support_cgroups import control_group
from support_processes import cpus

import safepool
from safepool import joblib_pools

# One row per argument that changes how, not what: the call's results are the same with it.
SAME_RESULTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "batch_size, one": {"batch_size": 1},
    "batch_size, auto": {"batch_size": "auto"},
    "pre_dispatch, all": {"pre_dispatch": "all"},
    "pre_dispatch, text": {"pre_dispatch": "2*n_jobs"},
    "pre_dispatch, number": {"pre_dispatch": 3},
    "timeout": {"timeout": 60},
    "max_nbytes, none": {"max_nbytes": None},
    "max_nbytes, small": {"max_nbytes": 1},
    "max_nbytes, text": {"max_nbytes": "1M"},
    "mmap_mode, r": {"mmap_mode": "r"},
    "mmap_mode, c": {"mmap_mode": "c"},
    "mmap_mode, none": {"mmap_mode": None},
    "prefer, processes": {"prefer": "processes"},
    "initializer": {"initializer": tasks.mark, "initargs": ("here",)},
    "idle_worker_timeout": {"idle_worker_timeout": 5},
}


@pytest.mark.parametrize("option", SAME_RESULTS)
def test_results_are_the_same(option: str) -> None:
    """Accepted, also where there is nothing for it to do."""
    with safepool.parallel_backend(n_jobs=2):
        assert Parallel(**SAME_RESULTS[option])(
            delayed(tasks.add)(n, more=1) for n in range(30)
        ) == [n + 1 for n in range(30)]


def test_temp_folder_is_accepted_and_stays_empty(tmp_path: Any) -> None:
    """Arrays travel over the worker's channel: there is nothing to place or to leave."""
    array = np.arange(300_000.0)
    with safepool.parallel_backend(n_jobs=2):
        sums = Parallel(temp_folder=str(tmp_path), max_nbytes=10)(
            delayed(np.sum)(array) for _ in range(4)
        )
    assert sums == [array.sum()] * 4
    assert list(tmp_path.iterdir()) == []


def _write_into(array: Any) -> float:
    array[0] = 7.0
    return float(array.sum())


def test_arrays_arrive_writable_and_are_the_tasks_own() -> None:
    """The default backend hands out read-only memory for large ones."""
    array = np.zeros(300_000)
    with safepool.parallel_backend(n_jobs=2):
        sums = Parallel()(delayed(_write_into)(array) for _ in range(4))
    assert sums == [7.0] * 4
    assert array[0] == 0.0


def test_an_initializer_runs_in_each_worker_before_its_tasks() -> None:
    """Of the block, and of one call."""
    with safepool.parallel_backend(2, initializer=tasks.mark, initargs=("block",)):
        ours = Parallel(batch_size=1)(delayed(tasks.marks)() for _ in range(6))
        own = Parallel(batch_size=1, initializer=tasks.mark, initargs=("call",))(
            delayed(tasks.marks)() for _ in range(6)
        )
    assert {tuple(marks) for marks in ours} == {("block",)}
    assert {tuple(marks) for marks in own} == {("call",)}


@pytest.mark.parametrize("where", ["block", "name"])
def test_an_initializer_runs_once_here_where_calls_do(where: str) -> None:
    """Else a program with one would fail where a single CPU is left to it."""
    marked: list[str] = []
    words: dict[str, Any] = {"initializer": marked.append, "initargs": (where,)}
    backends: dict[str, Any] = {
        "block": lambda: safepool.parallel_backend(1, **words),
        "name": lambda: joblib.parallel_config("safepool", n_jobs=1, **words),
    }
    for _ in range(2):
        with backends[where]():
            for _ in range(2):
                seen = Parallel()(delayed(marked.copy)() for _ in range(2))
    assert seen == [[where]] * 2


def test_that_nothing_ends_a_task_here_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safepool.machine._told", set())
    with safepool.parallel_backend(1, timeout=5):
        with pytest.warns(RuntimeWarning, match="only tasks in workers can be ended"):
            assert Parallel()(delayed(abs)(-n) for n in range(2)) == [0, 1]
        assert Parallel()(delayed(abs)(-n) for n in range(2)) == [0, 1]


def test_an_initializer_that_fails_here_is_called_again() -> None:
    called: list[int] = []

    def fail_first() -> None:
        called.append(1)
        if len(called) == 1:
            raise ZeroDivisionError

    with safepool.parallel_backend(1, initializer=fail_first):
        with pytest.raises(ZeroDivisionError):
            Parallel()(delayed(abs)(-n) for n in range(2))
        assert Parallel()(delayed(abs)(-n) for n in range(2)) == [0, 1]
    assert len(called) == 2


def test_verbose_says_how_far_the_call_is(capsys: pytest.CaptureFixture[str]) -> None:
    with safepool.parallel_backend(n_jobs=2):
        Parallel(verbose=11)(delayed(abs)(n) for n in range(4))
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert "SafepoolBackend with 2 concurrent workers" in said
    assert "4 out of   4" in said


def test_more_jobs_than_fit_is_done_as_asked_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number is the caller's business; that it is too high is worth a line."""
    # What was said earlier in this process is not said again.
    monkeypatch.setattr("safepool.machine._told", set())
    many = safepool.cpu_count() + 3
    with caplog.at_level(logging.INFO, "safepool"), safepool.parallel_backend():
        assert joblib.effective_n_jobs(many) == many
        assert joblib.effective_n_jobs(many) == many
        # Two numbers in one block: its pool changes its size without a word.
        assert Parallel(n_jobs=2)(delayed(abs)(-n) for n in range(2)) == [0, 1]
        assert Parallel(n_jobs=many)(delayed(abs)(-n) for n in range(2)) == [0, 1]
    (line,) = (message for message in caplog.messages if "2 is" not in message)
    assert f"n_jobs={many} is more than the " in line


def test_that_one_worker_fits_is_said_with_its_threads(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safepool.machine._told", set())
    threads = max(2, safepool.cpu_count())
    with (
        caplog.at_level(logging.INFO, "safepool"),
        safepool.parallel_backend(threads_per_worker=threads),
    ):
        assert joblib.effective_n_jobs(2) == 2
    (line,) = caplog.messages
    assert "the one worker that fits (" in line
    assert f", each with {threads} threads)" in line


def test_no_number_is_one_job() -> None:
    """``None`` outside of a block that sets a default is sequential, as everywhere in joblib."""
    assert (
        Parallel(n_jobs=None, backend="safepool")(delayed(tasks.pid)() for _ in range(3))
        == [os.getpid()] * 3
    )


def _depth(levels: int) -> list[int]:
    if not levels:
        return [os.getpid()]
    below = Parallel(n_jobs=-1)(delayed(_depth)(levels - 1) for _ in range(2))
    return [pid for pids in below for pid in pids]


@pytest.mark.skipif(cpus() < 2, reason="where one worker fits no call leaves this process")
def test_calls_within_calls_stay_within_the_workers() -> None:
    """Four levels of two calls each are sixteen, in two processes."""
    with safepool.parallel_backend(n_jobs=2):
        pids = _depth(4)
    assert len(pids) == 16
    assert len(set(pids)) <= 2
    assert os.getpid() not in pids


def test_memory_per_worker_bounds_what_fits() -> None:
    """Nobody has room for two workers of an exabyte each."""
    with safepool.parallel_backend(memory_per_worker="100PB"):
        limits = safepool.read_limits()
        bounded = any(memory.bytes is not None for memory in limits.memory)
        assert joblib.effective_n_jobs(-1) == (1 if bounded else safepool.cpu_count())


def test_threads_per_worker_divides_the_workers() -> None:
    with safepool.parallel_backend(threads_per_worker=2):
        assert joblib.effective_n_jobs(-1) == max(1, safepool.cpu_count() // 2)
    with safepool.parallel_backend(n_jobs=2, threads_per_worker=2):
        found = Parallel()(delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(2))
    assert found == ["2", "2"]


# One row per rounding: how many workers 1.5 CPUs are.
ROUNDINGS = {"default": 2, "floor": 1, "nearest": 2, "ceil": 2}


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.skipif(cpus() < 2, reason="two workers need two CPUs")
def test_rounding_decides_about_a_fraction() -> None:
    code = (
        "import joblib, safepool, sys\n"
        "for rounding in sys.argv[1:]:\n"
        "    options = {} if rounding == 'default' else {'rounding': rounding}\n"
        "    with safepool.parallel_backend(**options):\n"
        "        print(rounding, joblib.effective_n_jobs(-1))\n"
    )
    with control_group(cpus=1.5) as group:
        printed = group.run(code, *ROUNDINGS)
    assert dict(line.split() for line in printed.splitlines()) == {
        rounding: str(workers) for rounding, workers in ROUNDINGS.items()
    }


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.skipif(cpus() < 2, reason="libraries start one thread on one CPU")
def test_where_one_worker_fits_this_process_is_capped_for_the_block() -> None:
    """A sequential call with two threads that spin for one CPU takes minutes for seconds."""
    code = (
        "import scipy.linalg, safepool\n"
        "from joblib import Parallel, delayed\n"
        "from threadpoolctl import threadpool_info\n"
        "def threads():\n"
        "    return {pool['num_threads'] for pool in threadpool_info()}\n"
        "before = threads()\n"
        "with safepool.parallel_backend():\n"
        "    assert Parallel(n_jobs=-1)(delayed(threads)() for _ in range(2)) == [{1}, {1}]\n"
        "assert before != {1}\n"
        "assert threads() == before\n"
        "print('done')\n"
    )
    with control_group(cpus=1) as group:
        assert group.run(code) == "done"


# One row per argument of the block that is out of its range.
WRONG: dict[str, dict[str, Any]] = {
    "n_jobs": {"n_jobs": 0},
    "timeout": {"timeout": 0},
    "retries": {"retries": -1},
    "memory_per_worker": {"memory_per_worker": "much"},
    "threads_per_worker": {"threads_per_worker": 0},
    "threads_per_worker in words": {"threads_per_worker": "auto"},
    "rounding": {"rounding": "up"},
    "mmap_mode": {"mmap_mode": "rw"},
    "max_nbytes": {"max_nbytes": "much"},
}


@pytest.mark.parametrize("argument", WRONG)
def test_what_is_out_of_range_is_said_at_the_block(argument: str) -> None:
    """Not by the first call in it."""
    with pytest.raises((TypeError, ValueError), match=f"{argument.split(maxsplit=1)[0]} must be"):
        safepool.parallel_backend(**WRONG[argument])


def _file_of(array: Any) -> str:
    """Return the file that an array's memory is a mapping of, the inode alone."""
    address = array.__array_interface__["data"][0]
    for line in open("/proc/self/maps"):  # noqa: SIM115 -- read to its end, or left to the worker
        span, *_, inode = line.split()[:5]
        low, high = (int(number, 16) for number in span.split("-"))
        if low <= address < high:
            return inode
    raise LookupError(address)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux has mapped")
def test_an_array_that_many_batches_are_given_is_placed_once() -> None:
    """A hundred megabytes for a hundred tasks are not ten gigabytes."""
    array = np.zeros(500_000)
    with safepool.parallel_backend(n_jobs=2):
        inodes = Parallel(batch_size=1)(delayed(_file_of)(array) for _ in range(20))
        writes = Parallel(batch_size=1)(delayed(_write_into)(array) for _ in range(20))
        array[:] = 1.0
        sums = Parallel(batch_size=1)(delayed(np.sum)(a=array) for _ in range(20))
    # The first batch has a copy of its own.
    assert len(set(inodes[1:])) == 1
    assert writes == [7.0] * 20
    assert sums == [500_000.0] * 20


def test_arrays_that_one_batch_each_is_given_are_not_kept() -> None:
    """What is made as the call goes on is freed as it goes on."""
    import gc
    import weakref

    refs = []

    def made(n: int) -> Any:
        array = np.full(300_000, float(n))
        refs.append(weakref.ref(array))
        return array

    with safepool.parallel_backend(n_jobs=2):
        sums = Parallel(batch_size=1)(delayed(np.sum)(made(n)) for n in range(10))
        gc.collect()
        assert [ref() for ref in refs] == [None] * 10
    assert sums == [300_000.0 * n for n in range(10)]


class _Holder:
    """Holds an array where nobody looks for one."""

    def __init__(self, array: Any) -> None:
        self.array = array


def _can_write(*holders: Any) -> list[bool]:
    """Tell of each array whether it can be written to, by doing it."""
    found = []
    for holder in holders:
        array = holder.array if isinstance(holder, _Holder) else holder
        array = array["a"][0] if isinstance(array, dict) else array
        try:
            array.flat[0] = 7.0
        except ValueError as error:
            assert "read-only" in str(error)  # noqa: PT017 -- in a worker
        found.append(bool(array.flat[0] == 7.0))
    return found


@contextmanager
def _named(**options: Any) -> Any:
    try:
        with joblib.parallel_config(backend="safepool", n_jobs=2, **options):
            yield
    finally:
        joblib_pools.SHARED.close(end=True)


# One row per way to say what tasks may do with large arrays, and whether they may write: what
# surrounds the call, the call's own options.
BLOCK = safepool.parallel_backend
MODES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "block, nothing": (lambda: BLOCK(2), {}, True),
    "block, r": (lambda: BLOCK(2, mmap_mode="r"), {}, False),
    "block, c": (lambda: BLOCK(2, mmap_mode="c"), {}, True),
    "block, None": (lambda: BLOCK(2, mmap_mode=None), {}, True),
    "block, r+": (lambda: BLOCK(2, mmap_mode="r+"), {}, True),
    "block, r, larger": (lambda: BLOCK(2, mmap_mode="r", max_nbytes="9M"), {}, True),
    "block, r, none": (lambda: BLOCK(2, mmap_mode="r", max_nbytes=None), {}, True),
    "block, call r": (lambda: BLOCK(2), {"mmap_mode": "r"}, False),
    "block r, call c": (lambda: BLOCK(2, mmap_mode="r"), {"mmap_mode": "c"}, True),
    "name, nothing": (_named, {}, True),
    "name, r": (lambda: _named(mmap_mode="r"), {}, False),
    "name, c": (lambda: _named(mmap_mode="c"), {}, True),
    "name c, call r": (lambda: _named(mmap_mode="c"), {"mmap_mode": "r"}, False),
}


@pytest.mark.parametrize("mode", MODES)
def test_mmap_mode_decides_who_may_write(mode: str) -> None:
    """In every batch, the first one too, and wherever the array is; small ones are everybody's."""
    around, options, writable = MODES[mode]
    array, other = np.zeros(300_000), np.zeros((2, 300_000))
    given = [array, other[:, ::2], {"a": [other]}, _Holder(other), np.zeros(10)]
    with around():
        found = Parallel(batch_size=1, **options)(delayed(_can_write)(*given) for _ in range(6))

    assert found == [[writable] * 4 + [True]] * 6
    assert not array.any()
    assert not other.any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux has mapped")
def test_a_mode_that_is_none_is_refused_by_the_call_too() -> None:
    with BLOCK(2), pytest.raises(ValueError, match="mmap_mode must be one of 'r', "):
        Parallel(mmap_mode="rw")(delayed(abs)(-n) for n in range(2))


def test_a_read_only_array_is_placed_once() -> None:
    array = np.zeros(500_000)
    with safepool.parallel_backend(n_jobs=2, mmap_mode="r"):
        inodes = Parallel(batch_size=1)(delayed(_file_of)(array) for _ in range(20))
    assert len(set(inodes[1:])) == 1


def test_what_a_block_around_says_holds_inside() -> None:
    array = np.zeros(300_000)
    with joblib.parallel_config(mmap_mode="r"), safepool.parallel_backend(2):
        assert Parallel()(delayed(_can_write)(array) for _ in range(2)) == [[False]] * 2


def test_functions_of_the_program_travel_beside_read_only_arrays() -> None:
    """By value, as without."""
    array = np.ones(300_000)
    more = 1.0

    def add_up(values: Any) -> float:
        return float(values.sum()) + more

    with safepool.parallel_backend(2, mmap_mode="r"):
        assert Parallel()(delayed(add_up)(array) for _ in range(4)) == [300_001.0] * 4


def test_that_writes_are_private_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safepool.machine._told", set())
    with caplog.at_level(logging.INFO, "safepool"), safepool.parallel_backend(2, mmap_mode="r+"):
        Parallel()(delayed(abs)(n) for n in range(2))
    assert [line for line in caplog.messages if "numpy.memmap" in line]


def test_a_memory_mapped_file_is_written_by_all(tmp_path: Any) -> None:
    """Whatever ``mmap_mode`` says: the program has chosen the file's own."""
    mapped = np.memmap(tmp_path / "file", dtype=float, mode="w+", shape=(300_000,))
    with safepool.parallel_backend(2, mmap_mode="r"):
        Parallel()(delayed(_set)(mapped, n) for n in range(4))
    assert mapped[:5].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def _set(array: Any, place: int) -> None:
    array[place] = 1.0
