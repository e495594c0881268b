"""Caps of the native thread pools that are loaded in this process, and of those loaded later.

A worker is capped in three layers, because no single one reaches everything:

    environment   Variables, set before the interpreter starts. A library reads them when it is
                  loaded. Some pools have no variable, and a forked worker has libraries already.
    initializer   Calls that cap all loaded libraries, before the user's initializer and after it.
                  Libraries that a task imports later are missing.
    each task     A check of the loader's list; new libraries are capped. During a task, a library
                  is capped at the end of its import (``imports``).

Not covered:
    * OpenMP and MKL in another thread: their run-time cap holds for the calling thread only
      (OpenMP 5.2, section 2.4, nthreads-var). A worker runs its tasks in the thread that was
      capped. Threads that a task starts follow the variables, so in a worker that was forked from
      a process with these libraries they are not capped.
    * A task that raises a cap itself: the number stays until a further library is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import ModuleType

from safepool.threads import blocks, counts
from safepool.threads.calls import attempt
from safepool.threads.environment import runtime_threads, worker_environment
from safepool.threads.imports import AfterImport
from safepool.threads.native import NativeLibraries
from safepool.threads.registry import (
    brought_by,
    imported_runtimes,
    modules_to_cap,
    revision,
    when_added,
)


class WorkerCap:
    """The caps of this process for the rest of its life as a worker."""

    def __init__(self, threads: int, environment: Mapping[str, str | None]) -> None:
        """Decide the caps; :meth:`apply` sets them."""
        self.threads = threads
        self._environment = environment
        # Threads of each runtime, and the revision of the rows that this was computed for.
        self._of: dict[str, int] = {}
        self._rows = -1
        self._native = _found or NativeLibraries()
        self._imports = AfterImport(self._cap_new)
        # Number of caps so far, in all and in this thread.
        self._times = 1  # libraries that were found ahead
        self._here = threading.local()

    def apply(self) -> None:
        """Cap everything that is loaded, and watch what will be."""
        if self._native.changed():
            self._times += 1
        self._here.times = self._times
        rows = revision()
        if self._rows != rows:
            self._of, self._rows = _decided(self.threads, self._environment), rows
        attempt(self._native.set, lambda name: self._of.get(name, self.threads))
        self._cap_imported()
        self._imports.start(modules_to_cap() | counts.MODULES)

    def recheck(self) -> None:
        """Cap again if a library was loaded since. 0.1 microseconds if none was."""
        if self._native.changed():
            self.apply()

    def recheck_here(self) -> None:
        """Do the same as :meth:`recheck`, in any thread: each has caps of OpenMP and MKL."""
        if self._native.changed() or getattr(self._here, "times", 0) != self._times:
            self.apply()

    def _cap_imported(self) -> None:
        for row, call, module in imported_runtimes():
            attempt(call.write, module, self._of.get(row.name, self.threads))
        counts.answer(self.threads)

    def _cap_new(self, name: str, module: ModuleType) -> None:
        counts.answer_in(name, module, self.threads)
        for row, call in brought_by(name):
            attempt(call.write, module, self._of.get(row.name, self.threads))
        # Importing blosc2 sets NumExpr to all CPUs; others may do so too.
        self._cap_imported()


_worker_cap: WorkerCap | None = None
_found: NativeLibraries | None = None
_ahead: tuple[tuple[int, int, Mapping[str, str | None]], dict[str, int]] | None = None


def find_ahead() -> None:
    """Find the libraries loaded here, for workers that are forked from this process.

    The search takes milliseconds, most of a worker's start. The function sets nothing, and reads
    only the names and versions of the libraries.
    """
    global _found  # noqa: PLW0603 -- a fact about the process
    _found = NativeLibraries()
    attempt(_found.found)


def decide_ahead(threads: int, environment: Mapping[str, str | None]) -> None:
    """Decide the caps of a worker that is to be forked from this process, once for all alike."""
    global _ahead  # noqa: PLW0603 -- a fact about the process
    key = (revision(), threads, environment)
    if _ahead is None or _ahead[0] != key:
        _ahead = key, runtime_threads(threads, environment)


def _decided(threads: int, environment: Mapping[str, str | None]) -> dict[str, int]:
    if _ahead is not None and _ahead[0] == (revision(), threads, environment):
        return _ahead[1]
    return runtime_threads(threads, environment)


def cap_worker(threads: int, environment: Mapping[str, str | None] | None = None) -> WorkerCap:
    """Cap every native pool of this process for the rest of its life as a worker.

    Args:
        threads: Threads for each pool, at least 1.
        environment: The changes that the worker was born with, which the caps follow where
            the user has set a variable. ``None`` is :func:`worker_environment`.

    Returns:
        The cap, to be checked again before each task.
    """
    global _worker_cap  # noqa: PLW0603 -- a fact about the process
    # A forked worker has its parent's blocks.
    blocks.start_anew(threads)
    if environment is None:
        environment = worker_environment(threads)
    _worker_cap = WorkerCap(threads, environment)
    _worker_cap.apply()
    when_added(_worker_cap.apply)
    return _worker_cap


def worker_threads() -> int | None:
    """Return the threads of this process if it is a worker of a pool, otherwise ``None``."""
    return None if _worker_cap is None else _worker_cap.threads


def is_capped(threads: int) -> bool:
    """Return whether this process is a worker that is capped to that number, now as well."""
    cap = _worker_cap
    if cap is None or cap.threads != threads:
        return False
    cap.recheck_here()
    return True


class capped:  # noqa: N801 -- used as a function is
    """Hold native pools at ``threads`` inside the block, then restore them.

    A library that is first imported inside is capped after its import. Afterwards it has its size
    from outside, if it can still be changed. In a block within a block, or beside one in another
    thread, the number of the last one to begin holds for what belongs to the whole process.

    Args:
        threads: Threads for each pool, at least 1. In a worker that is capped to the same
            number already, the block costs next to nothing.

    Example:
        >>> with capped(1):
        ...     pass
    """

    __slots__ = ("_hold", "_threads")

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._hold: blocks.Hold | None = None

    def __enter__(self) -> None:
        if not is_capped(self._threads):
            self._hold = blocks.enter(self._threads)

    def __exit__(self, *_: object) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            blocks.leave(hold)
