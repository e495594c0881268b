"""``safepool.limit_threads()``: this process's own native pools, down and never up."""

from __future__ import annotations

import os
import sys
import threading
import types
from typing import TYPE_CHECKING, Any

import pytest
import support_natives as natives
import support_tasks as tasks
import threadpoolctl  # sets KMP_DUPLICATE_LIB_OK when it is imported, which is not ours to restore
from support_processes import cpus

import safepool
from safepool import own_threads
from safepool.threads import NativePool, NativeRuntime, ThreadVariable, register, unregister

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


assert threadpoolctl


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Another's library with a pool of 4 threads, loaded and registered."""
    module = types.ModuleType("own_library")
    module.threads = 4  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    register(
        NativeRuntime(
            name="own-library", used_by="a test", modules=(module.__name__,), source="a test"
        ),
        read=lambda m: m.threads,
        write=lambda m, n: setattr(m, "threads", n),
    )
    yield module
    unregister("own-library")


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Another's library whose number is read once, when it is loaded."""
    monkeypatch.setitem(sys.modules, "fixed_library", types.ModuleType("fixed_library"))
    register(
        NativeRuntime(
            name="fixed-library",
            used_by="a test",
            modules=("fixed_library",),
            variables=(ThreadVariable(name="FIXED_LIBRARY_THREADS"),),
            fixed="everything",
            source="a test",
        )
    )
    monkeypatch.delenv("FIXED_LIBRARY_THREADS", raising=False)
    monkeypatch.setattr("safepool.machine._told", set())
    yield "FIXED_LIBRARY_THREADS"
    unregister("fixed-library")


def test_a_block_lowers_and_restores(library: Any) -> None:
    before = dict(os.environ)
    with safepool.limit_threads(2) as limit:
        assert (limit.threads, limit.kept) == (2, ())
        assert (library.threads, os.environ["OMP_NUM_THREADS"]) == (2, "2")
    assert library.threads == 4
    assert dict(os.environ) == before


