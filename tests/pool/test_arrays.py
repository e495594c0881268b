"""Large arrays travel in unnamed files: every shape, every start method, every refusal."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import support_arrays as arrays
import support_tasks as tasks
from support_descriptors import count_descriptors
from support_processes import wait_until

from safepool import ProcessPool, WorkerDiedError
from safepool.transport import _memfd, channel, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files need memfd_create")

METHODS = ["safepool", "loky", "spawn", "forkserver", "fork"]
LARGE = np.arange(float(arrays.ITEMS))


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as opened:
        opened.submit(arrays.total, np.ones(3)).result(timeout=60)
        yield opened


# One row per kind of value that must arrive as it was.
VALUES: dict[str, Callable[[], Any]] = {
    "C order": lambda: LARGE.reshape(-1, 1024),
    "Fortran order": lambda: np.asfortranarray(LARGE.reshape(-1, 1024)),
    "not contiguous": lambda: LARGE.reshape(-1, 1024)[:, ::2],
    "no items": lambda: np.zeros((0, 5)),
    "no dimension": lambda: np.array(3.0),
    "complex": lambda: LARGE.astype(complex),
    "another byte order": lambda: LARGE.astype(">f8"),
    "structured": lambda: np.zeros(arrays.ITEMS, dtype=[("a", "i4"), ("b", "f8")]),
    "text": lambda: np.full(arrays.ITEMS // 4, "abcdef"),
    "of objects": lambda: np.array([{"an": "object"}, None], dtype=object),
    "in containers": lambda: {"a": [LARGE, (LARGE[:10], OrderedDict(b=LARGE + 1))], "c": "text"},
    "hundreds": lambda: [np.full(5000, n) for n in range(600)],
    "many large ones": lambda: [np.full(arrays.ITEMS // 4, n) for n in range(40)],
    "files of their own": lambda: [np.full(1 << 20, float(n)) for n in range(20)],
    "twice the same": lambda: [LARGE, LARGE],
    "bytes": lambda: b"x" * (5 << 20),
    "bytearray": lambda: bytearray(b"y" * (5 << 20)),
    "text of Python": lambda: "z" * (5 << 20),
    "masked": lambda: np.ma.masked_array(LARGE, LARGE > 5),
}


@pytest.mark.parametrize("value", VALUES)
def test_values_arrive_as_they_were(pool: ProcessPool, value: str) -> None:
    """As arguments and as results, by submit and by map."""
    sent = VALUES[value]()

    for got in [
        pool.submit(arrays.itself, sent).result(timeout=60),
        *pool.map(arrays.itself, [sent, sent], timeout=60),
    ]:
        assert type(got) is type(sent)
        assert_equal(got, sent)


def assert_equal(got: Any, sent: Any) -> None:
    if isinstance(sent, dict):
        assert list(got) == list(sent)
        for key in sent:
            assert_equal(got[key], sent[key])
    elif isinstance(sent, (list, tuple)):
        assert len(got) == len(sent)
        for one, other in zip(got, sent, strict=True):
            assert_equal(one, other)
    elif isinstance(sent, np.ndarray):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert got.flags.f_contiguous == sent.flags.f_contiguous or not sent.flags.contiguous
        np.testing.assert_array_equal(got, sent)
    else:
        assert got == sent


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_every_start_method_sends_files(method: str) -> None:
    """The argument is a private mapping of the worker, and the result one of this process."""
    with ProcessPool(1, mp_context=method) as pool:
        mapped, opened = pool.submit(count_files, LARGE).result(timeout=60)
        got = pool.submit(arrays.itself, LARGE).result(timeout=60)

        assert (mapped, opened) == (1, 0)
        arrays.expect_files(1, 0)
        np.testing.assert_array_equal(got, LARGE)
    got[:] = 0  # private and writable, also without the worker
    del got
    arrays.expect_files(0, 0)


def count_files(array: Any) -> tuple[int, int]:
    assert len(array)
    return arrays.files_here()


def test_writes_are_nobody_elses(pool: ProcessPool) -> None:
    """A task may write to its argument; neither the program nor the next task sees it."""
    given = LARGE.copy() + 7

    assert [pool.submit(arrays.overwrite, given).result(timeout=60) for _ in range(3)] == [7] * 3
    assert given[0] == 7
    assert pool.submit(arrays.flags, given).result(timeout=60)[0]


def test_an_array_is_freed_with_its_last_user(pool: ProcessPool) -> None:
    """Neither side keeps anything of a task that has ended and whose result was dropped."""
    kept = pool.submit(arrays.itself, [LARGE, LARGE + 1]).result(timeout=60)
    part = kept[1][:10]
    del kept
    gc.collect()
    arrays.expect_files(1, 0)  # shared by both, as neither has 8 MiB

    del part
    gc.collect()
    arrays.expect_files(0, 0)
    assert pool.submit(arrays.files_here).result(timeout=60) == (0, 0)


def test_each_large_array_of_a_result_is_freed_alone(pool: ProcessPool) -> None:
    """To keep one array of many must not keep the memory of all."""
    first, second = pool.submit(arrays.itself, [np.ones(1 << 20), np.ones(1 << 20)]).result(60)
    arrays.expect_files(2, 0)
    del first
    gc.collect()

    arrays.expect_files(1, 0)
    assert second.sum() == 1 << 20


def test_a_thousand_results_take_no_descriptors(pool: ProcessPool) -> None:
    """What the program keeps costs it mappings, and no descriptor."""
    before = count_descriptors()
    count = 1000 if "CI_LARGE" in os.environ else 60
    kept = list(pool.map(arrays.ones, [arrays.ITEMS] * count, timeout=110))

    wait_until(lambda: count_descriptors() <= before)
    assert all(array[0] == 1 for array in kept)


# One row per way in which the system refuses a file: what memfd_create(2) says.
REFUSALS = [errno.ENOSYS, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EFBIG]


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.__getitem__)
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_where_files_are_refused_the_stream_takes_all(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same API, the same values, no file; for results as well, by a fork of this process."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_memfd, "_create", refuse)
    with ProcessPool(1, mp_context="fork") as pool:
        got = pool.submit(arrays.itself, [LARGE, LARGE]).result(timeout=60)

        assert_equal(got, [LARGE, LARGE])
        assert arrays.files_here() == (0, 0)
        assert pool.submit(count_files, LARGE).result(timeout=60) == (0, 0)


def test_without_a_side_the_stream_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As elsewhere than on Linux, and where no descriptor is left for one more worker."""
    monkeypatch.setattr("safepool.workers.start.invite", _decline)
    with ProcessPool(1) as pool:
        assert_equal(pool.submit(arrays.itself, LARGE).result(timeout=60), LARGE)
        assert pool.submit(count_files, LARGE).result(timeout=60) == (0, 0)


