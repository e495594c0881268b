"""A pool seen from outside: what its workers do, and where they are."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import support_inside as inside
import support_logging as support
import support_tasks as tasks
from support_processes import wait_until

import safepool
from safepool import ProcessPool, TaskTimeoutError, WorkerDiedError
from safepool.pool import watch
from safepool.pool.core.worker import Member, Phase
from safepool.pool.shell import staff
from safepool.pool.shell.worker import Worker
from safepool.workers.board import NO_BOARD, STACK_SIGNAL, Board

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="there are no stacks to be had")


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def the_worker(pool: ProcessPool) -> safepool.WorkerInfo:
    (worker,) = pool.workers()
    return worker


# What a worker is seen to do.


def test_before_the_first_task_and_after_the_end_there_is_nobody() -> None:
    with ProcessPool(2) as pool:
        assert pool.workers() == ()
        assert pool.dump_tracebacks() == {}
        pool.submit(tasks.pid).result(timeout=30)
        assert len(pool.workers()) == 1
    assert pool.workers() == ()
    assert pool.dump_tracebacks() == {}


def test_a_worker_from_its_start_on(tmp_path: Path) -> None:
    """Starting, busy, idle."""
    initialize, work = tmp_path / "initialize", tmp_path / "work"
    with ProcessPool(1, initializer=tasks.wait_for, initargs=(str(initialize),)) as pool:
        try:
            first = pool.submit(tasks.wait_for, str(work))
            until(pool.workers, "it is started")
            starting = the_worker(pool)
            assert (starting.state, starting.task, starting.running_s) == ("starting", None, None)
            initialize.touch()

            until(lambda: the_worker(pool).task, "a task runs")
            busy = the_worker(pool)
            assert (busy.state, busy.task) == ("busy", "support_tasks.wait_for")
            assert busy.running_s is not None
            until(lambda: (the_worker(pool).running_s or 0) > busy.running_s, "time passes")
            assert (busy.pid, busy.tasks_done, busy.waiting) == (starting.pid, 0, 0)
            work.touch()

            first.result(timeout=30)
            idle = the_worker(pool)
            assert (idle.state, idle.task, idle.running_s) == ("idle", None, None)
            assert (idle.tasks_done, idle.waiting) == (1, 0)
        finally:
            initialize.touch()
            work.touch()


def test_a_worker_that_was_told_to_end_is_leaving(tmp_path: Path) -> None:
    """It still waits for a thread of its task; another one takes what comes next."""
    gate = tmp_path / "gate"
    with ProcessPool(1, max_tasks_per_child=1) as pool:
        leaving = pool.submit(support.leave_a_thread, str(gate)).result(timeout=30)
        (worker,) = pool.workers()
        assert (worker.pid, worker.state, worker.task) == (leaving, "leaving", None)
        assert pool.submit(tasks.pid).result(timeout=30) != leaving
        gate.touch()


def test_calls_of_a_map_are_named_and_counted(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(1) as pool:
        results = pool.map(tasks.wait_for, [str(tmp_path), str(tmp_path), str(gate)])
        until(lambda: pool.workers() and the_worker(pool).tasks_done == 2, "two are done")
        until(lambda: the_worker(pool).task, "the third runs")
        assert the_worker(pool).task == "support_tasks.wait_for"
        gate.touch()
        assert list(results) == [None] * 3
        assert the_worker(pool).tasks_done == 3


@on_linux
def test_memory_and_threads_are_the_systems() -> None:
    with ProcessPool(1) as pool:
        pool.submit(tasks.pid).result(timeout=30)
        before = the_worker(pool)
        assert before.resident_bytes is not None
        assert before.native_threads is not None
        pool.submit(support.hold, 50_000_000, 3).result(timeout=30)
        after = the_worker(pool)
        assert after.resident_bytes is not None
        assert after.resident_bytes - before.resident_bytes > 40_000_000
        assert after.native_threads == before.native_threads + 3


class Work:
    """A call, or several, on a ledger."""

    expected_ns = 0

    def __init__(self, name: str, count: int = 1) -> None:
        self.name = name
        self.count = count
        self.position = self.done = 0

    def split(self, at: int) -> Work:
        raise NotImplementedError(at)


class StoredWorker(Member):
    """What the scheduler knows of a worker, without one."""

    def __init__(self, *works: Work, **known: Any) -> None:
        super().__init__()
        for work in works:
            self.ledger.give(work)
        self.board: Any = None
        self.sent_ns = time.monotonic_ns()
        self.pid, self.ready, self.phase = os.getpid(), True, Phase.READY
        self.lane: Any = None
        vars(self).update(known)

    def resident_bytes(self) -> int | None:
        return None


@dataclasses.dataclass
class ReadBoard:
    claimed: int
    since_ns: int = 0


class ClosedBoard:
    @property
    def claimed(self) -> int:
        raise ValueError("operation forbidden on released memoryview object")


A, B = (lambda count=1: Work("a", count)), (lambda count=1: Work("b", count))
# One row per thing to be seen: the worker; then state, task and how many wait.
SEEN: dict[str, tuple[Callable[[], StoredWorker], tuple[str, str | None, int]]] = {
    "nothing was sent": (lambda: StoredWorker(board=ReadBoard(0)), ("idle", None, 0)),
    "sent and not begun": (
        lambda: StoredWorker(A(), B(), board=ReadBoard(0)),
        ("idle", None, 2),
    ),
    "the first runs": (lambda: StoredWorker(A(), B(), board=ReadBoard(1)), ("busy", "a", 1)),
    "the second runs, the first is not read yet": (
        lambda: StoredWorker(A(), B(), board=ReadBoard(2)),
        ("busy", "b", 0),
    ),
    "in the middle of a batch": (
        lambda: StoredWorker(A(5), B(3), board=ReadBoard(3)),
        ("busy", "a", 5),
    ),
    "all is answered": (
        lambda: StoredWorker(A(), board=ReadBoard(7)),
        ("idle", None, 0),
    ),
    "no board": (lambda: StoredWorker(A(), B(2)), ("busy", "a", 2)),
    "no board, nothing sent": (StoredWorker, ("idle", None, 0)),
    "a board that was closed": (
        lambda: StoredWorker(A(), board=ClosedBoard()),
        ("busy", "a", 0),
    ),
    "starting": (lambda: StoredWorker(ready=False, phase=Phase.STARTING), ("starting", None, 0)),
    "retiring in its last task": (
        lambda: StoredWorker(A(), board=ReadBoard(1), phase=Phase.RETIRING),
        ("leaving", "a", 0),
    ),
    "leaving": (lambda: StoredWorker(phase=Phase.STOPPING), ("leaving", None, 0)),
    "ended before it was ready": (
        lambda: StoredWorker(ready=False, phase=Phase.DYING),
        ("leaving", None, 0),
    ),
}


@pytest.mark.parametrize("case", SEEN)
def test_what_is_known_of_a_worker_is_said(case: str) -> None:
    make, expected = SEEN[case]
    (info,) = watch.look_at([make()])  # type: ignore[list-item]

    assert (info.state, info.task, info.waiting) == expected
    assert (info.running_s is None) == (info.task is None)


@on_linux
def test_workers_come_and_go_while_they_are_looked_at() -> None:
    """Each does two tasks, some are killed; two threads look on and ask for stacks."""
    problems: list[BaseException] = []
    seen: set[int] = set()
    over = threading.Event()

    def look() -> None:
        try:
            while not over.is_set():
                seen.update(worker.pid for worker in pool.workers())
                for stack in pool.dump_tracebacks(timeout=0.05).values():
                    assert stack
        except BaseException as error:
            problems.append(error)

    with ProcessPool(2, max_tasks_per_child=2) as pool:
        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            futures = [pool.submit(tasks.sleep_and_return, 0.01, n) for n in range(24)]
            futures += [pool.submit(tasks.be_killed) for _ in range(3)]
            errors = [future.exception(timeout=60) for future in futures]
        finally:
            over.set()
            for thread in threads:
                thread.join()

    assert problems == []
    assert [type(error) for error in errors if error] == [WorkerDiedError] * 3
    assert len(seen) >= 8


# Where it is.


def main_stacks(text: str) -> int:
    return text.count("in be_worker\n")


@on_linux
def test_stacks_of_all_workers_are_had_at_once(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(2) as pool:
        futures = [pool.submit(tasks.wait_for, str(gate), n) for n in range(2)]
        until(lambda: [w.state for w in pool.workers()] == ["busy"] * 2, "both are busy")
        stacks = pool.dump_tracebacks(timeout=10)
        assert stacks.keys() == {worker.pid for worker in pool.workers()}
        for stack in stacks.values():
            assert "most recent call first" in stack
            assert stack.count("in wait_for\n") == main_stacks(stack) == 1
        gate.touch()
        assert [future.result(timeout=30) for future in futures] == [0, 1]


# One row per place where no Python code runs: what does, and what its stack names.
IN_C: dict[str, tuple[Callable[..., object], tuple[Any, ...], str]] = {
    "a sleep": (support.sleep_here, (1.0,), "in sleep_here"),
    "C code that holds the interpreter": (tasks.sleep_in_c, (1,), "in sleep_in_c"),
    "a long sum of NumPy": (support.sum_here, (30_000_000, 20), "in sum_here"),
    "a thread of its own": (support.sleep_in_thread, (1.0,), "in sleep_here"),
}


@on_linux
@pytest.mark.parametrize("place", IN_C)
def test_a_stack_is_had_in_the_middle_of_c_code(place: str) -> None:
    if "NumPy" in place:
        pytest.importorskip("numpy")
    function, arguments, line = IN_C[place]
    with ProcessPool(1) as pool:
        found: list[str] = []

        def is_found() -> bool:  # or the call was over before this process had its turn
            future = pool.submit(function, *arguments)
            while not future.done() and not any(line in stack for stack in found):
                found.extend(pool.dump_tracebacks(timeout=10).values())
            future.result(timeout=60)
            return any(line in stack for stack in found)

        wait_until(is_found)


@on_linux
def test_a_stopped_worker_is_said_to_be_and_answers_nothing_later() -> None:
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: "T" in _state(pid), "it is stopped")
            started = time.monotonic()
            assert pool.dump_tracebacks(timeout=20)[pid].startswith("(it is stopped")
            assert time.monotonic() - started < 10
        finally:
            os.kill(pid, signal.SIGCONT)
        assert main_stacks(pool.dump_tracebacks(timeout=20)[pid]) == 1


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0]


@on_linux
def test_a_hanging_initializer_is_found(tmp_path: Path) -> None:
    """A worker that is not ready is asked as soon as the signal cannot end it."""
    path = tmp_path / "go on"
    with ProcessPool(1, initializer=tasks.wait_for, initargs=(str(path),)) as pool:
        future = pool.submit(tasks.square, 3)
        found: list[str] = []
        until(pool.workers, "it is started")
        until(
            lambda: found.extend(pool.dump_tracebacks(10).values()) or "in wait_for" in found[-1],
            "its stack",
        )
        path.touch()
        assert future.result(timeout=30) == 9

    assert set(found[:-1]) <= {"(it cannot be asked: it is still starting)"} | {
        text for text in found if "most recent call first" in text
    }


@on_linux
def test_an_answer_that_comes_late_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the moment in which it is asked: it answers when it goes on."""
    end = Worker.end

    def stop_and_ask(self: Worker, number: int) -> None:
        if number == STACK_SIGNAL:
            os.kill(self.pid, signal.SIGSTOP)
            until(lambda: "T" in _state(self.pid), "it is stopped")
        end(self, number)

    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        monkeypatch.setattr(Worker, "end", stop_and_ask)
        try:
            assert pool.dump_tracebacks(timeout=0.2)[pid].startswith("(no answer in time")
        finally:
            monkeypatch.undo()
            os.kill(pid, signal.SIGCONT)
        board = inside.workers_of(pool)[0].board
        until(lambda: board.written, "the late answer")
        assert main_stacks(pool.dump_tracebacks(timeout=10)[pid]) == 1
        error = pool.submit(tasks.be_killed).exception(timeout=30)

    assert isinstance(error, WorkerDiedError)
    assert error.stack == ""


