"""Floor 1, limits on Linux: the limits of another running process.

The module reads; it decides nothing.

The process is a machine like a captured one: its own files of ``/proc``, and control groups where
*it* sees them. The affinity is that of the process's first living thread; the environment is the
one at its start.

Sources: proc_pid_cgroup(5), proc_pid_mountinfo(5), proc_pid_environ(5), proc_pid_limits(5),
proc_pid_maps(5), proc_pid_root(5), proc_pid_stat(5); cgroup-v2.rst, "cpu.stat";
cgroup-v1/cpuacct.rst.

Not covered:
    * Files that only the owner and root may read: noted as skipped.
    * ``RLIMIT_NPROC`` of a process: it counts the tasks of a user (``tasks_of_user``).
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace

from safepool import procfs
from safepool.limits import quota
from safepool.limits._types import CpuUsage, Limits, OpenFilesLimit, Throttling
from safepool.limits.cgroup import find_levels
from safepool.limits.files import Machine
from safepool.limits.place import read_place

if sys.platform == "linux":
    from safepool.limits._linux import read_groups_limits, read_shared_memory

assert sys.platform == "linux"

_OWN_FOLDERS = ("/proc/self/", "/proc/thread-self/")
_OPEN_FILES = re.compile(r"^Max open files +([0-9]+|unlimited) ", re.ASCII | re.MULTILINE)
_USAGE_US = re.compile(r"^usage_usec ([0-9]{1,19})$", re.ASCII | re.MULTILINE)


class ProcessView:
    """Limits and use of one process, as seen from here.

    Args:
        pid: Process id.

    Raises:
        ProcessLookupError: The process does not exist, or has ended.

    Example:
        >>> view = ProcessView(os.getpid())
        >>> view.threads() >= 1
        True
    """

    def __init__(self, pid: int) -> None:
        if not os.path.isdir(f"/proc/{pid}"):
            if not os.path.isdir("/proc/self"):
                raise ProcessLookupError(
                    "cannot read other processes: /proc is not mounted here. Mount it"
                )
            raise ProcessLookupError(f"there is no process {pid}")
        self.pid = pid
        running = self._running()
        if not running:
            raise ProcessLookupError(f"process {pid} has ended")
        # A thread that has ended, as the first one may have, shows nothing.
        self._thread = pid if pid in running else running[0]
        self._machine = _ProcessMachine(self._thread)

    def environ(self) -> dict[str, str]:
        """Return the environment that it was started with, empty if it may not be read."""
        text = self._machine.read("/proc/self/environ", expected=True) or ""
        pairs = (entry.partition("=") for entry in text.split("\0") if "=" in entry)
        return {name: value for name, _, value in pairs}

    def read_limits(self) -> Limits:
        """Read every limit of the process; see `safepool.limits.read_limits`."""
        groups = read_groups_limits(self._machine, self.environ())
        found = replace(
            groups,
            affinity=replace(groups.affinity, source=f"/proc/{self.pid}/status"),
            open_files=self._open_files(),
            shared_memory=read_shared_memory(f"/proc/{self._thread}/root/dev/shm"),
        )
        return replace(found, skipped=tuple(self._machine.skipped))

    def read_throttling(self) -> Throttling | None:
        """Read its group's counters; see `safepool.limits.read_throttling`."""
        machine = self._machine
        return quota.read_throttling(machine, find_levels(machine, read_place(machine), "cpu"))

    def read_usage(self) -> CpuUsage | None:
        """Read the CPU time of the group whose quota binds, otherwise of the process's own group.

        Returns:
            ``None`` if nothing counts the time of that group: in version 1, the counting hierarchy
            may be another one, in which the process has other companions.
        """
        machine = self._machine
        place = read_place(machine)
        levels = find_levels(machine, place, "cpu")
        binding = quota.read_binding(machine, levels)
        if binding is not None:
            folders = [binding.source.removesuffix(f"/{binding.name}")]
        else:
            folders = [path for level in levels[:1] for path in level.directories]
        if place.mounts is not None and place.own.get("cpuacct") == place.own.get("cpu"):
            # Version 1 mounts it with cpu, or as a separate hierarchy.
            for level in find_levels(machine, place, "cpuacct")[:1]:
                folders.extend(level.directories)
        for folder in folders:
            source = f"{folder}/cpu.stat"
            match = _USAGE_US.search(machine.read(source) or "")
            if match:
                return CpuUsage(used_us=int(match[1]), source=source)
            source = f"{folder}/cpuacct.usage"
            text = (machine.read(source) or "").strip()
            if text.isascii() and text.isdigit():
                return CpuUsage(used_us=int(text) // 1000, source=source)
        return None

    def threads(self) -> int:
        """Count its threads; 0 when it has ended meanwhile."""
        return len(self._running())

    def _running(self) -> list[int]:
        tasks = procfs.threads(self.pid)
        # The first one stays until the parent asks how the process has ended.
        if self.pid in tasks and self._first_has_ended():
            tasks.remove(self.pid)
        return tasks

    def _first_has_ended(self) -> bool:
        stat = procfs.read_stat(self.pid)
        return stat is None or stat.state in "ZX"

    def libraries(self) -> tuple[str, ...]:
        """Return the files that it has mapped to run code from, each once, sorted."""
        text = self._machine.read("/proc/self/maps", expected=True) or ""
        return tuple(sorted(procfs.parse_maps(text, code=True)))

    def _open_files(self) -> OpenFilesLimit | None:
        match = _OPEN_FILES.search(self._machine.read("/proc/self/limits") or "")
        if match is None:
            return None
        try:
            used = len(os.listdir(f"/proc/{self._thread}/fd"))
        except OSError:
            used = None
        return OpenFilesLimit(
            files=None if match[1] == "unlimited" else int(match[1]),
            used_files=used,
            source=f"/proc/{self.pid}/limits",
            raw=match[1],
        )


def tasks_of_user(user: int) -> int | None:
    """Count the processes and threads that ``RLIMIT_NPROC`` counts: those of one real user.

    Tasks that are not visible from here are left out, such as those of another container.

    Args:
        user: Number of the real user.

    Returns:
        Number of tasks; ``None`` if unknown.

    Example:
        >>> (tasks_of_user(os.getuid()) or 0) >= 1
        True
    """
    found = [procfs.fields(number) for number in procfs.processes()]
    mine = [one for one in found if one.get("Uid", "").split()[:1] == [str(user)]]
    return sum(int(one["Threads"]) for one in mine) if found else None


class _ProcessMachine(Machine):
    """The files as the process sees them."""

    __slots__ = ("_pid", "_shares_mounts")

    def __init__(self, pid: int) -> None:
        super().__init__(f"/proc/{pid}/root")
        self._pid = pid
        try:
            theirs = os.readlink(f"/proc/{pid}/ns/mnt")
            self._shares_mounts = theirs == os.readlink("/proc/self/ns/mnt")
        except OSError:
            # This process may not see it, and so may not see its root.
            self._shares_mounts = True

    def note(self, source: str, reason: str) -> None:
        """Remember that a source was not usable, by its name here."""
        super().note(self._theirs(source), reason)

    def _actual(self, path: str) -> str:
        theirs = self._theirs(path)
        return theirs if theirs != path or self._shares_mounts else super()._actual(path)

    def _theirs(self, path: str) -> str:
        for folder in _OWN_FOLDERS:
            if path.startswith(folder):
                return f"/proc/{self._pid}/{path.removeprefix(folder)}"
        return path
