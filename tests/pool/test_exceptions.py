"""What a task raises arrives as itself: class, arguments, attributes and text."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_exceptions as there

from safepool import ProcessPool, RemoteTaskError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as made:
        yield made


@pytest.mark.parametrize("kind", there.MADE)
def test_it_arrives_as_itself(kind: str, pool: ProcessPool) -> None:
    """And no constructor is run that would not take its arguments."""
    expected = there.MADE[kind]()

    error = pool.submit(there.throw, kind).exception(timeout=60)

    assert error is not None
    assert type(error) is type(expected)
    assert there.facts(error) == there.facts(expected)
    assert "there.throw" in str(error.__cause__) or "support_exceptions.py" in str(error.__cause__)
    assert getattr(error, "itself", error) is error


def test_it_does_so_inside_of_what_travels(pool: ProcessPool) -> None:
    """In a result and in an argument, in whatever holds it."""
    made = {kind: make() for kind, make in there.MADE.items() if kind != "a broken __reduce__"}

    sent = there.Holder(made, [ExceptionGroup("all", [there.KeywordError(field="g")])])
    back = pool.submit(there.pass_on, sent, [*made.values()]).result(timeout=60)

    (errors, held), listed = back
    assert {kind: type(error) for kind, error in errors.items()} == {
        kind: type(error) for kind, error in made.items()
    }
    assert {kind: there.facts(error) for kind, error in errors.items()} == {
        kind: there.facts(error) for kind, error in made.items()
    }
    assert all(one is two for one, two in zip(errors.values(), listed, strict=True))
    assert there.facts(held[0]) == there.facts(sent.more[0])


def test_it_does_so_from_a_script(tmp_path: Path) -> None:
    """Its classes are the script's own: its ``except`` clauses catch them."""
    text = Path(there.__file__).read_text(encoding="utf-8")
    text += """
import sys
from safepool import ProcessPool
with ProcessPool(1) as pool:
    made = {name: MADE[name]() for name in MADE}
    thrown = {name: pool.submit(throw, name) for name in made}
    copied = thrown.keys() - {"a broken __reduce__"}
    given = {name: pool.submit(give, name) for name in copied}
    passed = {name: pool.submit(pass_on, Holder({}, [made[name]]), []) for name in copied}
    for name, expected in made.items():
        error = thrown[name].exception(timeout=60)
        assert type(error) is type(expected), (name, type(error))
        assert facts(error) == facts(expected), (name, facts(error), facts(expected))
    for name in copied:
        expected = made[name]
        for one in (given[name].result(timeout=60)[0], passed[name].result(timeout=60)[0][1][0]):
            assert type(one) is type(expected), (name, type(one))
            assert facts(one) == facts(expected), (name, facts(one), facts(expected))
print("right")
"""
    (tmp_path / "script.py").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("right\n", "")


def test_what_cannot_be_pickled_stays_in_the_worker(pool: ProcessPool) -> None:
    """The exception arrives without it, and its remote traceback says so."""
    error: Any = pool.submit(there.throw_with_lock).exception(timeout=60)

    assert type(error) is there.HoldsLockError
    assert (str(error), error.args, vars(error)) == ("held", ("held",), {"seen": "held"})
    assert "left in the worker: attribute 'lock' of HoldsLockError" in str(error.__cause__)

    error = pool.submit(there.throw_lock).exception(timeout=60)
    assert type(error) is ValueError
    assert error.args[0] == "held"
    assert "_thread.lock" in repr(error.args[1])

    group: Any = pool.submit(there.throw_group_with_lock).exception(timeout=60)
    assert [type(one) for one in group.exceptions] == [there.HoldsLockError, there.KeywordError]


def test_only_what_has_no_class_here_arrives_in_words(pool: ProcessPool) -> None:
    """A class that holds what cannot be pickled, made by the task."""
    error = pool.submit(throw_unknown).exception(timeout=60)

    assert type(error) is RemoteTaskError
    assert "Unknown" in str(error)


def throw_unknown() -> None:
    raise type("Unknown", (Exception,), {"held": iter(n for n in ())})("text")


def first(items: list[int]) -> int:
    return next(iter(items))


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
def test_a_coroutine_is_told_of_a_stop(kind: type[Exception]) -> None:
    """As RuntimeError on every version, with the exception as its cause."""

    async def ask(pool: ProcessPool) -> None:
        loop = asyncio.get_running_loop()
        problems: list[Any] = []
        loop.set_exception_handler(lambda _loop, context: problems.append(context))
        for wait in (
            loop.run_in_executor(pool, raise_kind, kind),
            asyncio.wrap_future(pool.submit(raise_kind, kind)),
        ):
            with pytest.raises(RuntimeError, match=f"task raised {kind.__name__}") as told:
                await asyncio.wait_for(wait, 60)
            assert type(told.value.__cause__) is kind
        assert await loop.run_in_executor(pool, first, [3]) == 3
        assert problems == []

    with ProcessPool(1) as pool:
        asyncio.run(ask(pool))


def raise_kind(kind: type[Exception]) -> None:
    raise kind(5)


def test_elsewhere_a_stop_is_itself() -> None:
    """In ``result()`` and in a callback, as with the standard pool."""
    told: list[list[type]] = []
    for made in (ProcessPool(1), ProcessPoolExecutor(1, mp_context=get_context("spawn"))):
        called: list[Future[Any]] = []
        with made as pool:
            future = pool.submit(first, [])
            future.add_done_callback(called.append)
            assert type(future.exception(timeout=60)) is StopIteration
        told.append([type(one.exception()) for one in called])
        assert called == [future]
    assert told[0] == told[1] == [StopIteration]
