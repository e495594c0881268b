"""``safepool.threads.inspect()`` says what is loaded, how large it is, and what rules it."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

import pytest
import support_natives as natives

from safepool.threads import NativeRuntime, inspect, register, unregister
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
