"""Calls that their callers send and read themselves, while the scheduler's thread sleeps.

Nothing is lost and nothing runs twice, whoever comes in between: a handler before any instruction
(a trace function stands for it, as in ``test_signals``), the scheduler, another thread, a death.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import support_core
import support_inside as inside
import support_tasks as tasks
from support_interrupts import Interrupt, interrupted_at, others_uncollected, places
from support_processes import run_script

from safepool import ProcessPool, WorkerDiedError
from safepool.pool.calls.awaiting import AsyncResults
from safepool.pool.calls.mapping import MapRun
from safepool.pool.calls.tasks import PoolFuture, Task
from safepool.pool.core.pace import Pace
from safepool.pool.core.policy import NO_POLICY
from safepool.pool.shell import turns
from safepool.pool.shell.loop import Loop
from safepool.transport.channel import NO_SIGPIPE, Channel
from safepool.transport.frames import Kind, encode
from safepool.workers.messages import answer_frame, call_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from safepool.pool.shell.turns import Turn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs eventfd(2) and the board")

PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _no_further_reducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects go the shortest way only if ``multiprocessing`` has no reducer for plain types.

    It has one for ``c_int`` as soon as a ``multiprocessing.Value`` was made in this process.
    """
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", {})


# One turn between a caller and the scheduler, without a pool.


class Table:
    """A lane whose worker is the other end of a socket pair."""

    def __init__(self) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setblocking(False)
        self.channel = Channel(ours)
        worker: Any = support_core.worker(channel=self.channel, lane=None)
        worker.ledger.skip(6)
        self.woken = 0
        self.turns = turns.Turns(
            lambda *_: None,
            [],
            self._wake,
            lambda: True,
            settling=Any,
            pace=Pace(),
            size=SimpleNamespace(now=1),
            allowed=True,
        )
        self.turns._make_bells(1)
        self.lane = turns._Lane(self.turns, worker)
        self.turn = self.lane.turn
        self.future = PoolFuture()

    def _wake(self) -> None:
        self.woken += 1

    def send(self, turn: Turn) -> bool:
        task = Task(self.future, (abs, (), {}), "f", NO_POLICY)
        return turn.send(task, call_frame(turn.position, 1, b"call"))

    def watch(self) -> int:
        self.turns._watching = True
        self.turns._watched[self.lane.fileno] = self.lane
        return self.lane.fileno

    def close(self) -> None:
        self.turns.close()
        self.channel.close()
        self.theirs.close()


@pytest.fixture
def table() -> Iterator[Table]:
    table = Table()
    yield table
    table.close()


def test_a_turn_that_the_scheduler_has_closed_sends_nothing(table: Table) -> None:
    assert table.turn.last().is_mine()

    assert not table.send(table.turn)

    table.theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        table.theirs.recv(1)


def test_a_call_that_was_sent_is_found_by_the_scheduler_with_what_was_read(table: Table) -> None:
    assert table.send(table.turn)
    assert table.turn.position == 7
    table.theirs.send(b"answer")
    table.turn.answer.extend(map(turns._call, (table.turn.reader.pop, table.lane.read)))

    last = table.turn.last()

    assert last is table.turn
    assert not last.is_mine()
    assert last.is_decided()
    assert last.marks == {"next": None, "sent": True}
    assert last.rest() == b""
    assert last.take_answer() == b"answer"


def test_a_call_that_nobody_reads_is_read_by_the_scheduler(table: Table) -> None:
    table.send(table.turn)

    assert table.turn.last().take_answer() == b""

    assert not table.turn._await(table.turns.bells[0], None)


def test_a_call_to_a_worker_that_is_gone_is_its_callers(table: Table) -> None:
    table.theirs.close()

    assert not table.send(table.turn)

    assert not table.turn.is_mine()
    assert table.turn.is_decided()
    assert table.turn.marks == {"sent": False}


