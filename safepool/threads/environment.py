"""The environment that a worker is born with. It is computed, never set on the caller."""

from __future__ import annotations

from safepool.threads.table import THREAD_VARIABLES

__all__ = ["worker_environment"]

# Read by loky and joblib, and by os.process_cpu_count() from Python 3.13 on: a pool that
# a task starts sees the worker's share of the machine, not the whole of it.
_SHARE_VARIABLES = ("LOKY_MAX_CPU_COUNT", "PYTHON_CPU_COUNT")


def worker_environment(threads: int) -> dict[str, str]:
    """Return the variables to set for a worker before its interpreter starts.

    A library reads its variable once, when it is loaded; what is set later is ignored.
    So these must be in the environment that the process is started with.

    Args:
        threads: Threads for each native pool, at least 1.

    Returns:
        Variable names and their values.

    Example:
        >>> worker_environment(1)["OPENBLAS_NUM_THREADS"]
        '1'
    """
    names = (*(variable.name for variable in THREAD_VARIABLES), *_SHARE_VARIABLES)
    return dict.fromkeys(names, str(threads))
