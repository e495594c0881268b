r"""Floor 1, limits: what the kernel's out-of-memory killer has counted in control groups.

Two counters, in different groups. A kill is counted in the group of the process that was
killed; that a ceiling was used up is counted in the group that has the ceiling, which may be
any ancestor:

    version   killed here                    ceiling of this group used up
    1         memory.oom_control: oom_kill   memory.failcnt
    2         memory.events: oom_kill        memory.events.local: oom, else memory.events: oom

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst, "memory.events", and
cgroup-v1/memory.rst, section 10; mm/memcontrol.c, memcg_memory_event.

Not covered:
    * Whom the kernel killed: only its log tells, which few may read.
    * Version 1 before Linux 4.13, whose oom_control counts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.limits._types import OutOfMemoryCount
from safepool.limits.memory import parse_memory_stat, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

__all__ = ["read_oom_counts"]

_KILLS = {1: "memory.oom_control", 2: "memory.events"}
_CEILING = {1: "memory.limit_in_bytes", 2: "memory.max"}
# The most so far: what is used now, when the killed process has given back its part, says
# nothing. Version 2 has it from Linux 5.19.
_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}


def read_oom_counts(machine: Machine, levels: Iterable[Level]) -> tuple[OutOfMemoryCount, ...]:
    """Read the counters of every level, in their order; levels without them are left out."""
    found = (_read_level(machine, level) for level in levels)
    return tuple(count for count in found if count is not None)


def _read_level(machine: Machine, level: Level) -> OutOfMemoryCount | None:
    for directory in level.directories:
        prefix = directory.rstrip("/")
        source = f"{prefix}/{_KILLS[level.version]}"
        # Both are lines of a name and a number, as memory.stat is.
        events = parse_memory_stat(machine.read(source) or "")
        if "oom_kill" in events:
            return OutOfMemoryCount(
                kills=events["oom_kill"],
                used_up=_read_used_up(machine, prefix, level.version, events),
                limit_bytes=read_bytes(machine, f"{prefix}/{_CEILING[level.version]}"),
                peak_bytes=read_bytes(machine, f"{prefix}/{_PEAK[level.version]}"),
                group=prefix or "/",
                source=source,
            )
    return None


def _read_used_up(
    machine: Machine, prefix: str, version: int, events: dict[str, int]
) -> int | None:
    if version == 1:
        return read_bytes(machine, f"{prefix}/memory.failcnt")
    # memory.events counts the groups below as well (Linux 5.2 has the local file).
    local = parse_memory_stat(machine.read(f"{prefix}/memory.events.local") or "")
    return local.get("oom", events.get("oom"))
