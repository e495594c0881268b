"""Floor 1: the limits of this process.

The package reads files and asks the system; it never decides.

No rounding, no cache, nothing read at import. The one reader, `read_limits`, and its modules in
the order in which data passes them:

    files        one machine's files as text, with notes of unreadable ones
    mounts       mountinfo -> the mounts that can be reached
    place        /proc/self/cgroup -> own groups, and the mounts
    cgroup       own group x mounts x ancestors -> directories, innermost first
    levels       each of these directories, read for one kind of limit; number of tasks
    quota, memory, affinity, environment
                 text of a file or variable -> limits with source and raw text
    left         the memory that all limits leave, for repeated reading
    waiting      time that processes waited for a CPU while CPUs were idle
    gpus         the GPUs that a process may see
    _linux, _no_groups, _windows
                 calls to the system; this package chooses one of them
    _types       the results, each with its source

Not covered: see each module. The main gap: limits that the kernel enforces and does not show.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from safepool.limits._types import (
    Limit,
    Limits,
    MemoryLimit,
    OpenFilesLimit,
    OutOfMemoryCount,
    PidsLimit,
    SharedMemory,
    Skipped,
    Throttling,
)

if sys.platform == "linux":
    from safepool.limits import _linux as _platform
else:  # not Linux
    from safepool.limits import _no_groups as _platform

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = [
    "Limit",
    "Limits",
    "MemoryLimit",
    "OpenFilesLimit",
    "OutOfMemoryCount",
    "PidsLimit",
    "QuotaWatch",
    "SharedMemory",
    "Skipped",
    "Throttling",
    "read_cpu_limits",
    "read_limits",
    "read_oom_counts",
    "read_throttling",
]


def read_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read every limit that the kernel and the environment set for the calling thread.

    Args:
        root: ``"/"`` for this machine, or a folder with files captured on another one
            (``proc/self/cgroup``, ``proc/self/mountinfo``, ``sys/fs/cgroup/...``). For a captured
            machine it reads only the files, and does not ask this system.
        environ: The environment. ``None`` is this process's, and is empty for a captured
            machine.

    Returns:
        Every value with its source and raw text. Missing, unreadable and invalid sources are in
        ``skipped``; they never raise.

    Example:
        >>> limits = read_limits(environ={"SLURM_CPUS_PER_TASK": "1"})
        >>> limits.bounds[0].name, limits.bounds[0].cpus
        ('SLURM_CPUS_PER_TASK', 1.0)
    """
    return _platform.read_limits(root, environ=environ)


def read_cpu_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read the limits on CPU time only: a part of `read_limits` at a part of its cost.

    Args:
        root: The same as for `read_limits`.
        environ: The same as for `read_limits`.

    Returns:
        The same as `read_limits`, without memory, processes, files and shared memory.
    """
    return _platform.read_cpu_limits(root, environ=environ)


def read_throttling(root: str | os.PathLike[str] = "/") -> Throttling | None:
    """Read how often the group whose quota binds has been frozen.

    The group is the one with the smallest quota among this process's own and its ancestors (the
    innermost of equal ones): the kernel counts in the group that has the quota, not in the groups
    below.

    Args:
        root: The same as for `read_limits`.

    Returns:
        The counters; ``None`` if no visible group sets a quota.
    """
    return _platform.read_throttling(root)


def read_oom_counts(root: str | os.PathLike[str] = "/") -> tuple[OutOfMemoryCount, ...]:
    """Read the counts of the kernel's out-of-memory killer for this thread's groups.

    Args:
        root: The same as for `read_limits`.

    Returns:
        The own group's counters first, then its ancestors' up to the mount point; groups that
        count nothing are left out, and so is everything that cannot be read.
    """
    return _platform.read_oom_counts(root)


class QuotaWatch(_platform.QuotaWatch):
    """Repeated, cheap reading of the limits on CPU time.

    The object keeps the names of the directories that hold this thread's groups, and looks for
    them again when the thread was moved to another group, or a group's files have gone. The object
    keeps no descriptor and no value. It is not thread-safe; threads of one process may be in
    different groups, so read in the thread that starts the workers.

    Args:
        root: The same as for `read_limits`.

    Not covered:
        * A mount that changes while the own group's old directory stays readable.

    Example:
        >>> watch = QuotaWatch()
        >>> watch.read().affinity == read_cpu_limits().affinity
        True
    """
