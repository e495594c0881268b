"""Races between the scheduler and its workers, each forced to be lost every time."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_core
import support_inside as inside
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool, WorkerDiedError
from safepool.pool.calls.mapping import MapRun
from safepool.pool.calls.tasks import PoolFuture, callbacks_by
from safepool.pool.core import reclaim, starts
from safepool.pool.core.policy import NO_POLICY
from safepool.pool.shell import hiring, scheduler
from safepool.pool.shell.dispatch import Dispatch, Packing
from safepool.pool.shell.hiring import Hiring
from safepool.pool.shell.listener import Listener

if sys.platform != "win32":
    import fcntl
    import termios

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from safepool.pool.shell.worker import Worker
    from safepool.workers.inheritance import Inheritance

TESTS = Path(__file__).parent.parent

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a board and /proc")


def wait_for_state(pid: int, states: str) -> None:
    """Wait until the system says that a process is stopped (T), a zombie (Z), or asleep (S)."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            stat = ") Z"
        if stat.rpartition(")")[2].split()[0] in states:
            return
        time.sleep(0.002)
    pytest.fail(f"process {pid} did not get into a state of {states}")


def make_known(pool: ProcessPool, *functions: Callable[..., Any]) -> None:
    """Let the pool think that calls of these are short, so that it sends them ahead."""
    inside.expect(pool, 50_000, *functions)


def has_begun(pool: ProcessPool) -> bool:
    """Tell whether a worker has begun a call, and not only been sent one."""
    boards = [worker.board for worker in inside.workers_of(pool)]
    return any(board.began > 0 for board in boards)


def has_begun_what_it_owes(pool: ProcessPool, count: int) -> bool:
    """Tell whether a worker has begun the first of so many calls."""
    owing = [worker for worker in inside.workers_of(pool) if worker.ledger.owed == count]
    return any(worker.board.began > worker.ledger.last - count for worker in owing if worker.board)


def staff_fully(pool: ProcessPool, size: int) -> set[int]:
    """Return the ids of this many workers, all ready."""
    while len(inside.ready_pids(pool)) < size:
        for future in [pool.submit(tasks.pid_after, 0.02) for _ in range(2 * size)]:
            future.result(timeout=30)
    return set(pool._processes)


class Gate:
    """A callback that keeps the scheduler's thread until it is opened."""

    # Else it is called by another thread: asyncio's are known to wait for nothing.
    __module__ = "asyncio.futures"

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, _future: Future[Any]) -> None:
        self.reached.set()
        self.open.wait(30)


def unread_bytes(worker: Worker) -> int:
    """Return how much a worker has sent that nobody has read."""
    found = fcntl.ioctl(worker.channel.fileno(), termios.FIONREAD, bytes(4))
    return int.from_bytes(found, sys.byteorder)


@on_linux
def test_an_answer_under_way_is_read_when_the_next_task_meets_a_dead_worker(
    tmp_path: Path,
) -> None:
    """The worker has answered and died; a failed send must not throw the answer away."""
    gate, first, second = Gate(), tmp_path / "first", tmp_path / "second"
    with ProcessPool(2) as pool:
        make_known(pool, tasks.square)
        staff_fully(pool, 2)
        pool.submit(tasks.wait_for, str(first)).add_done_callback(gate)
        # 20 KB: too large for the board, so it goes as a frame of its own.
        answered = pool.submit(tasks.wait_for, str(second), bytes(20_000))
        # The scheduler may read the first answer before it sends this call.
        wait_until(answered.running)
        first.touch()
        assert gate.reached.wait(30)
        (busy,) = (worker for worker in inside.workers_of(pool) if worker.ledger.owed)
        second.touch()
        wait_until(lambda: unread_bytes(busy) > 20_000)
        os.kill(busy.pid, signal.SIGKILL)
        wait_for_state(busy.pid, "Z")
        # More than the other worker has room for, so that this one is sent some as well.
        later = [pool.submit(tasks.square, n) for n in range(3000)]
        gate.open.set()

        assert len(answered.result(timeout=30)) == 20_000
        assert [future.result(timeout=30) for future in later] == [n * n for n in range(3000)]


