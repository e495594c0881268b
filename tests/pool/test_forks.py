"""A fork of the program asks for what it has inherited of a pool: it gets an answer at once."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, Future, as_completed, wait
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_processes import in_a_fork

import safepool
from safepool import ProcessPool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")

PATIENCE_S = 30
_wait_for_4 = functools.partial(tasks.wait_for, value=4)
_REFUSED = "is a fork of that process: results arrive only in process"


def _awaited(future: Future[int]) -> int:
    async def main() -> int:
        return await asyncio.wrap_future(future)

    return asyncio.run(main())


def _called_back(future: Future[int]) -> int:
    called: list[Future[int]] = []
    future.add_done_callback(called.append)
    return called.pop().result()


def _polled(future: Future[int]) -> int:
    while future.running() or not future.done():
        time.sleep(0.01)
    return future.result()


def _error_of(future: Future[int]) -> int:
    if (error := future.exception()) is not None:
        raise error
    return future.result()


def _cancelled(future: Future[int]) -> int:
    assert not future.cancel()
    assert not future.cancelled()
    return future.result(timeout=0)


# One row per way to ask for a future.
ASKED: dict[str, Callable[[Future[int]], int]] = {
    "result": lambda future: future.result(),
    "result with a timeout": lambda future: future.result(timeout=PATIENCE_S * 2),
    "exception": _error_of,
    "done and running": _polled,
    "wait": lambda future: wait([future], return_when=ALL_COMPLETED).done.pop().result(),
    "as_completed": lambda future: next(as_completed([future])).result(),
    "callback": _called_back,
    "asyncio": _awaited,
    "cancel": _cancelled,
    "repr": lambda future: repr(future) and future.result(),
}


class _Held:
    """A call that runs until the test opens its gate, and one that waits behind it."""

    def __init__(self, pool: Any, gate: Path) -> None:
        self._gate = gate
        self.running: Future[int] = pool.submit(tasks.wait_for, str(gate), 4)
        self.waiting: Future[int] = pool.submit(tasks.wait_for, str(gate), 4)

    def end(self) -> None:
        self._gate.touch()
        assert self.running.result(PATIENCE_S) == self.waiting.result(PATIENCE_S) == 4


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as made:
        yield made


@pytest.mark.parametrize("state", ["running", "waiting"])
@pytest.mark.parametrize("asked", ASKED)
def test_an_unfinished_future_raises_at_once(
    pool: ProcessPool, asked: str, state: str, tmp_path: Path
) -> None:
    """No thread of the fork would end it. The program's future and its callbacks stay."""
    held, called = _Held(pool, tmp_path / "gate"), list[Any]()
    future: Future[int] = getattr(held, state)
    future.add_done_callback(called.append)
    future.add_done_callback(lambda _: (tmp_path / f"called by {os.getpid()}").touch())

    told = in_a_fork(lambda: ASKED[asked](future))

    assert told.startswith("RuntimeError: this pool belongs to process ")
    assert f"process {os.getpid()}, and" in told
    assert _REFUSED in told
    assert told.endswith("Make a new pool in the fork, and submit the call there")
    assert not future.done()
    held.end()
    pool.shutdown()
    assert called == [future]
    assert [path.name for path in tmp_path.glob("called*")] == [f"called by {os.getpid()}"]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("way", ["scheduler", "turn"])
def test_a_future_that_has_ended_gives_its_result(pool: ProcessPool, asked: str, way: str) -> None:
    for _ in range(1 if way == "scheduler" else 50):
        future = pool.submit(tasks.square, 3)
        assert future.result(timeout=PATIENCE_S) == 9

    assert in_a_fork(lambda: ASKED[asked](future)) == "9"


