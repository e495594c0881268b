r"""Floor 1, limits: counts of the kernel's out-of-memory killer in control groups.

There are two counters, in different groups. A kill is counted in the group of the killed process.
A used-up ceiling is counted in the group that has the ceiling, which may be any ancestor:

    version   killed here                    ceiling of this group used up
    1         memory.oom_control: oom_kill   memory.failcnt
    2         memory.events: oom_kill        memory.events.local: oom, else memory.events: oom

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst, "memory.events", and
cgroup-v1/memory.rst, section 10; mm/memcontrol.c, memcg_memory_event.

Not covered:
    * The killed process: only the kernel's log names it, which few users may read.
    * Version 1 before Linux 4.13, whose oom_control counts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.limits._types import OutOfMemoryCount
from safepool.limits.levels import read_levels, read_number
from safepool.limits.memory import parse_memory_stat

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

_KILLS = {1: "memory.oom_control", 2: "memory.events"}
_CEILING = {1: "memory.limit_in_bytes", 2: "memory.max"}
# The peak is read because the present use says nothing after the killed process has freed its
# part. Version 2 has the peak from Linux 5.19.
_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}


def read_oom_counts(machine: Machine, levels: Iterable[Level]) -> tuple[OutOfMemoryCount, ...]:
    """Read the counters of every level, in their order; levels without them are left out."""
    return read_levels(machine, levels, _read)


def _read(machine: Machine, directory: str, version: int) -> OutOfMemoryCount | None:
    source = f"{directory}/{_KILLS[version]}"
    # Both files have lines of a name and a number, like memory.stat.
    events = parse_memory_stat(machine.read(source) or "")
    if "oom_kill" not in events:
        return None
    return OutOfMemoryCount(
        kills=events["oom_kill"],
        used_up=_read_used_up(machine, directory, version, events),
        limit_bytes=read_number(machine, f"{directory}/{_CEILING[version]}"),
        peak_bytes=read_number(machine, f"{directory}/{_PEAK[version]}"),
        group=directory or "/",
        source=source,
    )


def _read_used_up(
    machine: Machine, directory: str, version: int, events: dict[str, int]
) -> int | None:
    if version == 1:
        return read_number(machine, f"{directory}/memory.failcnt")
    # memory.events counts the groups below as well (Linux 5.2 has the local file).
    local = parse_memory_stat(machine.read(f"{directory}/memory.events.local") or "")
    return local.get("oom", events.get("oom"))
