"""Floor 1, limits: memory ceilings of control groups, and counts of the out-of-memory killer.

Formats: Linux, Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files", and
cgroup-v1/memory.rst; mm/memcontrol.c, memcg_memory_event.

The killer has two counters, in different groups. A kill is counted in the group of the killed
process. A used-up ceiling is counted in the group that has the ceiling, which may be any ancestor:

    version   killed here                    ceiling of this group used up
    1         memory.oom_control: oom_kill   memory.failcnt + memory.memsw.failcnt
    2         memory.events: oom_kill        memory.events.local: oom, else memory.events: oom

Not covered:
    * ``memory.low``, ``memory.min``, soft limits: guarantees to the group, not ceilings.
    * Swap and kernel memory, which have separate ceilings.
    * 32-bit kernels, whose "no limit" is a smaller number.
    * The killed process: only the kernel's log names it, which few users may read.
    * Version 1 before Linux 4.13, whose oom_control counts nothing.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from safepool.errors import UnreadableLimitError
from safepool.limits._types import MemoryLimit, OutOfMemoryCount
from safepool.limits.levels import NO_LIMIT, parse_number, read_levels, read_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

# Per version: the files with a ceiling, the file with the use, and the lines of memory.stat that
# the kernel frees under pressure. Both kinds of file pages, as in the kernel's own MemAvailable
# (fs/proc/meminfo.c): active pages are only freed later. Version 1's total_ lines count the groups
# below, as version 2's lines do.
_CEILINGS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USED = {1: "memory.usage_in_bytes", 2: "memory.current"}
_RECLAIMABLE = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}

_KILLS = {1: "memory.oom_control", 2: "memory.events"}
# The peak is read because the present use says nothing after the killed process has freed its
# part. Version 2 has the peak from Linux 5.19.
_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}

# Version 1 computes the smallest ceiling over all ancestors itself, those that no mount
# shows included (memory.rst, "stat file").
_HIERARCHICAL = "hierarchical_memory_limit"

_STAT_LINE = re.compile(r"^(\w+) ([0-9]{1,20})$", re.ASCII | re.MULTILINE)


def parse_memory_stat(text: str) -> dict[str, int]:
    r"""Parse the text of one ``memory.stat`` file; lines of another shape are left out.

    Example:
        >>> parse_memory_stat("inactive_file 4096\nactive_file 0\n")
        {'inactive_file': 4096, 'active_file': 0}
    """
    return {name: int(number) for name, number in _STAT_LINE.findall(text)}


def read_memory(machine: Machine, levels: Sequence[Level]) -> tuple[MemoryLimit, ...]:
    """Read the ceilings of every level, in their order; levels without the files are left out."""
    innermost = {path.rstrip("/") for level in levels[:1] for path in level.directories}

    def read(machine: Machine, directory: str, version: int) -> list[MemoryLimit] | None:
        return _read(machine, directory, version, innermost=directory in innermost) or None

    return tuple(chain.from_iterable(read_levels(machine, levels, read)))


def _read(machine: Machine, prefix: str, version: int, *, innermost: bool) -> list[MemoryLimit]:
    ceilings: list[tuple[str, str, str, int | None]] = []
    for name in _CEILINGS[version]:
        source = f"{prefix}/{name}"
        text = machine.read(source)
        if text is None:
            continue
        try:
            ceilings.append((name, source, text.strip(), parse_number(text, source=source)))
        except UnreadableLimitError as error:
            machine.note_unreadable(error)
    computed = version == 1 and innermost
    # memory.stat is the expensive file (the kernel first sums its counters over all CPUs): it is
    # read only if one of its numbers is needed.
    if not computed and all(ceiling is None for *_, ceiling in ceilings):
        used = reclaimable = None
        stat = None
    else:
        used = read_number(machine, f"{prefix}/{_USED[version]}")
        text = machine.read(f"{prefix}/memory.stat")
        stat = parse_memory_stat(text) if text is not None else {}
        parts = [stat[name] for name in _RECLAIMABLE[version] if name in stat]
        reclaimable = sum(parts) if parts else None
    if computed and stat and _HIERARCHICAL in stat:
        value = stat[_HIERARCHICAL]
        ceilings.append(
            (
                _HIERARCHICAL,
                f"{prefix}/memory.stat",
                f"{_HIERARCHICAL} {value}",
                None if value >= NO_LIMIT else value,
            )
        )
    return [
        MemoryLimit(
            name=name,
            bytes=ceiling,
            used_bytes=used,
            reclaimable_bytes=reclaimable,
            source=source,
            raw=raw,
        )
        for name, source, raw, ceiling in ceilings
    ]


def read_oom(machine: Machine, directory: str, version: int) -> OutOfMemoryCount | None:
    """Read the counters of one group, for :func:`~safepool.limits.levels.read_levels`."""
    source = f"{directory}/{_KILLS[version]}"
    # Both files have lines of a name and a number, like memory.stat.
    events = parse_memory_stat(machine.read(source) or "")
    if "oom_kill" not in events:
        return None
    return OutOfMemoryCount(
        kills=events["oom_kill"],
        used_up=_read_used_up(machine, directory, version, events),
        limit_bytes=read_number(machine, f"{directory}/{_CEILINGS[version][0]}"),
        peak_bytes=read_number(machine, f"{directory}/{_PEAK[version]}"),
        group=directory or "/",
        source=source,
    )


def _read_used_up(
    machine: Machine, directory: str, version: int, events: dict[str, int]
) -> int | None:
    if version == 1:
        # mm/memcontrol.c, try_charge: the ceiling with swap is looked at first. Where both are
        # alike (docker run --memory-swap), only its counter grows.
        names = ("memory.failcnt", "memory.memsw.failcnt")
        counts = [read_number(machine, f"{directory}/{name}") for name in names]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None
    # memory.events counts the groups below as well (Linux 5.2 has the local file).
    local = parse_memory_stat(machine.read(f"{directory}/memory.events.local") or "")
    return local.get("oom", events.get("oom"))
