"""What each ending means: every row of the design's table, provoked for real.

More of them: the kernel's out-of-memory killer in ``test_oom.py``, the ends of a whole program in
``test_lifetime.py``, what tasks do to harm a pool without an ending in ``test_hostile.py``.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_endings as endings
import support_tasks as tasks
from support_cgroups import control_group
from support_processes import kill, still_alive
from support_programs import run_program

from safepool import (
    PoolBrokenError,
    ProcessPool,
    TaskTimeoutError,
    WorkerDiedError,
)
from safepool.pool.core import machine, starts
from safepool.pool.core.events import HandOut
from safepool.pool.core.machine import Core
from safepool.pool.core.policy import Policy
from safepool.pool.core.worker import Phase
from safepool.pool.shell import staff
from safepool.workers.board import Board

if TYPE_CHECKING:
    from collections.abc import Callable


TESTS = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def both_workers(pool: ProcessPool) -> set[int]:
    """Start the second worker as well, and return who they are."""
    pids: set[int] = set()
    while len(pids) < 2:
        futures = [pool.submit(tasks.sleep_and_return, 0.05, None) for _ in range(2)]
        for future in futures:
            future.result(timeout=30)
        pids = set(pool._processes)
    return pids


def limited(function: Callable[..., Any], timeout_s: float) -> Callable[..., Any]:
    """Give a function a timeout of its own, in a pool that sets none."""

    def call(*arguments: object) -> object:
        return function(*arguments)

    Policy(timeout_s=timeout_s).attach(call)
    return call


# A worker dies in a task.

# One row per crash in native code: what runs, the signal that it ends by.
CRASHES: dict[str, tuple[Callable[..., object], tuple[object, ...], int]] = {
    "SIGSEGV": (endings.crash_in_native_code, (), signal.SIGSEGV),
    "abort": (os.abort, (), signal.SIGABRT),
    "SIGFPE": (endings.raise_signal, (signal.SIGFPE,), signal.SIGFPE),
    "SIGBUS": (
        endings.raise_signal,
        (getattr(signal, "SIGBUS", 0),),
        getattr(signal, "SIGBUS", 0),
    ),
    "SIGILL": (endings.raise_signal, (signal.SIGILL,), signal.SIGILL),
}


@linux
@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_in_native_code_brings_its_python_stack(crash: str) -> None:
    """It says where in Python the crash was, in the error and nowhere else."""
    function, arguments, number = CRASHES[crash]
    with ProcessPool(1) as pool:
        error = pool.submit(function, *arguments).exception(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == -number
    assert "Current thread" in error.stack
    if function is not os.abort:  # a builtin has no frame of its own
        assert f"in {function.__name__}" in error.stack
    assert "in be_worker" not in error.stack  # nor anything else that it is called by
    assert error.stack.rstrip() in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_exit_code_0_is_a_loss_too() -> None:
    with ProcessPool(1) as pool:
        error = pool.submit(endings.exit_with_0).exception(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == 0
    assert "ended with exit code 0 while it ran support_endings.exit_with_0" in str(error)


def test_a_death_in_a_map_costs_the_one_call() -> None:
    """The results before it arrive, then the loss is raised, and what follows was run."""
    with ProcessPool(2) as pool:
        results = pool.map(lambda n: os.abort() if n == 30 else n, range(60), chunksize=10)
        assert [next(results) for _ in range(30)] == list(range(30))
        with pytest.raises(WorkerDiedError):
            next(results)
        assert list(pool.map(tasks.square, range(5))) == [0, 1, 4, 9, 16]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_while_pickling_the_answer() -> None:
    with ProcessPool(1) as pool:
        future = pool.submit(endings.return_killer)
        after = pool.submit(tasks.square, 3)
        assert isinstance(future.exception(timeout=30), WorkerDiedError)
        assert after.result(timeout=30) == 9


@linux
def test_a_task_may_leave_a_program_behind_that_holds_its_descriptors(tmp_path: Path) -> None:
    """Neither its result nor its worker's death waits for that program."""
    path = str(tmp_path / "holders")
    try:
        with ProcessPool(1) as pool:
            pool.submit(endings.spawn_a_holder, path).result(timeout=30)
            error = pool.submit(endings.spawn_a_holder_and_die, path).exception(timeout=30)
            assert pool.submit(tasks.square, 3).result(timeout=30) == 9
        assert len(endings.lines(path)) == 2
        assert isinstance(error, WorkerDiedError)
    finally:
        kill([int(pid) for pid in endings.lines(path)])
        assert still_alive([int(pid) for pid in endings.lines(path)], after_s=5) == []