def test_a_caller_has_its_moment_though_the_program_was_stopped(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock has gone on meanwhile, and no thread."""
    clock, looks = itertools.count(0, 10), itertools.count()

    def sleep(_: float) -> None:
        if next(looks) == 3:
            table.send(table.turn)

    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=clock.__next__, sleep=sleep))

    assert table.turn.is_decided()


@pytest.mark.parametrize(
    "answer",
    [
        answer_frame(7, 1, Kind.EXCEPTION, b"error"),
        answer_frame(8, 1, Kind.RESULT, b"\x80\x05N."),
        answer_frame(7, 1, Kind.RESULT, b"\x80\x05N.")[:-1],
        answer_frame(7, 1, Kind.RESULT, b"\x80\x05N.") * 2,
        answer_frame(7, 1, Kind.RESULT, b"no pickle"),
        answer_frame(7, 1, Kind.RESULT, pickle.dumps(os.system, 5)),
        b"",
    ],
    ids=["exception", "position", "cut off", "two", "unreadable", "untrusted", "nothing"],
)
def test_what_is_no_plain_answer_is_left_to_the_scheduler(table: Table, answer: bytes) -> None:
    table.send(table.turn)
    table.turn.answer = [True, answer]

    assert table.turn.work is not None
    table.turn._end(table.turn.work, turns.Turn(table.lane, 8))

    assert table.woken == 1
    assert not table.future.done()
    assert "next" not in table.turn.marks


# What the scheduler's thread reads in a watched lane.
HEARD = {
    "nothing": (b"", False),
    "answer": (answer_frame(7, 1, Kind.RESULT, b"\x80\x05N."), True),
    "answer to another": (answer_frame(8, 1, Kind.RESULT, b"\x80\x05N."), False),
    "log": (b"".join(encode(Kind.LOG, 0, [b"record"])), False),
}


@pytest.mark.parametrize("arrived", HEARD)
@pytest.mark.parametrize("noted", [True, False], ids=["", "sender not back yet"])
def test_the_scheduler_ends_calls_of_a_watched_lane(
    table: Table, arrived: str, noted: bool
) -> None:
    """By a plain answer alone, also before the sending thread has come back from the system."""
    data, plain = HEARD[arrived]
    table.send(table.turn)
    if not noted:
        table.turn.record.pop()
        table.turn.marks.clear()
    if data:
        table.theirs.send(data)
    fileno = table.watch()

    assert table.turns.hear([fileno]) is plain

    assert table.future.done() is plain
    assert [turn.position for turn in table.turns.idle] == ([8] if plain else [])
    assert table.lane.done == plain
    assert table.channel._fed == (b"" if plain else data)


def test_a_wake_up_or_an_end_is_not_for_the_lanes(table: Table) -> None:
    table.send(table.turn)
    table.theirs.send(HEARD["answer"][0])
    fileno = table.watch()

    assert not table.turns.hear([])
    assert not table.turns.hear([fileno, fileno + 1])
    assert not table.future.done()


def test_lanes_are_watched_as_long_as_nobody_waits_by_result(table: Table) -> None:
    table.turns._watching = True
    for collects in (True, True, False, True, True):
        table.turns.heard(table.turn, collects=collects)
    assert table.turns._watching
    table.turns.heard(table.turn, collects=True)
    assert not table.turns._watching


def test_who_waits_is_woken_when_the_scheduler_takes_over(table: Table) -> None:
    table.send(table.turn)
    found: list[bool] = []
    bell = table.turns.bells[0]
    table.turn.bells.append(bell)
    thread = threading.Thread(target=lambda: found.append(table.turn._await(bell, None)))
    thread.start()

    table.turn.take_answer()
    table.turn.ring()

    thread.join(PATIENCE_S)
    assert found == [False]


# A pool.


def warmed() -> ProcessPool:
    """Return a pool whose worker knows the functions that are called here."""
    pool = ProcessPool(1)
    for function in (abs, tasks.note_order, tasks.sleep_and_return, tasks.zeros):
        pool.submit(function, 0).result(timeout=PATIENCE_S)
    return pool


def await_a_turn(pool: ProcessPool) -> None:
    """Return when a caller may send a call itself; calls make it so."""
    until = time.monotonic() + PATIENCE_S
    while not inside.may_send_alone(pool):
        assert time.monotonic() < until
        pool.submit(abs, -1).result(timeout=PATIENCE_S)
        time.sleep(0.001)


def submit_alone(pool: ProcessPool, *call: Any) -> Any:
    """Submit until the call was sent by this thread: return its future."""
    while True:
        await_a_turn(pool)
        future = pool.submit(*call)
        if "_turn" in vars(future):
            return future
        future.result(timeout=PATIENCE_S)


def test_a_loop_sends_only_where_the_scheduler_reads(table: Table) -> None:
    """Its thread does not wait for one: its first call lets the scheduler watch the lanes."""

    async def may_send() -> bool:
        return table.turns._may_send()

    table.turns.idle.append(table.turn)

    assert not asyncio.run(may_send())
    assert table.turns._loops
    table.turns._watching = True
    assert asyncio.run(may_send())


def test_results_that_are_wanted_soon_are_asked_of_the_scheduler(table: Table) -> None:
    """It would look at its workers later than that."""
    run = MapRun(abs, "f", NO_POLICY, None)
    table.send(table.turn)
    run.turns.append(table.turn)

    assert not run.wait(0, time.monotonic() + 0.01)

    assert table.woken == 1


ALONE: dict[str, Callable[[ProcessPool], Any]] = {
    "submit": lambda pool: pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1,
    "map": lambda pool: [*pool.map(abs, [-1, -2])] == [1, 2],
}


@pytest.mark.parametrize("call", ALONE)
def test_a_round_trip_takes_so_many_calls_of_the_system(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One send, one poll, one receive; the scheduler's thread sleeps; one wake-up here."""
    steps: list[object] = []
    polls = itertools.count()
    woken = itertools.count()

    def poll() -> Any:
        next(polls)
        return _poll()

    def do(step: Callable[[], object]) -> object:
        steps.append(step)
        return _call(step)

    _poll, _call, wake = turns._poll, turns._call, Loop.wake
    monkeypatch.setattr(Loop, "wake", lambda self: (next(woken), wake(self)))
    with warmed() as pool:
        submit_alone(pool, abs, -1).result(timeout=PATIENCE_S)
        monkeypatch.setattr(turns, "_poll", poll)
        monkeypatch.setattr(turns, "_call", do)
        # A tick of the scheduler's may fall into one; not into each of many.
        for _ in range(100):
            steps.clear()
            begun = next(polls), next(woken)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
            await_a_turn(pool)
            assert ALONE[call](pool)
            switches = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
            counted = next(polls) - begun[0] - 1, next(woken) - begun[1] - 1, len(steps)
            if counted == (1, 0, 4) and switches <= 1:
                break
        else:
            pytest.fail("no call went the shortest way")


# Python's own calls in submit() and result(): of a function of a module, of one of the script, and
# of one that names a class with attributes and methods.
COUNTED = """
import operator, sys, safepool
from safepool.pool.shell.settings import Settings

def own(x):
    return x

class Config:
    x, y = 1, "a"
    def __init__(self): pass
    def method(self): pass
    @staticmethod
    def static(): pass
    @property
    def value(self): pass

def of_class(x):
    return Config.x

def calls_in(act):
    calls = []
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame))
    result = act()
    sys.setprofile(None)
    return result, len(calls)

def counted(pool, function):
    future, in_submit = calls_in(lambda: pool.submit(function, 1))
    alone = "_turn" in vars(future)
    _, in_result = calls_in(future.result)
    return (in_submit, in_result) if alone else counted(pool, function)

if __name__ == "__main__":
    with safepool.ProcessPool(1) as pool:
        Settings.look_before = lambda *_: None  # now and then at more
        for function in (operator.neg, own, of_class):
            found = [counted(pool, function) for _ in range(50)]
            print(*map(min, zip(*found)))
"""


def test_a_round_trip_takes_few_calls_of_python(tmp_path: Path) -> None:
    """And few more for a function of the script: it and what it uses may have changed.

    A class that it names is looked at as a whole, not at each of its methods.
    """
    counted = run_script(COUNTED, cwd=tmp_path)

    assert not counted.stderr
    lines = counted.stdout.splitlines()
    of_module, of_script, of_class = [[*map(int, line.split())] for line in lines]
    assert of_module[0] <= 32
    assert of_module[1] <= 12
    assert of_script[0] - of_module[0] <= 6
    assert of_script[1] <= 12
    assert of_class[0] - of_script[0] <= 20


def test_calls_that_cannot_go_alone_make_no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane costs the scheduler's thread more than half of what a small call takes."""
    made: list[object] = []

    class Lane(turns._Lane):
        __slots__ = ()

        def __init__(self, *told: Any, **others: Any) -> None:
            made.append(told)
            super().__init__(*told, **others)

    monkeypatch.setattr(turns, "_Lane", Lane)
    large = bytes(turns._MOST_BYTES + 1)
    with warmed() as pool:
        of_pool = inside.turns_of(pool)
        until = time.monotonic() + PATIENCE_S
        while of_pool._unfit < turns._MOST_UNFIT:
            assert time.monotonic() < until
            pool.submit(len, large).result(timeout=PATIENCE_S)
        before = len(made)
        for _ in range(turns._TRIED_AGAIN - 1):
            pool.submit(len, large).result(timeout=PATIENCE_S)
        assert len(made) == before

        assert submit_alone(pool, abs, -1).result(timeout=PATIENCE_S) == 1
        assert not of_pool._unfit


def test_calls_with_a_timeout_ask_for_no_lanes() -> None:
    with ProcessPool(1, timeout=PATIENCE_S) as pool:
        for _ in range(10):
            pool.submit(abs, -1).result(timeout=PATIENCE_S)
        assert not inside.turns_of(pool).wanted


def test_the_time_of_calls_that_go_alone_is_known() -> None:
    """The scheduler sends no more of them ahead to a worker than fit."""
    with warmed() as pool:
        for _ in range(3):
            submit_alone(pool, tasks.sleep_and_return, 0.01, 1).result(timeout=PATIENCE_S)
        name = "support_tasks.sleep_and_return"
        _until(lambda: inside.expected_ns(pool, name) > 1_000_000)


def _in_time(future: Any, timeout_s: float) -> None:
    try:
        future.result(timeout=timeout_s)
    except TimeoutError:
        pass


def _called(future: Any) -> None:
    called = threading.Event()
    future.add_done_callback(lambda _: called.set())
    assert called.wait(PATIENCE_S)


def _until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.0005)