def _decline(sock: Any) -> None:
    sock.send(b"\x00")


def test_a_program_without_descriptors_sends_and_gets_arrays(
    pool: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At EMFILE arguments go by the stream; results come by the one descriptor kept for them.

    The worker stays: rights and limits that cannot be read have not changed.
    """
    monkeypatch.setattr("safepool.workers.identity._LOOK_S", 0.0)
    monkeypatch.setattr("safepool.pool.shell.size._FOLLOW_S", 0.0)
    pid = pool.submit(tasks.pid).result(timeout=60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 512), limits[1]))
    taken = arrays.use_up_descriptors()
    try:
        for _ in range(3):
            got = pool.submit(arrays.itself, LARGE).result(timeout=60)
            assert np.array_equal(got, LARGE)
        assert pool.submit(arrays.ones, 3 << 20).result(timeout=60).sum() == 3 << 20
        assert pool.submit(tasks.pid).result(timeout=60) == pid
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert pool.submit(tasks.pid).result(timeout=60) == pid


def test_a_worker_without_descriptors_gets_and_sends_arrays(pool: ProcessPool) -> None:
    """The same the other way round."""
    pool.submit(arrays.total, LARGE).result(timeout=60)
    for _ in range(2):
        got = pool.submit(arrays.answer_without_descriptors, LARGE).result(timeout=60)
        np.testing.assert_array_equal(got, LARGE * 2)
    pool.submit(arrays.give_descriptors_back).result(timeout=60)


def test_no_memory_for_a_copy_fails_that_task_alone(
    pool: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOMEM is a MemoryError that says what there was no room for; the pool goes on."""

    def fail(*_: object) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    small = pool.submit(tasks.sleep_and_return, 0.1, 3)
    with monkeypatch.context() as patched:
        patched.setattr(_memfd, "_create", fail)
        for size in (arrays.ITEMS // 2, 2 * arrays.ITEMS):  # by the scheduler, by the packer
            with pytest.raises(MemoryError, match=f"{8 * size:,} bytes of arrays"):
                pool.submit(arrays.total, np.ones(size)).result(timeout=60)
            with pytest.raises(MemoryError, match="bytes of arrays"):
                list(pool.map(arrays.total, [np.ones(size)] * 3, chunksize=3, timeout=60))
    assert small.result(timeout=60) == 3
    assert pool.submit(arrays.total, np.ones(arrays.ITEMS)).result(timeout=60) == arrays.ITEMS


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="free-threaded builds reserve a GiB of addresses: what cannot be mapped is read there",
)
def test_no_memory_in_the_worker_fails_that_task_alone() -> None:
    """A worker that cannot map its argument, nor read it, says so."""
    with ProcessPool(1, max_tasks_per_child=None) as pool:
        pool.submit(arrays.total, LARGE).result(timeout=60)
        pid = pool.submit(tasks.pid).result(timeout=60)
        pool.submit(arrays.limit_memory, 8 << 20).result(timeout=60)
        with pytest.raises(MemoryError, match="no memory to map"):
            pool.submit(arrays.total, np.ones(8 << 20)).result(timeout=60)
        pool.submit(arrays.unlimit_memory).result(timeout=60)
        assert pool.submit(arrays.total, np.ones(8 << 20)).result(timeout=60) == 8 << 20
        assert pool.submit(tasks.pid).result(timeout=60) == pid


def test_a_task_with_retries_gets_the_same_file_again(tmp_path: Path) -> None:
    """The second attempt costs no second copy, and finds what the first one did."""
    made: list[Any] = []
    given = LARGE + 3
    with ProcessPool(1, retries=2) as pool:
        pool.submit(tasks.square, 1).result(timeout=60)
        with pytest.MonkeyPatch.context() as patched:
            create = _memfd._create
            patched.setattr(_memfd, "_create", lambda: made.append(1) or create())
            mark = tmp_path / "mark"
            assert pool.submit(die_once, given, mark).result(timeout=60) == 3
        assert len(made) == 1
    assert arrays.files_here() == (0, 0)


def die_once(array: Any, mark: Path) -> float:
    found = float(array[0])
    if not mark.exists():
        mark.touch()
        array[0] = 99
        os.kill(os.getpid(), signal.SIGKILL)
    return found


def test_a_large_argument_to_a_stopped_worker_blocks_nobody() -> None:
    """The others go on, and so does the stopped one when it may."""
    with ProcessPool(2) as pool:
        pids = set(pool.map(tasks.pid, range(50)))
        while len(pids) < 2:
            pids |= set(pool.map(tasks.pid, range(50)))
        stopped, *_ = pids
        os.kill(stopped, signal.SIGSTOP)
        try:
            late = [pool.submit(arrays.total, np.ones(arrays.ITEMS * 4)) for _ in range(3)]
            early = [pool.submit(tasks.square, n) for n in range(20)]
            assert [future.result(timeout=30) for future in early] == [n * n for n in range(20)]
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert [future.result(timeout=60) for future in late] == [arrays.ITEMS * 4] * 3


def test_hundreds_of_megabytes_in_both_directions_at_once() -> None:
    """Neither side waits for the other to read, whatever the stream holds."""
    with ProcessPool(2) as pool, pytest.MonkeyPatch.context() as patched:
        futures = [pool.submit(arrays.itself, LARGE) for _ in range(30)]
        patched.setattr(channel, "FILE_BYTES", sys.maxsize)  # by the stream, for arguments
        futures += [pool.submit(arrays.itself, LARGE) for _ in range(30)]
        time.sleep(0.3)  # the caller does nothing
        for future in futures:
            assert future.result(timeout=60)[-1] == LARGE[-1]


def test_a_worker_killed_with_a_large_argument_leaves_nothing() -> None:
    """While the copy is made, on its way, or in the task: the kernel frees it."""
    with ProcessPool(1) as pool:
        for pause_s in (0.0, 0.005, 0.02, 0.05):
            pool.submit(tasks.square, 1).result(timeout=60)
            pid = pool.submit(tasks.pid).result(timeout=60)
            future = pool.submit(tasks.sleep_and_return, 0.3, np.ones(4 << 20))
            time.sleep(pause_s)
            os.kill(pid, signal.SIGKILL)
            error = future.exception(timeout=60)
            assert error is None or isinstance(error, WorkerDiedError)
            del future, error
            gc.collect()
            arrays.expect_files(0, 0)


def test_a_cancelled_task_frees_its_array() -> None:
    """Whether it waits, is being copied, or runs."""
    with ProcessPool(1) as pool:
        pool.submit(tasks.square, 1).result(timeout=60)
        futures = [pool.submit(tasks.sleep_and_return, 30, np.ones(4 << 20)) for _ in range(3)]
        time.sleep(0.02)
        assert all(pool.cancel(future, kill=True) for future in reversed(futures))
        assert pool.submit(tasks.square, 2).result(timeout=60) == 4
        arrays.expect_files(0, 0)


def test_more_than_one_write_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are written in steps, each of which the kernel may cut short."""
    real = os.pwrite

    def short(descriptor: int, data: Any, place: int) -> int:
        return real(descriptor, memoryview(data)[: 1 << 20], place)

    monkeypatch.setattr(_memfd, "_STEP_BYTES", 2 << 20)
    monkeypatch.setattr(os, "pwrite", short)
    given = [LARGE, np.random.default_rng(0).random(3 << 20)]
    stored = files.store([memoryview(array) for array in given])
    for file, array in zip(stored, given, strict=True):
        assert isinstance(file, files.Stored)
        np.testing.assert_array_equal(np.frombuffer(file.segments()[0]), array)
        file.close()


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [2.2, 4.3])
def test_arrays_of_gigabytes(gigabytes: float) -> None:
    """More than write(2) takes at once, and than 32 bits count."""
    if os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE < 2.5 * gigabytes * (1 << 30):
        pytest.skip("not enough memory is free")
    given = np.zeros(int(gigabytes * (1 << 30)), dtype=np.uint8)
    given[::4096] = 1
    with ProcessPool(1) as pool:
        assert pool.submit(count_ones, given).result(timeout=100) == given[::4096].size
        got = pool.submit(zeros_and_a_one, given.size).result(timeout=100)
        assert (got.size, got[-1]) == (given.size, 1)


def count_ones(array: Any) -> int:
    return int(np.count_nonzero(array[::4096]))


def zeros_and_a_one(size: int) -> Any:
    array = np.zeros(size, dtype=np.uint8)
    array[-1] = 1
    return array


def test_the_parent_killed_leaves_nothing(tmp_path: Path) -> None:
    """Neither processes nor names; what is in flight goes with them."""
    before = set(os.listdir("/dev/shm"))
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import sys, time
                sys.path.insert(0, {str(Path(arrays.__file__).parent)!r})
                import numpy as np, support_arrays as arrays
                from safepool import ProcessPool, share
                pool = ProcessPool(2)
                handle = share(np.ones(1 << 20))
                kept = [pool.submit(arrays.itself, np.ones(1 << 20)) for _ in range(20)]
                kept += [pool.submit(arrays.total, handle) for _ in range(20)]
                kept[0].result()
                print(*pool._processes, flush=True)
                time.sleep(60)
            """),
        ],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        text=True,
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert pids
    program.kill()
    program.wait()
    program.stdout.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert {name for name in os.listdir("/dev/shm") if "safepool" in name} <= before
    assert os.listdir(tmp_path) == []
