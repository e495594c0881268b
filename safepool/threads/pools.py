"""Native thread pools in this process, their sizes, and the variables that bound them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safepool import procfs
from safepool.threads.imports import imported
from safepool.threads.registry import call_of, runtimes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.threads.table import NativeRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class NativePool:
    """A native thread pool that is loaded in this process.

    Attributes:
        runtime: Name of its row in the table, such as ``openblas``; threadpoolctl's own name for a
            library that only threadpoolctl knows.
        library: The file that the pool was loaded from; for a Python module the module's file.
            Empty if neither is known, as for a pool that is recognised by the names of its
            threads.
        threads: The most threads that the pool uses now; ``None`` if unknown. For a pool without a
            call, the number of started threads with its name.
        variable: The environment variable that bounds the pool in this process, or would if it
            were set; ``None`` if the pool has none.
        value: Value of that variable now, word for word; ``None`` if it is not set. The library
            has read the value when it was loaded.
        fixed: Part that cannot be changed after loading; empty if all can.
        hole: Part that neither variable nor call reaches, and the remedy; empty if none.
        source: Documentation of the pool.
    """

    runtime: str
    library: str
    threads: int | None
    variable: str | None
    value: str | None
    fixed: str
    hole: str
    source: str


def inspect() -> tuple[NativePool, ...]:
    """Return the native thread pools that are loaded in this process.

    Returns:
        Pools that threadpoolctl finds, then the table's further runtimes whose module is imported,
        whose library is loaded or whose threads run. A pool that a library takes from another,
        such as scikit-learn's from OpenMP, has no entry of its own. The function imports and
        starts nothing.

    Example:
        >>> for pool in inspect():
        ...     assert pool.threads is None or pool.threads >= 0
    """
    from threadpoolctl import threadpool_info  # noqa: PLC0415 -- importing safepool stays light

    rows = {row.name: row for row in runtimes()}
    found = [
        _pool(
            rows.get(info["internal_api"]),
            runtime=info["internal_api"],
            library=info["filepath"],
            threads=info["num_threads"],
        )
        for info in threadpool_info()
    ]
    files = procfs.mapped_files()
    names = [name for _, name in procfs.named_threads()]
    for row in runtimes():
        if row.through is None:
            found += _pools_of(row, files, names)
    return tuple(found)


def _pools_of(row: NativeRuntime, files: list[str], names: list[str]) -> Iterator[NativePool]:
    """Yield what threadpoolctl does not know of a row."""
    called = re.compile(row.thread_names or r"(?!)")  # one that matches nothing
    started = sum(called.fullmatch(name) is not None for name in names) or None
    module = next((m for name in row.modules if (m := imported(name)) is not None), None)
    if module is not None:
        threads = started
        call = call_of(row)
        if call is not None and call.read is not None:
            try:
                threads = call.read(module)
            except Exception:  # noqa: BLE001 -- any library's own errors; then it does not say
                threads = None
        file = getattr(module, "__file__", None) or ""
        yield _pool(row, runtime=row.name, library=file, threads=threads)
    elif row.libraries and row.call != "threadpoolctl":
        for file in files:
            if os.path.basename(file).lower().startswith(row.libraries):
                yield _pool(row, runtime=row.name, library=file, threads=started)
    elif started is not None:
        yield _pool(row, runtime=row.name, library="", threads=started)


def _pool(
    row: NativeRuntime | None, *, runtime: str, library: str, threads: int | None
) -> NativePool:
    if row is None:
        return NativePool(
            runtime=runtime,
            library=library,
            threads=threads,
            variable=None,
            value=None,
            fixed="",
            hole="no row of the table: safepool.threads.register() adds one",
            source="threadpoolctl",
        )
    own = [variable.name for variable in row.variables]
    first = [*row.removed, *own] if row.removed_win else [*own, *row.removed]
    names = [*first, *row.opt_in, *row.falls_back_to]
    settable = [*own, *row.opt_in, *row.falls_back_to, None]
    ruling = next((name for name in names if os.environ.get(name)), settable[0])
    return NativePool(
        runtime=runtime,
        library=library,
        threads=threads,
        variable=ruling,
        value=None if ruling is None else os.environ.get(ruling),
        fixed=row.fixed,
        hole=row.hole,
        source=row.source,
    )