def test_nothing_is_raised(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pool, nor a variable that says less, nor one that follows such a variable."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    monkeypatch.setenv("RAYON_NUM_THREADS", "100")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    before = dict(os.environ)
    with safepool.limit_threads(8):
        assert library.threads == 4
        assert os.environ["OMP_NUM_THREADS"] == "3,2"
        assert "OPENBLAS_NUM_THREADS" not in os.environ
        assert os.environ["RAYON_NUM_THREADS"] == os.environ["POLARS_MAX_THREADS"] == "8"
        with safepool.limit_threads(1):
            assert library.threads == 1
            with safepool.limit_threads(2):
                assert (library.threads, os.environ["OMP_NUM_THREADS"]) == (1, "1")
    assert library.threads == 4
    assert dict(os.environ) == before


def test_it_counts_threads_and_not_workers() -> None:
    """A program with one native thread may have as many workers as before."""
    before = safepool.cpu_count(), safepool.cpu_limit()
    with safepool.limit_threads(1):
        assert (safepool.cpu_count(), safepool.cpu_limit()) == before
        with safepool.ProcessPool(max_workers=2) as pool:
            assert pool._max_workers == 2


def test_the_decorator_inside_has_its_own_number(library: Any) -> None:
    """A function's own cap is a number, and the limit is there again after it."""

    @safepool.worker(threads=3)
    def body() -> int:
        return int(library.threads)

    with safepool.limit_threads(2):
        assert body() == 3
        assert library.threads == 2
    assert library.threads == 4


def test_by_itself_it_lasts(tmp_path: Path) -> None:
    """Without having set a variable, for what is imported before and after it."""
    code = """
        import json, os
        import safepool
        import numpy
        limit = safepool.limit_threads(2)
        import scipy.linalg
        found = [(pool.runtime, pool.threads) for pool in safepool.threads.inspect()]
        del limit
        again = [(pool.runtime, pool.threads) for pool in safepool.threads.inspect()]
        print(json.dumps([found, again, os.environ["NUMBA_NUM_THREADS"]]))
    """
    found, again, variable = natives.run(_dedent(code), folder=tmp_path)

    assert {name for name, _ in found} >= {"openblas"}
    assert {threads for name, threads in found if name == "openblas"} == {2}
    assert again == found
    assert variable == "2"


def test_after_a_block_what_was_imported_inside_is_as_large_as_elsewhere(tmp_path: Path) -> None:
    code = """
        import json, safepool
        with safepool.limit_threads(1):
            import numpy, scipy.linalg
            inside = [(pool.runtime, pool.threads) for pool in safepool.threads.inspect()]
        after = [(pool.runtime, pool.threads) for pool in safepool.threads.inspect()]
        print(json.dumps([inside, after]))
    """
    inside, after = natives.run(_dedent(code), folder=tmp_path)

    blas = [threads for name, threads in inside if name == "openblas"]
    assert blas
    assert set(blas) == {1}
    # SciPy's OpenBLAS is compiled for at least as many as the shim shows.
    assert [t for name, t in after if name == "openblas"] == [natives.MANY] * len(blas)


def _dedent(code: str) -> str:
    import textwrap

    return textwrap.dedent(code)


def test_auto_is_the_budget_and_in_a_worker_its_share() -> None:
    with safepool.limit_threads() as limit:
        assert limit.threads == safepool.cpu_count()
    with safepool.ProcessPool(1, threads_per_worker=2) as pool:
        assert pool.submit(_auto).result(timeout=60) == 2


def _auto() -> int:
    return safepool.limit_threads().threads


@pytest.mark.skipif(cpus() < 2, reason="libraries start one thread on one CPU")
def test_in_a_worker_it_can_lower_further() -> None:
    with safepool.ProcessPool(1, threads_per_worker=2) as pool:
        inside, after = pool.submit(_lower).result(timeout=60)
    assert {count for _, count in inside} == {1}
    assert inside != []
    assert {count for api, count in after if api == "openblas"} == {2}


def _lower() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    tasks.native_pools("scipy.linalg")
    with safepool.limit_threads(1):
        inside = tasks.native_pools("scipy.linalg")
    return inside, tasks.native_pools("scipy.linalg")


def test_what_cannot_be_lowered_is_named_with_its_variable(fixed: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"fixed-library.*set {fixed}=2 before"):
        limit = safepool.limit_threads(2)
    (kept,) = limit.kept
    with limit, safepool.limit_threads(2):  # another warning would be an error
        pass
    assert (kept.runtime, kept.variable, kept.threads) == ("fixed-library", fixed, None)
    assert "fixed-library" in repr(limit)


def test_what_was_limited_when_it_was_loaded_is_not_named(
    fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fixed, "2")
    with safepool.limit_threads(2) as limit:
        assert limit.kept == ()


def test_an_object_may_be_entered_inside_of_its_own_block(library: Any) -> None:
    limit = safepool.limit_threads(2)
    with limit:
        with limit:
            assert library.threads == 2
        assert library.threads == 2
    assert library.threads == 4


def test_an_object_may_be_entered_by_several_threads(library: Any) -> None:
    """A program's one limit: the first block to end is not the end of the others."""
    limit = safepool.limit_threads(2)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with limit:
            entered.set()
            assert leave.wait(20)

    thread = threading.Thread(target=other)
    with limit:
        thread.start()
        assert entered.wait(20)
    inside = library.threads
    leave.set()
    thread.join()
    assert (inside, library.threads) == (2, 4)


def test_one_that_is_interrupted_at_its_beginning_has_lowered_nothing(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of its time goes to looking at what could not be lowered."""

    def interrupted() -> list[NativePool]:
        raise KeyboardInterrupt

    monkeypatch.setattr(own_threads, "inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        safepool.limit_threads(1)
    assert library.threads == 4


def test_it_can_be_entered_again(library: Any) -> None:
    limit = safepool.limit_threads(2)
    with limit:
        assert library.threads == 2
    assert library.threads == 4
    with limit, limit:
        assert library.threads == 2
    assert library.threads == 4


# In an interpreter of its own, without NumPy: OpenBLAS has locks of its own.
FORKING = """
import json, os, sys, threading, types, warnings
import safepool
from safepool.threads import NativeRuntime, blocks, register

warnings.simplefilter("ignore")  # Python 3.12 warns of the other thread, which is the test
sys.modules["slow_library"] = types.ModuleType("slow_library")
begun, may_go, set_is_over = (threading.Event() for _ in range(3))

def write(module, n):
    begun.set()
    may_go.wait(30)
    set_is_over.set()

register(
    NativeRuntime(
        name="slow-library", used_by="a test", modules=("slow_library",), source="a test"
    ),
    read=lambda module: 4,
    write=write,
)

def look():
    for event in (begun, may_go, set_is_over):
        event.clear()
    thread = threading.Thread(target=lambda: safepool.limit_threads(1).__enter__())
    thread.start()
    begun.wait()
    timer = threading.Timer(WAIT_S, may_go.set)
    timer.start()
    pid = os.fork()
    if not pid:
        os._exit(int(set_is_over.is_set()))
    told = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    may_go.set()
    timer.cancel()
    thread.join()
    return told

print(json.dumps(look()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork()")
@pytest.mark.parametrize(("setting", "over"), [("", 1), ("blocks._FORK_WAITS_S = 0.1", 0)])
def test_a_fork_waits_until_a_limit_is_set(setting: str, over: int, tmp_path: Path) -> None:
    """The child would have half of it, and the locks that another's library has meanwhile.

    Not for ever: what sets it may wait for the thread that forks.
    """
    wait_s = "0.5" if over else "20"
    code = FORKING.replace("WAIT_S", wait_s, 1).replace("\ndef look", f"\n{setting}\n\ndef look")

    assert natives.run(code, folder=tmp_path, cpus=None) == over


# One row per wrong argument: what is passed, and what is raised.
WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "none": (0, ValueError),
    "negative": (-1, ValueError),
    "half": (1.5, TypeError),
    "another word": ("all", ValueError),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_told(case: str) -> None:
    n, error = WRONG[case]
    with pytest.raises(error, match="n must be "):
        safepool.limit_threads(n)
