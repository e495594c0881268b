"""What a fork server may import ahead of the tasks: libraries that can be forked after that.

Each was measured: imported, and nothing more, in a server whose environment caps native threads;
then the server was forked and its child computed with it, hundreds of times. One whose import
starts threads that a fork would lose is not here; nor does a module of the program's own
get here by itself, for importing it runs the program's code.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from safepool.transport.lazy import lazy_names

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BACKGROUND_THREADS", "PRELOADABLE", "modules_to_preload"]

PRELOADABLE = frozenset(
    {
        "av",
        "blosc2",
        "catboost",
        "cloudpickle",
        "cv2",
        "dask",
        "datafusion",
        "deltalake",
        "duckdb",
        "faiss",
        "implicit",
        "jax",
        "joblib",
        "lightgbm",
        "numba",
        "numcodecs",
        "numexpr",
        "numpy",
        "pandas",
        "polars",
        "pyarrow",
        "pyvips",
        "scipy",
        "SimpleITK",
        "sklearn",
        "tensorstore",
        "threadpoolctl",
        "tokenizers",
        "torch",
        "xgboost",
        "zarr",
    }
)

BACKGROUND_THREADS = frozenset(
    {
        # jemalloc, background_thread:true: its child re-creates what it needs
        # (jemalloc, src/background_thread.c, background_thread_postfork_child). In the wheels
        # of pyarrow and polars. 400 of 400 children worked.
        "jemalloc_bg_thd",
        # polars: removes its spill files; a child that does not spill never needs it.
        "polars-ooc-clea",
    }
)
"""Names of threads that a fork may lose, as in ``/proc/PID/task/TID/comm`` (15 characters)."""


def modules_to_preload(wanted: str | Sequence[str]) -> list[str]:
    """Return the modules that a fork server imports for a pool that is started now.

    Args:
        wanted: ``"auto"`` is what this process has imported of the libraries in the table,
            with their public subpackages; otherwise the names themselves.

    Example:
        >>> modules_to_preload(["json", "csv"])
        ['json', 'csv']
    """
    if wanted != "auto":
        return list(wanted)
    found = []
    # What it imports lazily it would have imported, and the server has it in time.
    for name in [*(name for name, module in list(sys.modules.items()) if module), *lazy_names()]:
        top, _, rest = name.partition(".")
        if top in PRELOADABLE and "." not in rest and rest[:1] != "_":
            found.append(name)
    return found
