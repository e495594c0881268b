"""Coroutines await calls: nothing blocks their loop, and one that is cancelled ends its call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any

import pytest
import support_coroutines as coroutines
import support_inside as inside
import support_tasks as tasks
from support_processes import wait_until

from safepool import PoolBrokenError, ProcessPool, WorkerDiedError
from safepool.pool.shell.hiring import Hiring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

    # Runs a coroutine in a new event loop.
    Run = Callable[[Coroutine[Any, Any, Any]], Any]


with contextlib.suppress(ImportError):
    import uvloop

    # It keeps a pipe for its first loop's signals, which is no leak of the first test.
    uvloop.new_event_loop().close()


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def run_in_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    try:
        uvloop = pytest.importorskip("uvloop")
    except BaseException:
        main.close()
        raise
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def run_in_anyio(main: Coroutine[Any, Any, Any]) -> Any:
    try:
        anyio = pytest.importorskip("anyio")
    except BaseException:
        main.close()
        raise

    async def wait() -> Any:
        return await main

    return anyio.run(wait, backend="asyncio")


LOOPS: dict[str, Run] = {"asyncio": asyncio.run, "uvloop": run_in_uvloop, "anyio": run_in_anyio}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    return LOOPS[request.param]


async def until(is_so: Callable[[], object]) -> None:
    """Return when it is so; fail if it never is."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "not within the time"
        await asyncio.sleep(0.002)


def runs(pool: ProcessPool, name: str) -> bool:
    """Tell whether a worker runs a call of a function, or is not through with its end."""
    return any(name in (worker.task or "") for worker in pool.workers())


def test_a_call_returns_and_raises(pool: ProcessPool, run: Run) -> None:
    async def main() -> None:
        assert await pool.run(tasks.square, 3) == 9
        assert await pool.run(tasks.add, 1, 2, more=3) == 6
        assert await asyncio.gather(*[pool.run(tasks.square, n) for n in range(50)]) == [
            n * n for n in range(50)
        ]
        with pytest.raises(ValueError, match="on purpose"):
            await pool.run(tasks.raise_value_error)
        with pytest.raises(WorkerDiedError):
            await pool.run(tasks.be_killed)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await pool.run(next, iter(()))

    run(main())


def test_a_coroutine_that_is_cancelled_ends_the_call_that_runs(
    pool: ProcessPool, run: Run, tmp_path: Path
) -> None:
    """By whatever: a time that is over, another child of its group, cancel() itself."""

    async def hang(name: str) -> None:
        await pool.run(tasks.touch_and_sleep, str(tmp_path / name), 600)

    async def fail(name: str) -> None:
        await until((tmp_path / name).exists)
        raise KeyError(name)

    async def expire(limit: asyncio.Timeout, name: str) -> None:
        await until((tmp_path / name).exists)
        limit.reschedule(0)

    async def main() -> None:
        me = asyncio.current_task()
        assert me is not None
        over = False
        try:
            async with asyncio.timeout(None) as limit:
                asyncio.get_running_loop().create_task(expire(limit, "timeout"))
                await hang("timeout")
        except TimeoutError:
            over = True
        assert over
        assert me.cancelling() == 0
        caught: list[type] = []
        try:
            async with asyncio.TaskGroup() as children:
                child = children.create_task(hang("group"))
                children.create_task(fail("group"))
        except* KeyError as errors:
            caught = [*map(type, errors.exceptions)]
        assert caught == [KeyError]
        assert child.cancelled()
        alone = asyncio.create_task(hang("alone"))
        await until((tmp_path / "alone").exists)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        await until(lambda: not runs(pool, "touch_and_sleep"))
        assert await pool.run(tasks.square, 2) == 4

    run(main())


