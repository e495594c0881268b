"""Cap the native thread pools that are loaded in this process.

Not covered:
    * A library that is loaded later: its variable holds it (``environment``).
    * OpenMP in another thread: OpenMP's limit is one of the calling thread alone
      (OpenMP 5.2, section 2.4, nthreads-var), so a worker runs its tasks in the thread
      that was capped.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safepool.threads.environment import worker_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cap_worker", "capped", "worker_threads"]

_worker_threads: int | None = None


def worker_threads() -> int | None:
    """Return the threads this process was capped to as a worker; ``None`` outside one."""
    return _worker_threads


def cap_worker(threads: int) -> None:
    """Cap every loaded native pool for the rest of this worker's life.

    Args:
        threads: Threads for each pool, at least 1.
    """
    global _worker_threads  # noqa: PLW0603 -- a fact about the process, set once at its start
    # Imported here: threadpoolctl is the worker's, and importing safepool must stay free
    # of third-party packages.
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    threadpool_limits(limits=threads)
    _worker_threads = threads


@contextmanager
def capped(threads: int) -> Iterator[None]:
    """Hold native pools at ``threads`` inside the block, then restore what was loaded before.

    A library that is first imported inside the block reads its variable then, and keeps to
    it afterwards.

    Args:
        threads: Threads for each pool, at least 1. In a worker that is capped to the same
            number already, the block costs nothing.

    Example:
        >>> with capped(1):
        ...     pass
    """
    if _worker_threads == threads:
        yield
        return
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    with _variables.set_to(threads), threadpool_limits(limits=threads):
        yield


class _Variables:
    """The thread variables of this process while blocks in any of its threads hold them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before: dict[str, str | None] = {}

    @contextmanager
    def set_to(self, threads: int) -> Iterator[None]:
        """Set them for the first block that enters, restore them with the last that leaves."""
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                wanted = worker_environment(threads)
                self._before = {name: os.environ.get(name) for name in wanted}
                os.environ.update(wanted)
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    for name, value in self._before.items():
                        if value is None:
                            os.environ.pop(name, None)
                        else:
                            os.environ[name] = value


_variables = _Variables()
