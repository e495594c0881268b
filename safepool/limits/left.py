r"""Floor 1, limits: the memory that this process can still get, below the tightest ceiling.

The room below a ceiling is the ceiling minus the use, plus the part of the use that the kernel
takes back first (page cache), plus swap. The machine's own memory is a ceiling as well:

    ceiling                     use                     swap, where the machine has any free
    memory.max                  memory.current          memory.swap.max - memory.swap.current
    memory.limit_in_bytes       memory.usage_in_bytes   memory.memsw.limit_in_bytes, with its
                                                        usage: both together
    MemTotal (/proc/meminfo)    MemTotal - MemAvailable SwapFree

Sources: as `memory`; Linux, Documentation/filesystems/proc.rst, "meminfo".

Not covered:
    * ``memory.high``: above it the kernel slows a group down, and ends nothing.
    * Memory that is in use and was promised to others (overcommitment).
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

from safepool.limits.cgroup import Level, find_levels
from safepool.limits.files import Machine
from safepool.limits.levels import read_number
from safepool.limits.memory import read_memory
from safepool.limits.place import read_own_groups_text, read_place

if TYPE_CHECKING:
    from safepool.limits._types import MemoryLimit

assert sys.platform == "linux"

_MEMINFO = "/proc/meminfo"
_MEMINFO_LINE = re.compile(
    r"^(MemTotal|MemAvailable|SwapFree): +([0-9]{1,15}) kB$", re.MULTILINE | re.ASCII
)


class MemoryLeft(NamedTuple):
    """Memory that the tightest ceiling leaves.

    Attributes:
        bytes: Memory that can still be used before the kernel must end a process; at least 0.
        limit_bytes: The ceiling.
        source: The file that sets it.
    """

    bytes: int
    limit_bytes: int
    source: str


class MemoryWatch:
    """Repeated reading of the memory that is left.

    The object keeps the names of the directories that hold this process's groups, and looks for
    them again when the process was moved.

    Args:
        root: The same as for `safepool.limits.read_limits`.
    """

    __slots__ = ("_levels", "_machine", "_own")

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._machine = Machine(root)
        self._own: str | None = None
        self._levels: tuple[Level, ...] = ()

    def read(self) -> MemoryLeft | None:
        """Return the remaining memory; ``None`` if unknown."""
        machine = self._machine
        machine.skipped.clear()
        own = read_own_groups_text(machine)
        if own is None or own != self._own:
            self._levels = find_levels(machine, read_place(machine), "memory")
            self._own = own
        lines = _MEMINFO_LINE.findall(machine.read(_MEMINFO) or "")
        system = {name: int(kib) << 10 for name, kib in lines}
        swap = system.get("SwapFree", 0)
        found = [
            left
            for limit in read_memory(machine, self._levels)
            if (left := _left_below(machine, limit, swap)) is not None
        ]
        if "MemTotal" in system and "MemAvailable" in system:
            total, free = system["MemTotal"], system["MemAvailable"] + swap
            found.append(MemoryLeft(bytes=free, limit_bytes=total, source=_MEMINFO))
        return min(found, key=lambda left: left.bytes, default=None)


def _left_below(machine: Machine, limit: MemoryLimit, swap: int) -> MemoryLeft | None:
    if limit.bytes is None or limit.used_bytes is None or limit.name == "memory.high":
        return None
    reclaimable = limit.reclaimable_bytes or 0
    left = limit.bytes - limit.used_bytes + reclaimable
    if swap:
        left = _with_swap(machine, os.path.dirname(limit.source), left, reclaimable, swap)
    return MemoryLeft(bytes=max(0, left), limit_bytes=limit.bytes, source=limit.source)


def _with_swap(machine: Machine, group: str, left: int, reclaimable: int, swap: int) -> int:
    # Without the file, the group may use all swap of the machine.
    ceiling = read_number(machine, f"{group}/memory.swap.max")
    if ceiling is not None:
        used = read_number(machine, f"{group}/memory.swap.current") or 0
        return left + max(0, min(swap, ceiling - used))
    ceiling = read_number(machine, f"{group}/memory.memsw.limit_in_bytes")
    if ceiling is not None:
        used = read_number(machine, f"{group}/memory.memsw.usage_in_bytes") or 0
        return min(left + swap, ceiling - used + reclaimable)
    return left + swap
