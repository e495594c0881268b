"""Floor 1, limits on Linux: control groups, affinity, resource limits, environment.

The module reads and asks; it decides nothing and keeps nothing.

Not covered:
    * Limits that the kernel enforces and does not show: an ancestor outside a cgroup
      namespace, a quota on a hypervisor.
    * Descriptors and ``/dev/shm`` of a captured machine: the module asks this system only.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import replace

from safepool.limits import memory, quota
from safepool.limits._types import (
    Limit,
    Limits,
    OpenFilesLimit,
    OutOfMemoryCount,
    PidsLimit,
    SharedMemory,
    Skipped,
    Throttling,
)
from safepool.limits.affinity import AFFINITY, read_captured_affinity
from safepool.limits.cgroup import Level, find_levels
from safepool.limits.environment import read_environment
from safepool.limits.files import Machine
from safepool.limits.levels import read_levels, read_pids
from safepool.limits.place import read_own_groups_text, read_place

assert sys.platform == "linux"

_SHARED_MEMORY = "/dev/shm"


def read_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read every limit; see `safepool.limits.read_limits`."""
    machine = Machine(root)
    found = read_groups_limits(machine, environ)
    if machine.is_this_one:
        found = replace(
            found,
            pids=(*found.pids, _user_processes(machine)),
            open_files=_open_files(machine),
            shared_memory=read_shared_memory(_SHARED_MEMORY),
        )
    return replace(found, skipped=tuple(machine.skipped))


def read_groups_limits(machine: Machine, environ: Mapping[str, str] | None) -> Limits:
    """Read affinity, environment and the control groups' limits."""
    place = read_place(machine)
    return replace(
        _cpu_limits(machine, find_levels(machine, place, "cpu"), environ),
        memory=memory.read_memory(machine, find_levels(machine, place, "memory")),
        pids=read_levels(machine, find_levels(machine, place, "pids"), read_pids),
    )


def read_cpu_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read the limits on CPU time only; see `safepool.limits.read_cpu_limits`."""
    machine = Machine(root)
    return _cpu_limits(machine, find_levels(machine, read_place(machine), "cpu"), environ)


def read_throttling(root: str | os.PathLike[str] = "/") -> Throttling | None:
    """Read the counters; see `safepool.limits.read_throttling`."""
    machine = Machine(root)
    return quota.read_throttling(machine, find_levels(machine, read_place(machine), "cpu"))


def read_oom_counts(root: str | os.PathLike[str] = "/") -> tuple[OutOfMemoryCount, ...]:
    """Read the counters; see `safepool.limits.read_oom_counts`."""
    machine = Machine(root)
    levels = find_levels(machine, read_place(machine), "memory")
    return read_levels(machine, levels, memory.read_oom)


def _cpu_limits(
    machine: Machine, levels: tuple[Level, ...], environ: Mapping[str, str] | None
) -> Limits:
    here = machine.is_this_one
    if environ is None:
        environ = os.environ if here else {}
    affinity = _affinity(machine) if here else read_captured_affinity(machine)
    quotas = read_levels(machine, levels, quota.read_quota)
    bounds, exact, skipped = read_environment(environ, sys._xoptions if here else {})
    machine.skipped.extend(note for note in skipped if note not in machine.skipped)
    return Limits(
        affinity=affinity,
        quotas=quotas,
        bounds=bounds,
        exact_workers=exact,
        skipped=tuple(machine.skipped),
    )


def _affinity(machine: Machine) -> Limit:
    # The calling thread's mask, already cut down to its cpuset by the kernel; a worker
    # inherits it from the thread that starts it. sched_setaffinity(2).
    try:
        cpus = os.sched_getaffinity(0)
    except OSError as error:  # a filter refuses the call
        machine.note("os.sched_getaffinity(0)", error.strerror or str(error))
        return read_captured_affinity(machine)
    return Limit(
        name=AFFINITY, cpus=float(len(cpus)), source="os.sched_getaffinity(0)", raw=_ranges(cpus)
    )


def _ranges(cpus: set[int]) -> str:
    """Write CPU numbers as the kernel does: ``0-3,8``."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1][1:] = [cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def _user_processes(machine: Machine) -> PidsLimit:
    """Ask for the ceiling on this user's tasks, all over the machine (setrlimit(2))."""
    soft, raw = _soft_limit(machine, "RLIMIT_NPROC")
    tasks = None if soft == resource.RLIM_INFINITY else soft
    # kernel/fork.c, copy_process: not enforced for the machine's own root. The root of a
    # user namespace (rootless podman) is an ordinary user outside, and bound by it.
    if tasks is not None and os.getuid() == 0 and _is_machines_root(machine):
        tasks = None
        raw += " (not enforced for root)"
    return PidsLimit(
        name="RLIMIT_NPROC",
        tasks=tasks,
        used_tasks=None,
        source="resource.getrlimit(RLIMIT_NPROC)",
        raw=raw,
    )


def _is_machines_root(machine: Machine) -> bool:
    # user_namespaces(7): the first namespace maps every number to itself.
    text = machine.read("/proc/self/uid_map")
    return text is not None and text.split() == ["0", "0", "4294967295"]


def _open_files(machine: Machine) -> OpenFilesLimit:
    soft, raw = _soft_limit(machine, "RLIMIT_NOFILE")
    try:
        # One descriptor belongs to the listing.
        used = len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        used = None
    return OpenFilesLimit(
        files=None if soft == resource.RLIM_INFINITY else soft,
        used_files=used,
        source="resource.getrlimit(RLIMIT_NOFILE)",
        raw=raw,
    )


def _soft_limit(machine: Machine, name: str) -> tuple[int, str]:
    """Ask for a soft limit; return it and its text for the screen."""
    try:
        soft, _ = resource.getrlimit(getattr(resource, name))
    except (OSError, ValueError) as error:  # a filter refuses the call
        machine.note(f"resource.getrlimit({name})", str(error))
        return resource.RLIM_INFINITY, "unreadable"
    return soft, "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def read_shared_memory(path: str) -> SharedMemory | None:
    """Ask for the size of a file system; ``None`` if there is none."""
    try:
        size = os.statvfs(path)
    except OSError:
        return None
    return SharedMemory(
        bytes=size.f_blocks * size.f_frsize,
        free_bytes=size.f_bavail * size.f_frsize,
        source=path,
    )


class QuotaWatch:
    """Reads the limits on CPU time again and again; see `safepool.limits.QuotaWatch`."""

    __slots__ = ("_levels", "_machine", "_notes", "_own", "_quotas")

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._machine = Machine(root)
        self._own: str | None = None
        self._levels: tuple[Level, ...] | None = None
        self._notes: list[Skipped] = []
        self._quotas = 0

    def read(self, *, environ: Mapping[str, str] | None = None) -> Limits:
        """Read the limits as they are now; see `safepool.limits.read_cpu_limits`."""
        machine = self._machine
        machine.skipped.clear()
        own = read_own_groups_text(machine)
        if self._levels is not None and own == self._own:
            machine.skipped[:] = self._notes
            limits = _cpu_limits(machine, self._levels, environ)
            # A group that was removed, or whose mount has changed, has no files any more.
            if len(limits.quotas) == self._quotas:
                return limits
        machine.skipped.clear()
        self._own = own
        self._levels = find_levels(machine, read_place(machine), "cpu")
        self._notes = machine.skipped.copy()
        limits = _cpu_limits(machine, self._levels, environ)
        self._quotas = len(limits.quotas)
        return limits
