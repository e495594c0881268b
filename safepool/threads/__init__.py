"""Floor 3: the native thread pools that a worker can meet, and how each one is capped.

    table         knowledge: a row for each runtime
    counts        who asks for a number of CPUs, and what it is told in a worker
    calls         what caps a loaded runtime, for the rows that threadpoolctl does not know
    registry      the rows that count here: the table's, and those that others add
    environment   what a worker is born with
    libraries     what was loaded since the last look
    imports       what is being imported
    placement     which CPUs a worker is bound to, if it is
    native        what threadpoolctl caps
    blocks        a number that holds for a while, and what was before
    cap           the three layers of a worker, and the block around a function
    pools         what is loaded now

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


# A type checker would take any misspelled name for an object.
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