def test_a_call_that_has_not_begun_is_dropped(pool: ProcessPool, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"

    async def main() -> None:
        begun = [tmp_path / str(n) for n in range(2)]
        busy = [
            asyncio.create_task(pool.run(tasks.touch_and_wait_for, str(path), str(gate)))
            for path in begun
        ]
        await until(lambda: all(path.exists() for path in begun))
        workers = {worker.pid for worker in pool.workers()}
        waiting = [asyncio.create_task(pool.run(tasks.log, str(log), n)) for n in range(9)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        await asyncio.wait(waiting[::2])
        # Before the workers go on, the scheduler has done what it was brought: it looks there when
        # it has done what it has found there before.
        for _ in range(2):
            pool.cancel(pool.submit(tasks.pid), kill=True)
            await until(lambda: inside.has_taken_all_in(pool))
        gate.touch()
        await asyncio.gather(*busy)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [result for result in results if isinstance(result, int)] == [1, 3, 5, 7]
        assert sorted(map(int, log.read_text().split())) == [1, 3, 5, 7]
        assert {worker.pid for worker in pool.workers()} == workers

    asyncio.run(main())


def test_what_the_pool_drops_is_no_cancellation_of_the_coroutine() -> None:
    """A group of tasks would pass over one of asyncio's without a word."""

    async def main() -> None:
        pool = ProcessPool(1)
        running = asyncio.create_task(pool.run(time.sleep, 600))
        waiting = asyncio.create_task(pool.run(tasks.square, 3))
        await until(lambda: runs(pool, "sleep"))
        pool.kill_workers()
        with pytest.raises(futures.CancelledError):
            await waiting
        with pytest.raises((WorkerDiedError, futures.CancelledError)):
            await running
        with pytest.raises(RuntimeError, match="after shutdown"):
            await pool.run(tasks.square, 3)
        async with pool:
            pass

    asyncio.run(main())


async def counted(count: int, then: BaseException | None = None) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(0)
        yield number
    if then is not None:
        raise then


class FalseIterator:
    """With as many items left as it says."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.items:
            raise StopIteration
        return self.items.pop(0)

    def __bool__(self) -> bool:
        return False


def test_results_come_in_order_and_as_calls_end(pool: ProcessPool, run: Run) -> None:
    async def main() -> None:
        squares = [n * n for n in range(300)]
        for items in (range(300), iter(range(300)), counted(300)):
            assert [result async for result in pool.amap(tasks.square, items)] == squares
        for options in ({"chunksize": 7}, {"buffersize": 3}, {"buffersize": 1, "chunksize": 4}):
            found = [r async for r in pool.amap(tasks.square, counted(300), **options)]
            assert found == squares
            found = [r async for r in pool.amap(tasks.square, range(300), **options)]
            assert found == squares
        assert {r async for r in pool.amap(tasks.square, range(300), ordered=False)} == {*squares}
        pairs = pool.amap(tasks.add, counted(3), range(10, 20))
        assert [result async for result in pairs] == [10, 12, 14]
        pairs = pool.amap(tasks.add, counted(3), FalseIterator([10, 11, 12]))
        assert [result async for result in pairs] == [10, 12, 14]
        assert [result async for result in pool.amap(tasks.square, [])] == []
        assert [result async for result in pool.amap(tasks.square, counted(0))] == []

    run(main())


def test_an_error_comes_in_its_turn_and_the_next_results_after_it(pool: ProcessPool) -> None:
    async def main() -> None:
        for items in (["1", "x", "3"], counted_words()):
            results = pool.amap(int, items)
            assert await anext(results) == 1
            with pytest.raises(ValueError, match="invalid literal"):
                await anext(results)
            assert [result async for result in results] == [3]
        found = [r async for r in pool.amap(int, ["1", "x"], return_exceptions=True)]
        assert found[0] == 1
        assert isinstance(found[1], ValueError)
        # Neither ends the loop as if there were no more.
        for error in (StopIteration, StopAsyncIteration):
            with pytest.raises(RuntimeError):
                [_ async for _ in pool.amap(coroutines.throw, [error])]
        # The items' own errors come after the results of those before.
        for broken in (ValueError("items"), asyncio.CancelledError("items")):
            results = pool.amap(tasks.square, counted(2, broken))
            assert [await anext(results) for _ in range(2)] == [0, 1]
            with pytest.raises(type(broken), match="items"):
                await anext(results)

    asyncio.run(main())


async def counted_words() -> AsyncIterator[str]:
    for word in ("1", "x", "3"):
        yield word


def test_items_are_taken_as_results_are(pool: ProcessPool) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        for number in range(10**9):
            taken.append(number)
            yield number

    async def endless_there() -> AsyncIterator[int]:
        for number in endless():
            yield number

    async def main() -> None:
        for make in (endless, endless_there):
            for ahead, options in (
                (4, {"buffersize": 4}),
                (1024, {}),
                (6, {"chunksize": 3, "buffersize": 2}),
            ):
                taken.clear()
                results = pool.amap(tasks.square, make(), **options)
                for number in range(50):
                    assert await anext(results) == number * number
                    assert len(taken) <= number + 1 + ahead + 1
                await results.aclose()
                count = len(taken)
                assert await pool.run(tasks.square, 2) == 4
                assert len(taken) == count
                assert [result async for result in results] == []

    asyncio.run(main())


def test_a_wait_that_is_cancelled_ends_all_that_the_map_runs(
    pool: ProcessPool, run: Run, tmp_path: Path
) -> None:
    """And ``aclose()`` does; what a map runs that is only dropped goes on."""
    begun, log = [tmp_path / str(n) for n in range(2)], tmp_path / "log"

    def hanging(source: Callable[[list[str]], Any]) -> Any:
        for path in begun:
            path.unlink(missing_ok=True)
        paths = [str(begun[n]) for n in range(2)] + [str(log)] * 50
        return pool.amap(tasks.touch_and_sleep, source(paths), [600] * len(paths))

    async def there(paths: list[str]) -> AsyncIterator[str]:
        for path in paths:
            yield path
        await asyncio.sleep(600)

    async def main() -> None:
        for source in (list, there):
            results = hanging(source)
            waiting = asyncio.ensure_future(anext(results))
            await asyncio.sleep(0)  # until it waits
            await until(lambda: all(path.exists() for path in begun))
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: not runs(pool, "touch_and_sleep"))
            assert [result async for result in results] == []
            async with contextlib.aclosing(hanging(source)):
                await until(lambda: all(path.exists() for path in begun))
            await until(lambda: not runs(pool, "touch_and_sleep"))
        assert not log.exists()

    run(main())


def test_one_that_is_left_early_drops_what_has_not_begun(
    pool: ProcessPool, tmp_path: Path
) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"

    async def main() -> None:
        begun = [tmp_path / str(n) for n in range(2)]
        others = [
            asyncio.create_task(pool.run(tasks.touch_and_wait_for, str(p), str(gate)))
            for p in begun
        ]
        await until(lambda: all(path.exists() for path in begun))
        pids = {worker.pid for worker in pool.workers()}
        results = pool.amap(tasks.log, [str(log)] * 40, range(40))
        first = asyncio.ensure_future(anext(results))
        await asyncio.sleep(0)
        gate.touch()
        await first
        del results, first
        gc.collect()
        await asyncio.gather(*others)
        await pool.run(tasks.square, 2)
        await until(lambda: not runs(pool, "log"))
        assert {worker.pid for worker in pool.workers()} == pids

    asyncio.run(main())


def test_coroutines_may_share_results(pool: ProcessPool, tmp_path: Path) -> None:
    async def take(results: AsyncIterator[int], found: list[int]) -> None:
        async for result in results:
            found.append(result)
            await asyncio.sleep(0)

    gate = tmp_path / "gate"

    async def main() -> None:
        found: list[int] = []
        results = pool.amap(tasks.square, counted(200))
        await asyncio.gather(*[take(results, found) for _ in range(5)])
        assert sorted(found) == [n * n for n in range(200)]
        # One is there, and two ask for it: the other does not hold up the loop.
        gated = pool.amap(tasks.wait_for, [str(gate)] * 2, ["first", "second"], buffersize=1)
        gate.touch()
        await until(gated._iterator.results.look)  # type: ignore[union-attr]
        gate.unlink()
        asked = [asyncio.ensure_future(anext(gated)) for _ in range(2)]
        assert await asked[0] == "first"
        gate.touch()
        assert await asked[1] == "second"

    asyncio.run(main())


def test_a_time_to_wait_ends_the_results(pool: ProcessPool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def main() -> None:
        results = pool.amap(tasks.wait_for, [str(gate)], timeout=0.1)
        with pytest.raises(TimeoutError):
            await anext(results)
        assert [result async for result in results] == []
        gate.touch()

    asyncio.run(main())


def test_several_loops_in_several_threads(pool: ProcessPool) -> None:
    """Also when the loop, or its thread, ends before the call."""

    async def use(number: int) -> list[int]:
        found = await asyncio.gather(*[pool.run(tasks.square, number + n) for n in range(40)])
        return found + [r async for r in pool.amap(tasks.square, range(number, number + 40))]

    with futures.ThreadPoolExecutor(4) as threads:
        results = [threads.submit(asyncio.run, use(100 * n)) for n in range(8)]
        for n, result in enumerate(results):
            expected = [x * x for x in range(100 * n, 100 * n + 40)]
            assert result.result(timeout=60) == expected * 2


def test_a_loop_that_is_closed_while_calls_run(
    pool: ProcessPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The results find nobody, and the pool goes on without a word."""
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # asyncio's word on tasks that were left
    call = pool.run(tasks.touch_and_wait_for, str(begun), str(gate))
    waiting = loop.create_task(call)
    results = loop.create_task(anext(pool.amap(tasks.wait_for, [str(gate)])))  # type: ignore[arg-type]
    loop.run_until_complete(until(begun.exists))
    loop.close()
    gate.touch()
    wait_until(lambda: not any(worker.task for worker in pool.workers()))
    assert pool.submit(tasks.square, 3).result(timeout=60) == 9
    assert not waiting.done()
    assert not results.done()
    del waiting, results, call, loop
    gc.collect()
    assert [one for one in caplog.records if one.name != "asyncio"] == []


def test_the_first_call_waits_for_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the first worker takes a server of its own, and imports."""
    went_on = threading.Event()
    prepare = Hiring.prepare

    def wait_and_prepare(hiring: Hiring) -> None:
        assert went_on.wait(60)
        prepare(hiring)

    monkeypatch.setattr(Hiring, "prepare", wait_and_prepare)

    async def main() -> None:
        async with ProcessPool(1) as pool:
            first = asyncio.ensure_future(pool.run(tasks.square, 3))
            results = pool.amap(tasks.square, [4])
            await asyncio.sleep(0)
            went_on.set()
            assert await first == 9
            assert [result async for result in results] == [16]

    asyncio.run(main())


def test_the_end_of_the_block_does_not_block_the_loop(tmp_path: Path, run: Run) -> None:
    """It waits for a call that this very loop lets go on."""
    gate, begun = tmp_path / "gate", tmp_path / "begun"

    async def let_go() -> None:
        await until(begun.exists)
        gate.touch()

    async def main() -> None:
        async with ProcessPool(1) as pool:
            future = pool.submit(tasks.touch_and_wait_for, str(begun), str(gate))
            helper = asyncio.ensure_future(let_go())
        assert future.done()
        await helper
        with pytest.raises(RuntimeError, match="after shutdown"):
            await pool.run(tasks.square, 2)

    run(main())


@pytest.mark.parametrize("where", ["in the block", "at its end"])
def test_a_block_that_is_cancelled_waits_for_no_call(where: str, run: Run, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    async def main() -> None:
        ended: list[futures.Future[Any]] = []

        async def use() -> None:
            async with ProcessPool(1) as pool:
                ended.append(pool.submit(tasks.touch_and_sleep, str(begun), 600))
                if where == "in the block":
                    await asyncio.sleep(600)

        using = asyncio.ensure_future(use())
        await until(begun.exists)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert all(future.done() for future in ended)

    run(main())


def test_a_block_that_raises_finishes_what_was_submitted(tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    async def main() -> None:
        with contextlib.suppress(KeyError):
            async with ProcessPool(1) as pool:
                future = pool.submit(tasks.wait_for, str(gate), 5)
                gate.touch()
                raise KeyError
        assert future.result(timeout=0) == 5

    asyncio.run(main())


def test_an_interrupt_ends_a_program_that_awaits(tmp_path: Path) -> None:
    """``asyncio.run()`` cancels its tasks: nobody waits for what runs."""
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "begun\n"
        program.send_signal(signal.SIGINT)
        out, errors = program.communicate(timeout=60)
    assert out == "cancelled\n"
    assert errors.strip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") <= 2  # asyncio's own, from the cancellation


INTERRUPTED = """
import asyncio, time
import safepool

async def main():
    async with safepool.ProcessPool(1) as pool:
        waiting = asyncio.ensure_future(pool.run(time.sleep, 600))
        while not any(worker.task for worker in pool.workers()):
            await asyncio.sleep(0.002)
        print("begun", flush=True)
        try:
            await waiting
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise

asyncio.run(main())
"""


def test_a_pool_that_breaks_ends_every_wait() -> None:
    async def main() -> None:
        async with ProcessPool(1, initializer=tasks.fail_to_initialize) as pool:
            results = pool.amap(tasks.square, range(3))
            with pytest.raises(PoolBrokenError):
                await pool.run(tasks.square, 3)
            with pytest.raises(PoolBrokenError):
                await anext(results)

    asyncio.run(main())


def test_a_pool_that_was_shut_down_refuses_items_of_any_kind() -> None:
    async def main() -> None:
        async with ProcessPool(1) as pool:
            pass
        for items in (range(3), counted(3)):
            with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
                pool.amap(tasks.square, items)

    asyncio.run(main())


def test_a_scope_of_anyio_is_cancelled_as_it_should(pool: ProcessPool, tmp_path: Path) -> None:
    anyio = pytest.importorskip("anyio")
    begun = tmp_path / "begun"

    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(pool.run, tasks.touch_and_sleep, str(begun), 600)
                await until(begun.exists)
                scope.cancel()
        assert scope.cancelled_caught
        with anyio.move_on_after(0) as scope:
            async for _ in pool.amap(time.sleep, [600, 600]):
                pass
        assert scope.cancelled_caught
        await until(lambda: not (runs(pool, "sleep")))

    anyio.run(main, backend="asyncio")


# A function that is a coroutine function in some way, by how it is called.
KINDS: dict[str, Callable[[int], Any]] = {
    "async def": coroutines.double,
    "a partial": functools.partial(coroutines.double),
    "a partial of more": functools.partial(coroutines.multiply, 2),
    "a decorated one": coroutines.double_decorated,
    "one of safepool.worker": coroutines.double_capped,
    "an object": coroutines.Doubler(),
    "a method": coroutines.Doubler().double,
    "types.coroutine": coroutines.double_by_generator,
    "one that returns another": coroutines.double_by_two,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_coroutine_function_runs_in_the_worker(kind: str, pool: ProcessPool) -> None:
    function = KINDS[kind]

    async def main() -> None:
        assert await pool.run(function, 4) == 8
        assert [r async for r in pool.amap(function, range(5))] == [0, 2, 4, 6, 8]

    assert pool.submit(function, 3).result(timeout=60) == 6
    assert [*pool.map(function, range(5), chunksize=2)] == [0, 2, 4, 6, 8]
    asyncio.run(main())


def test_what_can_be_awaited_and_pickled_is_a_result_as_any(pool: ProcessPool) -> None:
    assert pool.submit(coroutines.Deferred, 3).result(timeout=60).value == 3


def test_a_coroutine_raises_without_the_frames_of_its_loop(pool: ProcessPool) -> None:
    error = pool.submit(coroutines.fail, "why").exception(timeout=60)
    assert isinstance(error, ValueError)
    assert error.__context__ is None
    text = str(error.__cause__)
    assert "in fail" in text
    assert "asyncio" not in text
    assert "safepool" not in text.replace("safepool-", "")


def test_a_worker_is_as_before_after_a_coroutine() -> None:
    """Its signals, its context, and no loop that is left."""
    with ProcessPool(1) as alone:
        before = alone.submit(coroutines.look).result(timeout=60)
        assert alone.submit(coroutines.interrupt).result(timeout=60) == "went on"
        alone.submit(coroutines.set_context, 5).result(timeout=60)
        assert alone.submit(coroutines.look).result(timeout=60) == before


def test_a_coroutine_is_ended_when_its_time_is_over() -> None:
    with ProcessPool(1) as pool:
        error = pool.submit(coroutines.sleep_too_long, 600).exception(timeout=60)
        assert isinstance(error, TimeoutError)
        assert pool.submit(coroutines.double, 2).result(timeout=60) == 4
