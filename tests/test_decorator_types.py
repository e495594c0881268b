"""What a type checker says: of decorated functions what it says of the functions."""

from __future__ import annotations

import importlib.util
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

    with safepool.limit_threads(2) as limit:
        assert_type(limit.threads, int)
        assert_type([pool.variable for pool in limit.kept], list[str | None])
    safepool.limit_threads()

    with safepool.ProcessPool() as pool:
        assert_type(pool.submit(add, 1, z="b").result(), int)

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
    "a word for a number": ('safepool.limit_threads("all")', "arg-type"),
}


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_a_type_checker_knows_decorated_functions(tmp_path: Path) -> None:
    """One program without a complaint, then a line for each mistake with one."""
    program = tmp_path / "program.py"
    lines = [f"{line}\n" for line, _ in MISTAKES.values()]
    program.write_text(PROGRAM + "# mistakes\n" + "".join(lines))
    first = program.read_text().split("\n").index("# mistakes") + 2
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--hide-error-context", program.name],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={"MYPYPATH": str(ROOT), "PATH": "", "MYPY_CACHE_DIR": str(tmp_path / "cache")},
    )

    told = [line for line in done.stdout.splitlines() if ": error:" in line]
    for number, (_, code) in enumerate(MISTAKES.values(), start=first):
        mine = [line for line in told if line.startswith(f"program.py:{number}:")]
        assert any(f"[{one}]" in line for line in mine for one in code.split("|")), mine
        told = [line for line in told if line not in mine]
    assert told == []
