"""``safepool.Pool`` beside ``multiprocessing.Pool``: the same program, the same answers.

CPython's own tests of its pool run in test_cpython_pool_suite.py.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import multiprocessing
import multiprocessing.pool
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import wait_until

import safepool
from safepool import ProcessPool, WorkerDiedError
from safepool.multiprocessing_pool import ApplyResult, IMapIterator, MapResult, Options, Pool
from safepool.pool.calls import results as map_results
from safepool.pool.calls.tasks import PoolFuture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def pool() -> Iterator[Pool]:
    with safepool.Pool(2) as made:
        yield made
    made.join()


def unpicklable() -> Any:
    return [threading.Lock()]


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def outcomes(results: Iterator[Any]) -> list[Any]:
    """Return what an iterator yields, and the type of what it raises in between."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(results))
        except StopIteration:
            return found
        except Exception as error:
            found.append(type(error))


def broken_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise OSError("no more")


# One row per program: what is done with a pool, and comes out the same with either.
PROGRAMS: dict[str, Callable[[Any], object]] = {
    "apply": lambda pool: pool.apply(int, ["ff"], {"base": 16}),
    "map": lambda pool: pool.map(tasks.square, (n for n in range(20)), 3),
    "map of nothing": lambda pool: (pool.map(abs, []), pool.map_async(abs, ()).get()),
    "starmap of any iterables": lambda pool: pool.starmap(pow, ([n, 2] for n in (3, 2))),
    "imap": lambda pool: list(pool.imap(tasks.square, range(10), chunksize=4)),
    "imap_unordered": lambda pool: sorted(pool.imap_unordered(tasks.square, iter(range(10)), 3)),
    "an error of map": lambda pool: repr(
        caught(lambda: pool.map(tasks.fail_at_three, range(9), 2))
    ),
    "its cause": lambda pool: type(caught(lambda: pool.map(tasks.fail_at_three, [3])).__cause__),
    "an error in imap": lambda pool: outcomes(pool.imap(tasks.fail_at_three, range(6))),
    "an iterator that raises": lambda pool: outcomes(pool.imap(abs, broken_after(3))),
    "one that raises in a chunk": lambda pool: outcomes(
        itertools.islice(pool.imap(abs, broken_after(5), 2), 4)
    ),
    "one that raises in map": lambda pool: repr(caught(lambda: pool.map(abs, broken_after(3)))),
    "an argument that cannot be pickled": lambda pool: str(
        caught(lambda: pool.apply(abs, [threading.Lock()]))
    ),
    "a timeout of get": lambda pool: type(
        caught(lambda: pool.apply_async(time.sleep, [0.2]).get(timeout=0))
    ),
    "a timeout of next": lambda pool: outcomes_of_next(pool.imap(time.sleep, iter([0.3]))),
    "not ready": lambda pool: caught(pool.apply_async(time.sleep, [0.2]).successful).args[0][-9:],
    "no iterable": lambda pool: str(caught(lambda: pool.map(abs, 5))),
    "arguments that are text": lambda pool: pool.apply(max, "ab"),  # type: ignore[arg-type]
    "a chunk of no items": lambda pool: str(caught(lambda: pool.imap_unordered(abs, [1], 0))),
    "repr": lambda pool: repr(pool).partition(".Pool ")[2],
    "pickled": lambda pool: repr(caught(lambda: pickle.dumps(pool))),
    "joined too early": lambda pool: repr(caught(pool.join)),
    "what it is": lambda pool: isinstance(pool, multiprocessing.pool.Pool),
    "its workers": lambda pool: (len(pool._pool), pool._processes, pool._pool[0].is_alive()),
}


def outcomes_of_next(results: Any) -> list[Any]:
    first = type(caught(lambda: results.next(timeout=0.01)))
    return [first, results.next(timeout=60), type(caught(lambda: results.next(timeout=1)))]


def test_a_program_cannot_tell_it_from_the_standard_pool(pool: Pool) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as standard:
        found = {name: run(pool) for name, run in PROGRAMS.items()}
        expected = {name: run(standard) for name, run in PROGRAMS.items()}
    standard.join()
    assert found == expected


# One row per wrong use: with either pool the same error, in the same words.
REFUSED: dict[str, Callable[[Any], object]] = {
    "no processes": lambda make: make(0),
    "no tasks": lambda make: make(1, maxtasksperchild=0),
    "half a task": lambda make: make(1, maxtasksperchild=0.5),
    "initializer": lambda make: make(1, initializer=3),
}