def _in_threads(future: Any) -> None:
    threads = [threading.Thread(target=future.result, args=(PATIENCE_S,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


# What else may be done with a future whose call the scheduler does not know yet.
ASKED: dict[str, Callable[[Any], object]] = {
    "result": lambda future: future.result(timeout=PATIENCE_S),
    "result, at once": lambda future: _in_time(future, 0.0),
    "result, soon": lambda future: _in_time(future, 0.11),
    "exception": lambda future: future.exception(timeout=PATIENCE_S),
    "wait": lambda future: concurrent.futures.wait([future], timeout=PATIENCE_S),
    "as_completed": lambda future: [*concurrent.futures.as_completed([future], PATIENCE_S)],
    "callback": _called,
    "done": lambda future: _until(future.done),
    "running": lambda future: _until(lambda: not future.running()),
    "repr": lambda future: _until(lambda: "finished" in repr(future)),
    "cancel": lambda future: future.cancel(),
    "two threads": _in_threads,
    "nothing": lambda _: None,
}


def test_a_future_is_asked_in_any_way() -> None:
    with warmed() as pool:
        for (name, ask), seconds in itertools.product(ASKED.items(), (0.0, 0.002, 0.06)):
            future = submit_alone(pool, tasks.sleep_and_return, seconds, name)
            ask(future)
            assert future.result(timeout=PATIENCE_S) == name
            assert pool.submit(abs, -2).result(timeout=PATIENCE_S) == 2
        (worker,) = pool.workers()
        assert worker.state == "idle"


def test_the_scheduler_reads_the_answers_of_those_who_wait_otherwise() -> None:
    with warmed() as pool:
        until, found = time.monotonic() + PATIENCE_S, 0
        while found < 3:
            assert time.monotonic() < until
            future = pool.submit(abs, -1)
            turn = vars(future).get("_turn")
            found += turn is not None and turn.lane.watched
            # Also one that then waits for it here.
            ask = ASKED["result" if found == 2 else "wait"]
            ask(future)
            assert future.result(timeout=0) == 1


async def _await(pool: ProcessPool) -> None:
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(pool, abs, -1) == 1


def _wait(pool: ProcessPool) -> None:
    concurrent.futures.wait([pool.submit(abs, -1)], timeout=PATIENCE_S)


def _call_back(pool: ProcessPool) -> None:
    ended: SimpleQueue[object] = SimpleQueue()
    pool.submit(abs, -1).add_done_callback(ended.put)
    ended.get(timeout=PATIENCE_S)


# Ways to wait for each call, in which the scheduler's thread reads the answer.
OTHERWISE: dict[str, Callable[[ProcessPool], object]] = {"wait": _wait, "callback": _call_back}


def _calls_without_a_look_around() -> Iterator[bool]:
    """Yield before each of ten calls, and then whether lanes were taken back meanwhile."""
    looks = itertools.count()
    awake, until = turns.Turns.awake, time.monotonic() + PATIENCE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns.Turns, "awake", lambda *given: (next(looks), awake(*given))[1])
        while True:
            before = next(looks)
            for _ in range(10):
                yield True
            # A tick falls into one of many.
            if next(looks) == before + 1:
                return
            assert time.monotonic() < until


@pytest.mark.parametrize("way", [*OTHERWISE, "await"])
def test_calls_are_ended_while_lanes_are_open(way: str) -> None:
    """Who waits by ``wait()``, a callback or in an event loop does not cost a look at all."""

    async def await_all() -> None:
        for _ in _calls_without_a_look_around():
            await _await(pool)

    with warmed() as pool:
        if way == "await":
            asyncio.run(await_all())
        else:
            for _ in _calls_without_a_look_around():
                OTHERWISE[way](pool)
        assert pool.submit(abs, -2).result(timeout=PATIENCE_S) == 2


@pytest.mark.parametrize("size", [100, 2000, 15_000, 40_000, 500_000, 3_000_000])
def test_answers_of_any_size_arrive(size: int) -> None:
    """Also in pieces, or in a file: then the scheduler gets what its caller has read of them."""
    with warmed() as pool:
        for _ in range(3):
            future = submit_alone(pool, tasks.sleep_and_return, 0.0, b"x" * 10)
            assert future.result(timeout=PATIENCE_S) == b"x" * 10
            assert pool.submit(bytes, size).result(timeout=PATIENCE_S) == bytes(size)
            future = submit_alone(pool, tasks.zeros, size)
            assert future.result(timeout=PATIENCE_S) == bytes(size)


def test_what_a_worker_does_is_said_though_the_scheduler_does_not_know() -> None:
    with warmed() as pool:
        await_a_turn(pool)
        (before,) = pool.workers()
        for _ in range(5):
            pool.submit(abs, -1).result(timeout=PATIENCE_S)
        (after,) = pool.workers()
        assert after.tasks_done == before.tasks_done + 5
        future = submit_alone(pool, tasks.sleep_and_return, 0.2)
        _until(lambda: pool.workers()[0].task == "support_tasks.sleep_and_return")
        future.result(timeout=PATIENCE_S)


@pytest.mark.parametrize("handler", ["raises", "submits", "waits"])
@pytest.mark.parametrize("call", ["submit", "result"])
def test_a_handler_comes_before_any_instruction(call: str, handler: str) -> None:
    """Each call that was begun has run once, each that was submitted has ended."""
    numbers = itertools.count()
    kept: list[Any] = []

    def handle(pool: ProcessPool) -> None:
        if handler == "raises":
            raise Interrupt
        kept.append((number := next(numbers), pool.submit(tasks.note_order, number)))
        if handler == "waits":
            kept[-1][1].result(timeout=PATIENCE_S)

    with ProcessPool(1) as pool:
        pool.submit(tasks.remember_order).result(timeout=PATIENCE_S)
        pool.submit(tasks.note_order, -1).result(timeout=PATIENCE_S)
        alone = missed = 0
        for place in places(5):
            await_a_turn(pool)
            number = next(numbers)
            if call == "submit":
                act = partial(_keep, kept, pool, number)
            else:
                # The scheduler may send one in this thread's place: each has a number of its own.
                while "_turn" not in vars(future := pool.submit(tasks.note_order, number)):
                    assert future.result(timeout=PATIENCE_S) == number
                    await_a_turn(pool)
                    number = next(numbers)
                alone += 1
                kept.append((number, future))
                act = partial(future.result, PATIENCE_S)
            # The scheduler may have been faster, and 3.14 does not tell of all instructions.
            missed = 0 if interrupted_at(place, act, partial(handle, pool)) else missed + 1
            if missed == 8:
                break
            assert pool.submit(abs, -3).result(timeout=PATIENCE_S) == 3
        for number, future in kept:
            assert future.result(timeout=PATIENCE_S) == number
        begun = [n for n in pool.submit(tasks.order).result(timeout=PATIENCE_S) if n >= 0]
    assert len(begun) == len(set(begun))
    assert {number for number, _ in kept} <= set(begun)
    assert call == "submit" or alone > 8


_SHORT_NS, _LONG_NS = 1e3, 1e9


def map_alone(pool: ProcessPool, function: Any, *items: Any, thought_ns: float = _SHORT_NS) -> Any:
    """Map until the calls were sent by this thread: return the iterator.

    Args:
        pool: Where.
        function: Which.
        *items: Its arguments.
        thought_ns: Expected time of a call. One worker is sent all that are short; of those that
            are long or unknown each idle worker is sent one.
    """
    while True:
        await_a_turn(pool)
        inside.expect(pool, thought_ns, function)
        iterator: Any = pool.map(function, *items)
        if iterator.results._run.turns:
            return iterator
        list(iterator)


def _close_early(iterator: Any) -> list[Any]:
    first = next(iterator)
    iterator.close()
    return [first, "b"]


def _when_all_is_idle(iterator: Any, pool: ProcessPool) -> list[Any]:
    _until(lambda: all(worker.state == "idle" for worker in pool.workers()))
    return [*iterator]


def _after_a_shutdown(iterator: Any, pool: ProcessPool) -> list[Any]:
    pool.shutdown()
    return [*iterator]


def _in_a_coroutine(iterator: Any) -> list[Any]:
    async def taken() -> list[Any]:
        return [value async for value in AsyncResults(iterator)]

    return asyncio.run(taken())


# What may be done with the results of a map that the scheduler does not know yet.
TAKEN: dict[str, Callable[[Any, ProcessPool], list[Any]]] = {
    "all": lambda iterator, _: [*iterator],
    "one": lambda iterator, _: _close_early(iterator),
    "late": _when_all_is_idle,
    "in a coroutine": lambda iterator, _: _in_a_coroutine(iterator),
    "none": lambda *_: ["a", "b"],
    "none any more": _after_a_shutdown,
}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_of_a_short_map_are_taken_in_any_way(workers: int) -> None:
    with ProcessPool(workers) as pool:
        for function in (abs, tasks.sleep_and_return):
            [*pool.map(function, [0] * 8)]
        for (way, take), seconds in itertools.product(TAKEN.items(), (0.0, 0.002, 0.06)):
            if way == "none any more" and seconds < 0.06:
                continue
            thought_ns = _SHORT_NS if workers == 1 else _LONG_NS
            calls = (tasks.sleep_and_return, [seconds] * 2, "ab")
            iterator = map_alone(pool, *calls, thought_ns=thought_ns)
            assert take(iterator, pool) == ["a", "b"], (way, seconds)


# Short maps by the kind of their results: some of them can only be read by the scheduler.
KINDS: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "numbers": (tasks.itself, [1, 2]),
    "of two kinds": (tasks.itself, [1.5, None]),
    "truth": (tasks.itself, [True, False]),
    "text": (tasks.itself, ["a", b"b"]),
    "containers": (tasks.itself, [(1, [2]), {3: 4}]),
    "too large for a number's place": (tasks.itself, [2**70, -1]),
    "larger than what is read at once": (tasks.zeros, [80_000, 1]),
    "large together": (tasks.zeros, [10_000, 10_000]),
    "read by code": (tasks.a_third, [1, 2]),
    "as many as may be": (tasks.itself, list(range(16))),
    "as many lists": (tasks.itself, [[number] for number in range(16)]),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_of_any_kind_arrive(workers: int) -> None:
    with ProcessPool(workers) as pool:
        for kind, (function, items) in KINDS.items():
            found = [*map_alone(pool, function, items)]
            assert found == [*map(function, items)], kind
            assert [*map(type, found)] == [type(function(item)) for item in items]
        assert [*pool.map(tasks.fail_at_three, [1, 2])] == [1, 2]
        iterator = map_alone(pool, tasks.fail_at_three, [3, 4])
        with pytest.raises(KeyError, match="3"):
            next(iterator)
        assert [*iterator] == [4]
        with pytest.raises(TypeError) as raised:
            [*pool.map(tasks.pid_after, [(1, 2), (3, 4)])]
        assert not hasattr(raised.value, "__notes__")


def test_idle_workers_have_a_call_each_and_take_what_waits_behind_a_long_one(
    tmp_path: Path,
) -> None:
    with ProcessPool(2) as pool:
        while True:  # until both workers know the function
            iterator = map_alone(pool, tasks.pid_after, [0.005, 0.005], thought_ns=_LONG_NS)
            sent = [*iterator.results._run.turns]
            assert len([*iterator]) == 2
            if len(sent) == 2:
                break
        assert len({turn.lane.worker.pid for turn in sent}) == 2
        [*pool.map(tasks.touch_or_wait, [str(tmp_path / "0")] * 2)]
        path = tmp_path / "1"
        iterator = map_alone(pool, tasks.touch_or_wait, [f"!{path}", str(path)])
        assert len(iterator.results._run.turns) == 1
        assert [*iterator] == [f"!{path}", str(path)]


@pytest.mark.parametrize("handler", ["raises", "submits", "waits"])
@pytest.mark.parametrize("call", ["map", "next"])
def test_a_handler_comes_before_any_instruction_of_a_map(call: str, handler: str) -> None:
    numbers = itertools.count()
    kept: list[tuple[list[int], Any]] = []

    def handle(pool: ProcessPool) -> None:
        if handler == "raises":
            raise Interrupt
        mine = [next(numbers), next(numbers)]
        kept.append((mine, pool.map(tasks.note_order, mine)))
        if handler == "waits":
            assert [*kept.pop()[1]] == mine

    def take(iterator: Any, mine: list[int]) -> None:
        assert [*iterator] == mine

    sent: set[int] = set()
    with ProcessPool(1) as pool:
        pool.submit(tasks.remember_order).result(timeout=PATIENCE_S)
        for _ in range(3):
            [*pool.map(tasks.note_order, [-1, -1])]
        alone = missed = 0
        for place in places(29):
            mine = [next(numbers), next(numbers)]
            if call == "map":
                await_a_turn(pool)
                act = partial(_keep_map, kept, pool, mine)
            else:
                act = partial(take, map_alone(pool, tasks.note_order, mine), mine)
                # Waiting calls of a map that is left are cancelled.
                sent |= {*mine} if handler != "raises" else set()
                alone += 1
            missed = 0 if interrupted_at(place, act, partial(handle, pool)) else missed + 1
            if missed == 4:
                break
            assert [*pool.map(abs, [-3, -4])] == [3, 4]
        for mine, iterator in kept:
            assert [*iterator] == mine
            sent |= {*mine}
        begun = [n for n in pool.submit(tasks.order).result(timeout=PATIENCE_S) if n >= 0]
    assert len(begun) == len(set(begun))
    assert sent <= set(begun)
    assert call == "map" or alone > 8


def _keep_map(kept: list[Any], pool: ProcessPool, mine: list[int]) -> None:
    kept.append((mine, pool.map(tasks.note_order, mine)))


def _keep(kept: list[Any], pool: ProcessPool, number: int) -> None:
    kept.append((number, pool.submit(tasks.note_order, number)))


def test_real_interrupts_in_bursts() -> None:
    """Two in a row: one may come in what the other has left to be done."""
    left: list[bool] = []

    def ring(*_: object) -> None:
        if left:
            left.pop()
            raise Interrupt

    def go_on(pool: ProcessPool) -> None:
        while left:
            futures.append(pool.submit(abs, -5))
            futures[-1].result(timeout=PATIENCE_S)

    before = signal.signal(signal.SIGALRM, ring)
    futures: list[Any] = []
    try:
        with warmed() as pool, others_uncollected():
            for number in range(150):
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0.0001 + number * 1e-5, 0.00005)
                        left.extend([True, True])
                        go_on(pool)
                    except Interrupt:
                        go_on(pool)
                except Interrupt:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert [future.result(timeout=PATIENCE_S) for future in futures] == [5] * len(futures)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_worker_dies_under_a_map_that_the_scheduler_does_not_know() -> None:
    with warmed() as pool:
        for _ in range(3):
            [*pool.map(tasks.do_or_return, [1, 2])]
        for values in ([tasks.be_killed, 2], [1, tasks.be_killed]):
            iterator = map_alone(pool, tasks.do_or_return, values)
            for value in values:
                if value is tasks.be_killed:
                    with pytest.raises(WorkerDiedError):
                        next(iterator)
                else:
                    assert next(iterator) == value
            for _ in range(3):
                [*pool.map(tasks.do_or_return, [1, 2])]


@pytest.mark.parametrize("waits", [True, False])
def test_a_worker_dies_under_a_call_that_the_scheduler_does_not_know(waits: bool) -> None:
    with warmed() as pool:
        future = submit_alone(pool, tasks.sleep_and_return, 60.0)
        _until(lambda: pool.workers()[0].task is not None)
        (worker,) = pool.workers()
        timer = threading.Thread(target=os.kill, args=(worker.pid, signal.SIGKILL))
        if waits:
            threading.Timer(0.005, timer.start).start()
        else:
            timer.start()
        with pytest.raises(WorkerDiedError):
            future.result(timeout=PATIENCE_S)
        _until(lambda: timer.ident is not None)
        timer.join(PATIENCE_S)
        assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1


def test_a_worker_that_has_died_is_sent_nothing_that_is_lost() -> None:
    """The caller may find out before the scheduler does: the call goes to the next worker."""
    with warmed() as pool:
        for _ in range(20):
            await_a_turn(pool)
            (worker,) = pool.workers()
            os.kill(worker.pid, signal.SIGKILL)
            try:
                assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1
            except WorkerDiedError:
                pass  # it had begun
            assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1


def test_a_call_is_killed_that_the_scheduler_does_not_know() -> None:
    with warmed() as pool:
        future = submit_alone(pool, tasks.sleep_and_return, 60.0)
        assert pool.cancel(future, kill=True)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(timeout=PATIENCE_S)
        assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1


def test_a_stopped_worker_keeps_nobody_else() -> None:
    with ProcessPool(2) as pool:
        pool.submit(tasks.sleep_and_return, 0.0).result(timeout=PATIENCE_S)
        pool.submit(abs, -1).result(timeout=PATIENCE_S)
        future = submit_alone(pool, tasks.sleep_and_return, 0.01, 5)
        pid = vars(future)["_turn"].lane.worker.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1
        finally:
            os.kill(pid, signal.SIGCONT)
        assert future.result(timeout=PATIENCE_S) == 5


# A fork of a program with threads.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_of_the_program_reads_no_answer_of_it() -> None:
    with warmed() as pool:
        await_a_turn(pool)
        future = submit_alone(pool, tasks.sleep_and_return, 0.01, 5)
        child = os.fork()
        if not child:
            code = 1
            try:
                vars(future)["_turn"].collect(None)
                pool.submit(abs, -1)
            except RuntimeError:
                code = 0
            finally:
                os._exit(code)
        assert future.result(timeout=PATIENCE_S) == 5
        assert os.waitpid(child, 0)[1] == 0
        assert pool.submit(abs, -1).result(timeout=PATIENCE_S) == 1


def test_a_pool_that_is_shut_down_finishes_what_it_does_not_know_yet() -> None:
    pool = warmed()
    future = submit_alone(pool, tasks.sleep_and_return, 0.01, 5)
    pool.shutdown()
    assert future.result(timeout=0) == 5


def test_frames_go_by_the_socket_as_they_are() -> None:
    """`NO_SIGPIPE` is given with each: a program may have given SIGPIPE its default meaning."""
    assert NO_SIGPIPE == socket.MSG_NOSIGNAL
