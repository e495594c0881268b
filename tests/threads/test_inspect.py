"""``safepool.threads.inspect()`` says what is loaded, how large it is, and what rules it."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import pytest
import support_natives as natives

from safepool.threads import NativeRuntime, inspect, pools, register, unregister
from safepool.threads.table import RUNTIMES

if TYPE_CHECKING:
    from pathlib import Path


def test_it_finds_what_threadpoolctl_finds(tmp_path: Path) -> None:
    if natives.missing("scipy"):
        pytest.skip("SciPy is not installed")
    code = """
import json, scipy.linalg, safepool.threads, threadpoolctl
ours = sorted((p.library, p.threads) for p in safepool.threads.inspect()
              if p.runtime in ("openblas", "openmp"))
theirs = sorted((p["filepath"], p["num_threads"]) for p in threadpoolctl.threadpool_info())
print(json.dumps([ours == theirs, len(ours)]))
"""
    same, number = natives.run(code, folder=tmp_path)

    assert same
    assert number >= 1


def test_the_ruling_variable_is_the_first_that_is_set(tmp_path: Path) -> None:
    """OpenBLAS reads its own first, and OpenMP's where that is not set."""
    if natives.missing("numpy"):
        pytest.skip("NumPy is not installed")
    code = (
        "import json, numpy, safepool.threads as t; print(json.dumps([[p.variable, p.value, "
        "p.threads] for p in t.inspect() if p.runtime == 'openblas']))"
    )
    chosen = {
        "own": {"OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"},
        "another's": {"OMP_NUM_THREADS": "2"},
    }

    found = {
        name: natives.run(code, folder=tmp_path, variables=variables)
        for name, variables in chosen.items()
    }

    if natives.shim(tmp_path.parent) is None:
        pytest.skip("no compiler to build the shim with: this machine may have fewer CPUs")
    assert found == {
        "own": [["OPENBLAS_NUM_THREADS", "3", 3]],
        "another's": [["OMP_NUM_THREADS", "2", 2]],
    }


# One row per library that threadpoolctl does not know: what is listed once it was used on 48
# CPUs, by runtime: the threads with nothing set, the variable that rules them, and the threads
# with that one set to 3.
FURTHER: dict[str, dict[str, tuple[int | None, str | None, int | None]]] = {
    "numexpr": {"numexpr": (16, "NUMEXPR_NUM_THREADS", 3)},
    "numba": {"numba": (48, "NUMBA_NUM_THREADS", 3), "openmp": (48, "OMP_NUM_THREADS", 3)},
    "polars": {"polars": (48, "POLARS_MAX_THREADS", 3), "tokio": (32, "TOKIO_WORKER_THREADS", 3)},
    "pyarrow": {"arrow": (48, "OMP_NUM_THREADS", 3), "arrow-io": (8, "ARROW_IO_THREADS", 3)},
    # One pool for each database, which are not to be found.
    "duckdb": {"duckdb": (None, "SLURM_CPUS_ON_NODE", None)},
    "numcodecs": {"numcodecs": (8, "BLOSC_NTHREADS", 3)},
}

USE_AND_INSPECT = """
import json, sys, safepool.threads, support_natives as n
n.use(sys.argv[1])
found = safepool.threads.inspect()
print(json.dumps([[p.runtime, p.threads, p.variable, p.value] for p in found]))
"""


@pytest.mark.natives
@pytest.mark.parametrize("library", FURTHER)
def test_what_threadpoolctl_does_not_know_is_listed_too(library: str, tmp_path: Path) -> None:
    if module := natives.missing(library):
        pytest.skip(f"{module} is not installed")
    if natives.shim(tmp_path.parent) is None:
        pytest.skip("no compiler to build the shim with: this machine may have fewer CPUs")

    def look(variables: dict[str, str]) -> list[list[object]]:
        found = natives.run(
            USE_AND_INSPECT, folder=tmp_path, arguments=(library,), variables=variables
        )
        return [row for row in found if row[0] in FURTHER[library]]

    unset = [[name, many, by, None] for name, (many, by, _) in FURTHER[library].items()]
    three = [[name, three, by, "3"] for name, (_, by, three) in FURTHER[library].items()]
    variables = {by: "3" for _, by, _ in FURTHER[library].values() if by is not None}

    assert sorted(look({}), key=str) == sorted(unset, key=str)
    assert sorted(look(variables), key=str) == sorted(three, key=str)


