"""What ``initargs=`` may hold: what the standard pool's may, by each start method."""

from __future__ import annotations

import multiprocessing
import threading
from typing import TYPE_CHECKING, Any

import pytest

from safepool import PoolBrokenError, ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import BaseContext

METHODS = ["safepool", "loky", "spawn", "forkserver", "fork"]

# multiprocessing keeps the memory file of its first value for the next ones.
_first_value = multiprocessing.get_context("spawn").Value("i", 0)

_given: dict[str, Any] = {}


def keep(things: dict[str, Any]) -> None:
    _given.update(things)


def hold_lock(_: int) -> bool:
    with _given["Lock"]:
        return True


def count_up(_: int) -> bool:
    with _given["Value"].get_lock():
        _given["Value"].value += 1
    return True


def put(number: int) -> bool:
    _given["SimpleQueue"].put(number)
    return True


def set_event(_: int) -> bool:
    _given["Event"].set()
    return True


def send(number: int) -> bool:
    _given["Pipe"].send(number)
    return True


def _lock(context: BaseContext) -> tuple[Any, Callable[[], bool]]:
    return context.Lock(), lambda: True


def _value(context: BaseContext) -> tuple[Any, Callable[[], bool]]:
    value = context.Value("i", 0)
    return value, lambda: value.value == 20


def _queue(context: BaseContext) -> tuple[Any, Callable[[], bool]]:
    queue = context.SimpleQueue()
    return queue, lambda: sorted(queue.get() for _ in range(20)) == list(range(20))


def _event(context: BaseContext) -> tuple[Any, Callable[[], bool]]:
    event = context.Event()
    return event, event.is_set


def _pipe(context: BaseContext) -> tuple[Any, Callable[[], bool]]:
    receiver, sender = context.Pipe(duplex=False)

    def got_all() -> bool:
        found = sorted(receiver.recv() for _ in range(20))
        receiver.close()
        sender.close()
        return found == list(range(20))

    return sender, got_all


# One row per thing: how it is made and what must be true in the end, and what a task does.
THINGS: dict[str, tuple[Callable[[BaseContext], tuple[Any, Callable[[], bool]]], Any]] = {
    "Lock": (_lock, hold_lock),
    "Value": (_value, count_up),
    "SimpleQueue": (_queue, put),
    "Event": (_event, set_event),
    "Pipe": (_pipe, send),
}


# One worker where writers would otherwise have to share the end of a pipe.
POOLS: dict[int, list[str]] = {2: ["Lock", "Value", "SimpleQueue", "Event"], 1: ["Pipe"]}


@pytest.mark.parametrize("workers", POOLS)
@pytest.mark.parametrize("method", METHODS)
def test_the_initializer_gets_what_multiprocessing_shares(method: str, workers: int) -> None:
    """One lock, one value, one queue for all workers and the program."""
    context = multiprocessing.get_context("fork" if method == "fork" else "spawn")
    made = {thing: THINGS[thing][0](context) for thing in POOLS[workers]}
    shared = {thing: one for thing, (one, _) in made.items()}
    with ProcessPool(workers, method, initializer=keep, initargs=(shared,)) as pool:
        for thing in made:
            assert all(pool.map(THINGS[thing][1], range(20))), thing
    assert [thing for thing, (_, holds) in made.items() if not holds()] == []
    for one in shared.values():
        if hasattr(one, "close"):
            one.close()


def test_a_forked_worker_takes_what_cannot_be_pickled() -> None:
    lock = threading.Lock()

    with ProcessPool(1, "fork", initializer=keep, initargs=({"Lock": lock},)) as pool:
        assert pool.submit(hold_lock, 0).result(timeout=30)


@pytest.mark.parametrize("method", ["safepool", "spawn"])
def test_what_cannot_travel_breaks_the_pool_and_is_named(method: str) -> None:
    with (
        ProcessPool(1, method, initializer=keep, initargs=({"Lock": threading.Lock()},)) as pool,
        pytest.raises(PoolBrokenError, match=r"initializer cannot be pickled.*lock"),
    ):
        pool.submit(hold_lock, 0).result(timeout=30)
