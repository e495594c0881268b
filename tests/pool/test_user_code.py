"""The scheduler's thread waits for no code of the program: what blocks keeps its own call alone.

Each test lets such code block for real, and makes another call meanwhile.
"""

from __future__ import annotations

import logging
import pickle
import queue
import subprocess
import sys
import sysconfig
import textwrap
import threading
import time
from collections import namedtuple
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import wait_until

from safepool import ProcessPool
from safepool.pool import hands
from safepool.pool.calls.mains import runs_no_code
from safepool.pool.calls.names import Names
from safepool.pool.shell import dispatch, loop
from safepool.pool.shell.dispatch import Dispatch
from safepool.transport import marks, trusted
from safepool.workers import preload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Gate:
    """Something to wait for, in whatever way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.event = threading.Event()
        self.queue: queue.Queue[int] = queue.Queue()
        self.reached = threading.Event()

    def open(self) -> None:
        self.event.set()
        self.queue.put(0)
        self.lock.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What stands still lets others pass soon."""
    monkeypatch.setattr(hands, "STANDS_S", 0.1)
    monkeypatch.setattr(dispatch, "_LOOK_S", 0.05)
    made = Gate()
    yield made
    if not made.event.is_set():
        made.open()


# One row per way in which pickling may wait for somebody.
WAYS: dict[str, Callable[[Gate], object]] = {
    "an event": lambda gate: gate.event.wait(30),
    "a lock": lambda gate: gate.lock.acquire(timeout=30) and gate.lock.release(),
    "a queue": lambda gate: gate.queue.get(timeout=30),
    "time": lambda _: time.sleep(1),
}


class Waits:
    """Waits when it is pickled, and arrives as 7."""

    def __init__(self, gate: Gate, way: str) -> None:
        self.gate, self.way = gate, way

    def __reduce__(self) -> tuple[Any, ...]:
        self.gate.reached.set()
        WAYS[self.way](self.gate)
        return int, (7,)


class WaitsForState(Waits):
    def __reduce__(self) -> tuple[Any, ...]:
        return super(Waits, self).__reduce_ex__(5)

    def __getstate__(self) -> tuple[int]:
        return Waits.__reduce__(self)[1]

    def __setstate__(self, state: tuple[int]) -> None:
        pass


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_an_argument_whose_pickling_waits_delays_its_own_call(
    gate: Gate, way: str, workers: int
) -> None:
    with ProcessPool(workers) as pool:
        waiting = pool.submit(abs, Waits(gate, way))
        assert gate.reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        assert list(pool.map(abs, [-1, -2], timeout=30)) == [1, 2]
        assert way == "time" or not waiting.done()
        gate.open()
        assert waiting.result(timeout=30) == 7


def test_many_arguments_that_wait_delay_their_own_calls(gate: Gate) -> None:
    """More than are pickled at a time; by map() as well as by submit()."""
    with ProcessPool(2) as pool:
        waiting = [pool.submit(abs, Waits(gate, "an event")) for _ in range(60)]
        results = pool.map(abs, [Waits(gate, "an event"), -1])
        assert pool.submit(abs, -1).result(timeout=30) == 1
        assert not any(future.running() for future in waiting)
        gate.open()
        assert [future.result(timeout=30) for future in waiting] == [7] * 60
        assert list(results) == [7, 1]


def test_a_call_that_is_being_pickled_may_be_cancelled(gate: Gate) -> None:
    with ProcessPool(1) as pool:
        waiting = pool.submit(abs, Waits(gate, "an event"))
        assert gate.reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        assert waiting.cancel()
        gate.open()
        assert pool.submit(abs, -2).result(timeout=30) == 2


