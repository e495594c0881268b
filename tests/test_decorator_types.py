"""What type checkers say of a program that uses the package rightly, and of its mistakes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = textwrap.dedent("""
    import functools
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from typing import Generic, TypeVar, assert_type, overload

    import safepool

    T = TypeVar("T")

    @safepool.worker
    def add(x: int, y: int = 0, *, z: str = "") -> int:
        return x + y

    assert_type(add(1, y=2, z="a"), int)

    @safepool.worker(threads=1, timeout=3.5, retries=1)
    def same(value: T) -> T:
        return value

    assert_type(same("a"), str)

    @safepool.worker
    async def later(x: int) -> str:
        return str(x)

    async def use() -> None:
        assert_type(await later(1), str)
        async for item in stream(3):
            assert_type(item, bytes)

    @safepool.worker
    def items(n: int) -> Iterator[float]:
        yield float(n)

    assert_type(next(items(1)), float)

    @safepool.worker
    async def stream(n: int) -> AsyncIterator[bytes]:
        yield bytes(n)

    class Model(Generic[T]):
        def __init__(self, value: T) -> None:
            self.value = value

        @safepool.worker
        def method(self, x: int) -> T:
            return self.value

        @classmethod
        @safepool.worker
        def inner(cls, x: int) -> int:
            return x

        @safepool.worker
        @classmethod
        def outer(cls, x: int) -> int:
            return x

        @staticmethod
        @safepool.worker(timeout=1)
        def inner_static(x: int) -> str:
            return str(x)

        @safepool.worker
        @staticmethod
        def outer_static(x: int) -> str:
            return str(x)

    assert_type(Model("a").method(1), str)
    assert_type(Model.inner(1), int)
    assert_type(Model.outer(1), int)
    assert_type(Model.inner_static(1), str)
    assert_type(Model.outer_static(1), str)

    @overload
    def either(x: int) -> int: ...
    @overload
    def either(x: str) -> str: ...
    @safepool.worker
    def either(x: int | str) -> int | str:
        return x

    assert_type(either(1), int)
    assert_type(either("a"), str)

    assert_type(safepool.worker(abs, timeout=5)(-2), int)
    assert_type(safepool.worker(functools.partial(add, 1))(), int)

    def five(a: int, b: str, c: bytes, d: float, e: None) -> str:
        return b

    def look_up(table: dict[str, int], key: str) -> int:
        return table[key]

    with safepool.limit_threads(2) as limit:
        assert_type(limit.threads, int)
        assert_type([pool.variable for pool in limit.kept], list[str | None])
    safepool.limit_threads()

    with safepool.ProcessPool() as pool:
        assert_type(pool.submit(add, 1, z="b").result(), int)
        assert_type(pool.map(add, [1, 2]), Iterator[int])
        assert_type(pool.map(add, [1], (2, 3), chunksize=2), Iterator[int])
        assert_type(pool.map(five, [1], "a", [b""], [1.0], [None], ordered=False), Iterator[str])
        assert_type(pool.map(abs, range(3), return_exceptions=True), Iterator[int | BaseException])
        assert_type(list(pool.map(lambda x: x + 1, [1, 2])), list[int])
        pool.map(functools.partial(add, y=2), [1])
        pool.map(max, *[[1]] * 6)
        table = safepool.share({"a": 1}, writable=True)
        assert_type(table, dict[str, int])
        assert_type(pool.submit(look_up, table, "a").result(), int)
        pool.map(look_up, [table] * 2, ["a", "b"])
        assert_type(pool.submit(later, 1).result(), str)

    async def wait() -> None:
        async with safepool.ProcessPool() as pool:
            assert_type(await pool.run(add, 1, z="b"), int)
            assert_type(await pool.run(later, 1), str)
            assert_type(await pool.run(lambda: 1), int)
            async for text in pool.amap(later, [1, 2], buffersize=2):
                assert_type(text, str)
            async for number in pool.amap(add, numbers(), [1], ordered=False):
                assert_type(number, int)
            async for found in pool.amap(abs, numbers(), return_exceptions=True):
                assert_type(found, int | BaseException)

    async def numbers() -> AsyncIterator[int]:
        yield 1

    running = safepool.ProcessPool()

    assert_type(safepool.threads.inspect()[0].runtime, str)
    assert_type(safepool.threads.table.RUNTIMES[0].name, str)
    assert_type(safepool.limits.read_limits(), safepool.Limits)