@pytest.mark.parametrize("use", REFUSED)
def test_wrong_arguments_are_refused_in_the_same_words(use: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours = caught(lambda: REFUSED[use](safepool.Pool))
    standard = caught(lambda: REFUSED[use](spawn.Pool))
    assert type(ours) is type(standard)
    assert str(standard) in str(ours)


def test_an_argument_that_is_no_tuple_of_arguments_is_told_what_is(pool: Pool) -> None:
    given: Any = 5
    with pytest.raises(TypeError, match=r"args must be a tuple, not 5 .* mean args=\(5,\)\?"):
        pool.apply(abs, given)
    with pytest.raises(TypeError, match="args must be a tuple, not None"):
        pool.apply_async(abs, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"kwds must be a dict of keyword arguments, not 5"):
        pool.apply(abs, (), given)
    for method in (pool.map, pool.starmap, pool.imap, pool.imap_unordered):
        for wrong, meant in (("2", "2"), (2.0, "2"), (1.5, "")):
            with pytest.raises(TypeError, match=f"chunksize must be an integer.*{meant}"):
                method(abs, [], wrong)  # type: ignore[operator]


def test_every_argument_of_a_process_pool_is_taken_by_name() -> None:
    parameters = inspect.signature(ProcessPool).parameters
    ours = {*parameters} - {"max_workers", "mp_context", "initializer", "initargs"}
    assert set(Options.__annotations__) == ours - {"max_tasks_per_child"}
    with pytest.raises(TypeError, match=r"Pool\(\) got .* 'n_jobs': did you mean processes=\?"):
        safepool.Pool(n_jobs=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="retries"):
        safepool.Pool(1, retries="many")  # type: ignore[arg-type]
    with safepool.Pool(1, env={"ANSWER": "42"}) as pool:
        assert pool.apply(os.getenv, ["ANSWER"]) == "42"


def test_it_has_as_many_workers_as_fit() -> None:
    with safepool.Pool() as pool:
        assert pool._processes == pool.size == safepool.cpu_count()


def test_a_killed_worker_costs_its_call_and_nothing_hangs(pool: Pool) -> None:
    """The standard pool's caller waits for ever."""
    killed: list[Any] = []
    lost = pool.apply_async(os._exit, [3], error_callback=killed.append)
    with pytest.raises(WorkerDiedError):
        lost.get(timeout=60)
    assert [type(error) for error in killed] == [WorkerDiedError]
    with pytest.raises(WorkerDiedError):
        pool.map(die_at, range(6))
    results = outcomes(pool.imap(die_at, range(6)))
    assert results == [0, 1, 2, WorkerDiedError, 4, 5]
    assert pool.map(abs, [-1]) == [1]


def die_at(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_result_that_cannot_be_pickled_is_told_in_the_standard_words(pool: Pool) -> None:
    for call in (lambda: pool.apply(unpicklable), lambda: next(pool.imap(any_of, [unpicklable]))):
        error: Any = caught(call)
        assert type(error) is multiprocessing.pool.MaybeEncodingError  # type: ignore[attr-defined]
        assert str(error).startswith("Error sending result: '[<unlocked _thread.lock object at ")
        assert "cannot pickle" in error.exc
        assert any("while the result of " in note for note in error.__notes__), error.__notes__


def any_of(function: Callable[[], Any]) -> Any:
    return function()


@pytest.mark.parametrize("ended", [False, True])
def test_callbacks_come_before_the_result(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """Also those of calls that have ended before their result is made."""
    add = PoolFuture.add_done_callback

    def add_at_the_end(self: PoolFuture, fn: Callable[[Any], object]) -> None:
        self.exception(60)
        add(self, fn)

    if ended:
        monkeypatch.setattr(PoolFuture, "add_done_callback", add_at_the_end)
    found: list[Any] = []
    rows: list[tuple[Callable[..., ApplyResult[Any]], Any, Any]] = [
        (pool.apply_async, [-3], 3),
        (pool.map_async, [-1, 2], [1, 2]),
        (pool.starmap_async, [(-4,)], [4]),
    ]
    for begin, given, expected in rows:
        begin(abs, given, callback=found.append).wait()
        assert found.pop() == expected
    for start, arguments in ((pool.apply_async, [3]), (pool.map_async, [3, 1])):
        result: Any = start(tasks.fail_at_three, arguments, error_callback=found.append)
        error = caught(lambda result=result: result.get(timeout=60))  # type: ignore[misc]
        assert found.pop() is error
        assert result.ready()
        assert not result.successful()


def test_a_callback_may_use_the_pool(pool: Pool) -> None:
    done = threading.Event()
    inner: list[int] = []

    def again(value: int) -> None:
        inner.append(pool.apply(abs, [-value - 1]))
        done.set()

    pool.apply_async(abs, [-1], callback=again)
    assert done.wait(60)
    assert inner == [2]


def test_a_callback_that_raises_keeps_nobody_waiting(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """The standard pool's thread ends with it, and every later call waits for ever."""

    def wrong(_: object) -> None:
        raise RuntimeError("wrong")

    assert pool.apply_async(abs, [-1], callback=wrong).get(timeout=60) == 1
    assert pool.apply(abs, [-2]) == 2
    wait_until(lambda: "exception calling callback" in caplog.text)


def test_results_tell_how_many_chunks_are_left(pool: Pool, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    result = pool.map_async(partial(wait_until_there, go_on), range(10), chunksize=5)
    assert isinstance(result, MapResult)
    assert (result._number_left, result._chunksize, result.ready()) == (2, 5, False)
    go_on.touch()
    assert result.get() == [*range(10)]
    assert result._number_left == 0


def wait_until_there(path: Path, number: int) -> int:
    while not path.exists():
        time.sleep(0.005)
    return number


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_items_may_be_made_of_results(method: str, pool: Pool) -> None:
    """Each is sent before the next is waited for."""
    items: queue.Queue[int | None] = queue.Queue()
    items.put(0)
    found = []
    for value in getattr(pool, method)(abs, iter(items.get, None)):
        found.append(value)
        items.put(value + 1 if value < 5 else None)
    assert found == [0, 1, 2, 3, 4, 5]


def test_an_iterator_without_an_end_is_taken_as_it_is_read(pool: Pool) -> None:
    """And no further when it is left."""
    taken = itertools.count()
    results = pool.imap(abs, taken)
    assert [next(results) for _ in range(10)] == [*range(10)]
    assert isinstance(results, IMapIterator)
    results.close()
    wait_until(lambda: not pool._feeders)
    assert next(results, None) is None


def test_closing_takes_all_items_and_joining_waits_for_them(tmp_path: Path) -> None:
    with safepool.Pool(2) as pool:
        unread = pool.imap(touch, ((tmp_path, n) for n in range(50)))
        pool.imap_unordered(touch, ((tmp_path, n) for n in range(50, 60)))
        pool.close()
        pool.join()
        assert len([*tmp_path.iterdir()]) == 60
        assert list(unread) == [*range(50)]
        with pytest.raises(ValueError, match="Pool not running"):
            pool.apply_async(abs, [1])


def touch(where: tuple[Path, int]) -> int:
    (where[0] / str(where[1])).touch()
    return where[1]


def test_leaving_the_block_ends_what_runs_and_whoever_waits_is_told() -> None:
    """The standard pool's results are never ready then."""
    called: list[Any] = []
    with safepool.Pool(1) as pool:
        results = [
            pool.apply_async(
                time.sleep, [600], callback=called.append, error_callback=called.append
            )
            for _ in range(3)
        ]
        mapped = pool.map_async(time.sleep, [600] * 3)
        iterated = pool.imap(time.sleep, [600] * 3)
        wait_until(lambda: any(worker.task for worker in pool.workers()))
    errors = [type(caught(lambda one=one: one.get(timeout=60))) for one in [*results, mapped]]  # type: ignore[misc]
    assert errors[0] is WorkerDiedError
    assert {error.__name__ for error in errors[1:]} == {"CancelledError"}
    assert "terminated" in str(caught(lambda: next(iterated)))
    assert called == []
    with pytest.raises(ValueError, match="Pool not running"), pool:
        pass


@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_pool_that_ends_while_an_item_is_made_cancels_its_call(method: str, before: int) -> None:
    """Also the first one's; and whoever goes on after the error comes to an end."""
    goes_on = threading.Event()

    def items() -> Iterator[int]:
        yield from range(before)
        goes_on.wait()
        yield before
        raise AssertionError("nobody wants more")

    with safepool.Pool(1) as pool:
        results = getattr(pool, method)(abs, items())
        found = {next(results) for _ in range(before)}
    goes_on.set()
    wait_until(lambda: not pool._feeders)

    assert found == {*range(before)}
    assert "terminated before" in str(caught(lambda: next(results)))
    assert next(results, None) is None


def test_a_broken_pool_says_why_to_an_iterator() -> None:
    with safepool.Pool(1, initializer=int, initargs=["x"]) as pool:
        wait_until(lambda: bool(pool._engine._broken))
        results = pool.imap(abs, iter([1]))
        assert isinstance(caught(lambda: next(results)), BrokenProcessPool)
        assert next(results, None) is None


def test_a_pool_is_derived_from_as_libraries_do() -> None:
    """As schwimmbad's, which waits with a timeout, so that Ctrl-C is heard."""

    class MultiPool(safepool.Pool):
        def __init__(self, processes: int, initializer: Any = None, initargs: Any = ()) -> None:
            super().__init__(processes, partial(call_if, initializer), initargs)
            self.size = self._processes

        def map(
            self, func: Any, iterable: Any, chunksize: Any = None, callback: Any = None
        ) -> Any:
            result = self.map_async(func, iterable, chunksize=chunksize, callback=callback)
            while True:
                try:
                    return result.get(3600)
                except multiprocessing.TimeoutError:
                    pass

    told: list[Any] = []
    with MultiPool(2) as pool:
        assert pool.map(tasks.square, range(4), callback=told.append) == [0, 1, 4, 9]
        assert (pool.size, told) == (2, [[0, 1, 4, 9]])
        pool.size = 7
        assert (pool.size, pool._processes) == (7, 2)


def call_if(function: Callable[..., object] | None, *arguments: object) -> None:
    if function is not None:
        function(*arguments)


def test_a_chunk_is_a_task_of_a_worker_that_is_replaced() -> None:
    with safepool.Pool(2, maxtasksperchild=1) as pool:
        assert len(set(pool.map(pid_of, range(4), chunksize=1))) == 4
        # In eight chunks as the standard pool's, of which two workers may share one.
        assert len(set(pool.map(pid_of, range(40)))) < 20


def pid_of(_: int) -> int:
    return os.getpid()


def test_workers_are_there_before_a_call_if_they_are_asked_for(tmp_path: Path) -> None:
    """By an initializer, which may be all that they do, or by who looks at them."""
    with safepool.Pool(2, initializer=touch_own, initargs=[tmp_path]):
        wait_until(lambda: len([*tmp_path.iterdir()]) == 2)
    with safepool.Pool(2) as pool:
        pids = [process.pid for process in pool._pool]
        assert len(set(pids)) == 2
        assert set(pool.map(pid_of, range(20))) <= {*pids}
        assert [process.pid for process in pool._pool] == pids


def touch_own(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def test_a_dropped_pool_warns_and_its_calls_end(tmp_path: Path) -> None:
    held = [safepool.Pool(1)]
    held[0].imap(touch, iter([(tmp_path, 5)]))
    wait_until(lambda: not held[0]._feeders)
    result = held[0].map_async(touch, [(tmp_path, n) for n in range(5)])
    again = held[0].apply_async(touch, [(tmp_path, 6)])

    def drop() -> None:
        held.clear()
        assert result.get(timeout=60) == [*range(5)]  # they hold the pool until then
        assert again.get(timeout=60) == 6
        gc.collect()

    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool <safepool"):
        drop()
    wait_until(lambda: len([*tmp_path.iterdir()]) == 7)


SCRIPT = """
import time
from multiprocessing import Manager
import safepool

def write(queue, shard):
    for number in range(3):
        queue.put((shard, number))
    return shard

def flat(pool, shards):
    # As datasets.Dataset.map(num_proc=) does.
    pids = {process.pid for process in pool._pool}
    with Manager() as manager:
        queue = manager.Queue()
        results = [pool.apply_async(write, (queue, shard)) for shard in shards]
        while not (all(result.ready() for result in results) and queue.empty()):
            assert {process.pid for process in pool._pool} == pids
            while not queue.empty():
                yield queue.get()
        assert [result.get(timeout=0.05) for result in results] == shards

if __name__ == "__main__":
    with safepool.Pool(2) as pool:
        print(sorted(flat(pool, [0, 1, 2])))
    left = safepool.Pool(1)
    left.apply_async(time.sleep, (600,))  # and nobody closes it: as the standard pool's, it ends
"""


def test_a_script_with_a_managers_queue_and_a_pool_that_is_left_open(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == f"{[(shard, n) for shard in range(3) for n in range(3)]}\n", done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("end", ["join", "terminate"])
def test_what_is_ahead_of_its_reader_ends_with_the_pool(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining takes all items, though nobody reads; terminating takes none."""
    monkeypatch.setattr(map_results, "_MOST_AHEAD", 4)
    with safepool.Pool(1) as pool:
        items = iter(range(500)) if end == "join" else itertools.count()
        results = pool.imap(abs, items)
        assert next(results) == 0
        if end == "join":
            pool.close()
            pool.join()
            assert [*results] == [*range(1, 500)]
        else:
            pool.terminate()
            wait_until(lambda: not pool._feeders)
            results.close()
