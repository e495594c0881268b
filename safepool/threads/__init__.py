"""Floor 3: the native thread pools that a worker can meet, and how each one is capped.

    table         knowledge: a row for each runtime
    counts        functions that count CPUs, and their results in a worker
    calls         functions that cap a loaded runtime which threadpoolctl does not know
    registry      the valid rows: those of the table, and added ones
    environment   variables at a worker's start
    imports       calls at the end of a module's import
    placement     the CPUs that a worker is bound to
    native        libraries that threadpoolctl caps, and those loaded since the last check
    blocks        temporary caps, and the former numbers
    cap           the three layers of caps in a worker, and the block around a function
    pools         the pools that are loaded now

The package never measures limits: the caller gives the number of threads. It imports no library in
order to cap it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safepool.threads import table as table
    from safepool.threads.pools import NativePool, inspect
    from safepool.threads.registry import register, unregister
    from safepool.threads.table import NativeRuntime, ThreadVariable

__all__ = ["NativePool", "NativeRuntime", "ThreadVariable", "inspect", "register", "unregister"]

_HOMES = {
    "NativePool": "safepool.threads.pools",
    "NativeRuntime": "safepool.threads.table",
    "ThreadVariable": "safepool.threads.table",
    "inspect": "safepool.threads.pools",
    "register": "safepool.threads.registry",
    "unregister": "safepool.threads.registry",
}


# Hidden from type checkers, which would accept any misspelled name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "table":
            return importlib.import_module("safepool.threads.table")
        try:
            home = _HOMES[name]
        except KeyError:
            raise AttributeError(f"module 'safepool.threads' has no attribute {name!r}") from None
        value: object = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value
