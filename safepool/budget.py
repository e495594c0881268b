"""Floor 2: limits and a request in, workers and threads out, with the reason.

It computes. It opens no file and reads neither the clock nor the environment; whoever
wants to know what the machine says asks ``safepool.limits`` and hands the answer over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safepool.limits import Limit

if TYPE_CHECKING:
    from safepool.limits import Limits

__all__ = ["Budget", "fit"]

# A limit this close below an integer counts as that integer: systemd rounds a quota to
# 10 ms and odd periods give 1.99999 where 2 was meant.
_SNAP = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many processes to start, and why.

    Attributes:
        workers: Worker processes, at least 1.
        threads_per_worker: Threads of each native pool inside a worker, at least 1.
        cpus: The CPUs that were divided up, before rounding.
        because: The limit that decided.
    """

    workers: int
    threads_per_worker: int
    cpus: float
    because: Limit


def fit(limits: Limits, *, max_workers: int | None = None, threads_per_worker: int = 1) -> Budget:
    """Divide the CPUs that the kernel grants into workers.

    Rounded down: the fraction is left to this process, which pickles and unpickles every
    task, and to the pool's own threads. The minimum is one worker, and workers x threads
    never exceed the affinity mask.

    Args:
        limits: What was read.
        max_workers: The caller's own number, which always wins; ``None`` lets the limits
            decide.
        threads_per_worker: Native threads that each worker may use, at least 1.

    Returns:
        The budget with the limit that decided it.

    Raises:
        ValueError: ``max_workers`` or ``threads_per_worker`` is below 1.

    Example:
        >>> affinity = Limit(name="affinity", cpus=8.0, source="sched_getaffinity", raw="0-7")
        >>> quota = Limit(name="cpu.max", cpus=2.5, source="cpu.max", raw="250000 100000")
        >>> from safepool.limits import Limits
        >>> fit(Limits(affinity=affinity, quotas=(quota,))).workers
        2
    """
    if threads_per_worker < 1:
        raise ValueError(f"threads_per_worker must be at least 1, not {threads_per_worker}")
    binding = limits.binding
    # A captured machine may say nothing at all; one CPU is the only number sure to exist.
    cpus = 1.0 if binding.cpus is None else binding.cpus
    if max_workers is not None:
        if max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        asked = Limit(
            name="max_workers",
            cpus=float(max_workers),
            source="the max_workers= argument",
            raw=str(max_workers),
        )
        return Budget(
            workers=max_workers, threads_per_worker=threads_per_worker, cpus=cpus, because=asked
        )
    if limits.exact_workers is not None and limits.exact_workers.cpus is not None:
        return Budget(
            workers=max(1, int(limits.exact_workers.cpus)),
            threads_per_worker=threads_per_worker,
            cpus=cpus,
            because=limits.exact_workers,
        )
    return Budget(
        workers=max(1, _whole(cpus) // threads_per_worker),
        threads_per_worker=threads_per_worker,
        cpus=cpus,
        because=binding,
    )


def _whole(cpus: float) -> int:
    above = math.ceil(cpus)
    return above if cpus >= above * (1 - _SNAP) else math.floor(cpus)
