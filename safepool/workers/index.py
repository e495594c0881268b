"""Which worker of its pool this process is."""

from __future__ import annotations

__all__ = ["be_index", "worker_index"]

_index: int | None = None


def worker_index() -> int | None:
    """Return the place of this worker in its pool: 0 to ``max_workers`` - 1.

    No two workers that run tasks of one pool have the same at the same time. The worker that takes
    the place of another gets its number when the old process has ended, or a second later at the
    latest, if that takes its time. Programs choose a device, a port or a file by it: see also
    ``env=`` and ``gpus=`` of :class:`safepool.ProcessPool`.

    Returns:
        The number, in every task and initializer of a pool of this package, joblib's calls
        included; in what a task forks as well. ``None`` where no such worker is: in the program,
        in its threads and sequential calls, in a process that a task has started afresh.

    Example:
        >>> from safepool import ProcessPool
        >>> with ProcessPool(1) as pool:
        ...     pool.submit(worker_index).result(), worker_index()
        (0, None)
    """
    return _index


def be_index(index: int) -> None:
    """Let this process be the worker of that number."""
    global _index  # noqa: PLW0603 -- a fact about the process
    _index = index