def test_what_follows_a_batch_that_cannot_be_read_is_not_run_twice(tmp_path: Path) -> None:
    """The worker goes on with what is behind it, so that must not be taken back."""
    log = str(tmp_path / "log")
    items: list[Any] = [*range(20)]
    items[3] = tasks.RaisesWhenUnpickled()
    with ProcessPool(1) as pool:
        make_known(pool, tasks.append_line)
        results = pool.map(tasks.append_line, itertools.repeat(log, 20), items, chunksize=5)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.2)
        pool.submit(tasks.square, 1).result(timeout=30)

    lines = Path(log).read_text().split()
    assert len(lines) == len(set(lines)) >= 3


@on_linux
def test_what_was_sent_ahead_is_cancelled_when_the_workers_are_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waits in no queue any more, and nobody else would ever end it."""
    monkeypatch.setattr(reclaim, "_LONG_NS", 10**12)
    with ProcessPool(1) as pool:
        make_known(pool, tasks.sleep_and_return)
        running = pool.submit(tasks.sleep_and_return, 30)
        futures = [pool.submit(tasks.sleep_and_return, 0.0) for _ in range(8)]
        results = pool.map(tasks.sleep_and_return, [0.0] * 8)
        while not (futures[-1].running() and has_begun(pool)):
            time.sleep(0.001)
        inside.end(pool, "terminate", wait=True)

        assert isinstance(running.exception(timeout=0), WorkerDiedError)
        assert all(future.cancelled() for future in futures)
        with pytest.raises(CancelledError):
            next(results)


@on_linux
def test_calls_taken_back_in_the_moment_of_a_cancellation_are_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler cancels what waits, and then finds more: they must not vanish."""
    monkeypatch.setattr(reclaim, "_LONG_NS", 10**12)
    monkeypatch.setattr(reclaim, "_LONG_WHILE_IDLE_NS", 10**12)
    gate, first, other = Gate(), tmp_path / "first", tmp_path / "other"
    with ProcessPool(2) as pool:
        staff_fully(pool, 2)
        results = pool.map(tasks.wait_for, [str(first), *[str(tmp_path)] * 9], chunksize=10)
        # Else all ten are taken back, and cancelled: the worker may read them later than the
        # scheduler learns of the other one's end.
        wait_until(lambda: has_begun_what_it_owes(pool, 10))
        pool.submit(tasks.wait_for, str(other)).add_done_callback(gate)
        other.touch()
        assert gate.reached.wait(30)
        pool.shutdown(wait=False, cancel_futures=True)
        monkeypatch.setattr(reclaim, "_LONG_WHILE_IDLE_NS", 1)
        gate.open.set()
        inside.wake(pool)
        wait_until(lambda: sum(one.ledger.owed for one in inside.workers_of(pool)) == 1)
        first.touch()

        assert next(results) is None
        with pytest.raises(CancelledError):
            next(results)


@on_linux
def test_a_worker_is_of_use_after_a_large_task_was_cancelled_on_its_way() -> None:
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        os.kill(pid, signal.SIGSTOP)
        try:
            large = pool.submit(len, bytes(20_000_000))
            while not large.running():
                time.sleep(0.001)
            assert pool.cancel(large, kill=True)
            time.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGCONT)

        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


@on_linux
def test_a_worker_may_have_the_number_of_one_whose_end_is_not_yet_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server has reaped that one, and the system gives its number to the next."""
    start = Hiring.start

    def start_by_one_number(self: Hiring, place: int) -> Worker:
        worker = start(self, place)
        worker.pid = 4711
        return worker

    monkeypatch.setattr(Hiring, "start", start_by_one_number)
    with ProcessPool(2) as pool:
        slow = [pool.submit(tasks.sleep_and_return, 0.3, n) for n in range(4)]
        error = pool.submit(os._exit, 3).exception(timeout=30)
        after = [pool.submit(tasks.sleep_and_return, 0.1, n) for n in range(4)]

        assert [future.result(timeout=30) for future in slow + after] == 2 * [*range(4)]
        assert len(pool.workers()) == 2

    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == 3


@on_linux
@pytest.mark.filterwarnings("ignore:mp_context")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_worker_keeps_what_has_the_number_that_another_pools_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other pool has closed it meanwhile, and what is opened for this worker gets it."""

    def about_to_be_opened() -> list[int]:
        taken = {int(name) for name in os.listdir("/proc/self/fd")}
        return [number for number in range(3, 64) if number not in taken]

    monkeypatch.setattr(hiring, "_descriptors_of_all_pools", about_to_be_opened)
    with ProcessPool(1, mp_context="fork") as pool:
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert "before it was initialized" not in caplog.text


