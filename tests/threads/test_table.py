"""The table is closed: every row can be found, capped or explained, and has a source."""

from __future__ import annotations

import collections

import pytest

from safepool.threads.calls import CALLS
from safepool.threads.environment import worker_environment
from safepool.threads.table import RUNTIMES, NativeRuntime

ROWS = {row.name: row for row in RUNTIMES}

# What the package promises to know.
PROMISED = [
    "openblas",
    "mkl",
    "blis",
    "flexiblas",
    "accelerate",
    "openmp",
    "tbb",
    "numexpr",
    "numba",
    "torch",
    "torch-interop",
    "tensorflow",
    "xla",
    "polars",
    "rayon",
    "tokenizers",
    "arrow",
    "arrow-io",
    "opencv",
    "duckdb",
    "onnxruntime",
    "blosc",
    "numcodecs",
    "itk",
    "libvips",
    "tokio",
    "lightgbm",
    "xgboost",
    "faiss",
    "catboost",
]

# Set by nobody but the user, with the harm that it does otherwise.
NEVER_SET = {
    "OMP_THREAD_LIMIT": "an OpenBLAS on OpenMP spins for ever",
    "POLARS_MAX_BLOCKING_THREAD_COUNT": "Polars' scan_csv hangs",
    "XLA_FLAGS": "without effect, and it replaces the user's",
    "SLURM_CPUS_ON_NODE": "other programs take it for the machine's size",
}


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_runtime_has_a_row(name: str) -> None:
    assert name in ROWS


def test_names_are_unique() -> None:
    assert len(ROWS) == len(RUNTIMES)


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_a_row_tells_its_source_and_its_users(row: NativeRuntime) -> None:
    assert len(row.source) > 8
    assert row.used_by


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_a_row_has_a_cap_or_says_what_to_do(row: NativeRuntime) -> None:
    assert row.variables or row.call or row.through or row.hole


@pytest.mark.parametrize("row", RUNTIMES, ids=lambda row: row.name)
def test_a_row_that_cannot_be_capped_when_loaded_says_so(row: NativeRuntime) -> None:
    """The two rows of a share of the machine, and pools of other rows, have none to cap."""
    assert row.call or row.through or row.fixed or row.hole or row.name == "loky"


def test_a_variable_belongs_to_one_row() -> None:
    names = [
        name
        for row in RUNTIMES
        for name in (*(v.name for v in row.variables), *row.removed, *row.opt_in)
    ]
    assert [name for name, times in collections.Counter(names).items() if times > 1] == []


def test_a_row_falls_back_to_variables_of_other_rows() -> None:
    for row in RUNTIMES:
        others = {
            name
            for other in RUNTIMES
            if other is not row
            for name in (*(v.name for v in other.variables), *other.opt_in)
        }
        assert others.issuperset(row.falls_back_to), row.name


def test_a_row_takes_its_threads_from_a_row_that_exists() -> None:
    assert {row.through for row in RUNTIMES} - {None} <= set(ROWS)


def test_every_call_is_written_and_every_written_call_has_a_row() -> None:
    """A row that names threadpoolctl needs none: that finds its libraries by itself."""
    named = {row.name for row in RUNTIMES if row.call not in {None, "threadpoolctl"}}

    assert named == set(CALLS)
    assert all(ROWS[name].modules for name in CALLS)


def test_threadpoolctl_knows_the_rows_that_name_it() -> None:
    """By the same name and the same file names, so that a scan is started when one is loaded."""
    import threadpoolctl

    known = {
        controller.internal_api: controller.filename_prefixes
        for controller in threadpoolctl._ALL_CONTROLLERS
        # Libraries register controllers of their own when they are imported: scipy.io does.
        if controller.__module__ == "threadpoolctl"
    }
    named = {row.name: row.libraries for row in RUNTIMES if row.call == "threadpoolctl"}

    assert set(known) == set(named)
    prefixes = tuple(prefix for row in named.values() for prefix in row)
    assert [p for row in known.values() for p in row if not p.startswith(prefixes)] == []


@pytest.mark.parametrize("name", NEVER_SET)
def test_a_harmful_variable_is_left_to_the_user(name: str) -> None:
    for threads in (1, 2, 8):
        assert name not in worker_environment(threads)
    assert worker_environment(1, overrides={name: "1"})[name] == "1"
