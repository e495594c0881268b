"""The same program gives the same answers with the standard pool and with ours."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import multiprocessing
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import wait_until

import safepool
from safepool import ProcessPool
from safepool.pool.shell.hiring import Hiring

if TYPE_CHECKING:
    from pathlib import Path

    from safepool.pool.shell.worker import Worker

PoolType = Callable[..., Executor]

both = pytest.mark.parametrize("pool_type", [ProcessPoolExecutor, ProcessPool])


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


@pytest.mark.parametrize(
    ("standard", "ours"),
    [
        (ProcessPoolExecutor, ProcessPool),
        (concurrent.futures.ThreadPoolExecutor, safepool.ThreadPool),
        (multiprocessing.Pool, safepool.Pool),
    ],
)
def test_the_end_of_a_block_returns_what_the_standard_one_does(standard: Any, ours: Any) -> None:
    """Code that calls ``__exit__`` itself may look at it."""
    assert ours(1).__exit__(None, None, None) is standard(1).__exit__(None, None, None)


# One row per way a task can end: what runs, and what its caller must catch.
ENDINGS: dict[str, tuple[Callable[[], object], type[BaseException]]] = {
    "an exception": (tasks.raise_value_error, ValueError),
    "sys.exit": (tasks.exit_with_3, SystemExit),
    "os._exit": (tasks.end_without_cleanup, BrokenProcessPool),
    "SIGKILL": (tasks.be_killed, BrokenProcessPool),
    "a result that cannot be pickled": (tasks.return_lock, TypeError),
}


@both
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_except_clause_works(pool_type: PoolType, ending: str) -> None:
    """Whatever the standard pool raises is caught here as well."""
    function, expected = ENDINGS[ending]

    with pool_type(1) as pool, pytest.raises(expected):
        pool.submit(function).result(timeout=30)


@both
def test_an_exception_carries_its_remote_traceback(pool_type: PoolType) -> None:
    """The cause says where in the worker it was raised."""
    with pool_type(1) as pool:
        error = pool.submit(tasks.raise_value_error, "here").exception(timeout=30)

    assert isinstance(error, ValueError)
    assert error.args == ("here",)
    assert type(error.__cause__) is _RemoteTraceback
    assert "in raise_value_error" in str(error.__cause__)


@both
def test_submit_passes_every_argument(pool_type: PoolType) -> None:
    with pool_type(1) as pool:
        assert pool.submit(tasks.add, 1, 2, more=3).result(timeout=30) == 6


@both
def test_keywords_named_like_submits_own_reach_the_function(pool_type: PoolType) -> None:
    """``fn`` and ``self`` are positional-only."""
    with pool_type(1) as pool:
        assert pool.submit(dict, fn=1, self=2).result(timeout=30) == {"fn": 1, "self": 2}


@both
@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map_keeps_the_order(pool_type: PoolType, chunksize: int) -> None:
    with pool_type(2) as pool:
        found = list(pool.map(pow, range(10), range(2, 20), chunksize=chunksize))

    assert found == [n ** (n + 2) for n in range(10)]


@both
@pytest.mark.parametrize("chunksize", [1, 2])
def test_map_calls_the_submit_of_a_subclass(pool_type: PoolType, chunksize: int) -> None:
    """A subclass wraps or counts what goes through ``submit``."""
    seen: list[object] = []

    class Counting(pool_type):  # type: ignore[misc,valid-type]
        def submit(self, fn: Callable[..., object], /, *args: object, **more: object) -> object:
            seen.append(fn)
            return super().submit(fn, *args, **more)

    with Counting(1) as pool:
        found = list(pool.map(pow, [2, 3], [5, 2], chunksize=chunksize))

    assert found == [32, 9]
    assert seen


@both
def test_map_raises_when_the_turn_comes(pool_type: PoolType) -> None:
    with pool_type(1) as pool:
        results = pool.map(divmod, [5, 5, 5], [2, 0, 3])
        assert next(results) == (2, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)


@both
def test_map_times_out(pool_type: PoolType, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with pool_type(1) as pool:
        results = pool.map(tasks.wait_for, [str(tmp_path), str(gate)], timeout=0.5)
        with pytest.raises(TimeoutError):
            list(results)
        gate.touch()


# One row per argument that is refused: how the pool is made or used, and the error.
REFUSED: dict[str, tuple[Callable[[PoolType], object], type[Exception], str]] = {
    "no workers": (lambda new: new(0), ValueError, "max_workers must be greater than 0"),
    "fewer than none": (lambda new: new(-1), ValueError, "max_workers must be greater than 0"),
    "initializer": (lambda new: new(1, initializer=3), TypeError, "must be a callable"),
    "max tasks 0": (lambda new: new(1, max_tasks_per_child=0), ValueError, "must be >= 1"),
    "max tasks 1.5": (lambda new: new(1, max_tasks_per_child=1.5), TypeError, "an integer"),
    "chunksize": (lambda new: new(1).map(abs, [1], chunksize=0), ValueError, "must be >= 1"),
}


@both
@pytest.mark.parametrize("argument", REFUSED)
def test_bad_arguments_are_refused_alike(pool_type: PoolType, argument: str) -> None:
    use, error, words = REFUSED[argument]

    with pytest.raises(error, match=words):
        use(pool_type)


@both
def test_a_shut_down_pool_takes_no_more(pool_type: PoolType) -> None:
    pool = pool_type(1)
    pool.shutdown()
    pool.shutdown()  # again is fine

    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(abs, 1)


@both
def test_shutdown_cancels_what_has_not_begun(pool_type: PoolType) -> None:
    """With cancel_futures, queued tasks are cancelled and the running one ends well."""
    pool = pool_type(1)
    futures = [pool.submit(tasks.sleep_and_return, 0.4, n) for n in range(20)]
    while not futures[0].running():
        time.sleep(0.01)
    pool.shutdown(cancel_futures=True)

    assert futures[0].result(timeout=0) == 0
    assert futures[-1].cancelled()
    assert all(future.done() for future in futures)


@both
def test_shutdown_without_waiting_finishes_the_work(pool_type: PoolType) -> None:
    pool = pool_type(1)
    futures = [pool.submit(tasks.square, n) for n in range(20)]
    # The standard pool forgets its thread here, and so nobody could wait for its end.
    thread = getattr(pool, "_executor_manager_thread", None)
    pool.shutdown(wait=False)

    assert [future.result(timeout=30) for future in futures] == [n * n for n in range(20)]
    pool.shutdown()
    if thread is not None:
        thread.join(timeout=30)


@both
def test_a_dropped_pool_finishes_the_work(pool_type: PoolType) -> None:
    """The results come although nobody holds the pool any more."""
    pool = pool_type(1)
    futures = [pool.submit(tasks.square, n) for n in range(3)]
    results = pool.map(tasks.square, iter(range(3)))
    alive = weakref.ref(pool)
    threads = {*threading.enumerate()}
    del pool
    gc.collect()

    wait_until(lambda: alive() is None)  # its thread may look at it for a moment
    assert [future.result(timeout=30) for future in futures] == [0, 1, 4]
    assert list(results) == [0, 1, 4]
    for thread in threads - {threading.current_thread()}:
        if thread.name == "safepool-scheduler" or "Executor" in type(thread).__name__:
            thread.join(30)
            assert not thread.is_alive()


def file_that_is_closed(pool: Executor, _shut_down: object) -> list[object]:
    import io

    with io.StringIO("1\n22\n" * 1000) as lines:
        results = pool.map(len, lines)
    return [sum(results)]


def error_of_the_items(pool: Executor, _shut_down: object) -> list[object]:
    def items() -> Iterator[int]:
        yield from range(1000)
        raise KeyError("items")

    try:
        pool.map(abs, items())
    except KeyError as error:
        return [repr(error)]
    return ["no error from map()"]


def shut_down_before_the_results(pool: Executor, shut_down: Callable[[], None]) -> list[object]:
    results = pool.map(tasks.square, iter(range(1000)))
    shut_down()
    return [sum(results)]


def nobody_looks(pool: Executor, _shut_down: object) -> list[object]:
    taken: list[int] = []
    pool.map(tasks.square, (taken.append(n) or n for n in range(1000)))  # type: ignore[func-returns-value]
    return [len(taken)]


def leaving_early(pool: Executor, _shut_down: object) -> list[object]:
    first = [next(pool.map(tasks.square, iter(range(2, 1000))))]
    return [*first, pool.submit(tasks.square, 5).result(timeout=30)]


def nothing_on_a_pool_shut_down(pool: Executor, shut_down: Callable[[], None]) -> list[object]:
    shut_down()
    return [*pool.map(abs, []), *pool.map(abs)]


def something_on_a_pool_shut_down(pool: Executor, shut_down: Callable[[], None]) -> list[object]:
    shut_down()
    try:
        pool.map(abs, [1])
    except RuntimeError as error:
        return [str(error)]
    return ["no error from map()"]


def the_shortest_ends(pool: Executor, _shut_down: object) -> list[object]:
    return [*pool.map(pow, [2, 3, 4], iter([1, 2]), chunksize=5)]


MAPS = (
    file_that_is_closed,
    error_of_the_items,
    shut_down_before_the_results,
    nobody_looks,
    leaving_early,
    nothing_on_a_pool_shut_down,
    something_on_a_pool_shut_down,
    the_shortest_ends,
)


@pytest.mark.parametrize("use", MAPS, ids=lambda use: use.__name__)
def test_map_takes_its_items_as_the_standard_pool(use: Callable[..., list[object]]) -> None:
    """All before it returns: they may be gone after that, and an error is raised at once."""
    with ProcessPoolExecutor(1) as standard:
        expected = use(standard, standard.shutdown)
    with ProcessPool(1) as ours:
        assert use(ours, ours.shutdown) == expected


def test_leaving_an_endless_map_early() -> None:
    """With a buffer; the items left are not taken when the iterator is dropped."""
    import itertools

    items = itertools.count()
    with ProcessPool(1) as pool:
        for result in pool.map(tasks.square, items, buffersize=10):
            if result > 50:
                break

    assert next(items) < 30


@pytest.mark.parametrize(("buffersize", "chunksize"), [(4, 1), (2, 3)])
def test_a_buffer_counts_tasks(buffersize: int, chunksize: int) -> None:
    """So many chunks are taken ahead, as Python 3.14 does, also if nobody looks."""
    import itertools

    items = itertools.count()
    with ProcessPool(1) as pool:
        results = pool.map(tasks.square, items, buffersize=buffersize, chunksize=chunksize)
    assert next(items) == buffersize * chunksize
    # Further ones are not taken by a pool that was shut down.
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(results)


# One row per buffersize that is refused: the error, in the words of Python 3.14.
BUFFERSIZES: dict[str, tuple[object, type[Exception], str]] = {
    "0": (0, ValueError, "buffersize must be None or > 0"),
    "-1": (-1, ValueError, "buffersize must be None or > 0"),
    "text": ("foo", TypeError, "buffersize must be an integer or None"),
    "2.0": (2.0, TypeError, "buffersize must be an integer or None"),
}


@pytest.mark.parametrize("case", BUFFERSIZES)
def test_a_bad_buffersize_is_refused(pool: ProcessPool, case: str) -> None:
    value, error, words = BUFFERSIZES[case]

    with pytest.raises(error, match=words):
        pool.map(str, range(4), buffersize=value)  # type: ignore[arg-type]


@both
def test_max_tasks_per_child_counts_chunks(pool_type: PoolType) -> None:
    """A chunk is one task, so that a worker is not replaced within."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with pool_type(1, mp_context=context, max_tasks_per_child=1) as pool:
        pids = list(pool.map(tasks.pid, range(12), chunksize=6))

    assert len(set(pids[:6])) == len(set(pids[6:])) == 1
    assert pids[0] != pids[6]