@pytest.mark.parametrize("trace", [True, False])
def test_a_worker_that_could_not_be_sent_its_initializer_is_replaced(
    trace: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There was no memory for it. It would start for ever, and keep others from starting."""
    initialize = Dispatch.initialize
    refused: list[Worker] = []

    def initialize_late(self: Dispatch, worker: Worker, inheritance: Inheritance) -> Any:
        if not refused:
            refused.append(worker)
            raise MemoryError
        return initialize(self, worker, inheritance)

    monkeypatch.setattr(starts, "_RETRY_NS", 100_000_000)
    monkeypatch.setattr(Dispatch, "initialize", initialize_late)
    with ProcessPool(1, trace=tmp_path / "run.json" if trace else None) as pool:
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9
        assert refused[0] not in inside.workers_of(pool)


@on_linux
def test_a_map_may_be_left_while_a_large_item_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function is forgotten by then: sent after all, the call would end the worker."""
    gate, copy = Gate(), Packing.store

    def copy_late(packing: Packing, given_up: Callable[[], bool]) -> None:
        gate(Future())
        copy(packing, given_up)

    monkeypatch.setattr(Packing, "store", copy_late)
    with ProcessPool(1) as pool:
        results = pool.map(lambda item: (os.getpid(), len(item)), [b"", bytes(20_000_000)])
        pid, _ = next(results)
        assert gate.reached.wait(30)
        results.close()  # type: ignore[attr-defined]
        wait_until(lambda: inside.knows_who_has_left(pool))
        gate.open.set()

        assert pool.submit(tasks.pid).result(timeout=30) == pid


@on_linux
def test_a_worker_to_be_replaced_that_has_begun_nothing_is_replaced(tmp_path: Path) -> None:
    """It is too large, and all that it still owes can be taken back: then it owes nothing.

    It is not ready before all calls wait, so that it owes the others when it answers the first.
    """
    ready = tmp_path / "ready"
    with ProcessPool(
        1, max_memory_per_worker=1, initializer=tasks.wait_for, initargs=(str(ready),)
    ) as pool:
        make_known(pool, tasks.do)
        first = pool.submit(tasks.do, tasks.stop_after_answer)
        others = [pool.submit(tasks.do, tasks.pid) for _ in range(5)]
        ready.touch()
        pid = first.result(timeout=30)
        wait_for_state(pid, "T")
        (worker,) = inside.workers_of(pool)
        wait_until(lambda: not worker.ledger.owed)
        os.kill(pid, signal.SIGCONT)

        assert pid not in [future.result(timeout=30) for future in others]


def test_a_cancelled_task_in_the_queue_is_passed_over_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    future = PoolFuture()
    assert future.cancel_running()
    assert not future.begin()
    assert not caplog.records


def test_a_cancellation_and_the_beginning_of_a_task_may_meet() -> None:
    """Neither raises; whoever waits is told once."""
    # Without the GIL the system changes threads, and on a busy machine takes its time for each.
    for _ in range(200 if sysconfig.get_config_var("Py_GIL_DISABLED") else 2000):
        future = PoolFuture()
        thread = threading.Thread(target=future.begin)
        thread.start()
        assert future.cancel_running()
        thread.join()
        assert future.cancelled()


def test_the_end_of_a_call_and_who_adds_a_callback_may_meet() -> None:
    """Who adds it calls it, between two looks of the thread that ends the call."""

    class CalledMeanwhile(list[Any]):
        def __bool__(self) -> bool:
            self.clear()
            return True

    def end() -> None:
        callbacks_by(later.append, owner=future)
        future.set_result(1)
        ended.append(True)

    future, ended = PoolFuture(), list[bool]()
    later: list[Callable[[], None]] = []
    future._done_callbacks.append(CalledMeanwhile([print]))
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert ended


LOCK = threading.Lock()
# One row per part of a map that cannot be pickled: its function, and the arguments of its calls.
UNPICKLABLE: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "a call": (tasks.square, [(LOCK,)]),
    "the function": (functools.partial(tasks.square, LOCK), [(1,), (2,)]),
}


