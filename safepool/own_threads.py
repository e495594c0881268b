"""``safepool.limit_threads()``: lower the native threads of this process to its budget.

Not covered:
    * OpenMP and MKL in threads that run already: each thread keeps its own number. Threads that
      start later have the new number only if the library is loaded later as well.
    * Threads that a pool has started: the idle threads stay.
    * The number of workers of a process pool: see ``max_workers=``.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Mapping
from typing import Literal, Self

from safepool.arguments import checked
from safepool.machine import cpu_count, tell_once
from safepool.threads import blocks
from safepool.threads.cap import worker_threads
from safepool.threads.environment import ruled_threads
from safepool.threads.pools import NativePool, inspect
from safepool.threads.registry import runtimes


@checked("limit_threads")
def limit_threads(n: int | Literal["auto"] = "auto") -> ThreadLimit:
    """Bring this process's own native thread pools down to ``n`` threads, now and from now on.

    Libraries that are loaded are lowered by their own calls. Libraries that are imported later,
    and child processes, find the variables in ``os.environ``. No number is ever raised: a pool
    with fewer threads, or a variable with a lower value, stays as it is. The result lists pools
    that can no longer be changed. One warning names the variable to set before the import.

    As a context manager, the limit ends with the block, which restores the former numbers.

    Args:
        n: The most threads of each native pool, at least 1. ``"auto"`` is the budget,
            :func:`safepool.cpu_count`; in a worker of a pool it is the worker's share.

    Returns:
        Report of the change, and a context manager for a temporary change.

    Raises:
        ValueError: ``n`` is below 1.
        TypeError: ``n`` is no integer and not ``"auto"``.

    Example:
        >>> with limit_threads(1) as limit:
        ...     limit.threads
        1
        >>> with limit_threads() as limit:
        ...     limit.threads >= 1
        True
    """
    return ThreadLimit(worker_threads() or cpu_count() if n == "auto" else operator.index(n))


class ThreadLimit:
    """A limit on the native threads of this process.

    Attributes:
        threads: The most threads for each native pool.
        kept: The native pools that were loaded and could not be lowered. ``runtime`` is the name,
            ``variable`` is the environment variable that bounds the pool if it is set before the
            import, ``threads`` is the present number, if known.

    Example:
        >>> with limit_threads(1) as limit:
        ...     limit
        <limit_threads(1)>
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.kept: tuple[NativePool, ...] = ()
        self._lock = threading.Lock()
        # The state of the call itself, until the first block takes it over, and of open blocks.
        self._lasting: blocks.Hold | None = self._set()
        self._holds: list[blocks.Hold] = []

    def __enter__(self) -> Self:
        with self._lock:
            hold, self._lasting = self._lasting, None
        hold = hold or self._set()
        with self._lock:
            self._holds.append(hold)
        return self

    def __exit__(self, *_: object) -> None:
        here = threading.get_ident()
        with self._lock:
            # This thread's own: others may be in blocks of this object as well.
            holds = sorted(self._holds, key=lambda hold: hold.thread == here)
            if holds:
                self._holds.remove(holds[-1])
            elif self._lasting is not None:
                holds, self._lasting = [self._lasting], None
        if holds:
            blocks.leave(holds[-1])

    def __repr__(self) -> str:
        kept = ", ".join(pool.runtime for pool in self.kept)
        return f"<limit_threads({self.threads})" + (f", kept: {kept}>" if kept else ">")

    def _set(self) -> blocks.Hold:
        # Values that loaded libraries have read from the variables.
        environment = dict(os.environ)
        hold = blocks.enter(self.threads, lowers=True)
        try:
            self._name_what_is_kept(environment)
        except BaseException:  # Ctrl-C; no other code would end it
            blocks.leave(hold)
            raise
        return hold

    def _name_what_is_kept(self, environment: Mapping[str, str]) -> None:
        self.kept = tuple(pool for pool in inspect() if self._is_kept(pool, environment))
        for pool in self.kept:
            has = "an unknown number of" if pool.threads is None else str(pool.threads)
            remedy = (
                f"set {pool.variable}={self.threads} before it is imported"
                if pool.variable
                else pool.hole
            )
            tell_once(
                f"limit_threads({self.threads}) cannot lower {pool.runtime}, which is loaded "
                f"already and has {has} threads: {remedy}",
                subject=f"limit_threads {pool.runtime}",
            )

    def _is_kept(self, pool: NativePool, environment: Mapping[str, str]) -> bool:
        """Return whether a pool is known to have more threads than the limit."""
        if pool.threads is not None:
            return pool.threads > self.threads
        row = next((row for row in runtimes() if row.name == pool.runtime), None)
        if row is None or not (row.variables and row.fixed):
            return False
        # A pool without a call that reports its size: the variable that it has read decides.
        return (ruled_threads(row, environment) or math.inf) > self.threads