def test_max_tasks_per_child_with_a_backlog() -> None:
    """The standard pool hangs here before late 3.13 (gh-115634)."""
    with ProcessPool(2, max_tasks_per_child=2) as pool:
        futures = [pool.submit(tasks.value_and_pid, n) for n in range(9)]
        found = [future.result(timeout=60) for future in futures]

    assert [value for value, _ in found] == list(range(9))
    pids = [pid for _, pid in found]
    assert max(pids.count(pid) for pid in pids) <= 2


@both
def test_fork_and_max_tasks_do_not_go_together(pool_type: PoolType) -> None:
    import multiprocessing

    with pytest.raises(ValueError, match="incompatible with the 'fork' multiprocessing start"):
        pool_type(1, mp_context=multiprocessing.get_context("fork"), max_tasks_per_child=3)


# The start methods that hand a queue to the initializer.
@both
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_an_initializer_gets_a_queue(pool_type: PoolType, method: str) -> None:
    """It can be handed to a process that starts and else to none, so it is."""
    import multiprocessing
    import warnings

    context = multiprocessing.get_context(method)
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pool_type(1, context, tasks.keep_queue, (queue,)) as pool:
            pool.submit(tasks.put_into_queue, 7).result(timeout=60)
            assert queue.get(timeout=30) == 7
    queue.close()
    queue.join_thread()


