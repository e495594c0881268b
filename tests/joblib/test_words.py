"""What our backend takes besides joblib's own arguments, from a block or from one call."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import joblib
import pytest
import support_tasks as tasks
from joblib import Parallel, delayed

import safepool
from safepool import joblib_pools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _no_pools_are_kept() -> Iterator[None]:
    yield
    joblib_pools.SHARED.close(end=True)


WHERE = ("the block", "the call")


def call(where: str, words: dict[str, Any], calls: Any) -> list[Any]:
    if where == "the block":
        with joblib.parallel_config("safepool", n_jobs=2, **words):
            return list(Parallel(batch_size=1)(calls))
    return list(Parallel(2, backend="safepool", batch_size=1, **words)(calls))


def be_killed_the_first_time(flag: Path) -> str:
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


@pytest.mark.parametrize("where", WHERE)
def test_retries(where: str, tmp_path: Path) -> None:
    calls = (delayed(be_killed_the_first_time)(tmp_path / str(n)) for n in range(2))
    assert call(where, {"retries": 1}, calls) == ["done", "done"]


@pytest.mark.parametrize("where", WHERE)
def test_threads_per_worker(where: str) -> None:
    calls = (delayed(os.getenv)("OMP_NUM_THREADS") for _ in range(3))
    assert call(where, {"threads_per_worker": 3}, calls) == ["3"] * 3


@pytest.mark.parametrize("where", WHERE)
def test_progress(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    calls = (delayed(abs)(-n) for n in range(4))
    assert call(where, {"progress": "four calls"}, calls) == [0, 1, 2, 3]
    assert "four calls" in capfd.readouterr().err


def test_a_call_says_something_else_than_its_block() -> None:
    """Its initializer is not given the arguments of the block's."""
    with safepool.parallel_backend(2, initializer=tasks.mark, initargs=("block",)):
        ours = Parallel(batch_size=1)(delayed(tasks.marks)() for _ in range(3))
        own = Parallel(batch_size=1, initializer=os.getpid)(
            delayed(tasks.marks)() for _ in range(3)
        )
        again = Parallel(batch_size=1)(delayed(tasks.marks)() for _ in range(3))
    assert ours == again == [["block"]] * 3
    assert own == [[]] * 3


def test_the_object_keeps_what_it_says() -> None:
    """From call to call, and it says it for no other object."""
    threads = delayed(os.getenv)("OMP_NUM_THREADS")
    with joblib.parallel_config("safepool", n_jobs=2, threads_per_worker=2):
        own, other = Parallel(threads_per_worker=3), Parallel()
        found = [set(parallel([threads] * 2)) for parallel in (own, other, own, other)]
    assert found == [{"3"}, {"2"}, {"3"}, {"2"}]


WRONG = {
    "retries": ({"retries": -1}, "retries"),
    "rounding": ({"rounding": "up"}, "rounding"),
    "memory": ({"memory_per_worker": "2 apples"}, "2 apples"),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("word", WRONG)
def test_what_makes_no_sense_is_an_error(where: str, word: str) -> None:
    words, match = WRONG[word]
    with pytest.raises(ValueError, match=match):
        call(where, words, [delayed(abs)(-1)] * 2)


def test_a_word_that_a_block_does_not_know_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"no argument 'retires': did you mean retries=\?"):
        joblib.parallel_config("safepool", retires=1)
    with pytest.raises(TypeError, match=r"no argument 'colour'\. There are end_subprocesses, "):
        joblib.parallel_config("safepool", colour="red")


def test_a_word_that_a_call_does_not_know_is_said() -> None:
    """No error: joblib's own backends ignore it, and the call may be a library's."""
    with pytest.warns(
        RuntimeWarning, match=r"ignores the argument 'retires': did you mean retries="
    ):
        assert call("the call", {"retires": 1}, [delayed(abs)(-1)] * 2) == [1, 1]
