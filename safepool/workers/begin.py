"""First steps of a standard start method, before the program: CPUs, variables, then caps.

``spawn`` and ``forkserver`` import the program's script, and NumPy with it, before any code of
this package can run there. Both evaluate an expression of the program before that: the process's
name when it is unpickled, the fork server's command line.

Not covered:
    * A program that can import this package only by its own finder: there the variables are set
      first, and the caps that are calls follow at the worker's own start.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from multiprocessing import spawn
from typing import Any

# A worker that was forked from a capped server has the caps, and needs them once. The server may
# have fewer CPUs than the machine: then worker_main() asks the system for the worker's own.
BEGIN = """
import os, sys
if cpus and os.sched_getaffinity(0).issuperset(cpus):
    os.sched_setaffinity(0, cpus)
for name, value in environment.items():
    os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
if "safepool.threads.cap" not in sys.modules:
    sys.path[:] = path
    try:
        from safepool.threads.cap import cap_worker
    except ImportError:
        pass
    else:
        cap_worker(threads, environment)
"""
"""Statements that begin with the names of :func:`facts_for`."""


def facts_for(
    environment: Mapping[str, str | None], threads: int, cpus: tuple[int, ...]
) -> dict[str, Any]:
    """Return the values for the first statements of a worker, each with the text of a literal."""
    path = spawn.get_preparation_data("")["sys_path"]
    return {"environment": dict(environment), "threads": threads, "cpus": cpus, "path": path}


def popen_with(kind: Any, **names: object) -> Any:
    """Return a ``Popen`` of the standard library that finds other modules under these names.

    The class's own code starts the process, in any version of Python.
    """
    launch = types.FunctionType(kind._launch.__code__, {**kind._launch.__globals__, **names})
    return type("Popen", (kind,), {"_launch": launch})