def test_an_initializer_gets_a_queue_of_the_default_context() -> None:
    from loky.backend import get_context

    queue = get_context("loky").Queue()
    with ProcessPool(1, initializer=tasks.keep_queue, initargs=(queue,)) as pool:
        pool.submit(tasks.put_into_queue, 7).result(timeout=60)
        assert queue.get(timeout=30) == 7
    queue.close()
    queue.join_thread()


@both
def test_what_nobody_can_be_handed_breaks_the_pool(pool_type: PoolType) -> None:
    """The standard pool raises it from submit(); the initializer is named either way."""
    import multiprocessing

    with (
        pool_type(
            1, multiprocessing.get_context("spawn"), tasks.keep_queue, (threading.Lock(),)
        ) as pool,
        pytest.raises((BrokenProcessPool, TypeError), match="cannot pickle"),
    ):
        pool.submit(tasks.square, 1).result(timeout=60)


@both
def test_each_future_gets_an_exception_of_its_own(pool_type: PoolType) -> None:
    with pool_type(2) as pool:
        errors = [pool.submit(tasks.raise_value_error).exception(timeout=30) for _ in range(4)]

    assert len({id(error) for error in errors}) == 4


def test_workers_keep_nothing_of_a_task() -> None:
    """Arguments, results and what an exception refers to are gone when the next task runs.

    The standard pool's workers keep the last exception.
    """
    with ProcessPool(1) as pool:
        kept = pool.submit(tasks.remember, tasks.Remembered(), fail=False)
        kept.result(timeout=30)
        failed = pool.submit(tasks.remember, tasks.Remembered(), fail=True)
        assert isinstance(failed.exception(timeout=30), ValueError)
        list(pool.map(tasks.remember, [tasks.Remembered() for _ in range(3)], [False] * 3))

        assert pool.submit(tasks.remembered).result(timeout=30) == 0