def test_a_cancelled_future_stays_cancelled(pool: ProcessPool, tmp_path: Path) -> None:
    held = _Held(pool, tmp_path / "gate")
    future = pool.submit(tasks.square, 3)
    assert future.cancel()

    assert in_a_fork(lambda: [wait([future]).done == {future}, future.cancelled()]) == str(
        [True, True]
    )
    assert in_a_fork(future.result).startswith("CancelledError")
    held.end()


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("ended", [False, True])
def test_locks_of_other_threads_keep_nobody(
    pool: ProcessPool, asked: str, ended: bool, tmp_path: Path
) -> None:
    """Another thread holds the future's condition at the moment of the fork, and of the next."""
    held = _Held(pool, tmp_path / "gate")
    future = held.running
    if ended:
        held.end()
    holds, go = threading.Event(), threading.Event()

    def hold() -> None:
        with future._condition:
            holds.set()
            go.wait()

    def again() -> str:
        """Ask in a fork of the fork, in which another thread holds the fork's own lock."""
        taken = threading.Event()

        def hold() -> None:
            with future._condition:
                taken.set()
                time.sleep(PATIENCE_S * 2)

        threading.Thread(target=hold, daemon=True).start()
        taken.wait()
        return in_a_fork(lambda: ASKED[asked](future))

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        holds.wait()
        for told in (in_a_fork(lambda: ASKED[asked](future)), in_a_fork(again)):
            assert told.strip("'") == "4" if ended else _REFUSED in told
    finally:
        go.set()
        thread.join()
    held.end()


def test_a_wait_for_several_returns_those_that_have_ended(
    pool: ProcessPool, tmp_path: Path
) -> None:
    """Another thread waits for the same futures."""
    ended = pool.submit(tasks.square, 3)
    assert ended.result(timeout=PATIENCE_S) == 9
    held = _Held(pool, tmp_path / "gate")
    futures = [ended, held.running, held.waiting]
    thread = threading.Thread(target=wait, args=[futures])
    thread.start()
    while len(vars(held.waiting).get("_waiters", ())) == 0:
        time.sleep(0.001)

    assert in_a_fork(lambda: len(wait(futures).done)) == "3"
    assert in_a_fork(lambda: len([*as_completed(futures)])) == "3"
    held.end()
    thread.join()


def test_a_fork_uses_pools_of_its_own(pool: ProcessPool, tmp_path: Path) -> None:
    held = _Held(pool, tmp_path / "gate")

    def ask() -> list[int]:
        with ProcessPool(1) as own:
            futures = [own.submit(tasks.square, n) for n in range(3)]
            done = [future.result() for future in as_completed(futures)]
            assert wait(futures).done == {*futures}
            return [*sorted(done), *own.map(tasks.square, range(3))]

    assert in_a_fork(ask) == "[0, 1, 4, 0, 1, 4]"
    held.end()


# One row per use of the program's pool.
USED: dict[str, Callable[[ProcessPool, Future[int]], object]] = {
    "submit": lambda pool, _: pool.submit(abs, -1),
    "map": lambda pool, _: pool.map(abs, [-1]),
    "cancel": lambda pool, future: pool.cancel(future, kill=True),
    "run": lambda pool, _: asyncio.run(pool.run(abs, -1)),
}


@pytest.mark.parametrize("used", USED)
def test_the_pool_takes_no_calls(pool: ProcessPool, used: str, tmp_path: Path) -> None:
    held = _Held(pool, tmp_path / "gate")
    assert _REFUSED in in_a_fork(lambda: USED[used](pool, held.running))
    held.end()


@pytest.mark.parametrize("ends", ["shutdown", "block"])
def test_the_pool_is_not_waited_for(pool: ProcessPool, ends: str, tmp_path: Path) -> None:
    held = _Held(pool, tmp_path / "gate")

    def ask() -> None:
        if ends == "shutdown":
            pool.shutdown(cancel_futures=True)
        else:
            with pool:
                pass

    assert in_a_fork(ask) == "None"
    assert not held.running.done()
    held.end()


