"""Whatever is done with a pool, in whatever order: each call ends once, and rightly.

A machine that draws what to do next: submit and map calls that end well or badly, cancel, kill,
stop workers from outside, resize, shut down. It checks what became of each call when the pool
is shut down, never when, so that no timing makes it fail.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import support_inside as inside
import support_machine as calls
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from safepool import ProcessPool, TaskTimeoutError, WorkerDiedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops and kills workers")

# Nothing here takes as long: a wait that does has found a call that nobody will end.
PATIENCE_S = 60
# The slow version goes on for so long.
SLOW_S = float(os.environ.get("SAFEPOOL_TEST_SLOW_S", "20"))

End = Literal["wait", "leave", "cancel", "terminate", "kill"]


@dataclass
class Call:
    """One submitted call, and what was done to it."""

    number: int
    expected: str
    future: Future[Any]
    retries: int
    cancelled: bool = False
    killed: bool = False
    endings: int = 0


@dataclass
class Run:
    """One map, and what was taken from it."""

    numbers: list[int]
    results: Iterator[Any]
    bad: tuple[int, str] | None
    retries: int
    taken: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    over: bool = False
    whole: bool = True
    """All items are taken from the caller when the pool is shut down, as by the standard pool."""


class PoolMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self.folder = tempfile.TemporaryDirectory()
        self.log = str(Path(self.folder.name) / "log")
        Path(self.log).touch()

    @initialize(size=st.integers(2, 3), retries=st.sampled_from([0, 0, 1]))
    def begin(self, size: int, retries: int) -> None:
        self.pool = ProcessPool(size, retries=retries)
        self.retries = retries
        self.calls: list[Call] = []
        self.runs: list[Run] = []
        self.strikes = 0
        self.stopped: list[int] = []

    # Calls.

    def add(self, expected: str, function: Any, *arguments: Any, retries: int) -> None:
        number = next(self.numbers)
        future = self.pool.submit(function, self.log, number, *arguments)
        call = Call(number, expected, future, retries)
        self.calls.append(call)

        def count(_future: Future[Any]) -> None:
            call.endings += 1

        future.add_done_callback(count)

    @rule(endings=st.lists(st.sampled_from(sorted(calls.ENDINGS)), min_size=1, max_size=6))
    def submit(self, endings: list[str]) -> None:
        # The worker cannot answer any more: what is small is found on its board, but the next
        # call may have a large answer.
        self.strikes += endings.count("closing")
        for ending in endings:
            self.add(calls.ENDINGS[ending], calls.run, ending, retries=self.retries)

    @rule(count=st.integers(1, 60), ending=st.sampled_from(["quick", "quick", "slow"]))
    def submit_many(self, count: int, ending: str) -> None:
        for _ in range(count):
            self.add("value", calls.run, ending, retries=self.retries)

    @rule()
    def submit_what_cannot_be_pickled(self) -> None:
        self.add("not begun", calls.run, "quick", threading.Lock(), retries=self.retries)

    @rule(size=st.sampled_from([100_000, 3_000_000]))
    def submit_a_large_one(self, size: int) -> None:
        self.add("value", calls.run, "quick", bytes(size), retries=self.retries)

    @rule()
    def submit_one_that_takes_too_long(self) -> None:
        self.add("TaskTimeoutError", calls.overtime, retries=self.retries)

    @rule()
    def submit_one_that_dies_once(self) -> None:
        self.add("value", calls.fail_first, retries=2)

    @rule(
        count=st.integers(1, 80),
        at_once=st.sampled_from([1, 1, 7]),
        ahead=st.sampled_from([None, None, 3]),
        generator=st.booleans(),
        bad=st.none() | st.sampled_from(["raising", "killed", "unreadable", "no pickle", "large"]),
        where=st.integers(0, 79),
    )
    def map(
        self,
        count: int,
        at_once: int,
        ahead: int | None,
        generator: bool,
        bad: str | None,
        where: int,
    ) -> None:
        numbers = [next(self.numbers) for _ in range(count)]
        endings = ["quick"] * count
        arguments: list[object] = [None] * count
        where %= count
        if bad == "no pickle":
            arguments[where] = threading.Lock()
        elif bad is not None:
            endings[where] = bad
        items: Any = (number for number in numbers) if generator else numbers
        results = self.pool.map(
            calls.run,
            itertools.repeat(self.log, count),
            items,
            endings,
            arguments,
            chunksize=at_once,
            buffersize=ahead,
        )
        failure = "TypeError" if bad == "no pickle" else calls.ENDINGS.get(bad or "quick")
        trouble = None if failure in (None, "value") else (where, failure)
        self.runs.append(Run(numbers, results, trouble, self.retries, whole=ahead is None))

    # What is done to them.

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 10**6))
    def cancel(self, which: int) -> None:
        call = self.calls[which % len(self.calls)]
        call.cancelled = call.future.cancel() or call.cancelled

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 10))
    def kill(self, which: int) -> None:
        """One of the last: it is likely to run."""
        call = self.calls[-1 - which % len(self.calls)]
        call.killed = self.pool.cancel(call.future, kill=True) or call.killed

    @precondition(lambda self: self.calls)
    @rule(which=st.integers(0, 10**6))
    def wait(self, which: int) -> None:
        self.let_the_stopped_go_on()  # one of them may have it
        call = self.calls[which % len(self.calls)]
        if not call.future.cancelled():
            try:
                call.future.exception(timeout=PATIENCE_S)
            except CancelledError:
                pass

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 10**6), count=st.integers(1, 100))
    def take(self, which: int, count: int) -> None:
        self.let_the_stopped_go_on()
        self.take_from(self.runs[which % len(self.runs)], count)

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 10**6))
    def leave(self, which: int) -> None:
        run = self.runs[which % len(self.runs)]
        run.over = True
        run.results.close()  # type: ignore[attr-defined]

    def take_from(self, run: Run, count: int) -> None:
        for _ in range(count):
            if run.over:
                return
            try:
                run.taken.append(next(run.results))
            except StopIteration:
                run.over = True
                assert len(run.taken) == len(run.numbers)
            except BaseException as error:
                run.over, run.error = True, error

    # What is done to workers.

    def ready_workers(self) -> list[int]:
        return inside.ready_pids(self.pool)

    @rule(which=st.integers(0, 10**6), number=st.sampled_from([9, 9, 11, 15]))
    def strike_a_worker(self, which: int, number: int) -> None:
        if workers := self.ready_workers():
            self.strikes += 1
            self.send(workers[which % len(workers)], number)

    @rule(which=st.integers(0, 10**6))
    def stop_a_worker(self, which: int) -> None:
        if workers := self.ready_workers():
            self.send(workers[which % len(workers)], signal.SIGSTOP)
            self.stopped.append(workers[which % len(workers)])

    @rule()
    def let_the_stopped_go_on(self) -> None:
        while self.stopped:
            self.send(self.stopped.pop(), signal.SIGCONT)

    @staticmethod
    def send(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    @rule(size=st.integers(1, 3))
    def resize(self, size: int) -> None:
        self.pool.resize(size)

    @rule(milliseconds=st.integers(1, 20))
    def let_time_pass(self, milliseconds: int) -> None:
        time.sleep(milliseconds / 1000)

    # The end.

    @rule(
        end=st.sampled_from(["wait", "leave", "cancel", "terminate", "kill"]),
        size=st.integers(2, 3),
        retries=st.sampled_from([0, 0, 1]),
    )
    def shut_down(self, end: End, size: int, retries: int) -> None:
        self.finish(end)
        self.begin(size, retries)

    def finish(self, end: End) -> None:
        self.let_the_stopped_go_on()
        if end == "leave":
            self.pool.shutdown(wait=False)
        elif end == "cancel":
            self.pool.shutdown(wait=False, cancel_futures=True)
        elif end in ("terminate", "kill"):
            inside.end(self.pool, end, wait=False)
        joined = threading.Thread(target=self.pool.shutdown, daemon=True)
        joined.start()
        for run in self.runs:
            self.take_from(run, sys.maxsize)
        joined.join(PATIENCE_S)
        assert not joined.is_alive()
        assert self.pool._processes == {}
        self.check(end)

    def teardown(self) -> None:
        try:
            if hasattr(self, "pool"):
                self.finish("wait")
        finally:
            if hasattr(self, "pool"):
                inside.end(self.pool, "kill", wait=True)
            self.folder.cleanup()

    # What must have come of it.

    def check(self, end: End) -> None:
        runs = calls.runs_of(self.log)
        lost: Counter[str] = Counter()
        for call in self.calls:
            self.check_call(call, end, runs.get(call.number, 0), lost)
        for run in self.runs:
            self.check_run(run, end, runs, lost)
        ended = 3 if end in ("terminate", "kill") else 0
        assert lost["WorkerDiedError"] <= self.strikes + ended

    def check_call(self, call: Call, end: End, ran: int, lost: Counter[str]) -> None:
        assert call.future.done(), call
        assert call.endings == 1, call
        assert ran <= 1 + call.retries, call
        if call.future.cancelled():
            assert call.cancelled or call.killed or end in ("cancel", "terminate", "kill"), call
            if not (call.killed or call.retries):
                assert ran == 0, call
            return
        assert not call.cancelled, call
        assert not call.killed, call
        found = call.future.exception(timeout=0)
        name = "value" if found is None else type(found).__name__
        if name == "value":
            assert call.future.result() == call.number, call
            assert ran >= 1, call
        if name == call.expected or (call.expected == "not begun" and name == "TypeError"):
            assert ran == 0 if call.expected == "not begun" else ran >= 1, call
        else:
            assert isinstance(found, WorkerDiedError), (call, found)
            lost[name] += 1
        assert not isinstance(found, TaskTimeoutError) or call.expected == "TaskTimeoutError"

    def check_run(self, run: Run, end: End, runs: dict[int, int], lost: Counter[str]) -> None:
        assert run.over
        assert run.taken == run.numbers[: len(run.taken)], run
        assert all(runs.get(number, 0) <= 1 + run.retries for number in run.numbers), run
        assert all(runs.get(number, 0) >= 1 for number in run.numbers[: len(run.taken)]), run
        if run.error is None:
            return
        name = type(run.error).__name__
        if run.bad is not None and (len(run.taken), name) == run.bad:
            return
        if isinstance(run.error, WorkerDiedError):
            lost[name] += 1
        elif isinstance(run.error, CancelledError):
            assert end in ("cancel", "terminate", "kill"), run
        else:
            # The rest was never taken from the caller's iterator: the pool was shut down before.
            assert isinstance(run.error, RuntimeError), (run, run.error)
            assert not run.whole or end in ("cancel", "terminate", "kill"), run


COMMON = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
    # Not shrunk: an example that hangs takes a minute each time.
    phases=[Phase.explicit, Phase.generate],
)


def test_every_call_of_a_pool_ends_once_and_rightly() -> None:
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(COMMON, max_examples=8, stateful_step_count=20, derandomize=True),
    )


@pytest.mark.slow
@pytest.mark.timeout(SLOW_S + 200)
def test_every_call_of_a_pool_ends_once_and_rightly_for_minutes() -> None:
    """With other draws each time; the seed is in the report of a failure."""
    deadline = time.monotonic() + SLOW_S
    while time.monotonic() < deadline:
        number = time.time_ns()
        try:
            run_state_machine_as_test(
                seed(number)(PoolMachine),
                settings=settings(COMMON, max_examples=5, stateful_step_count=30),
            )
        except BaseException as error:
            error.add_note(f"the machine's seed was {number}")
            raise
