"""Floor 2: limits and a request in, workers and threads out, with the reason.

It opens no file and reads neither the clock nor the environment: callers pass the limits that
``safepool.limits`` has read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safepool.arguments import check
from safepool.limits import Limit, Limits, MemoryLimit, OpenFilesLimit, PidsLimit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.limits.waiting import WaitSample

AnyLimit = Limit | MemoryLimit | PidsLimit | OpenFilesLimit
Rounding = Literal["floor", "nearest", "ceil"]

# A limit this close below an integer counts as that integer: systemd rounds a quota to
# 10 ms and odd periods give 1.99999 where 2 was meant.
_SNAP = 0.01

# The kernel counts threads like processes. Besides its first thread and those of its native pools,
# a worker has one or two threads of a library (jemalloc's, Arrow's), and starts a program now
# and then.
_TASKS_BESIDE_THREADS = 3
# The scheduler's thread, the processes of a start method, and a reserve.
_TASKS_OF_A_POOL = 8

# For each worker: channel, process descriptor, pipe of the start method, and one during its start.
_FILES_PER_WORKER = 4
# Left for the program itself.
_FILES_SPARED = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Wishes of the caller; the defaults are neutral.

    Attributes:
        max_workers: The caller's own number of workers, at least 1, which overrides the limits.
            ``None`` lets the limits decide.
        threads_per_worker: Threads of each native pool in a worker, at least 1. ``"auto"`` divides
            the limit by ``max_workers``.
        rounding: Treatment of a fraction of a CPU.
        reserve: CPUs kept for this process and for other processes, such as 0.5.
        memory_per_worker: Bytes that one worker needs; ``None`` leaves memory out.
    """

    max_workers: int | None = None
    threads_per_worker: int | Literal["auto"] = 1
    rounding: Rounding = "floor"
    reserve: float = 0.0
    memory_per_worker: int | None = None

    def __post_init__(self) -> None:
        check("max_workers", self.max_workers, optional=True)
        check("threads_per_worker", self.threads_per_worker)
        check("rounding", self.rounding)
        check("reserve", self.reserve)
        check("memory_per_worker", self.memory_per_worker, optional=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Number of processes to start, and the reason: the result of :func:`safepool.budget.fit`.

    Attributes:
        workers: Worker processes, at least 1.
        threads_per_worker: Threads of each native pool inside a worker, at least 1.
        cpus: The CPUs that the kernel grants, before reserve and rounding.
        dropped_cpus: CPUs left over by rounding, 0 or more.
        because: The limit that decided.

    Example:
        >>> from safepool.budget import fit
        >>> from safepool import read_limits
        >>> budget = fit(read_limits())
        >>> budget.workers >= 1 and budget.because.source != ""
        True
    """

    workers: int
    threads_per_worker: int
    cpus: float
    dropped_cpus: float = 0.0
    because: AnyLimit


def fit(limits: Limits, request: Request | None = None) -> Budget:
    """Divide the CPUs that the kernel grants into workers.

    The default rounds down: the fraction is left to this process, which pickles and unpickles
    every task, and to the pool's own threads. With one more worker, the kernel freezes all workers
    and this process together for a part of every period. ``benchmarks/rounding.py`` gave on two
    CPUs, for workers that are always busy:

        quota   rounded up does     and freezes the program for
        1.1     1.10 x the work     427 ms of each second, 48 ms at a time
        1.5     1.50 x the work     207 ms of each second, 26 ms at a time
        1.9     1.94 x the work     nothing that was noticed

    A batch job gains by ``rounding="ceil"``, most of all with a quota just below a whole number.
    ``"nearest"`` has that gain and avoids the worst freezes.

    The minimum is one worker. Workers x threads never exceed the affinity mask. The number of
    workers also fits the limits on memory (if ``memory_per_worker`` is given), processes and open
    files.

    Args:
        limits: The limits that were read.
        request: The wishes of the caller.

    Returns:
        The budget, with the limit that decided.

    Example:
        >>> from safepool.limits import Limits
        >>> affinity = Limit(name="affinity", cpus=8.0, source="sched_getaffinity", raw="0-7")
        >>> quota = Limit(name="cpu.max", cpus=2.5, source="cpu.max", raw="250000 100000")
        >>> fit(Limits(affinity=affinity, quotas=(quota,))).workers
        2
        >>> fit(Limits(affinity=affinity, quotas=(quota,)), Request(rounding="ceil")).workers
        3
    """
    request = request or Request()
    binding = limits.binding
    # A captured machine may have no limit at all; only one CPU is certain.
    cpus = 1.0 if binding.cpus is None else binding.cpus
    exact = _exact(limits, request)
    if exact is not None:
        workers, because = exact
        share = max(1, math.floor(_snapped(cpus) - request.reserve) // workers)
        asked = request.threads_per_worker
        threads = share if asked == "auto" else asked
        return Budget(workers=workers, threads_per_worker=threads, cpus=cpus, because=because)

    threads = 1 if request.threads_per_worker == "auto" else request.threads_per_worker
    left = _snapped(cpus) - request.reserve
    whole = _ROUND[request.rounding](left)
    if limits.affinity.cpus is not None:
        whole = min(whole, int(limits.affinity.cpus))
    planned: list[tuple[int, AnyLimit]] = [(whole // threads, binding)]
    planned.extend(_rooms(limits, request, threads))
    # min() keeps the first of equals: the CPUs, if another limit has room for as many.
    workers, why = min(planned, key=lambda room: room[0])
    return Budget(
        workers=max(1, workers),
        threads_per_worker=threads,
        cpus=cpus,
        dropped_cpus=max(0.0, left - max(1, whole)),
        because=why,
    )


def is_held_back(sample: WaitSample) -> bool:
    """Tell whether processes waited for CPUs while CPUs stood idle.

    Ordinary delays of the scheduler stay far below a quarter of the wanted time. Idle time must
    cover at least half of the waiting: otherwise other processes used the CPUs.

    Example:
        >>> from safepool.limits.waiting import WaitSample
        >>> is_held_back(WaitSample(ran_s=0.5, waited_s=0.5, idle_s=1.4))
        True
        >>> is_held_back(WaitSample(ran_s=0.5, waited_s=0.5, idle_s=0.0))
        False
    """
    wanted_s = sample.ran_s + sample.waited_s
    return sample.waited_s > 0.25 * wanted_s and sample.idle_s >= 0.5 * sample.waited_s


def _exact(limits: Limits, request: Request) -> tuple[int, Limit] | None:
    """Return the number of workers that was set explicitly, and its source."""
    if request.max_workers is not None:
        return request.max_workers, Limit(
            name="max_workers",
            cpus=float(request.max_workers),
            source="the max_workers= argument",
            raw=str(request.max_workers),
        )
    exact = limits.exact_workers
    if exact is not None and exact.cpus is not None:
        return max(1, int(exact.cpus)), exact
    return None


def _rooms(limits: Limits, request: Request, threads: int) -> Iterator[tuple[int, AnyLimit]]:
    """Yield how many workers each other limit has room for."""
    if request.memory_per_worker is not None:
        for memory in limits.memory:
            if memory.bytes is not None:
                used = (memory.used_bytes or 0) - (memory.reclaimable_bytes or 0)
                yield (memory.bytes - max(0, used)) // request.memory_per_worker, memory
    for pids in limits.pids:
        if pids.tasks is not None:
            left = pids.tasks - (pids.used_tasks or 0) - _TASKS_OF_A_POOL
            yield left // (threads + _TASKS_BESIDE_THREADS), pids
    files = limits.open_files
    if files is not None and files.files is not None:
        left = files.files - (files.used_files or 0) - _FILES_SPARED
        yield left // _FILES_PER_WORKER, files


def _snapped(cpus: float) -> float:
    above = math.ceil(cpus)
    return above if cpus >= above * (1 - _SNAP) else cpus


_ROUND = {"floor": math.floor, "nearest": lambda cpus: math.floor(cpus + 0.5), "ceil": math.ceil}