@on_linux
@pytest.mark.parametrize("kept_bytes", [0, watch._KEPT_BYTES])
def test_stacks_that_were_asked_for_are_not_a_crashs(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is one stack, and the error tells of the crash alone; old ones are dropped."""
    monkeypatch.setattr(watch, "_KEPT_BYTES", kept_bytes)
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        answers = [pool.dump_tracebacks(timeout=20)[pid] for _ in range(5)]
        board = inside.workers_of(pool)[0].board
        assert (board.written == 0) == (kept_bytes == 0)
        error = pool.submit(support.crash).exception(timeout=30)

    assert [main_stacks(answer) for answer in answers] == [1] * 5
    assert isinstance(error, WorkerDiedError)
    assert error.stack.startswith("Fatal Python error: Segmentation fault")
    assert error.stack.count("in crash\n") == 1
    assert main_stacks(error.stack) == 0


@on_linux
def test_the_crash_of_what_a_task_forked_is_not_the_workers() -> None:
    """It writes its stack where the worker would, which lives on and is killed later."""
    with ProcessPool(1) as pool:
        assert pool.submit(support.crash_in_a_fork).result(timeout=30) == signal.SIGSEGV
        killed = pool.submit(tasks.be_killed).exception(timeout=30)
        assert pool.submit(support.crash_in_a_fork).result(timeout=30) == signal.SIGSEGV
        crashed = pool.submit(support.crash).exception(timeout=30)

    assert isinstance(killed, WorkerDiedError)
    assert killed.stack == ""
    assert isinstance(crashed, WorkerDiedError)
    assert crashed.stack.count("in crash\n") == 1
    assert "in crash_in_a_fork\n" not in crashed.stack


@on_linux
def test_stacks_that_were_asked_for_are_not_a_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "_STACK_S", 1.0)  # a busy machine needs more time to write it
    with ProcessPool(1, timeout=2.0) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        for _ in range(3):
            assert main_stacks(pool.dump_tracebacks(timeout=20)[pid]) == 1
        error = pool.submit(support.sleep_here, 60.0).exception(timeout=30)

    assert isinstance(error, TaskTimeoutError)
    assert error.stack.count("thread 0x") == error.stack.count("in sleep_here\n") == 1


@on_linux
def test_many_who_ask_at_once_get_one_stack_each() -> None:
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda: answers.append(pool.dump_tracebacks(30)[pid]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [main_stacks(answer) for answer in answers] == [1] * 8


@on_linux
def test_a_pool_that_is_stuck_in_a_callback_can_be_looked_at(tmp_path: Path) -> None:
    stuck, go_on, gate = threading.Event(), threading.Event(), tmp_path / "gate"

    def block(_: object) -> None:
        stuck.set()
        go_on.wait(60)

    with ProcessPool(1) as pool:
        pool.submit(tasks.wait_for, str(gate)).add_done_callback(block)
        gate.touch()
        try:
            assert stuck.wait(30)
            assert the_worker(pool).state == "idle"
            (stack,) = pool.dump_tracebacks(timeout=20).values()
            assert main_stacks(stack) == 1
        finally:
            go_on.set()


@on_linux
def test_a_worker_without_a_board_is_said_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Board, "create", lambda: NO_BOARD)
    with ProcessPool(1) as pool:
        pool.submit(tasks.pid).result(timeout=30)
        assert the_worker(pool).tasks_done == 1
        (text,) = pool.dump_tracebacks().values()

    assert text.startswith("(no stacks: ")


@on_linux
def test_a_worker_whose_handler_is_gone_is_not_signalled() -> None:
    """The signal would end it."""
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        pool.submit(support.take_the_handler_away, STACK_SIGNAL).result(timeout=30)
        assert pool.dump_tracebacks()[pid] == "(it cannot be asked: it handles no such signal)"
        assert pool.submit(tasks.pid).result(timeout=30) == pid