""")

# One row per mistake that must be found: a line, and the code of the error.
MISTAKES = {
    "a wrong argument": ('add("a")', "arg-type"),
    "an argument too many": ("add(1, 2, 3)", "misc|call-arg"),
    "a wrong keyword": ("add(1, w=2)", "call-arg"),
    "a wrong result": ("text: str = add(1)", "assignment"),
    "a wrong number": ('safepool.worker(threads="2")', "call-overload"),
    "what cannot be called": ("safepool.worker(3)", "call-overload"),
    "a misspelled name": ("safepool.ProcesPool()", "attr-defined"),
    "a misspelled name of a module": ("safepool.threads.inspekt()", "attr-defined"),
    "an item of a wrong type": ("pool.map(add, ['a'])", "arg-type|list-item|call-overload"),
    "a second item of a wrong type": ("pool.map(add, [1], [b''])", "arg-type|list-item"),
    "a fifth item of a wrong type": (
        "pool.map(five, [1], 'a', [b''], [1.0], [2])",
        "arg-type|list-item",
    ),
    "an iterable too many": ("pool.map(look_up, [table], ['a'], [1])", "arg-type|call-overload"),
    "a wrong option": ("pool.map(add, [1], chunk_size=2)", "call-overload|call-arg"),
    "what is shared for something else": (
        "pool.submit(look_up, safepool.share([1]), 'a')",
        "arg-type|call-overload",
    ),
    "a wrong argument of what is awaited": ("running.run(later, 'a')", "arg-type|call-overload"),
    "an item of a wrong type of what is awaited": (
        "running.amap(add, ['a'])",
        "arg-type|list-item|call-overload",
    ),
    "a keyword of another pool": ("safepool.ProcessPool(processes=2)", "call-arg"),
    "a word for a number": ('safepool.limit_threads("all")', "arg-type"),
}


def write(folder: Path) -> dict[int, str]:
    """Write the program and the mistakes behind it; return the line and the codes of each."""
    lines = [f"{line}\n" for line, _ in MISTAKES.values()]
    text = PROGRAM + "# mistakes\n"
    (folder / "program.py").write_text(text + "".join(lines))
    return dict(enumerate((code for _, code in MISTAKES.values()), start=text.count("\n") + 1))


def check(folder: Path, *command: str) -> str:
    """Run a type checker on the program and return what it says."""
    environment = {"MYPYPATH": str(ROOT), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, "-m", *command, "program.py"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=environment | {"MYPY_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
    ).stdout


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_mypy_finds_the_mistakes_and_nothing_else(tmp_path: Path) -> None:
    """One program without a complaint, then a line for each mistake with one."""
    mistakes = write(tmp_path)
    said = check(tmp_path, "mypy", "--strict", "--hide-error-context")

    told = [line for line in said.splitlines() if ": error:" in line]
    for number, code in mistakes.items():
        mine = [line for line in told if line.startswith(f"program.py:{number}:")]
        assert any(f"[{one}]" in line for line in mine for one in code.split("|")), (number, mine)
        told = [line for line in told if line not in mine]
    assert told == []


@pytest.mark.skipif(not importlib.util.find_spec("pyright"), reason="pyright is not installed")
def test_pyright_finds_the_mistakes_and_nothing_else(tmp_path: Path) -> None:
    """In the lines of the mistakes, and in no other."""
    mistakes = write(tmp_path)
    said = json.loads(check(tmp_path, "pyright", "--outputjson"))

    errors = [one for one in said["generalDiagnostics"] if one["severity"] == "error"]
    found = {one["range"]["start"]["line"] + 1: one["message"] for one in errors}
    assert found.keys() == mistakes.keys(), found
