"""``safepool.limit_threads()``: the native threads of this process itself, down to its budget.

Not covered:
    * OpenMP and MKL in threads that run already: their number is one of each thread. Those
      that start later have it where the library is loaded later as well.
    * Threads that a pool has started: they stay, idle.
    * Pools of processes: how many workers a program has is ``max_workers=``.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from typing import TYPE_CHECKING, Literal, Self

from safepool.arguments import checked
from safepool.machine import cpu_count, tell_once
from safepool.threads import blocks
from safepool.threads.cap import worker_threads
from safepool.threads.environment import ruled_threads
from safepool.threads.pools import inspect
from safepool.threads.registry import runtimes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from safepool.threads.pools import NativePool

__all__ = ["ThreadLimit", "limit_threads"]


@checked("limit_threads")
def limit_threads(n: int | Literal["auto"] = "auto") -> ThreadLimit:
    """Bring this process's own native thread pools down to ``n`` threads, now and from now on.

    What is loaded is lowered by its own call; what is imported later finds the variable in
    ``os.environ``, and so do programs that are started. Nothing is raised: what has
    fewer threads, or a variable that says less, keeps it. What cannot be changed any more is
    in the result, and warned of once with the variable that would have to be set before.

    Used as a context manager it holds inside the block, and everything is restored at its end.

    Args:
        n: The most threads for each native pool, at least 1. ``"auto"`` is the budget,
            :func:`safepool.cpu_count`; in a worker of a pool its share.

    Returns:
        Report of the change; for a ``with`` statement if it is not to last.

    Raises:
        ValueError: ``n`` is below 1.
        TypeError: ``n`` is no integer.

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
        kept: The native pools that were loaded and could not be lowered: ``runtime`` names
            each, ``variable`` is the environment variable that bounds it when it is set
            before the library is imported, ``threads`` is what it has, if it says.

    Example:
        >>> with limit_threads(1) as limit:
        ...     limit
        <limit_threads(1)>
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.kept: tuple[NativePool, ...] = ()
        self._lock = threading.Lock()
        # What the call has set, until the first block takes it over; and of blocks that are open.
        self._lasting: blocks.Hold | None = self._set()
        self._holds: list[blocks.Hold] = []

    def __enter__(self) -> Self:
        with self._lock:
            hold, self._lasting = self._lasting, None
        hold = hold or self._set()
        with self._lock:
            self._holds.append(hold)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        # What the variables say that loaded libraries have read.
        environment = dict(os.environ)
        hold = blocks.enter(self.threads, lowers=True)
        try:
            self._name_what_is_kept(environment)
        except BaseException:  # Ctrl-C; nobody would end it
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
        """Return whether a pool has more threads than it should, as far as it can be told."""
        if pool.threads is not None:
            return pool.threads > self.threads
        row = next((row for row in runtimes() if row.name == pool.runtime), None)
        if row is None or not (row.variables and row.fixed):
            return False
        # It has no call and does not say: what counts is what it has read.
        return (ruled_threads(row, environment) or math.inf) > self.threads
