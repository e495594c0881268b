"""The variables that native thread pools read when they are loaded, one row each."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["THREAD_VARIABLES", "ThreadVariable"]


class ThreadVariable(NamedTuple):
    """One environment variable that bounds a native thread pool.

    Attributes:
        name: The variable.
        runtime: Who reads it.
        source: Where its meaning is documented.
    """

    name: str
    runtime: str
    source: str


THREAD_VARIABLES = (
    ThreadVariable("OMP_NUM_THREADS", "OpenMP", "OpenMP 5.2, section 21.1.2"),
    ThreadVariable("OPENBLAS_NUM_THREADS", "OpenBLAS", "OpenBLAS README, Usage"),
    ThreadVariable("MKL_NUM_THREADS", "oneMKL", "oneMKL developer guide, threading"),
    ThreadVariable("BLIS_NUM_THREADS", "BLIS", "BLIS docs/Multithreading.md"),
    ThreadVariable("VECLIB_MAXIMUM_THREADS", "Accelerate", "man 7 Accelerate"),
    ThreadVariable("NUMEXPR_NUM_THREADS", "NumExpr", "NumExpr user guide, threadpool"),
)