def test_a_worker_that_was_waited_for_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at ``_processes`` waits until it has one, not only until one was started."""
    start, waited = Hiring.start, []

    def started(hiring: Hiring, place: int) -> Worker:
        worker = start(hiring, place)
        waited.append(not hiring.hired.is_open)
        return worker

    monkeypatch.setattr(Hiring, "start", started)
    with ProcessPool(1) as pool:
        pool.submit(abs, -1)
        assert len(pool._processes) == 1
    assert waited == [True]


def test_live_workers_are_seen_and_can_be_waited_for() -> None:
    """``_processes`` holds processes, which tell how they ended after the pool did."""
    with ProcessPool(1) as pool:
        pid = pool.submit(tasks.pid).result(timeout=30)
        processes = pool._processes
        assert list(processes) == [pid]
        assert processes[pid].is_alive()
        with pytest.raises(AttributeError):
            pool._processes = {}  # type: ignore[misc]

    processes[pid].join(30)
    assert processes[pid].exitcode == 0
    assert pool._max_workers == 1
    ours = "safepool" if sys.platform == "linux" else "loky"
    assert pool._mp_context.get_start_method() == ours
    assert not pool._broken


@both
def test_the_initializer_runs_before_tasks_and_its_globals_last(pool_type: PoolType) -> None:
    with pool_type(1, initializer=tasks.mark, initargs=("here",)) as pool:
        assert "here" in pool.submit(tasks.marks).result(timeout=30)


@both
def test_a_failing_initializer_breaks_the_pool(pool_type: PoolType) -> None:
    """Every future ends, each with an error of its own, and the pool takes no more."""
    pool = pool_type(1, initializer=tasks.fail_to_initialize)
    # Either may be late: the pool may know of it before the third submit, or after.
    with pytest.raises(BrokenProcessPool):
        [future.result(timeout=30) for future in [pool.submit(tasks.square, n) for n in "abc"]]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            pool.submit(tasks.square, 1)
        except BrokenProcessPool:
            break
    else:
        pytest.fail("a broken pool still takes tasks")
    pool.shutdown()


@both
def test_max_tasks_per_child_replaces_workers(pool_type: PoolType) -> None:
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with pool_type(1, mp_context=context, max_tasks_per_child=3) as pool:
        pids = [pool.submit(tasks.pid).result(timeout=60) for _ in range(6)]

    assert len(set(pids)) == 2
    assert pids[0] == pids[2] != pids[3] == pids[5]


def test_run_in_executor(pool: ProcessPool) -> None:
    async def main() -> int:
        return await asyncio.get_running_loop().run_in_executor(pool, tasks.square, 7)

    assert asyncio.run(main()) == 49


def test_wait_and_as_completed(pool: ProcessPool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = pool.submit(tasks.wait_for, str(gate), "slow")
    fast = pool.submit(tasks.sleep_and_return, 0, "fast")

    first = next(concurrent.futures.as_completed([slow, fast], timeout=30))
    gate.touch()
    assert first is fast
    assert concurrent.futures.wait([slow, fast], timeout=30).not_done == set()


def test_a_callback_may_submit_and_shut_down() -> None:
    """A future's callback runs in the scheduler's thread, and may use the pool."""
    pool = ProcessPool(1)
    second: list[concurrent.futures.Future[int]] = []
    done = threading.Event()

    def use_pool(_future: object) -> None:
        second.append(pool.submit(tasks.square, 6))
        pool.shutdown(wait=True)
        done.set()

    pool.submit(tasks.square, 5).add_done_callback(use_pool)
    assert done.wait(30)
    assert second[0].result(timeout=30) == 36
    pool.shutdown()


def test_a_callback_that_raises_harms_nobody(pool: ProcessPool) -> None:
    def fail(_future: object) -> None:
        raise RuntimeError("a callback's own fault")

    first = pool.submit(tasks.square, 2)
    first.add_done_callback(fail)
    assert first.result(timeout=30) == 4
    assert pool.submit(tasks.square, 3).result(timeout=30) == 9


# One row per object that makes trouble on the way: what is submitted, and the error.
AWKWARD: dict[str, tuple[tuple[object, ...], type[BaseException], str]] = {
    "argument not picklable": ((tasks.square, threading.Lock()), TypeError, "lock"),
    "function not picklable": ((threading.Lock().acquire,), TypeError, "lock"),
    "argument raises when unpickled": (
        (tasks.square, tasks.RaisesWhenUnpickled()),
        ValueError,
        "raised by unpickling",
    ),
    "result not picklable": ((tasks.return_lock,), TypeError, "lock"),
    "result raises when unpickled": ((tasks.return_raiser,), ValueError, "raised by unpickling"),
    "exception not picklable": (
        (tasks.raise_locked,),
        ValueError,
        "^holds a lock$",
    ),
    "exception not unpicklable": (
        (tasks.raise_two_arguments,),
        tasks.TwoArguments,
        "^1 and 2$",
    ),
    "exception that is false": ((tasks.raise_false_error,), tasks.FalseError, "still an error"),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_objects_cost_one_task(pool: ProcessPool, case: str) -> None:
    """The error is on the future, names the culprit, and other tasks are untouched."""
    (function, *arguments), error, words = AWKWARD[case]
    before = pool.submit(tasks.square, 2)
    awkward = pool.submit(function, *arguments)  # type: ignore[arg-type]
    after = pool.submit(tasks.square, 3)

    with pytest.raises(error, match=words):
        awkward.result(timeout=30)
    assert (before.result(timeout=30), after.result(timeout=30)) == (4, 9)


def test_a_returned_exception_is_a_result(pool: ProcessPool) -> None:
    error = pool.submit(tasks.sleep_and_return, 0, ValueError("a value")).result(timeout=30)

    assert isinstance(error, ValueError)


def test_nothing_is_kept_alive(pool: ProcessPool) -> None:
    """Neither the pool nor its thread holds arguments or results of a finished task."""

    class Carrier:
        pass

    argument = Carrier()
    alive = weakref.ref(argument)
    result = pool.submit(tasks.sleep_and_return, 0, argument).result(timeout=30)
    returned = weakref.ref(result)
    del argument, result

    def is_gone() -> bool:
        gc.collect()
        return (alive(), returned()) == (None, None)

    wait_until(is_gone)


def test_map_over_a_buffer_is_lazy(pool: ProcessPool) -> None:
    """With buffersize, an endless iterator is read only so far ahead."""
    taken: list[int] = []

    def endless() -> Iterator[int]:
        n = 0
        while True:
            taken.append(n)
            yield n
            n += 1

    results = pool.map(tasks.square, endless(), buffersize=4)
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    assert len(taken) <= 10 + 4
    results.close()  # type: ignore[attr-defined]


def test_closures_and_lambdas(pool: ProcessPool) -> None:
    offset = 5
    assert list(pool.map(lambda x: x + offset, range(3))) == [5, 6, 7]


def test_hundreds_of_megabytes_in_both_directions_at_once() -> None:
    """Arguments and results larger than every buffer cross each other without a deadlock."""
    import numpy as np

    arrays = [np.full(5_000_000, n, dtype=np.float64) for n in range(8)]  # 40 MB each
    with ProcessPool(2) as pool:
        results = list(pool.map(tasks.sleep_and_return, [0] * 8, arrays))

    for n, result in enumerate(results):
        assert result.shape == (5_000_000,)
        assert result[0] == result[-1] == n


_level: contextvars.ContextVar[int] = contextvars.ContextVar("_level", default=0)


def level() -> int:
    return _level.get()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_have_the_values_of_context_variables() -> None:
    """Those of the program's thread: another one may fork."""
    context = multiprocessing.get_context("fork")
    found = []
    token = _level.set(3)
    try:
        for pool_type in (ProcessPoolExecutor, ProcessPool):
            with pool_type(1, mp_context=context) as pool:
                found.append(pool.submit(level).result(timeout=60))
    finally:
        _level.reset(token)

    assert found == [3, 3]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork", "loky"])
def test_every_start_method_works(method: str) -> None:
    import multiprocessing
    import warnings

    from loky.backend import get_context

    context = get_context("loky") if method == "loky" else multiprocessing.get_context(method)
    with warnings.catch_warnings():
        # Python 3.12 warns of fork with threads, which the caller has asked for here.
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPool(2, mp_context=context) as pool:
            assert list(pool.map(tasks.square, range(20))) == [n * n for n in range(20)]
            with pytest.raises(safepool.WorkerDiedError) as caught:
                pool.submit(tasks.be_killed).result(timeout=30)
            assert caught.value.exitcode == -9
            assert pool.submit(tasks.square, 4).result(timeout=30) == 16


def test_a_fork_of_the_program_is_told() -> None:
    """The child's use of the parent's pool fails at once, and does the parent no harm."""
    import os
    import warnings

    with ProcessPool(1) as pool:
        assert pool.submit(tasks.square, 2).result(timeout=30) == 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                pool.submit(tasks.square, 2)
            except RuntimeError as error:
                pool.shutdown()
                os._exit(0 if "is a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9
