"""Numbers of CPUs that functions return in a worker, and the calls that change them.

A library that sizes its pool of threads by the machine would start 48 of them in each worker of a
host with 48 CPUs. Hence functions that count CPUs return the worker's share where possible. Code
that asks the kernel, a file or another program gets the machine's number: only a variable of the
library (``table``) or the affinity mask helps there (``ProcessPool(pin_workers=True)``).
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from safepool.threads.calls import attempt
from safepool.threads.imports import imported


def _set_loky(context: Any, count: int) -> None:
    # Until loky 3.6, ``cpu_count(only_physical_cores=True)`` returns the machine's cores unless a
    # limit is below ``os.cpu_count()``, which is the share here.
    if hasattr(context, "_count_physical_cores"):
        context._count_physical_cores = lambda *_: (count, None)


def _set_psutil(psutil: Any, count: int) -> None:
    # The platform's function: code that has imported psutil.cpu_count by name calls it as well.
    for name in ("cpu_count_logical", "cpu_count_cores", "cpu_count_physical"):
        if hasattr(psutil._psplatform, name):
            setattr(psutil._psplatform, name, functools.partial(int, count))


def _set_numexpr(numexpr: Any, count: int) -> None:
    told = functools.partial(int, count)
    numexpr.detect_number_of_cores = numexpr.utils.detect_number_of_cores = told
    numexpr.ncores = count


def _set_dask(system: Any, count: int) -> None:
    system.cpu_count = functools.partial(int, count)
    for name in ("dask.system", "dask.base", "dask.threaded", "dask.multiprocessing"):
        if hasattr(sys.modules.get(name), "CPU_COUNT"):
            sys.modules[name].CPU_COUNT = count  # type: ignore[attr-defined]


_ANSWERS: dict[str, Callable[[Any, int], object]] = {
    "joblib.externals.loky.backend.context": _set_loky,
    "loky.backend.context": _set_loky,
    "psutil": _set_psutil,
    "numexpr": _set_numexpr,
    "dask.system": _set_dask,
}
"""By module, what changes it. tests/threads/test_counts.py lists every question, with sources."""

MODULES = frozenset(_ANSWERS)
"""The modules that are changed, by the full name that is imported."""


def answer(count: int) -> None:
    """Make each imported module return the share."""
    for name in MODULES:
        module = imported(name)
        if module is not None:
            answer_in(name, module, count)


def answer_in(name: str, module: Any, count: int) -> None:
    """Do the same as :func:`answer`, for one module; nothing if it is not in the table."""
    if name in _ANSWERS:
        attempt(_ANSWERS[name], module, count)


_count = 1


def pretend(count: int) -> None:
    """Make ``os.cpu_count()`` and similar functions return ``count`` in this process.

    Python 3.13 reads PYTHON_CPU_COUNT and does this itself where the interpreter was started
    with it; here it is done for older ones, and for workers that were forked.
    """
    global _count  # noqa: PLW0603 -- a fact about this process
    _count = count
    if os.cpu_count is not cpu_count:
        os.cpu_count = cpu_count
        # Pickle finds the builtin function there.
        sys.modules[os.name].cpu_count = cpu_count  # type: ignore[attr-defined]
        if sys.version_info >= (3, 13):
            os.process_cpu_count = process_cpu_count  # type: ignore[assignment,unused-ignore]


# Modules keep them by ``from os import cpu_count``, in a fork server as well: so they look.
def cpu_count() -> int | None:
    """Return the CPUs that this worker may use."""
    return _count


def process_cpu_count() -> int | None:
    """Return the CPUs that this worker may use."""
    return _count


# They are pickled as the functions that they replace.
cpu_count.__module__ = process_cpu_count.__module__ = "os"
