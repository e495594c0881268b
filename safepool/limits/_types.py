"""Types of limits: a value never travels without its source and raw text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safepool.shown import counted, html_table, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A ceiling on CPU time, with its source.

    Attributes:
        name: Standard term: ``affinity``, ``cpu.max``, ``cpu.cfs_quota_us``, or the name of an
            environment variable such as ``SLURM_CPUS_PER_TASK``, or Python's option ``-X
            cpu_count``.
        cpus: Ceiling in CPUs of run time per second of wall time: 2.5 is two and a half CPUs.
            ``None`` means that the source sets no ceiling.
        source: The file, the call or the variable that was read.
        raw: Text of the source, word for word. If two files make one limit (version 1), both:
            ``150000 / 100000``.

    Example:
        >>> from safepool import read_limits
        >>> limit = read_limits().affinity
        >>> limit.name, limit.cpus is None or limit.cpus >= 1
        ('affinity', True)
    """

    name: str
    cpus: float | None
    source: str
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """A ceiling on memory, with its source.

    Attributes:
        name: ``memory.max``, ``memory.high``, ``memory.limit_in_bytes`` or
            ``hierarchical_memory_limit``.
        bytes: The ceiling; ``None`` means that the source sets none.
        used_bytes: Present memory of the group, page cache included; ``None`` if unknown, or not
            read because the group has no ceiling. For ``hierarchical_memory_limit``, whose
            ancestor may be hidden, the memory of the process's own group: a lower bound.
        reclaimable_bytes: Part of ``used_bytes`` that the kernel frees under pressure (clean page
            cache, inactive files, reclaimable slab); ``None`` if unknown.
        source: The file that was read.
        raw: Text of the source, word for word.
    """

    name: str
    bytes: int | None
    used_bytes: int | None
    reclaimable_bytes: int | None
    source: str
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PidsLimit:
    """A ceiling on processes and threads together (the kernel counts tasks).

    Attributes:
        name: ``pids.max``, or ``RLIMIT_NPROC``.
        tasks: The most processes and threads; ``None`` means that the source sets no ceiling.
        used_tasks: Present number of tasks; ``None`` if unknown, or not read because there is no
            ceiling.
        source: The file or the call that was read.
        raw: Text of the source, word for word.
    """

    name: str
    tasks: int | None
    used_tasks: int | None
    source: str
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFilesLimit:
    """The ceiling on this process's open file descriptors.

    Attributes:
        name: ``RLIMIT_NOFILE``; ``files`` is its soft value.
        files: The most open files; ``None`` means no ceiling.
        used_files: Present number of open files; ``None`` if unknown.
        source: The call that was made.
        raw: Text of the source, word for word.
    """

    name: str = "RLIMIT_NOFILE"
    files: int | None
    used_files: int | None
    source: str
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """The size of ``/dev/shm`` (docker's default is 64 MB).

    Attributes:
        bytes: Size of the file system.
        free_bytes: Bytes that are free now.
        source: The directory that was asked about.
    """

    bytes: int
    free_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A source that should have held a limit and was not usable.

    Attributes:
        source: The file, the call or the variable.
        reason: Reason in words, with the value that was found.
        was_set: Whether the user or a scheduler has set this variable, and will want to
            know that it is ignored.
    """

    source: str
    reason: str
    was_set: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttling:
    """Number of times that the kernel has frozen this group for using up its quota.

    The counters only grow; subtract two readings to learn about the time between them.

    Attributes:
        periods: Enforcement periods in which the group ran (``nr_periods``).
        throttled_periods: Periods in which it was frozen (``nr_throttled``).
        throttled_us: Time for which it was frozen, in microseconds (``throttled_usec``;
            version 1's ``throttled_time`` is in nanoseconds and converted).
        source: The ``cpu.stat`` that was read.
    """

    periods: int
    throttled_periods: int
    throttled_us: int
    source: str

    def __sub__(self, earlier: Throttling) -> Throttling:
        return Throttling(
            periods=self.periods - earlier.periods,
            throttled_periods=self.throttled_periods - earlier.throttled_periods,
            throttled_us=self.throttled_us - earlier.throttled_us,
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemoryCount:
    """Counts of the kernel's out-of-memory killer in one control group so far.

    The counters only grow; compare two readings to learn about the time between them.

    Attributes:
        kills: Number of processes of this group that the killer has killed, for any limit; on
            version 2 those of the groups below as well (``oom_kill``).
        used_up: Number of times that the group met its own ceiling: on version 1 with any outcome
            (``memory.failcnt``, and that of memory with swap), on version 2 when the kernel could
            free nothing (``oom``); ``None`` if unknown.
        limit_bytes: The ceiling now; ``None`` if the group sets none.
        peak_bytes: Peak use of the group; ``None`` if unknown.
        group: The group's directory.
        source: The file with ``kills``.
    """

    kills: int
    used_up: int | None
    limit_bytes: int | None
    peak_bytes: int | None
    group: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """All limits of one process on one machine, and the sources that were skipped.

    Attributes:
        affinity: Number of CPUs on which the scheduler may place this process; ``cpus`` is
            ``None`` where that is not known (a captured machine).
        quotas: Control-group CPU quotas, innermost group first, up to the mount point.
        bounds: Upper bounds from environment variables, in the order of their table.
        exact_workers: ``SAFEPOOL_MAX_WORKERS``, if it is set: it replaces the computed
            number of workers (``cpus`` is that number).
        memory: Control-group memory limits, innermost group first.
        pids: Limits on processes and threads, innermost group first, then the user's.
        open_files: The descriptor limit; ``None`` where the system has none.
        shared_memory: ``/dev/shm``; ``None`` where there is none.
        skipped: Sources that could not be used, and why.

    Example:
        >>> mask = Limit(name="affinity", cpus=8.0, source="sched_getaffinity", raw="0-7")
        >>> quota = Limit(name="cpu.max", cpus=2.5, source="cpu.max", raw="250000 100000")
        >>> Limits(affinity=mask, quotas=(quota,)).binding.name
        'cpu.max'
    """

    affinity: Limit
    quotas: tuple[Limit, ...]
    bounds: tuple[Limit, ...] = ()
    exact_workers: Limit | None = None
    memory: tuple[MemoryLimit, ...] = ()
    pids: tuple[PidsLimit, ...] = ()
    open_files: OpenFilesLimit | None = None
    shared_memory: SharedMemory | None = None
    skipped: tuple[Skipped, ...] = ()

    @property
    def cpu_quota(self) -> float | None:
        """The binding control-group quota in CPUs, or ``None`` if no group sets one."""
        return min((limit.cpus for limit in self.quotas if limit.cpus is not None), default=None)

    @property
    def binding(self) -> Limit:
        """The smallest of affinity, quotas and bounds; on a tie the first of them.

        Without any ceiling, the affinity entry, whose ``cpus`` is ``None``.
        """
        ceilings = [
            limit
            for limit in (self.affinity, *self.quotas, *self.bounds)
            if limit.cpus is not None
        ]
        return min(ceilings, key=lambda limit: limit.cpus or 0.0, default=self.affinity)

    def _repr_html_(self) -> str:
        """Return a table for a notebook: each limit, its value, its source and its text."""
        return html_table("limits", ("limit", "value", "source", "text"), self._rows())

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        exact = () if self.exact_workers is None else (self.exact_workers,)
        for cpu in (self.affinity, *self.quotas, *self.bounds):
            yield _row(cpu, None if cpu.cpus is None else counted(cpu.cpus, "CPU"))
        for workers in exact:
            yield _row(workers, counted(workers.cpus or 0, "worker"))
        for memory in self.memory:
            yield _row(memory, None if memory.bytes is None else size(memory.bytes))
        for tasks in self.pids:
            yield _row(tasks, None if tasks.tasks is None else counted(tasks.tasks, "task"))
        if (files := self.open_files) is not None:
            yield _row(files, None if files.files is None else counted(files.files, "file"))
        if (shared := self.shared_memory) is not None:
            yield "shared memory", size(shared.bytes), shared.source, ""
        for skipped in self.skipped:
            yield "skipped", "", skipped.source, skipped.reason


def _row(
    limit: Limit | MemoryLimit | PidsLimit | OpenFilesLimit, value: str | None
) -> tuple[str, str, str, str]:
    return limit.name, value or "no limit", limit.source, limit.raw


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUsage:
    """CPU time that a control group has used.

    Attributes:
        used_us: Microseconds since the group was made.
        source: The file that was read.
    """

    used_us: int
    source: str
