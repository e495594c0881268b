"""The number of this process among the workers of its pool."""

from __future__ import annotations

_index: int | None = None


def worker_index() -> int | None:
    """Return the index of this worker in its pool: 0 to ``max_workers`` - 1.

    No two workers of a pool that run tasks at the same time have the same index. A replacement
    gets the index of the worker that it replaces when the old process has ended, or after a
    second. Use the index to choose a device, a port or a file. ``env=`` and ``gpus=`` of
    :class:`safepool.ProcessPool` use the same index.

    Returns:
        The number, in every task and initializer of a safepool pool, in joblib's calls, and in
        forks that a task makes. ``None`` elsewhere: in the program and its threads, in sequential
        calls, and in other programs that a task starts.

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
