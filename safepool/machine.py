"""Floor 3: what this process may use, asked now and decided now.

The two numbers that most callers want: it joins ``limits`` and ``budget`` and holds no
rule of its own. Nothing is cached: limits change while a program runs.
"""

from __future__ import annotations

from safepool.budget import fit
from safepool.limits import read_limits

__all__ = ["cpu_count", "cpu_limit"]


def cpu_limit() -> float:
    """Return the CPUs that the kernel will give this process, not rounded.

    Returns:
        CPUs of run time per second of wall time, such as 2.5: the smallest of the
        affinity mask, every control group's quota from this process's own up to the
        mount point, and the upper bounds set in the environment. Always above 0.

    Source:
        sched_getaffinity(2); Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max".

    Example:
        >>> cpu_limit() > 0
        True
    """
    return fit(read_limits()).cpus


def cpu_count() -> int:
    """Return the number of workers that fit this process's limits.

    Returns:
        :func:`cpu_limit` rounded down, at least 1.

    Example:
        >>> cpu_count() >= 1
        True
    """
    return fit(read_limits()).workers
