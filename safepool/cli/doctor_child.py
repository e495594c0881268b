"""Floor 7: the process that the doctor imports libraries in: this module, run by ``python -P``.

Arguments: seconds for each import, then the libraries. The current folder is not searched: a file
there, numpy.py for one, is no library. On standard output, one line of JSON for each step, as
``doctor`` reads it:

    {"begin": NAME}                   the import begins
    {"name": NAME, ...}               it has ended: the fields of ``doctor.Library``
    {"end": true}                     nothing follows

Output of a library goes to standard error. Nothing is capped: the report shows the libraries' own
behaviour.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import packages_distributions
from typing import TextIO

from safepool import procfs
from safepool.errors import text_of
from safepool.threads import NativePool, inspect
from safepool.threads.imports import imported
from safepool.threads.registry import runtimes

_Key = tuple[str, str]

# The most that faulthandler takes.
_LONGEST_S = 1e9
_GONE_WITHIN_S = 1.0


def main(arguments: list[str]) -> None:
    """Import one library after the other, print the effects of each, and end the process."""
    limit_s, *names = arguments
    with os.fdopen(os.dup(1), "w", encoding="ascii") as told:
        os.dup2(2, 1)
        faulthandler.enable()
        inspect()  # its own imports come before the first count
        for name in names:
            _tell(told, {"begin": name})
            _tell(told, _import(name, float(limit_s)))
        _tell(told, {"end": True})
    # Not by returning: threads that a library has started may keep an interpreter alive.
    os._exit(0)


def _tell(told: TextIO, fact: dict[str, object]) -> None:
    told.write(f"{json.dumps(fact)}\n")
    told.flush()


def _import(name: str, limit_s: float) -> dict[str, object]:
    threads_before = _os_threads()
    pools_before = _by_key(inspect())
    guests_before = _guests()
    error = ""
    # A stack that the parent can show, written just before the parent's time limit. The stack
    # takes a thread, and so must not be written while threads are counted.
    me = os.getpid()
    before = set(procfs.threads())
    with contextlib.suppress(RuntimeError):  # without another thread there is no stack
        faulthandler.dump_traceback_later(min(limit_s, _LONGEST_S))
    watcher = set(procfs.threads()) - before
    try:
        importlib.import_module(name)
    except BaseException as problem:  # noqa: BLE001 -- whatever a library raises is its report
        error = f"{type(problem).__name__}: {text_of(problem)}{_hint(name, problem)}"
    finally:
        if os.getpid() != me:
            os._exit(0)  # a fork of the import's that has come back: it has no watchdog to cancel
        faulthandler.cancel_dump_traceback_later()
    _wait_for_the_end_of(watcher)
    pools = _by_key(inspect())
    return {
        "name": name,
        "error": error,
        "version": "" if error else _version(name),
        "os_threads_before": threads_before,
        "os_threads": _os_threads(),
        "pools": [asdict(pool) for key, pool in pools.items() if key not in pools_before],
        "changed": [
            {
                "runtime": pool.runtime,
                "library": pool.library,
                "threads_before": pools_before[key].threads,
                "threads": pool.threads,
            }
            for key, pool in pools.items()
            if key in pools_before and pool.threads != pools_before[key].threads
        ],
        "guests": [guest for guest in _guests() if guest not in guests_before],
    }


def _wait_for_the_end_of(ended: set[int]) -> None:
    # Python has joined the thread when it gives back a lock; the kernel ends it a little later.
    deadline = time.monotonic() + _GONE_WITHIN_S
    while ended.intersection(procfs.threads()) and time.monotonic() < deadline:
        time.sleep(0.001)


def _os_threads() -> int | None:
    """Return the kernel's number of threads of this process; ``None`` if unknown."""
    told = procfs.fields().get("Threads")
    return None if told is None else int(told)


def _by_key(pools: Iterable[NativePool]) -> dict[_Key, NativePool]:
    return {(pool.runtime, pool.library): pool for pool in pools}


def _guests() -> list[dict[str, str]]:
    """Return imported libraries that compute in the threads of another row's runtime."""
    return [
        {"runtime": row.name, "through": row.through, "fixed": row.fixed, "hole": row.hole}
        for row in runtimes()
        if row.through is not None and any(imported(name) is not None for name in row.modules)
    ]


def _version(name: str) -> str:
    for module in (name, name.partition(".")[0]):
        with warnings.catch_warnings(action="ignore"):  # some modules deprecate theirs
            version = getattr(sys.modules.get(module), "__version__", None)
        if isinstance(version, str):
            return version
    return ""


def _hint(name: str, problem: BaseException) -> str:
    """Return the names to import where ``name`` is one to install, or is in this folder."""
    top = name.partition(".")[0]
    if not isinstance(problem, ModuleNotFoundError) or problem.name != top:
        return ""
    for file in (f"{top}.py", top):
        if os.path.exists(file):
            return f" (./{file} is not run; PYTHONPATH=. makes Python look in this folder)"
    modules = sorted(
        module
        for module, packages in packages_distributions().items()
        if _installed_as(name) in map(_installed_as, packages) and not module.startswith("_")
    )
    return f" (the package {name} is imported as {', '.join(modules)})" if modules else ""


def _installed_as(package: str) -> str:
    # Python packaging guide, "Names and normalization", as far as it concerns equality here.
    return package.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    main(sys.argv[1:])
