"""Questions for a number of CPUs, their answers in a worker, and the calls that change these.

A library that sizes its pool of threads by the machine would start 48 of them in each worker of a
host with 48 CPUs. Hence functions that count CPUs return the worker's share where possible. Code
that asks the kernel, a file or another program gets the machine's number: only a variable of the
library (``table``) or the affinity mask helps there (``ProcessPool(pin_workers=True)``).
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from safepool.threads.calls import attempt
from safepool.threads.imports import imported

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A way to ask for a number of CPUs.

    Attributes:
        asked: The expression, or the command.
        told: Answer in a worker: the worker's share, which is the threads of each native pool; the
            affinity mask, which is the share if workers are pinned; or the machine.
        by: Cause of the answer, or the remedy if the answer is ``"machine"``.
        module: Module that is changed in the worker after its import; empty if none.
        write: Function of the module and the share that changes the module.
        source: Documentation of the question.
    """

    asked: str
    told: Literal["share", "affinity", "machine"]
    by: str
    module: str = ""
    write: Callable[[Any, int], object] | None = None
    source: str


def _set_loky(context: Any, count: int) -> None:
    # Until 3.6, asked for physical cores, it returns the machine's if nothing seems to limit it:
    # if its limit is not below the machine, which is what os.cpu_count() says.
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


_OS = "os.cpu_count() is replaced in a worker, and in the fork server before it imports anything"

QUESTIONS: tuple[Question, ...] = (
    Question(asked="os.cpu_count()", told="share", by=_OS, source="Python, os.cpu_count"),
    Question(
        asked="os.process_cpu_count()",
        told="share",
        by=_OS,
        source="Python 3.13, os.process_cpu_count",
    ),
    Question(
        asked="multiprocessing.cpu_count()",
        told="share",
        by="asks os.cpu_count()",
        source="Python, multiprocessing.cpu_count",
    ),
    Question(
        asked="multiprocessing.Pool()._processes",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count()",
        source="Python, multiprocessing.pool.Pool",
    ),
    Question(
        asked="concurrent.futures.ProcessPoolExecutor()._max_workers",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count()",
        source="Python, concurrent.futures.ProcessPoolExecutor",
    ),
    Question(
        asked="concurrent.futures.ThreadPoolExecutor()._max_workers - 4",
        told="share",
        by="asks os.cpu_count(), from 3.13 on os.process_cpu_count(); adds 4",
        source="Python, concurrent.futures.ThreadPoolExecutor",
    ),
    Question(
        asked="joblib.cpu_count()",
        told="share",
        by="asks os.cpu_count() and LOKY_MAX_CPU_COUNT",
        source="joblib, joblib.cpu_count",
    ),
    Question(
        asked="joblib.cpu_count(only_physical_cores=True)",
        told="share",
        by="its copy of loky counts no cores",
        module="joblib.externals.loky.backend.context",
        write=_set_loky,
        source="joblib, joblib.cpu_count; LightGBM's default asks so",
    ),
    Question(
        asked="loky.cpu_count()",
        told="share",
        by="asks os.cpu_count() and LOKY_MAX_CPU_COUNT",
        source="loky, README, loky.cpu_count",
    ),
    Question(
        asked="loky.cpu_count(only_physical_cores=True)",
        told="share",
        by="it counts no cores",
        module="loky.backend.context",
        write=_set_loky,
        source="loky, README, loky.cpu_count",
    ),
    Question(
        asked="psutil.cpu_count()",
        told="share",
        by="the function of its platform is replaced",
        module="psutil",
        write=_set_psutil,
        source="psutil, psutil.cpu_count",
    ),
    Question(
        asked="psutil.cpu_count(logical=False)",
        told="share",
        by="the function of its platform is replaced",
        source="psutil, psutil.cpu_count",
    ),
    Question(
        asked="numexpr.detect_number_of_cores()",
        told="share",
        by="the function is replaced",
        module="numexpr",
        write=_set_numexpr,
        source="NumExpr, numexpr.detect_number_of_cores",
    ),
    Question(
        asked="dask.system.CPU_COUNT",
        told="share",
        by="the number is set wherever Dask keeps it",
        module="dask.system",
        write=_set_dask,
        source="Dask, dask.system.CPU_COUNT",
    ),
    Question(
        asked="numba.config.NUMBA_NUM_THREADS",
        told="share",
        by="NUMBA_NUM_THREADS, and the cap on Numba",
        source="Numba, Environment variables, NUMBA_NUM_THREADS",
    ),
    Question(
        asked="torch.get_num_threads()",
        told="share",
        by="OMP_NUM_THREADS, and the cap on PyTorch",
        source="PyTorch, torch.get_num_threads",
    ),
    Question(
        asked="polars.thread_pool_size()",
        told="share",
        by="POLARS_MAX_THREADS",
        source="Polars, polars.thread_pool_size",
    ),
    Question(
        asked="pyarrow.cpu_count()",
        told="share",
        by="OMP_NUM_THREADS, and the cap on Arrow",
        source="Arrow, pyarrow.cpu_count",
    ),
    Question(
        asked="len(os.sched_getaffinity(0))",
        told="affinity",
        by="left as it is: programs bind threads by it. pin_workers=True makes it the share",
        source="Python, os.sched_getaffinity; sched_getaffinity(2), nproc(1)",
    ),
    Question(
        asked="os.sysconf('SC_NPROCESSORS_ONLN')",
        told="machine",
        by="asks the C library, as native code does: a variable of its own (safepool.threads), "
        "or the library's argument for it",
        source="sysconf(3)",
    ),
    Question(
        asked="sum(line.startswith('processor') for line in open('/proc/cpuinfo'))",
        told="machine",
        by="a file of the kernel's, which no affinity changes: a variable of its own, or its "
        "argument",
        source="proc_cpuinfo(5)",
    ),
    Question(
        asked="len(set(line for line in subprocess.run(['lscpu', '-p=CPU'], capture_output=True, "
        "text=True).stdout.splitlines() if line[:1] != '#'))",
        told="machine",
        by="another program, which reads /sys: as for /proc/cpuinfo",
        source="lscpu(1)",
    ),
)

MODULES = frozenset(question.module for question in QUESTIONS if question.module)
"""The modules that are changed, by the full name that is imported."""


def answer(count: int) -> None:
    """Let each of the modules that is imported answer with the share."""
    for name in MODULES:
        module = imported(name)
        if module is not None:
            answer_in(name, module, count)


def answer_in(name: str, module: Any, count: int) -> None:
    """Do the same as :func:`answer`, for one module; nothing if it is not in the table."""
    for question in QUESTIONS:
        if question.module == name and question.write is not None:
            attempt(question.write, module, count)


_count = 1


def pretend(count: int) -> None:
    """Let ``os.cpu_count()`` and its kin say ``count`` in this process.

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
