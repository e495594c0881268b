"""Process pools that fit the machine they run on.

    ProcessPool         replaces ``concurrent.futures.ProcessPoolExecutor``
    Pool                replaces ``multiprocessing.Pool``
    ClusterPool         the same executor over many nodes, through Dask or an executor
    ThreadPool          replaces ``concurrent.futures.ThreadPoolExecutor``
    parallel_backend    joblib and scikit-learn in a safepool pool
    worker              decorator: caps native threads in any pool, sets a timeout and retries
    limit_threads       fewer native threads in this process
    share               places an object once for many tasks
    worker_index        index of the task's worker in its pool, from 0
    register_setting    adds a library setting that workers take over from the program
    cpu_limit, cpu_count, read_limits
                        the limits of this process, each with the file it was read from
    threads             the native thread pools that are loaded, and their variables

``help(safepool.ProcessPool)`` has all arguments in groups, ``help("safepool.pool")`` the
differences from a forked pool, ``help("safepool.cli")`` the commands and exit codes,
``help("safepool.threats")`` the threat model.

The shell command is ``safepool --help``. All errors are subclasses of :class:`SafepoolError`.
Other messages of the package go to the logger ``safepool``, which is silent until the program
configures logging.

Data flows one way through the modules, and each one imports only from its left:

    errors, arguments -> linux -> limits -> budget -> machine -> threads -> transport -> workers
           -> pool -> cluster, decorator, multiprocessing_pool, own_threads -> joblib_backend
           -> cli

Public names load on first use: ``import safepool`` itself imports no other package. The import
registers the joblib backend ``"safepool"`` without importing joblib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from safepool.registration import register as _register

if TYPE_CHECKING:
    from safepool import limits as limits
    from safepool import threads as threads
    from safepool.budget import Budget
    from safepool.cluster import ClusterPool
    from safepool.decorator import worker
    from safepool.errors import (
        MemoryExceeded,
        MemoryLimitError,
        MissingExtraError,
        OutOfMemory,
        PoolBrokenError,
        RefusedCallError,
        RemoteTaskError,
        SafepoolError,
        TaskTimeoutError,
        TraceFileError,
        UnreadableLimitError,
        WorkerDiedError,
    )
    from safepool.joblib_backend import parallel_backend
    from safepool.limits import Limit, Limits, read_limits
    from safepool.machine import cpu_count, cpu_limit
    from safepool.multiprocessing_pool import Pool
    from safepool.own_threads import ThreadLimit, limit_threads
    from safepool.pool.executor import ProcessPool
    from safepool.pool.watch import WorkerInfo
    from safepool.thread_pool import ThreadPool
    from safepool.transport.sharing import share
    from safepool.workers.index import worker_index
    from safepool.workers.settings import register_setting, unregister_setting

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ClusterPool",
    "Limit",
    "Limits",
    "MemoryExceeded",
    "MemoryLimitError",
    "MissingExtraError",
    "OutOfMemory",
    "Pool",
    "PoolBrokenError",
    "ProcessPool",
    "RefusedCallError",
    "RemoteTaskError",
    "SafepoolError",
    "TaskTimeoutError",
    "ThreadLimit",
    "ThreadPool",
    "TraceFileError",
    "UnreadableLimitError",
    "WorkerDiedError",
    "WorkerInfo",
    "cpu_count",
    "cpu_limit",
    "limit_threads",
    "parallel_backend",
    "read_limits",
    "register_setting",
    "share",
    "unregister_setting",
    "worker",
    "worker_index",
]

_NAMES = {
    "budget": "Budget",
    "cluster": "ClusterPool",
    "decorator": "worker",
    "errors": "MemoryExceeded MemoryLimitError MissingExtraError OutOfMemory PoolBrokenError "
    "RefusedCallError RemoteTaskError SafepoolError TaskTimeoutError "
    "TraceFileError UnreadableLimitError WorkerDiedError",
    "joblib_backend": "parallel_backend",
    "limits": "Limit Limits read_limits",
    "machine": "cpu_count cpu_limit",
    "multiprocessing_pool": "Pool",
    "own_threads": "ThreadLimit limit_threads",
    "pool.executor": "ProcessPool",
    "pool.watch": "WorkerInfo",
    "thread_pool": "ThreadPool",
    "transport.sharing": "share",
    "workers.index": "worker_index",
    "workers.settings": "register_setting unregister_setting",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

# Reached by attribute after ``import safepool``.
_SUBMODULES = frozenset({"limits", "threads"})


# Hidden from type checkers, which would accept any misspelled name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        try:
            home = _HOMES[name]
        except KeyError:
            raise AttributeError(f"module 'safepool' has no attribute {name!r}") from None
        value: object = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value


_register()


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