@linux
def test_a_task_that_closes_its_workers_channel_is_lost_alone() -> None:
    """Small, its answer is left on the board; large, it cannot come, and the error says why."""
    with ProcessPool(1) as pool:
        large = pool.submit(endings.close_all_and_return, 1_000_000).exception(timeout=30)
        slow = pool.submit(endings.close_all_and_sleep, 60).exception(timeout=30)
        small = pool.submit(endings.close_all_and_return, 10).result(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(large, WorkerDiedError)
    assert isinstance(slow, WorkerDiedError)
    assert "closed its channel" in str(slow.__cause__)
    assert small == bytes(10)


# A worker dies before it has begun anything.

# One row per way in which an initializer can end its worker, and what the pool's error says.
INITIALIZERS = {
    "os._exit": "3 workers in a row died before they ran a task; the last: worker ",
    "slowly": "3 workers in a row died before they ran a task; the last: worker ",
    "SIGKILL": "was killed by SIGKILL",
    "SIGSEGV": "was killed by SIGSEGV",
    "sys.exit": "the initializer raised an exception in a worker: SystemExit: 3",
    "raise": "the initializer raised an exception in a worker: RuntimeError: ",
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", INITIALIZERS)
def test_an_initializer_that_ends_its_worker_starts_no_storm(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few starts, then all tasks fail with the reason; whatever was queued."""
    monkeypatch.setattr(starts, "_MOST_PAUSE_NS", 50_000_000)
    path, gate = str(tmp_path / "starts"), tmp_path / "gate"
    arguments = (path, how, str(gate))
    with ProcessPool(2, initializer=endings.note_and_end, initargs=arguments) as pool:
        futures = [pool.submit(tasks.square, n) for n in range(50)]
        gate.touch()
        errors = [future.exception(timeout=60) for future in futures]
        with pytest.raises(PoolBrokenError):
            pool.submit(tasks.square, 1)

    assert all(isinstance(error, PoolBrokenError) for error in errors)
    assert len({id(error) for error in errors}) == 50
    assert INITIALIZERS[how] in str(errors[0])
    # SIGKILL may have come from outside, and is met with pauses.
    assert 1 <= len(endings.lines(path)) <= (21 if how == "SIGKILL" else 4)
    causes = {"sys.exit": SystemExit, "raise": RuntimeError}
    if how in causes:
        assert isinstance(errors[0].__cause__ if errors[0] else None, causes[how])


def test_workers_that_die_before_any_task_start_no_storm_either(tmp_path: Path) -> None:
    """They were initialized, and the task that none of them begins would be sent for ever."""
    path = str(tmp_path / "starts")
    initializer = endings.note_and_end_before_the_first_task
    with ProcessPool(2, initializer=initializer, initargs=(path,)) as pool:
        error = pool.submit(tasks.square, 1).exception(timeout=60)

    assert isinstance(error, PoolBrokenError)
    assert "before it began a task" in str(error)
    assert len(endings.lines(path)) <= 4


def test_deaths_in_tasks_are_no_failed_starts() -> None:
    """However many tasks in a row end their workers, the next one has a worker."""
    with ProcessPool(1) as pool:
        for _ in range(5):
            assert isinstance(pool.submit(os._exit, 1).exception(timeout=30), WorkerDiedError)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


@linux
def test_deaths_while_arguments_are_read_are_no_failed_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three workers that end by what they were sent first cost three calls, and not the pool."""
    hand_out = Core._hand_out

    def hand_out_when_all_are_there(self: Core, event: HandOut) -> None:
        starting = any(one.phase is Phase.STARTING for one in self.members)
        hand_out(self, event._replace(kept=3 * starting))

    monkeypatch.setitem(machine._HANDLERS, HandOut, hand_out_when_all_are_there)
    with ProcessPool(3) as pool:
        results = pool.map(tasks.square, [tasks.SlowToUnpickle(os.getpid())] * 3)
        with pytest.raises(WorkerDiedError):
            next(results)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert "was killed by SIGKILL" in caplog.text
    assert "while it read arguments of support_tasks.square" in caplog.text
    assert "before it began" not in caplog.text


# What cannot be pickled; alone in a task, see AWKWARD in test_drop_in.py.

# One row per item of a map that makes trouble on its way, and the error of its call.
ITEMS: dict[str, tuple[object, type[BaseException]]] = {
    "an argument that cannot be pickled": (threading.Lock(), TypeError),
    "an argument that cannot be unpickled": (tasks.RaisesWhenUnpickled(), ValueError),
    "a result that cannot be pickled": (tasks.return_lock, TypeError),
    "a result that cannot be unpickled": (tasks.return_raiser, ValueError),
    "an exception that cannot be pickled": (tasks.raise_locked, ValueError),
    "an exception that cannot be unpickled": (tasks.raise_two_arguments, tasks.TwoArguments),
}


@pytest.mark.parametrize("chunksize", [1, 4])
@pytest.mark.parametrize("item", ITEMS)
def test_one_item_of_a_map_costs_its_own_call(item: str, chunksize: int, tmp_path: Path) -> None:
    """Those before it return, none is run twice, and the worker lives."""
    path = str(tmp_path / "runs")
    awkward, expected = ITEMS[item]
    with ProcessPool(1) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        items = [*range(5), awkward, *range(6, 10)]
        results = pool.map(endings.note_and_call, [path] * 10, items, chunksize=chunksize)
        assert [next(results) for _ in range(5)] == list(range(5))
        with pytest.raises(expected):
            next(results)
        assert pool.submit(tasks.pid).result(timeout=30) == worker

    noted = endings.lines(path)
    assert {*noted} >= {*"01234"}
    assert len(noted) == len(set(noted))


def test_items_that_are_slow_to_read_and_then_fail_do_not_go_round_for_ever() -> None:
    """Their message is taken back while it is read; whose fault it is must be found out."""
    items = [1, endings.SlowToFail(), 3, endings.SlowToFail(), 5, 6, 7, 8]
    with ProcessPool(1) as pool:
        results = pool.map(tasks.sleep_and_return, [0] * 8, items, chunksize=4)
        assert next(results) == 1
        with pytest.raises(ValueError, match="slow to fail"):
            next(results)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("place", [0, 3, 7])
def test_an_item_that_kills_its_reader_costs_its_own_call(place: int, tmp_path: Path) -> None:
    """Not the one that its message begins with, and no worker after the other."""
    path = str(tmp_path / "runs")
    items: list[object] = [*range(8)]
    items[place] = tasks.SlowToUnpickle(os.getpid())
    with ProcessPool(1) as pool:
        results = pool.map(endings.note_and_call, [path] * 8, items, chunksize=8)
        assert [next(results) for _ in range(place)] == list(range(place))
        with pytest.raises(WorkerDiedError):
            next(results)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert len(endings.lines(path)) == len(set(endings.lines(path)))


@linux
def test_a_timeout_while_the_arguments_are_read() -> None:
    function = limited(tasks.sleep_and_return, 0.5)
    with ProcessPool(1) as pool:
        items = [endings.SlowToRead(60), endings.SlowToRead(0)]
        results = pool.map(function, [0, 0], items, chunksize=2)
        with pytest.raises(TaskTimeoutError):
            next(results)
        error = pool.submit(function, 0, endings.SlowToRead(60)).exception(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(error, TaskTimeoutError)


@linux
def test_a_task_that_is_claimed_and_taken_back_at_once_runs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see it; the worker says so after what it has finished and before what comes next."""
    path = str(tmp_path / "runs")
    peek = Board.peek
    met = []

    def peek_early(board: Board) -> bytes:
        """Look, and then let the worker finish its task and claim the next, which is revoked."""
        before, records = board.claimed, peek(board)
        deadline = time.monotonic() + 0.5
        while board.claimed == before and time.monotonic() < deadline:
            time.sleep(0.001)
        met.append(board.claimed != before)
        return records

    with ProcessPool(1, initializer=endings.tell_results_late) as pool:
        worker = pool.submit(tasks.pid).result(timeout=30)
        for n in range(10):  # their time is known then, and several are sent together
            pool.submit(endings.note_and_wait, path, n, 0).result(timeout=30)
        monkeypatch.setattr(Board, "peek", peek_early)
        times = [0.1 if n % 30 == 10 else 0.0 for n in range(10, 100)]
        futures = [
            pool.submit(endings.note_and_wait, path, n, seconds)
            for n, seconds in enumerate(times, 10)
        ]
        assert [future.result(timeout=30) for future in futures] == list(range(10, 100))
        assert pool.submit(tasks.pid).result(timeout=30) == worker

    assert any(met)
    assert sorted(map(int, endings.lines(path))) == list(range(100))


# A worker is stopped, and does not end.


@linux
def test_what_was_sent_ahead_to_a_stopped_worker_is_run_elsewhere() -> None:
    """All but the task that it is in: that one may have begun, and waits for it."""
    with ProcessPool(2) as pool:
        stopped = min(both_workers(pool))
        list(pool.map(tasks.value_and_pid, range(200)))  # their time is known now: many are sent
        futures = [pool.submit(tasks.value_and_pid, n) for n in range(500)]
        while not futures[20].done():
            time.sleep(0.001)
        os.kill(stopped, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + 30
            while (left := sum(not future.done() for future in futures)) > 1:
                assert time.monotonic() < deadline, f"{left} of 500 tasks wait"
                time.sleep(0.01)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert [future.result(timeout=30)[0] for future in futures] == list(range(500))


@linux
def test_a_stopped_worker_keeps_no_later_task() -> None:
    """Whether they come by the hundred, or one by one."""
    with ProcessPool(2) as pool:
        stopped = min(both_workers(pool))
        list(pool.map(tasks.square, range(500)))
        os.kill(stopped, signal.SIGSTOP)
        try:
            for _ in range(3):
                many = [pool.submit(tasks.square, n) for n in range(100)]
                assert [f.result(timeout=20) for f in many] == [n * n for n in range(100)]
                assert pool.submit(tasks.square, 7).result(timeout=20) == 49
                assert sum(pool.map(tasks.square, range(100))) == 328350
        finally:
            os.kill(stopped, signal.SIGCONT)
        deadline = time.monotonic() + 30
        while True:  # it is back, and works again
            futures = [pool.submit(tasks.value_and_pid, n) for n in range(20)]
            if stopped in {future.result(timeout=30)[1] for future in futures}:
                break
            assert time.monotonic() < deadline


# Timeouts.


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_timeout_ends_exactly_its_task_with_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were sent ahead behind it are run, by another worker."""
    monkeypatch.setattr(staff, "_STACK_S", 1.0)  # a busy machine needs more time to write it
    with ProcessPool(1, timeout=1.0) as pool:
        before = pool.submit(limited(tasks.pid, 60)).result(timeout=30)
        late = pool.submit(endings.here_it_sleeps)
        after = [pool.submit(limited(tasks.value_and_pid, 60), n) for n in range(20)]
        error = late.exception(timeout=30)
        values = [future.result(timeout=30) for future in after]

    assert isinstance(error, TaskTimeoutError)
    assert isinstance(error, TimeoutError)
    assert (error.pid, error.timeout_s) == (before, 1.0)
    assert [value for value, _ in values] == list(range(20))
    assert before not in {pid for _, pid in values}
    if sys.platform == "linux":
        assert error.stack.endswith("in here_it_sleeps\n"), error.stack
    assert "support_endings.here_it_sleeps ran for more than 1 s" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@linux
def test_a_timeout_ends_what_the_task_has_started(tmp_path: Path) -> None:
    """Also a grandchild, and also if they ignore SIGTERM."""
    for limit_s in (3, 9, 27):
        path = str(tmp_path / f"family within {limit_s} s")
        with ProcessPool(1) as pool:
            function = limited(endings.sleep_with_a_stubborn_family, limit_s)
            error = pool.submit(function, path).exception(timeout=60)
            family = [int(pid) for pid in endings.lines(path)]
            assert pool.submit(tasks.square, 3).result(timeout=30) == 9
        if len(family) == 2:  # else the machine was too slow to start both
            break

    assert isinstance(error, TaskTimeoutError)
    assert len(family) == 2
    assert still_alive(family, after_s=5) == []


@linux
def test_a_timeout_in_c_code_that_holds_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staff, "_STACK_S", 1.0)  # a busy machine needs more time to write it
    with ProcessPool(1) as pool:
        error = pool.submit(limited(tasks.sleep_in_c, 0.5), 60).exception(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(error, TaskTimeoutError)
    assert "in sleep_in_c" in error.stack


@linux
def test_a_timeout_of_a_stopped_worker() -> None:
    """Nobody can leave a stack then; the task ends all the same."""
    with ProcessPool(1) as pool:
        future = pool.submit(limited(endings.raise_signal, 1.0), signal.SIGSTOP)
        assert isinstance(future.exception(timeout=30), TaskTimeoutError)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


@pytest.mark.slow
def test_timeouts_never_strike_the_next_task() -> None:
    """Tasks that take about as long as they may, each followed by one that has no limit."""
    briefly = limited(tasks.sleep_and_return, 0.05)
    with ProcessPool(2) as pool:
        futures = []
        for n in range(25):
            futures.append(pool.submit(briefly, 0.04 + 0.0008 * n, n))
            futures += [pool.submit(tasks.value_and_pid, n) for _ in range(3)]
        ends = [future.exception(timeout=60) for future in futures]

    unlimited = [error for index, error in enumerate(ends) if index % 4]
    assert unlimited == [None] * len(unlimited)
    assert {type(error) for error in ends[::4]} <= {type(None), TaskTimeoutError}


def test_the_time_that_a_task_waits_does_not_count() -> None:
    with ProcessPool(1, timeout=1.5) as pool:
        first = pool.submit(limited(tasks.sleep_and_return, 60), 1.8)
        others = [pool.submit(tasks.square, n) for n in range(8)]
        assert [future.result(timeout=30) for future in others] == [n * n for n in range(8)]
        assert first.done()


def test_a_timeout_in_a_map_costs_the_one_call() -> None:
    with ProcessPool(2) as pool:
        function = limited(tasks.sleep_and_return, 1.0)
        results = pool.map(function, [0, 0, 30, 0], range(4), chunksize=2)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(TaskTimeoutError):
            next(results)
        assert list(pool.map(tasks.square, range(4))) == [0, 1, 4, 9]


# Retries.


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_task_that_ends_every_worker_is_lost_after_its_retries(
    retries: int, tmp_path: Path
) -> None:
    path = str(tmp_path / "runs")
    with ProcessPool(1, retries=retries) as pool:
        error = pool.submit(endings.note_and_die, path).exception(timeout=60)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert isinstance(error, WorkerDiedError)
    pids = [int(pid) for pid in endings.lines(path)]
    assert len(pids) == len(set(pids)) == 1 + retries
    assert error.pid == pids[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_lost_task_is_run_again_and_returns(tmp_path: Path) -> None:
    path = str(tmp_path / "runs")
    with ProcessPool(2, retries=3) as pool:
        future = pool.submit(endings.die_the_first_times, path, 2)
        others = [pool.submit(tasks.square, n) for n in range(20)]
        assert future.result(timeout=60) == 3
        assert [f.result(timeout=30) for f in others] == [n * n for n in range(20)]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_lost_call_of_a_map_is_run_again(tmp_path: Path) -> None:
    """Alone: its neighbours in the same message are not."""
    path = str(tmp_path / "runs")

    def run(n: int) -> int:
        return endings.die_the_first_times(path, 2) if n == 7 else n

    with ProcessPool(2, retries=2) as pool:
        assert list(pool.map(run, range(20), chunksize=10)) == [
            *range(7),
            3,
            *range(8, 20),
        ]


# One row per ending that is an answer and not a loss.
ANSWERS: dict[str, tuple[Callable[..., object], type[BaseException]]] = {
    "an exception": (endings.note_and_raise, ValueError),
    "a timeout": (lambda path: endings.note_and_sleep(path, 60), TaskTimeoutError),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_not_run_again(answer: str, tmp_path: Path) -> None:
    function, expected = ANSWERS[answer]
    path = str(tmp_path / "runs")
    with ProcessPool(1, retries=5, timeout=1.5) as pool:
        assert isinstance(pool.submit(function, path).exception(timeout=30), expected)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9

    assert len(endings.lines(path)) == 1


# As the standard pool, if wanted.


def test_one_death_ends_a_pool_that_is_to_break(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(2, on_worker_death="break") as pool:
        assert list(pool.map(tasks.square, range(4))) == [0, 1, 4, 9]
        fatal = pool.submit(endings.wait_and_exit, str(gate), 7)
        others = [pool.submit(tasks.sleep_and_return, 0.5, n) for n in range(20)]
        gate.touch()
        assert isinstance(fatal.exception(timeout=30), WorkerDiedError)
        errors = [future.exception(timeout=30) for future in others]
        with pytest.raises(PoolBrokenError, match="terminated abruptly"):
            pool.submit(tasks.square, 1)

    assert isinstance(errors[-1], PoolBrokenError)
    assert "ended with exit code 7" in str(errors[-1])
    assert {type(error) for error in errors} <= {type(None), PoolBrokenError}
    assert len({id(error) for error in errors if error}) == sum(bool(error) for error in errors)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_retry_or_a_timeout_does_not_break_it(tmp_path: Path) -> None:
    """The task was not lost, and the pool ended that worker itself."""
    path = str(tmp_path / "runs")
    with ProcessPool(1, on_worker_death="break", retries=1) as pool:
        assert pool.submit(endings.die_the_first_times, path, 1).result(timeout=30) == 2
        late = limited(tasks.sleep_and_return, 0.3)
        assert isinstance(pool.submit(late, 30).exception(timeout=30), TaskTimeoutError)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


# What the system refuses.

WITHOUT_DESCRIPTORS = """
import ctypes, os, resource, sys
import safepool
with safepool.ProcessPool(1) as pool:
    pool.submit(abs, 1).result(30)
def free(number):
    while True:
        try:
            held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            break
    for _ in range(number):
        os.close(held.pop())
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
# From the first call-back on libffi keeps a descriptor (3.5).
ctypes.CFUNCTYPE(None)(lambda: None)
before = len(os.listdir("/proc/self/fd"))
told = set()
for number in range(0, 26):
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    free(number)
    try:
        with safepool.ProcessPool(3) as pool:
            told.add(str([pool.submit(abs, -n).result(30) for n in range(3)]))
    except (OSError, safepool.PoolBrokenError) as error:
        told.add(f"{type(error).__name__}: {error}")
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) <= before, number
with safepool.ProcessPool(1) as pool:
    assert pool.submit(abs, -1).result(30) == 1
print(*sorted(told), sep="\\n")
"""


@linux
def test_whatever_number_of_descriptors_is_left(tmp_path: Path) -> None:
    """The pool works or says what it lacks, leaks none, and the next one works."""
    told = program(WITHOUT_DESCRIPTORS, cwd=tmp_path)

    # Where a descriptor is left to find that out, they are counted.
    assert ", 60 are open. Raise it" in told
    met = (
        "[Errno 24] Too many open files (limit met: RLIMIT_NOFILE allows this process 64 open "
        "files. Raise it (ulimit -n), or use fewer workers)"
    )
    assert {*re.sub(r", (\d+|all) are open", "", told).splitlines()} == {
        f"OSError: {met}",
        f"PoolBrokenError: cannot start a worker: {met}",
        "[0, 1, 2]",
    }


# One row per way in which the program's descriptors are used up while its only worker dies: how
# long that lasts, by the module's own figure for giving up, and what the next task ends with.
USED_UP = {
    "for a while": (30, "1"),
    "for good": (0, "PoolBrokenError: cannot start a worker: [Errno 24] Too many open files"),
}


@linux
@pytest.mark.parametrize("lasting", USED_UP)
def test_the_only_worker_dies_while_no_descriptor_is_left(lasting: str, tmp_path: Path) -> None:
    """The pool tries again, and not for ever."""
    retrying_s, ending = USED_UP[lasting]
    code = f"""
    import os, resource, signal, threading, safepool, support_endings
    from safepool.pool.core import starts
    starts._RETRYING_NS = {retrying_s} * 1_000_000_000
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    def free():
        for descriptor in support_endings.kept:
            os.close(descriptor)
    with safepool.ProcessPool(1) as pool:
        pid = pool.submit(os.getpid).result(30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        support_endings.fill()
        os.kill(pid, signal.SIGKILL)
        while pool._processes:
            pass
        # Those that the worker had are free again.
        support_endings.fill()
        future = pool.submit(abs, -1)
        if {retrying_s}:
            threading.Timer(1.5, free).start()
        error = future.exception(30)
        print(f"{{type(error).__name__}}: {{error}}" if error else future.result())
        if not {retrying_s}:
            free()
    """
    assert ending in program(code, cwd=tmp_path)


@linux
def test_descriptors_used_up_in_the_program_and_in_a_worker(tmp_path: Path) -> None:
    """Workers that are there go on, and what needs a descriptor fails alone."""
    code = """
    import errno, os, resource, safepool, support_endings, support_tasks
    with safepool.ProcessPool(2) as pool:
        pool.submit(abs, 1).result(30)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        assert support_endings.fill() == errno.EMFILE
        print(sum(pool.map(support_tasks.square, range(100))))
        print([pool.submit(len, bytes(1_000_000)).result(30) for _ in range(3)])
        for descriptor in support_endings.kept:
            os.close(descriptor)
    with safepool.ProcessPool(1) as pool:
        print(pool.submit(support_endings.use_up_descriptors).result(30) == errno.EMFILE)
        print(pool.submit(support_endings.open_one_more).exception(30))
        print(pool.submit(len, bytes(1_000_000)).result(30))
        print(pool.submit(support_endings.crash_in_native_code).exception(30).exitcode)
        print(pool.submit(abs, -1).result(30))
    """
    assert program(code, cwd=tmp_path).splitlines() == [
        "328350",
        "[1000000, 1000000, 1000000]",
        "True",
        f"[Errno {errno.EMFILE}] Too many open files: '/dev/null'",
        "1000000",
        "-11",
        "1",
    ]


# One row per number of processes and threads that the group leaves to a program whose pool
# wants 3 workers: its thread takes the first, and each worker one more.
ROOM: dict[int, str] = {
    0: "RuntimeError: can't start new thread",
    1: "PoolBrokenError: cannot start a worker: [Errno 11] Resource temporarily unavailable",
    2: "1 worker",
    3: "2 workers",
    4: "3 workers",
}

IN_A_FULL_GROUP = """
import os, sys, time
import safepool
from safepool.pool.core import starts
starts._RETRY_NS = 100_000_000
with safepool.ProcessPool(1) as pool:  # starts what a start method keeps for the program
    pool.submit(abs, 1).result(30)
before = len(os.listdir("/proc/self/fd"))
def read(name):
    with open(f"{sys.argv[1]}/{name}") as file:
        return file.read().split()
def is_settled():  # a thread and a process are counted for longer than they can be waited for
    members = read("tasks" if os.path.exists(f"{sys.argv[1]}/tasks") else "cgroup.threads")
    return len(os.listdir("/proc/self/task")) == 1 and read("pids.current") == [str(len(members))]
while not is_settled():
    time.sleep(0.01)
def give(room):
    used = int(*read("pids.current"))
    with open(f"{sys.argv[1]}/pids.max", "w") as file:
        file.write("max" if room is None else str(used + room))
give(int(sys.argv[2]))
try:
    with safepool.ProcessPool(3, initializer=abs, initargs=(1,)) as pool:
        futures = [pool.submit(time.sleep, 0.1) for _ in range(5)]
        for future in futures:
            future.result(30)
        workers = len(pool._processes)
        give(None)
        while len(pool._processes) < 3:
            futures = [pool.submit(time.sleep, 0.1) for _ in range(6)]
            assert [future.exception(30) for future in futures] == [None] * 6
    print(workers, "worker" if workers == 1 else "workers")
except (RuntimeError, safepool.PoolBrokenError) as error:
    print(f"{type(error).__name__}: {error}")
give(None)
with safepool.ProcessPool(1) as pool:
    assert pool.submit(abs, -1).result(30) == 1
assert len(os.listdir("/proc/self/fd")) <= before
"""


@linux
@pytest.mark.parametrize("room", ROOM)
def test_where_no_process_can_be_started(room: int) -> None:
    """It goes on with the workers that there are, and gets the others as soon as it may.

    The thread that pickles an initializer makes room for a worker.
    """
    with control_group() as group:
        if "pids" not in group.directories:
            pytest.skip("no pids controller here")
        told = group.run(IN_A_FULL_GROUP, str(group.directories["pids"]), str(room))

    assert told.partition(" (limit met: pids.max allows ")[0] == ROOM[room]


# One row per state of the folders that other pools need: a script that makes it, in a mount
# namespace of its own.
FOLDERS = {
    "full": "for d in /dev/shm /tmp /var/tmp; do mount -t tmpfs -o size=4k none $d; "
    "head -c 9999 /dev/zero > $d/fill 2>/dev/null; done; cd /proc",
    "read only, like everything": "for d in /dev/shm /tmp /var/tmp; do "
    "mount -t tmpfs -o ro none $d; done; mount --bind / /; mount -o remount,bind,ro /; cd /",
    "missing": "mount -t tmpfs none /dev; mknod /dev/null c 1 3; mknod /dev/urandom c 1 9; "
    "mount -t tmpfs -o ro none /tmp; cd /proc; export TMPDIR=/missing",
}


@linux
@pytest.mark.parametrize("folders", FOLDERS)
def test_shared_memory_and_temporary_folders_are_not_needed(folders: str) -> None:
    """Nothing of a pool has a name in them, large arguments included."""
    code = (
        "import os, safepool\n"
        "with safepool.ProcessPool(2) as pool:\n"
        "    print(sum(pool.map(abs, range(10))), len(pool.submit(bytes, 40_000_000).result()))\n"
        "    print(pool.submit(lambda data: len(data), bytearray(40_000_000)).result())\n"
    )
    # The package, and the environment that runs it, may lie in one of the folders.
    script = (
        "mount -t tmpfs none /mnt && mkdir /mnt/package /mnt/python && "
        f'mount --bind "$1" /mnt/package && mount --bind "$2" /mnt/python && {FOLDERS[folders]}; '
        'PYTHONPATH=/mnt/package exec /mnt/python/bin/python -c "$3"'
    )
    if os.geteuid() != 0 or not os.path.isdir("/mnt"):
        pytest.skip("making mounts needs root, and a folder /mnt")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(TESTS.parent), sys.prefix, code],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={name: text for name, text in os.environ.items() if name != "TMPDIR"},
    )

    assert (done.stdout, done.stderr) == ("45 40000000\n40000000\n", "")


# The program forks.


@linux
def test_a_fork_of_the_program_ends_like_any_other(tmp_path: Path) -> None:
    """It is told that the pool is not its own, may have one, runs its exit functions; no more."""
    code = """
    import atexit, os, sys, time, warnings, safepool
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of threads
    pool = safepool.ProcessPool(2)
    list(pool.map(abs, range(4)))
    futures = [pool.submit(time.sleep, 0.3) for _ in range(6)]
    atexit.register(lambda: print("exit function", flush=True))
    child = os.fork()
    if child == 0:
        for use in (lambda: pool.submit(abs, 1), lambda: list(pool.map(abs, [1]))):
            try:
                use()
            except RuntimeError as error:
                print("is a fork" in str(error))
        with safepool.ProcessPool(1) as own:
            print(own.submit(abs, -5).result(30))
        pool.shutdown()
        del pool
        sys.exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print([future.exception(30) for future in futures] == [None] * 6)
    print(pool.submit(abs, -1).result(30))
    """
    assert program(code, cwd=tmp_path).splitlines() == [
        "True",
        "True",
        "5",
        "exit function",
        "5",
        "True",
        "1",
        "exit function",
    ]


def program(code: str, *, cwd: Path) -> str:
    """Run a program as a user would, and return what it printed; nothing goes to stderr."""
    import textwrap

    (cwd / "script.py").write_text(textwrap.dedent(code))
    done = run_program("script.py", cwd=cwd, env={**os.environ, "PYTHONPATH": str(TESTS)})
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    return done.stdout