# One row per order that is not plain: the runtime, what is set, and what rules.
RULING: dict[str, tuple[str, dict[str, str], str | None]] = {
    "a domain's number beats MKL's": (
        "mkl",
        {"MKL_DOMAIN_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"},
        "MKL_DOMAIN_NUM_THREADS",
    ),
    "BLIS's loops beat its number": (
        "blis",
        {"BLIS_JC_NT": "2", "BLIS_NUM_THREADS": "1"},
        "BLIS_JC_NT",
    ),
    "Goto's comes after OpenBLAS's": (
        "openblas",
        {"OPENBLAS_NUM_THREADS": "2", "GOTO_NUM_THREADS": "1"},
        "OPENBLAS_NUM_THREADS",
    ),
    "Goto's comes before OpenMP's": (
        "openblas",
        {"OMP_NUM_THREADS": "2", "GOTO_NUM_THREADS": "1"},
        "GOTO_NUM_THREADS",
    ),
    "an empty one is none": (
        "openblas",
        {"OPENBLAS_NUM_THREADS": "", "OMP_NUM_THREADS": "2"},
        "OMP_NUM_THREADS",
    ),
    "one that is removed from workers is not recommended": ("mkl", {}, "MKL_NUM_THREADS"),
    "a limit that only users set": ("openmp", {"OMP_THREAD_LIMIT": "2"}, "OMP_THREAD_LIMIT"),
    "nothing at all": ("catboost", {}, None),
}


@pytest.mark.parametrize("order", RULING)
def test_the_variable_that_wins_is_the_one_that_is_named(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, variables, expected = RULING[order]
    row = next(row for row in RUNTIMES if row.name == runtime)
    names = {one.name for row in RUNTIMES for one in row.variables if one.off is None}
    for name in names.union(row.removed):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    found = pools._pool(row, runtime=runtime, library="", threads=None)

    assert (found.variable, found.value) == (expected, variables.get(expected or ""))


def test_a_pool_is_known_by_its_library_or_by_the_names_of_its_threads() -> None:
    """Where no Python module brings it: oneTBB under MKL, Tokio in a library written in Rust."""
    rows = {row.name: row for row in RUNTIMES}
    files = ["/opt/x/libtbb.so.12", "/opt/x/libtbbmalloc.so.2", "/opt/x/libother.so"]
    names = ["python", "tokio-rt-worker", "tokio-rt-worker", "tokio-rt-worker-2"]

    found = [
        (pool.runtime, pool.library, pool.threads)
        for name in ("tbb", "tokio", "rayon", "openblas")
        for pool in pools._pools_of(rows[name], files, names)
    ]

    assert found == [("tbb", "/opt/x/libtbb.so.12", None), ("tokio", "", 2)]


def test_a_registered_runtime_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("inspected_library")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = NativeRuntime(
        name="inspected",
        used_by="a test",
        modules=(module.__name__,),
        fixed="everything",
        hole="ask its authors",
        source="this test",
    )
    register(row, read=lambda _: 7, write=lambda *_: None)
    try:
        (found,) = [pool for pool in inspect() if pool.runtime == "inspected"]
    finally:
        unregister("inspected")

    assert (found.threads, found.variable, found.library) == (7, None, "")
    assert (found.fixed, found.hole, found.source) == (row.fixed, row.hole, row.source)


def test_it_loads_nothing(tmp_path: Path) -> None:
    names = sorted({name for row in RUNTIMES for name in row.modules})
    code = (
        "import json, sys, safepool.threads; safepool.threads.inspect(); "
        f"print(json.dumps([n for n in {names!r} if n in sys.modules]))"
    )

    assert natives.run(code, folder=tmp_path) == []
