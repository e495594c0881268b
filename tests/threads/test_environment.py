"""What a worker's environment says: the cap, the user's own, and nothing that beats them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import support_natives as natives

from safepool.threads.environment import (
    change_environment,
    overridden,
    runtime_threads,
    worker_environment,
)
from safepool.threads.table import RUNTIMES

if TYPE_CHECKING:
    from pathlib import Path

VARIABLES = {v.name: v for row in RUNTIMES for v in row.variables}
REMOVED = [name for row in RUNTIMES for name in row.removed]


@pytest.mark.parametrize("threads", [1, 2, 17])
@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_says_the_number(name: str, threads: int) -> None:
    """A switch is off at one thread, and nobody's business beyond."""
    switch = VARIABLES[name].off
    expected = str(threads) if switch is None else switch if threads == 1 else None

    assert worker_environment(threads).get(name) == expected


@pytest.mark.parametrize("name", REMOVED)
def test_what_would_beat_the_cap_is_removed(name: str) -> None:
    assert worker_environment(2)[name] is None


def test_the_environment_of_no_threads_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        worker_environment(0)


# One row per choice of the user: what is set, and the number of each runtime it changes.
CHOICES: dict[str, tuple[dict[str, str], dict[str, int]]] = {
    "nothing": ({}, {}),
    "one library": ({"NUMEXPR_NUM_THREADS": "4"}, {"numexpr": 4}),
    "a library that another loads": (
        {"OPENBLAS_NUM_THREADS": "4"},
        {"openblas": 4, "flexiblas": 4},
    ),
    "OpenMP, and who uses it": (
        {"OMP_NUM_THREADS": "2"},
        {"openmp": 2, "lightgbm": 2, "xgboost": 2, "faiss": 2, "arrow": 2},
    ),
    "a list": ({"NUMBA_NUM_THREADS": "3,2"}, {"numba": 3}),
    "what PyTorch reads first": ({"MKL_NUM_THREADS": "4"}, {"mkl": 4, "torch": 4}),
    "one that is removed otherwise": ({"GOTO_NUM_THREADS": "4"}, {}),
    "one that is never set by us": ({"SLURM_CPUS_ON_NODE": "4"}, {"duckdb": 4}),
    "no number": ({"BLOSC_NTHREADS": "many"}, {}),
    "zero": ({"ARROW_IO_THREADS": "0"}, {}),
    "a number that no integer is": ({"ARROW_IO_THREADS": "²"}, {}),
    "another variable": ({"HOME": "/tmp"}, {}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_users_own_wins_and_the_cap_follows(choice: str) -> None:
    """In the environment word for word, and in what is set at run time."""
    overrides, changed = CHOICES[choice]

    environment = worker_environment(1, overrides=overrides)
    capped = runtime_threads(1, environment)

    assert environment.items() >= overrides.items()
    assert {name: n for name, n in capped.items() if n != 1} == changed


def test_a_ceiling_follows_the_number_beside_it() -> None:
    """NumExpr with a number above its ceiling prints an error and has no pool at all."""
    number = worker_environment(1, overrides={"NUMEXPR_NUM_THREADS": "4"})
    limit = worker_environment(1, overrides={"OMP_THREAD_LIMIT": "2"})

    assert number["NUMEXPR_MAX_THREADS"] == "4"
    assert limit["OMP_NUM_THREADS"] == "2"


def test_what_the_user_has_set_is_reported() -> None:
    report = overridden(
        1,
        {
            "OMP_NUM_THREADS": "2",
            "MKL_DOMAIN_NUM_THREADS": "4",
            "NUMBA_NUM_THREADS": "1",
            "HOME": "/tmp",
        },
    )

    assert {(o.variable, o.value, o.instead_of, o.runtime) for o in report} == {
        ("OMP_NUM_THREADS", "2", "1", "openmp"),
        ("MKL_DOMAIN_NUM_THREADS", "4", None, "mkl"),
    }


def test_changes_are_made_and_removals_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOTO_NUM_THREADS", "8")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = dict(os.environ)
    try:
        change_environment({"GOTO_NUM_THREADS": None, "OPENBLAS_NUM_THREADS": "1"})
        assert "GOTO_NUM_THREADS" not in os.environ
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    finally:
        change_environment({name: before.get(name) for name in worker_environment(1)})
    assert dict(os.environ) == before


# Set by the caller's shell; each would beat the cap.
CALLERS = dict.fromkeys(REMOVED, "7")

# With spawn and forkserver the worker imports this program before anything of ours runs.
BORN = """
import json, os, sys
# Not a global: there the program's own value would win.
sys.at_import = {name: os.environ.get(name) for name in json.loads(sys.argv[2])}
import multiprocessing, safepool

def look():
    return dict(os.environ), getattr(sys, "at_import", None)

if __name__ == "__main__":
    before = dict(os.environ)
    context = None if sys.argv[1] == "loky" else multiprocessing.get_context(sys.argv[1])
    with safepool.ProcessPool(1, mp_context=context) as pool:
        environment, at_import = pool.submit(look).result(60)
    print(json.dumps([environment, at_import, dict(os.environ) == before]))
"""


@pytest.mark.parametrize("method", ["loky", "spawn", "forkserver", "fork"])
def test_a_worker_is_born_with_it(method: str, tmp_path: Path) -> None:
    """In every start method, before the program's own imports, and the caller keeps its own."""
    wanted = worker_environment(1)

    environment, at_import, untouched = natives.run(
        BORN,
        folder=tmp_path,
        cpus=None,
        arguments=(method, '["OMP_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS"]'),
        variables={**CALLERS, "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": "7"},
    )

    assert {name: environment.get(name) for name in wanted} == wanted
    if method in {"spawn", "forkserver"}:
        assert at_import == {"OMP_NUM_THREADS": "1", "MKL_DOMAIN_NUM_THREADS": None}
    assert untouched
