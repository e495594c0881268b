"""Coroutine functions for tests, which workers import."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import signal
import types
from typing import TYPE_CHECKING, Any

import safepool

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE", default=0)


async def double(value: int) -> int:
    await asyncio.sleep(0)
    return 2 * value


async def multiply(factor: int, value: int) -> int:
    return factor * await asyncio.to_thread(lambda: value)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


@decorated
async def double_decorated(value: int) -> int:
    return 2 * value


@safepool.worker
async def double_capped(value: int) -> int:
    return 2 * value


@safepool.worker(timeout=0.2)
async def sleep_too_long(seconds: float) -> None:
    await asyncio.sleep(seconds)


class Doubler:
    async def __call__(self, value: int) -> int:
        return 2 * value

    async def double(self, value: int) -> int:
        return 2 * value


@types.coroutine
def double_by_generator(value: int) -> Generator[Any, Any, int]:
    yield from asyncio.sleep(0).__await__()
    return 2 * value


async def double_by_two(value: int) -> Coroutine[Any, Any, int]:
    return double(value)


class Deferred:
    """What can be awaited, and pickled as well."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, Any, int]:
        yield
        raise AssertionError("nobody has asked for it")


async def fail(why: str) -> None:
    await asyncio.sleep(0)
    raise ValueError(why)


def throw(kind: type[BaseException]) -> None:
    raise kind


async def set_context(value: int) -> None:
    VARIABLE.set(value)


async def interrupt() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(0.01)
    return "went on"


def look() -> tuple[int, str, bool]:
    handler = getattr(signal.getsignal(signal.SIGINT), "__name__", "")
    return VARIABLE.get(), handler, asyncio._get_running_loop() is None
