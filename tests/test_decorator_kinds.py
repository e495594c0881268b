"""``safepool.worker`` of every kind of callable: capped while its body runs, and like it."""

# ruff: noqa: ARG001, ARG002, ARG003, ARG004, ARG005 -- the parameters are there to be looked at

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import inspect
import os
import subprocess
import sys
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import support_natives as natives

import safepool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from pathlib import Path

# What the block sets for its time is seen without any native library.
VARIABLE = "VECLIB_MAXIMUM_THREADS"


def seen() -> str | None:
    """Return whether this moment is in a block."""
    return os.environ.get(VARIABLE)


@pytest.fixture(autouse=True)
def _uncapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def plain(a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> str | None:
    """Say what is seen."""
    return seen()


def generator(a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> Any:
    """Say what is seen."""
    yield seen()


async def coroutine(a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> Any:
    """Say what is seen."""
    return seen()


async def async_generator(a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> Any:
    """Say what is seen."""
    yield seen()


def wrapped(a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> str | None:
    """Say what is seen."""
    return seen()


cached = functools.lru_cache(wrapped)


class Tool:
    """Says what is seen."""

    def __call__(self, a: int, /, b: int = 2, *rest: int, c: int = 3, **more: int) -> str | None:
        """Say what is seen."""
        return seen()


class AsyncTool:
    async def __call__(self, a: int) -> str | None:
        return seen()


class Methods:
    """One of each, decorated in the class, below and above the other decorator."""

    @safepool.worker
    def method(self, a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return self, seen()

    @safepool.worker
    @classmethod
    def outer_class(cls, a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return cls, seen()

    @classmethod
    @safepool.worker(timeout=9)
    def inner_class(cls, a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return cls, seen()

    @safepool.worker
    @staticmethod
    def outer_static(a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return None, seen()

    @staticmethod
    @safepool.worker
    def inner_static(a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return None, seen()

    @safepool.worker
    @functools.lru_cache  # noqa: B019 -- what is tested
    def cached(self, a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return self, seen()

    @safepool.worker
    async def coroutine(self, a: int) -> tuple[Any, str | None]:
        """Say what is seen."""
        return self, seen()

    builtin = safepool.worker(len)


def run(result: Any) -> Any:
    """Return the value, the first item or the outcome of what a function returned."""
    if inspect.isgenerator(result):
        return next(result)
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    if inspect.isasyncgen(result):
        return asyncio.run(_first(result))
    return result


async def _first(items: AsyncGenerator[Any, None]) -> Any:
    async for item in items:
        await items.aclose()
        return item
    return None


@types.coroutine
def awaitable_generator(a: int) -> Generator[Any, Any, str | None]:
    yield from asyncio.sleep(0).__await__()
    return seen()


async def _await(function: Any) -> Any:
    return await function(1)


# One row per kind of callable.
KINDS: dict[str, Callable[..., Any]] = {
    "function": plain,
    "generator": generator,
    "coroutine": coroutine,
    "async generator": async_generator,
    "lambda": lambda a: seen(),
    "bound method": Tool().__call__,
    "partial": functools.partial(plain, 1),
    "partial coroutine": functools.partial(coroutine, 1),
    "partial generator": functools.partial(generator, 1),
    "callable": Tool(),
    "asynchronous callable": AsyncTool(),
    "lru_cache": cached,
    "decorated twice": safepool.worker(plain),
}


@pytest.mark.parametrize("form", ["inline", "decorator"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_body_of_every_kind_is_capped(kind: str, form: str) -> None:
    function = KINDS[kind]
    decorated = (
        safepool.worker(function, threads=3)
        if form == "inline"
        else safepool.worker(threads=3)(function)
    )
    if kind == "lru_cache":
        cached.cache_clear()
    expected = "1" if kind == "decorated twice" else "3"

    assert run(decorated(*([] if "partial" in kind else [1]))) == expected
    assert seen() is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_looks_like_what_it_calls(kind: str) -> None:
    function = KINDS[kind]
    decorated = safepool.worker(function)

    assert inspect.signature(decorated) == inspect.signature(function)
    assert decorated.__doc__ == function.__doc__
    assert inspect.unwrap(decorated) is inspect.unwrap(function)
    for name in ("__name__", "__qualname__", "__module__"):
        if hasattr(function, name):
            assert getattr(decorated, name) == getattr(function, name)
    for ask in (
        inspect.isgeneratorfunction,
        inspect.iscoroutinefunction,
        inspect.isasyncgenfunction,
        inspect.isclass,
        callable,
    ):
        assert ask(decorated) or not ask(function), ask


@pytest.mark.parametrize("name", [name for name in vars(Methods) if not name.startswith("_")])
def test_methods_are_bound_as_before(name: str) -> None:
    """To the instance, the class or nothing, from the instance and from the class."""
    instance = Methods()
    method = getattr(instance, name)
    if name == "builtin":
        assert method("abc") == 3
        return
    whom, inside = run(method(1))

    assert inside == "1"
    assert whom is (None if "static" in name else Methods if "class" in name else instance)
    assert list(inspect.signature(method).parameters) == ["a"]
    if "static" in name or "class" in name:
        assert run(getattr(Methods, name)(1))[0] is whom


def test_a_real_function_stays_one() -> None:
    """What tools ask of a ``def`` they get of a decorated one."""

    @safepool.worker
    def add(x: int) -> int:
        return x

    assert inspect.isfunction(add)
    assert isinstance(Methods.method, types.FunctionType)


def test_its_attributes_can_be_reached() -> None:
    """A cache that is wrapped inline can still be cleared, and a lookup that fails is told."""
    decorated: Any = safepool.worker(cached, timeout=3)
    decorated(1)
    decorated(1)

    assert decorated.cache_info().hits >= 1
    with pytest.raises(AttributeError, match="no_such"):
        _ = decorated.no_such


def test_a_generator_is_capped_in_steps() -> None:
    """Its body is, and the loop that takes its items is not."""

    @safepool.worker(threads=3)
    def steps(first: int) -> Generator[Any, Any, Any]:
        got = yield first, seen()
        try:
            yield got, seen()
        except KeyError as error:
            yield error.args, seen()
        return "end", seen()

    body = steps(1)
    assert (next(body), seen()) == ((1, "3"), None)
    assert (body.send(2), seen()) == ((2, "3"), None)
    assert (body.throw(KeyError("x")), seen()) == ((("x",), "3"), None)
    with pytest.raises(StopIteration) as end:
        next(body)
    assert end.value.value == ("end", "3")
    assert seen() is None


def test_a_closed_generator_ends_capped() -> None:
    told: list[Any] = []

    @safepool.worker(threads=3)
    def steps() -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            told.append(seen())

    body = steps()
    next(body)
    body.close()
    abandoned = steps()
    next(abandoned)
    del abandoned
    gc.collect()
    assert told == ["3", "3"]
    assert seen() is None


def test_a_generator_that_is_left_open_is_closed_quietly_at_the_programs_end() -> None:
    """It ends when the interpreter has taken the finders of imports away."""
    program = """
import safepool

@safepool.worker
def steps():
    try:
        yield 1
    finally:
        print("closed")

left = steps()
next(left)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    assert (done.stdout, done.stderr) == ("closed\n", "")


def test_a_generator_that_will_not_close_is_told() -> None:
    @safepool.worker
    def stubborn() -> Generator[int, None, None]:
        for _ in range(3):
            try:
                yield 1
            except GeneratorExit:
                pass

    body = stubborn()
    next(body)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        body.close()
    with pytest.raises(ZeroDivisionError):
        body.throw(ZeroDivisionError)


def test_a_waiting_generator_keeps_no_item() -> None:
    """A large array that was handed on is the taker's alone."""

    class Item:
        pass

    @safepool.worker
    def items() -> Generator[Item, None, None]:
        yield Item()
        yield Item()

    body = items()
    reference = weakref.ref(next(body))
    assert reference() is None


def test_a_generator_goes_on_in_another_thread() -> None:
    """The cap is set in the thread that runs the step."""
    found: list[Any] = []

    @safepool.worker(threads=3)
    def steps() -> Generator[Any, None, None]:
        while True:
            yield threading.get_ident(), seen()

    body = steps()
    found.append(next(body))
    thread = threading.Thread(target=lambda: found.append(next(body)))
    thread.start()
    thread.join()
    assert [inside for _, inside in found] == ["3", "3"]
    assert found[0][0] != found[1][0]


def test_a_coroutine_is_capped_in_steps() -> None:
    """While it waits, others run uncapped; cancelled, it cleans up capped."""
    told: list[Any] = []
    variable = contextvars.ContextVar("variable", default="outside")

    @safepool.worker(threads=3)
    async def steps(started: asyncio.Event, may_go: asyncio.Event) -> Any:
        variable.set("inside")
        started.set()
        try:
            await may_go.wait()
        finally:
            told.append((seen(), variable.get()))
        return seen()

    async def main() -> Any:
        started, may_go = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(steps(started, may_go))
        await started.wait()
        outside = seen()
        may_go.set()
        inside = await task
        cancelled = asyncio.create_task(steps(started, asyncio.Event()))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return outside, inside, seen()

    assert asyncio.run(main()) == (None, "3", None)
    assert told == [("3", "inside"), ("3", "inside")]


def test_an_asynchronous_generator_is_capped_in_steps() -> None:
    told: list[Any] = []

    @safepool.worker(threads=3)
    async def steps() -> AsyncGenerator[Any, Any]:
        try:
            await asyncio.sleep(0)
            got = yield seen()
            try:
                yield got, seen()
            except KeyError as error:
                yield error.args, seen()
        finally:
            told.append(seen())
            await asyncio.sleep(0)
            told.append(seen())

    async def main() -> None:
        body = steps()
        assert (await anext(body), seen()) == ("3", None)
        assert (await body.asend(2), seen()) == ((2, "3"), None)
        assert (await body.athrow(KeyError("x")), seen()) == ((("x",), "3"), None)
        with pytest.raises(StopAsyncIteration):
            await anext(body)
        body = steps()
        await anext(body)
        await body.aclose()
        assert [item async for item in steps()] == ["3", (None, "3")]

    asyncio.run(main())
    assert told == ["3"] * 6
    assert seen() is None


def test_an_awaitable_generator_is_awaited() -> None:
    """The old kind of coroutine, of ``types.coroutine``."""
    assert asyncio.run(_await(safepool.worker(awaitable_generator, threads=3))) == "3"


def test_recursion_and_other_numbers_nest() -> None:
    @safepool.worker(threads=4)
    def inner() -> str | None:
        return seen()

    @safepool.worker(threads=2)
    def outer(depth: int) -> list[str | None]:
        if depth:
            return [seen(), *outer(depth - 1), seen()]
        return [seen(), inner(), seen()]

    assert outer(2) == ["2", "2", "2", "4", "2", "2", "2"]
    assert seen() is None


def test_many_threads_at_once() -> None:
    """Whoever is last restores, whatever the order; nobody's own is lifted before its end."""
    barrier = threading.Barrier(8)
    wrong: list[Any] = []

    @safepool.worker
    def body() -> None:
        if seen() != "1":
            wrong.append(seen())

    def loop() -> None:
        barrier.wait(30)
        for _ in range(200):
            body()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=loop) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert seen() is None


# In an interpreter of its own, without NumPy: OpenBLAS has a lock that no fork can wait for.
FORKING = """
import json, os, threading, warnings
import safepool

warnings.simplefilter("ignore")  # Python 3.12 warns of the other thread, which is the test
os.environ.pop("VECLIB_MAXIMUM_THREADS", None)
stop = threading.Event()

@safepool.worker
def body():
    return os.environ.get("VECLIB_MAXIMUM_THREADS")

def loop():
    while not stop.is_set():
        body()

thread = threading.Thread(target=loop)
thread.start()
codes = []
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if body() == "1" else 1)
    codes.append(os.waitpid(pid, 0)[1])
stop.set()
thread.join()
print(json.dumps(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
def test_a_child_that_is_forked_in_another_threads_block_can_decorate(tmp_path: Path) -> None:
    """It has no such thread, so nobody would ever release what that one holds."""
    assert natives.run(FORKING, folder=tmp_path, cpus=None) == [0] * 20


def test_a_copy_is_as_good() -> None:
    decorated = safepool.worker(plain, threads=3, retries=1)
    for copied in (copy.copy(decorated), copy.deepcopy(decorated)):
        assert copied(1) == "3"


def test_what_is_said_twice() -> None:
    """The outer decorator's word, and the inner one's where that is silent."""
    from safepool.pool.core.policy import NO_POLICY, Policy, policy_of

    inner = safepool.worker(plain, timeout=5, retries=2)
    outer = safepool.worker(inner, timeout=7)
    for one in (outer, functools.partial(outer, 1), safepool.worker(functools.partial(outer, 1))):
        assert policy_of(one, NO_POLICY) == Policy(timeout_s=7, retries=2)
    assert policy_of(Methods().inner_class, NO_POLICY).timeout_s == 9
