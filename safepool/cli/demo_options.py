"""Floor 7: what can be asked of ``safepool demo``. Numbers and their bounds; no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FEWEST_POINTS", "LEAST_CPUS", "MOST_PRETENDED", "MOST_TASKS", "Options"]

FEWEST_POINTS = 16
"""A task's result keeps this many numbers of each operation."""

LEAST_CPUS = 0.01
"""The kernel takes no quota below 1 ms, of a period of 100 ms (sched-bwc.rst)."""

MOST_TASKS = 100_000
"""Their results, of 81 numbers each, are compared in memory."""

MOST_PRETENDED = 128
"""The standard pool then has 128 x 128 threads (NumPy and SciPy bring an OpenBLAS each, compiled
for 64): half of the 32,768 that Linux has numbers for by default (proc_sys_kernel(5))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the user.

    The defaults end within a minute on a laptop: alone on one CPU the batch takes about a
    second, and the pool that takes longer than the bound is cut off.

    Attributes:
        tasks: Number of tasks, from 1 to ``MOST_TASKS``.
        points: Size of each, at least ``FEWEST_POINTS``.
        cpus: Quota to run under, at least ``LEAST_CPUS``; ``None`` for the limits there are.
        pretend_host_cpus: CPUs that both halves believe in, at most ``MOST_PRETENDED``; ``None``
            for those that there are.
        bound_s: Seconds after which a half is cut off, above 0.
    """

    tasks: int = 192
    points: int = 150
    cpus: float | None = None
    pretend_host_cpus: int | None = None
    bound_s: float = 20.0