@pytest.mark.parametrize("buffersize", [None, 1])
def test_a_map_gives_what_has_arrived(
    pool: ProcessPool, buffersize: int | None, tmp_path: Path
) -> None:
    """Then it raises. No items are taken from the program's iterators."""
    taken = list[int]()

    def items() -> Iterator[str]:
        for place in ("there", "gate", "gate"):
            taken.append(os.getpid())
            yield str(tmp_path / place)

    (tmp_path / "there").touch()
    results = pool.map(tasks.wait_for, items(), [4] * 3, buffersize=buffersize)
    run = results.results._run
    assert run.wait(0, None)
    if buffersize is None:
        count = len(taken)
        assert in_a_fork(lambda: [next(results), len(taken) - count]) == "[4, 0]"
        assert next(results) == 4
    assert _REFUSED in in_a_fork(lambda: [*results])
    (tmp_path / "gate").touch()
    assert [*results] == [4] * (2 if buffersize is None else 3)


def test_a_map_that_another_thread_iterates_raises(pool: ProcessPool) -> None:
    """Its locks are that thread's, and so are the program's iterators."""
    inside, go = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 1
        inside.set()
        go.wait()
        yield 2

    results = pool.map(tasks.square, items(), buffersize=1)
    found = list[int]()
    thread = threading.Thread(target=lambda: found.extend(results))
    thread.start()
    try:
        inside.wait()
        told = in_a_fork(lambda: [*results])
    finally:
        go.set()
        thread.join()
    assert _REFUSED in told
    assert found == [1, 4]


def test_a_map_that_has_ended_gives_its_results(pool: ProcessPool) -> None:
    results = pool.map(tasks.square, range(5))
    pool.shutdown()
    assert in_a_fork(lambda: [*results]) == "[0, 1, 4, 9, 16]"
    assert [*results] == [0, 1, 4, 9, 16]


def test_an_asynchronous_map_raises(pool: ProcessPool, tmp_path: Path) -> None:
    held = _Held(pool, tmp_path / "gate")
    results = pool.amap(tasks.square, [2])

    async def take() -> list[int]:
        return [result async for result in results]

    assert _REFUSED in in_a_fork(lambda: asyncio.run(take()))
    held.end()
    assert asyncio.run(take()) == [4]


# One row per kind of result of a `safepool.Pool`: how the program asks, and how the fork does.
RESULTS: dict[str, tuple[Callable[[Any, str], Any], Callable[[Any], Any]]] = {
    "apply_async": (
        lambda pool, gate: pool.apply_async(tasks.wait_for, (gate, 4)),
        lambda r: r.get(),
    ),
    "apply_async with a callback": (
        lambda pool, gate: pool.apply_async(tasks.wait_for, (gate, 4), callback=abs),
        lambda r: r.get(),
    ),
    "starmap_async": (
        lambda pool, gate: pool.starmap_async(tasks.wait_for, [(gate, 4)]),
        lambda r: r.get()[0],
    ),
    "wait": (
        lambda pool, gate: pool.apply_async(tasks.wait_for, (gate, 4), callback=abs),
        lambda r: (r.wait(), r.ready(), r.get())[2],
    ),
    "imap": (lambda pool, gate: pool.imap(_wait_for_4, [gate]), next),
    "imap of an iterator": (lambda pool, gate: pool.imap(_wait_for_4, iter([gate])), next),
    "imap_unordered": (
        lambda pool, gate: pool.imap_unordered(_wait_for_4, [gate]),
        lambda r: r.next(timeout=PATIENCE_S * 2),
    ),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_an_unfinished_result_of_a_pool_raises(kind: str, tmp_path: Path) -> None:
    make, get = RESULTS[kind]
    gate = tmp_path / "gate"
    with safepool.Pool(1) as pool:
        result = make(pool, str(gate))
        assert _REFUSED in in_a_fork(lambda: get(result))
        gate.touch()
        assert get(result) == 4


@pytest.mark.parametrize("ends", ["terminate", "close"])
def test_a_pool_is_not_waited_for(ends: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with safepool.Pool(1) as pool:
        result = pool.apply_async(tasks.wait_for, (str(gate), 4))
        fed = pool.imap(tasks.square, iter(range(3)))

        def ask() -> None:
            getattr(pool, ends)()
            pool.join()

        assert in_a_fork(ask) == "None"
        gate.touch()
        assert result.get(PATIENCE_S) == 4
        assert [*fed] == [0, 1, 4]