# One row per way to end a pool that does not wait for what has not begun.
ENDS: dict[str, Callable[[ProcessPool], object]] = {
    "cancel_futures": lambda pool: pool.shutdown(cancel_futures=True),
    "kill": lambda pool: (pool.kill_workers(), pool.shutdown()),
    "terminate": lambda pool: (pool.terminate_workers(), pool.shutdown()),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_pool_ends_while_an_argument_waits(gate: Gate, end: str) -> None:
    pool = ProcessPool(1)
    waiting = pool.submit(abs, Waits(gate, "an event"))
    assert gate.reached.wait(30)
    assert pool.submit(abs, -1).result(timeout=30) == 1
    ENDS[end](pool)
    assert waiting.cancelled()
    gate.open()
    wait_until(lambda: not any("safepool" in one.name for one in threading.enumerate()))


@pytest.mark.parametrize("kind", ["submit", "map"])
def test_a_closed_pool_gives_up_what_never_goes_on(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(loop, "_REST_S", 0.2)
    with ProcessPool(1) as pool:
        argument = Waits(gate, "an event")
        if kind == "submit":
            waiting = pool.submit(abs, argument)
        else:
            results = pool.map(abs, [argument])
        assert gate.reached.wait(30)
        last = pool.submit(abs, -1)
    assert last.result(timeout=30) == 1
    with pytest.raises(pickle.PicklingError, match="stood still"):
        waiting.result(timeout=30) if kind == "submit" else next(results)


INITIALIZER = """
    import threading
    from safepool import ProcessPool
    from safepool.pool.shell import loop


    class Waits:
        def __reduce__(self):
            threading.Event().wait()


    def start():
        return WAITS


    WAITS = Waits()
    loop._REST_S = 0.2
    with ProcessPool(1, initializer=start) as pool:
        future = pool.submit(abs, -1)
    print(repr(future.exception()))
"""


def test_a_closed_pool_gives_up_an_initializer_that_never_goes_on() -> None:
    """What waits is a global of the script that it names."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INITIALIZER)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith(
        "PoolBrokenError('the pool was closed, and the pickling of the init"
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_job_that_uses_its_processor_goes_on(gate: Gate) -> None:
    working = hands.Hands("safepool-test", lambda: None, 2)
    assert working.do(lambda: gate.event.wait(30) and None, lambda: None, 0.0) is not None
    wait_until(lambda: working.rests_since() == working.rests_since() > 0)
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            pass

    assert working.do(spin, lambda: None, 0.0) is not None
    since = working.rests_since()
    wait_until(lambda: working.rests_since() > since)
    ended.set()
    gate.open()
    working.close()


class AsksThePool:
    """Calls the pool when it is pickled."""

    def __init__(self, pool: ProcessPool) -> None:
        self.pool = pool

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (self.pool.submit(abs, -5).result(timeout=30),)


def test_pickling_may_wait_for_the_pool_itself() -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(abs, AsksThePool(pool)).result(timeout=30) == 5
        assert list(pool.map(abs, [AsksThePool(pool), -1])) == [5, 1]


class EqualToAll(type):
    """Code of a metaclass, which runs wherever classes are compared."""

    def __eq__(cls, other: object) -> bool:
        return True

    __hash__ = type.__hash__


class Equal(metaclass=EqualToAll):
    pass


def test_items_of_a_class_that_is_equal_to_all_others_are_sent() -> None:
    with ProcessPool(1) as pool:
        assert [*pool.map(callable, [Equal(), Equal()])] == [False, False]
        assert pool.submit(callable, Equal()).result(60) is False


class EndsThePool(AsksThePool):
    def __reduce__(self) -> tuple[Any, ...]:
        self.pool.shutdown()
        return int, (3,)


def test_pickling_may_shut_the_pool_down() -> None:
    pool = ProcessPool(1)
    assert pool.submit(abs, EndsThePool(pool)).result(timeout=30) == 3
    pool.shutdown()


def test_an_initializer_whose_pickling_waits_keeps_no_worker_that_is_there(gate: Gate) -> None:
    """The second worker needs it again; the first goes on."""

    class Second:
        times = 0

        def __reduce__(self) -> tuple[Any, ...]:
            Second.times += 1
            if Second.times > 1:
                gate.reached.set()
                gate.event.wait(30)
            return int, (1,)

    with ProcessPool(2, initializer=abs, initargs=(Second(),)) as pool:
        assert pool.submit(abs, -1).result(timeout=30) == 1
        long = [pool.submit(time.sleep, 0.2) for _ in range(4)]
        assert gate.reached.wait(30)
        assert pool.submit(abs, -2).result(timeout=30) == 2
        gate.open()
        assert [future.result(timeout=30) for future in long] == [None] * 4


def test_an_initializer_whose_pickling_takes_a_moment_and_fails_breaks_the_pool() -> None:
    """It is not pickled again and again: once by submit, then once by the scheduler's hands."""

    class Fails:
        times = 0

        def __reduce__(self) -> tuple[Any, ...]:
            Fails.times += 1
            time.sleep(0.02)  # longer than the scheduler waits for it
            raise ValueError("no")

    with ProcessPool(1, initializer=abs, initargs=(Fails(),)) as pool:
        error = pool.submit(abs, -1).exception(timeout=30)

    assert type(error).__name__ == "PoolBrokenError"
    assert isinstance(error.__cause__, ValueError)
    assert Fails.times == 2


def test_calls_begin_in_their_order_also_when_pickling_takes_a_moment() -> None:
    class Slow:
        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self) -> tuple[Any, ...]:
            time.sleep(0.02)
            return int, (self.number,)

    with ProcessPool(1, initializer=tasks.remember_order) as pool:
        given = [Slow(n) if n % 3 else n for n in range(12)]
        futures = [pool.submit(tasks.note_order, n) for n in given]
        assert [future.result(timeout=30) for future in futures] == [*range(12)]
        assert pool.submit(tasks.order).result(timeout=30) == [*range(12)]


def test_a_module_may_call_a_pool_while_it_is_imported(tmp_path: Path) -> None:
    """Its function is pickled by the thread that imports it: another would wait for the import."""
    (tmp_path / "busy.py").write_text(
        textwrap.dedent(
            """
            import safepool

            class Point:
                def __init__(self, x): self.x = x

            def double(point): return 2 * point.x

            pool = None
            def call():
                global pool
                with safepool.ProcessPool(1) as pool:
                    return pool.submit(double, Point(4)).result(timeout=30)

            import multiprocessing
            if multiprocessing.parent_process() is None and __name__ == "busy":
                import os
                if not os.environ.get("BUSY"):
                    os.environ["BUSY"] = "1"
                    print(call())
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", "import busy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("8\n", 0), done.stderr


# A program in which each row's code waits where a name of the script is found out, and other calls
# are made meanwhile.
WAITING_NAMES = """
import csv, gc, os, sys, threading, warnings
import safepool

here = os.getpid() if __name__ == "__main__" else None
reached, opened = threading.Event(), threading.Event()

def wait():
    if os.getpid() == here and threading.current_thread() is not threading.main_thread():
        reached.set()
        opened.wait(60)

class Waits:
    def __reduce__(self):
        wait()
        return int, (7,)

class Lazy:
    def __getattr__(self, name):
        wait()
        raise AttributeError(name)
    @property
    def __class__(self):
        wait()
        return int
    def __reduce__(self):
        wait()
        return int, (7,)

class Meta(type):
    def __getattribute__(cls, name):
        if name == "attribute":
            wait()
        return super().__getattribute__(name)
    def __eq__(cls, other):
        wait()
        return cls is other
    def __hash__(cls):
        wait()
        return 5

class OfMeta(metaclass=Meta):
    attribute = Lazy() if here else None

class Dropped:
    def __reduce__(self):
        circle = Circle()
        del circle
        gc.collect()
        return int, (8,)

class Circle:
    def __init__(self):
        self.me = self
    def __del__(self):
        if os.getpid() == here:
            dropped.append(pool.submit(number).result(30))

class Category(UserWarning):
    sends = Waits() if here else None

dropped, value, data, pool = [], None, {"a": 1}, None

def number(): return 3
def of_data(): return data["a"]
def of_data_again(_): return data["a"]
def get_value(): return value
def get_attribute(): return OfMeta.__name__
def with_default(x=Waits() if here else None): return 1
def any_global(): return globals()["data"]["a"]

def others():
    data["a"] += 1
    asked = [pool.submit(f).result(30) for f in (number, of_data, any_global, lambda: data["a"])]
    return len({*asked[1:], *pool.map(of_data_again, [1, 2], timeout=30)}) == 1

def attempt(function, *, waits=True):
    global pool
    reached.clear(), opened.clear()
    with safepool.ProcessPool(2, main=sys.argv[1]) as pool:
        waiting = pool.submit(function)
        assert not waits or reached.wait(60)
        assert others() and others()
        assert not waiting.done() if waits else waiting.result(30)
        opened.set()
        return waiting.result(30)

def main():
    global value
    assert attempt(with_default) == 1
    value = [Waits()]
    assert attempt(get_value) == [7]
    value = None
    if sys.argv[1] == "run":
        assert attempt(get_attribute) == "OfMeta"
    value = Dropped()
    assert attempt(get_value, waits=False) == 8
    assert dropped and {*dropped} == {3}
    value = None
    warnings.simplefilter("ignore", Category)
    assert attempt(number, waits=False) == 3
    print("all")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("way", ["run", "value"])
def test_a_name_of_the_script_that_waits_delays_its_own_call(tmp_path: Path, way: str) -> None:
    """A global, a default, a class that nothing names, a finalizer, the class of a setting."""
    (tmp_path / "script.py").write_text(WAITING_NAMES)
    done = subprocess.run(
        [sys.executable, "script.py", way],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("all\n", 0), done.stderr


class WaitsOnce(Waits):
    def __reduce__(self) -> tuple[Any, ...]:
        if self.gate.reached.is_set():
            return int, (7,)
        return super().__reduce__()


def test_what_two_threads_find_out_at_once_has_one_version(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one takes over what the other has found, and keeps what is new in its own."""
    space = {"first": [1], "waits": WaitsOnce(gate, "an event"), "third": [3]}
    monkeypatch.setattr(marks, "_space", space)
    names = Names()
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(names.needed(frozenset(["first", "waits"])))
    )
    thread.start()
    assert gate.reached.wait(30)
    quick = [*names.needed(frozenset(["first", "third"]))]
    gate.open()
    thread.join(30)
    versions = {one.names: one.version for one in quick}
    later = {one.names: one.version for one in found}
    assert later[("first",)] == versions[("first",)]
    assert later.keys() | versions.keys() >= {("first",), ("waits",), ("third",)}
    both = names.needed(frozenset(space))
    assert {one.names: one.version for one in both} == later | versions


Point = namedtuple("Point", "x y")  # noqa: PYI024 -- as programs have it


class Plain:
    """Leaves its pickling to object."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


class WithDel(Plain):
    def __del__(self) -> None:
        pass


# One row per value, and whether its pickling runs nothing of the program's.
VALUES: dict[str, tuple[Callable[[], object], bool]] = {
    "numbers": (lambda: (1, 2.5, 3j, True, None), True),
    "containers": (lambda: {"a": [1, (2, {3}), frozenset({4})], b"b": bytearray(b"c")}, True),
    "an instance": (lambda: Plain([1]), True),
    "a named tuple": (lambda: Point(1, 2), True),
    "a function of a module": (lambda: tasks.square, True),
    "an exception": (lambda: ValueError("a"), True),
    "a slice": (lambda: slice(1, 2), True),
    "an instance with a finalizer": (lambda: WithDel(1), False),
    "an instance that reduces itself": (lambda: Waits(Gate(), "time"), False),
    "one within a list": (lambda: [[Waits(Gate(), "time")]], False),
    "a lambda": (lambda: VALUES["numbers"][0], False),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_the_schedulers_thread_pickles_itself(name: str) -> None:
    make, expected = VALUES[name]
    try:
        segments = trusted.dumps(make())
    except trusted.UntrustedError:
        assert not expected
        return
    assert expected
    arrived: Any = tasks.square
    if name != "a function of a module":  # which might be called to make something
        arrived = trusted.loads(segments)
    assert repr(arrived) == repr(make()) or arrived == make()


@pytest.mark.parametrize("dtype", ["float64", "i2", "U3", "datetime64[s]", "f4,i8"])
@pytest.mark.parametrize("size", [0, 3, 100_000])
def test_the_schedulers_thread_pickles_arrays_itself(dtype: str, size: int) -> None:
    """Small ones need no other thread, and large ones are pickled once."""
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(size, dtype)

    segments = trusted.dumps({"a": [array]})

    arrived: Any = trusted.loads(segments)
    assert numpy.array_equal(arrived["a"][0], array)
    assert arrived["a"][0].dtype == array.dtype
    with pytest.raises(trusted.UntrustedError):
        trusted.dumps(numpy.array([Waits(Gate(), "time")]))


def _holding(value: object) -> Callable[[], object]:
    return lambda: value


# One row per function by value, and whether its pickling runs nothing of the program's.
FUNCTIONS: dict[str, tuple[Callable[[], object], bool]] = {
    "a lambda": (lambda: VALUES, True),
    "one that holds data": (_holding({"a": [1, (2.5, None)]}), True),
    "one that holds an object": (_holding(Plain(1)), False),
    "one that holds an object deeper": (_holding([{"a": (Plain(1),)}]), False),
    "one that holds a class of the script's": (_holding(Plain), False),
    "one with a default": (lambda x=Waits: x, False),
    "a function of a module": (tasks.square, False),
    "an instance": (Plain(1), False),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_which_functions_the_schedulers_thread_pickles(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "_space", globals())
    function, expected = FUNCTIONS[name]
    assert runs_no_code(function) == expected


# What comes back: classes by value, so that this process runs what they say.
_reached, _open = threading.Event(), threading.Event()


def _wait_here(value: int) -> int:
    """Wait in the program; in a worker nothing sets the events, nor waits for them."""
    if threading.current_thread().name.startswith("safepool-unpickler"):
        _reached.set()
        _open.wait(30)
    return value


@pytest.fixture
def door() -> Iterator[threading.Event]:
    _reached.clear()
    _open.clear()
    yield _open
    _open.set()


def test_a_result_whose_unpickling_waits_delays_its_own_call(door: threading.Event) -> None:
    with ProcessPool(1) as pool:
        waiting = pool.submit(tasks.Returned, _wait_here, 7)
        assert _reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        assert list(pool.map(abs, [-1, -2], timeout=30)) == [1, 2]
        assert not waiting.done()
        door.set()
        assert waiting.result(timeout=30) == 7


def test_results_of_a_map_may_wait_as_well(door: threading.Event) -> None:
    with ProcessPool(2) as pool:
        results = pool.map(tasks.Returned, [_wait_here] * 2, [3, 4])
        assert _reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        door.set()
        assert list(results) == [3, 4]


def test_an_exception_whose_unpickling_waits_delays_its_own_call(door: threading.Event) -> None:
    with ProcessPool(1) as pool:
        waiting = pool.submit(tasks.raise_returned, _wait_here)
        assert _reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        door.set()
        assert waiting.exception(timeout=30) is not None


def test_a_pool_that_is_killed_leaves_no_result_behind(door: threading.Event) -> None:
    """What is being unpickled when the pool ends, ends its call all the same."""
    pool = ProcessPool(1)
    waiting = pool.submit(tasks.Returned, _wait_here, 7)
    assert _reached.wait(30)
    pool.kill_workers()
    pool.shutdown()
    door.set()
    assert waiting.result(timeout=30) == 7
    wait_until(lambda: not any("safepool" in one.name for one in threading.enumerate()))


def test_a_callback_that_waits_delays_no_call_and_keeps_the_order(
    gate: Gate, tmp_path: Path
) -> None:
    called: list[int] = []
    go_on = tmp_path / "go on"
    with ProcessPool(1) as pool:

        def wait(_: object) -> None:
            gate.reached.set()
            called.append(pool.submit(abs, -5).result(timeout=30))
            gate.event.wait(30)

        first = pool.submit(tasks.wait_for, str(go_on))
        first.add_done_callback(wait)
        for number in range(3):
            pool.submit(abs, -number).add_done_callback(
                lambda future: called.append(future.result())
            )
        go_on.touch()
        assert gate.reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        gate.open()
    # All of them have been called when the pool has ended.
    assert called == [5, 0, 1, 2]


def test_a_callback_may_shut_the_pool_down() -> None:
    pool = ProcessPool(1)
    ended = threading.Event()
    future = pool.submit(time.sleep, 0.1)
    future.add_done_callback(lambda _: (pool.shutdown(), ended.set()))
    assert ended.wait(30)
    pool.shutdown()


class WaitingHandler(logging.Handler):
    """Asks the pool, and waits, for each record."""

    def __init__(self, pool: ProcessPool, gate: Gate) -> None:
        super().__init__()
        self.pool, self.gate, self.said = pool, gate, []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.getMessage(), self.pool.submit(abs, -5).result(timeout=30)))
        self.gate.reached.set()
        self.gate.event.wait(30)


def test_a_handler_of_log_records_that_waits_delays_no_call(gate: Gate) -> None:
    logger = logging.getLogger("support.waiting")
    with ProcessPool(1) as pool:
        handler = WaitingHandler(pool, gate)
        logger.addHandler(handler)
        try:
            assert pool.submit(tasks.log_warning, "support.waiting", "hello").result(30) is None
            assert gate.reached.wait(30)
            assert pool.submit(abs, -1).result(timeout=30) == 1
            gate.open()
        finally:
            logger.removeHandler(handler)
    assert handler.said == [("hello", 5)]


def test_the_pools_own_words_wait_for_no_handler(gate: Gate) -> None:
    logger = logging.getLogger("safepool")
    with ProcessPool(1) as pool:
        assert pool.submit(abs, -1).result(timeout=30) == 1
        handler = WaitingHandler(pool, gate)
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)
        try:
            lost = pool.submit(tasks.be_killed)
            assert lost.exception(timeout=30) is not None
            assert gate.reached.wait(30)
            assert pool.submit(abs, -2).result(timeout=30) == 2
            gate.open()
        finally:
            logger.removeHandler(handler)
    assert "SIGKILL" in handler.said[0][0]


class Dropped:
    """Waits when it is dropped."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (2,)

    def __del__(self) -> None:
        self.gate.reached.set()
        self.gate.event.wait(30)


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="free-threaded builds run a finalizer in whichever thread collects",
)
def test_a_finalizer_of_an_argument_that_waits_delays_no_call(gate: Gate) -> None:
    with ProcessPool(1) as pool:
        future = pool.submit(abs, Dropped(gate))
        assert gate.reached.wait(30)
        assert pool.submit(abs, -1).result(timeout=30) == 1
        gate.open()
        assert future.result(timeout=30) == 2


def test_the_command_runs_no_file_of_the_current_folder(tmp_path: Path) -> None:
    """Neither in the place of a module of Python's nor of an installed library."""
    for name in ("logging", "random", "json", "pytest"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    for command in (["-m", "safepool", "--version"], ["-m", "safepool", "doctor", "pytest"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "the wrong one" not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr


class Odd:
    """What a program may put among its modules: every look at it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise TypeError(name)


class OddFinder:
    """A finder that does not keep to its contract."""

    @staticmethod
    def find_spec(*_: object) -> None:
        raise TypeError("a finder")


def test_odd_modules_of_the_program_cost_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("odd")
    module.__spec__ = Odd()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "odd", module)
    monkeypatch.setitem(sys.modules, 7, module)  # type: ignore[misc]
    with ProcessPool(1) as pool:
        assert pool.submit(tasks.square, 2).result(timeout=60) == 4
    # The rest looks for what is imported lazily.
    monkeypatch.setattr(preload, "lazy_names", lambda: ["nowhere"])
    monkeypatch.setattr(sys, "meta_path", [OddFinder])
    assert {"odd", "nowhere"}.isdisjoint(preload.modules_of_the_program())


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux's")
def test_what_fails_at_the_end_of_a_pool_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safepool.workers.context import ServerContext

    def fail(*_: object) -> None:
        raise TypeError("a hook")

    monkeypatch.setattr(ServerContext, "finish", fail)
    pool = ProcessPool(1)
    assert pool.submit(tasks.square, 2).result(timeout=60) == 4
    pool.shutdown()
    assert "the next pool's fork server preloads no modules" in caplog.text


def test_each_part_of_a_pool_is_closed_whatever_another_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []
    close = Dispatch.close

    def fail(dispatch: Dispatch) -> None:
        close(dispatch)
        raise TypeError("a part")

    monkeypatch.setattr(Dispatch, "close", fail)
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    pool = ProcessPool(1)
    assert pool.submit(tasks.square, 2).result(timeout=60) == 4
    pool.shutdown()
    assert [str(error) for error in told] == ["a part"]