@pytest.mark.parametrize("part", UNPICKLABLE)
def test_calls_that_cannot_be_pickled_are_settled(part: str) -> None:
    """Else their map never ends, and its function stays in every worker."""
    function, items = UNPICKLABLE[part]
    settled: list[int] = []
    run = MapRun(function, "square", NO_POLICY, len(items))
    run.waiting.add(items)
    worker: Any = support_core.worker(functions=set())

    dispatch = Dispatch(lambda _, count: settled.append(count), bool, None, Listener())
    dispatch.pack(worker, run.cut(len(items)))
    while dispatch.aside:
        dispatch.come_back(more=True)
    dispatch.close()

    assert sum(settled) == len(items)
    with pytest.raises(TypeError, match="lock"):
        run.take(0, None)


def test_leaving_a_map_early_takes_no_more_items() -> None:
    """A generator of any length is read no further."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100_000:
            taken += 1
            yield taken

    with ProcessPool(1) as pool:
        for result in pool.map(tasks.square, items()):
            assert result == 1
            break
        assert taken < 20_000


def test_a_map_whose_items_shut_the_pool_down_ends() -> None:
    def items() -> Iterator[int]:
        yield from range(20_000)
        pool.shutdown(wait=False)
        yield from range(20_000, 20_010)

    with ProcessPool(1) as pool:
        results = pool.map(tasks.square, items())
        found: list[int] = []
        with pytest.raises(RuntimeError, match="after shutdown"):
            found.extend(results)
    assert len(found) >= 16_384
    assert found == [n * n for n in range(len(found))]


def test_a_generators_calls_that_nobody_looked_at_run_before_the_program_ends(
    tmp_path: Path,
) -> None:
    """As the standard pool's, which takes all items at once."""
    script = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        import support_tasks as tasks, safepool
        pool = safepool.ProcessPool(1)
        unseen = pool.map(tasks.append_line, ["log"] * 1000, (n for n in range(1000)))
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True, timeout=60
    )
    assert len((tmp_path / "log").read_text().split()) == 1000


@on_linux
def test_short_tasks_are_not_sent_behind_a_long_one_again_and_again() -> None:
    """Sent, taken back, sent again: a thousand tasks became hundreds of thousands of messages."""
    with ProcessPool(2) as pool:
        make_known(pool, tasks.square, tasks.sleep_and_return, time.sleep)
        staff_fully(pool, 2)
        long = pool.submit(time.sleep, 2)
        short = [pool.submit(tasks.sleep_and_return, 0.0002, n) for n in range(4000)]
        assert [future.result(timeout=60) for future in short] == [*range(4000)]
        sent = sum(worker.ledger.last for worker in inside.workers_of(pool))
        long.result(timeout=60)

    assert sent < 8000


@pytest.mark.parametrize("closed", [True, False])
def test_a_pool_whose_thread_cannot_be_had_while_others_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, *, closed: bool
) -> None:
    """Each submit() gets the error, a shutdown() returns, and else the next submit() works."""
    reached, refuse = threading.Event(), threading.Event()

    def no_staff(*_: object) -> None:
        reached.set()
        refuse.wait(30)
        raise OSError(errno.EMFILE, "no descriptor")

    errors: list[BaseException] = []

    def submit(pool: ProcessPool) -> None:
        try:
            pool.submit(abs, -1)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    with ProcessPool(1) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(scheduler, "Staff", no_staff)
            waiting = [threading.Thread(target=submit, args=(pool,)) for _ in range(2)]
            waiting += [threading.Thread(target=pool.shutdown)] if closed else []
            waiting[0].start()
            assert reached.wait(30)
            for thread in waiting[1:]:
                thread.start()
            wait_until(lambda: inside.is_closed(pool) is closed)
            refuse.set()
            for thread in waiting:
                thread.join(30)
                assert not thread.is_alive()
        assert len(errors) == 2
        assert any(isinstance(error, OSError) for error in errors)
        if not closed:
            assert pool.submit(abs, -3).result(timeout=30) == 3
