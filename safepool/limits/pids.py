"""Floor 1, limits: ceilings on processes and threads of control groups.

Format: Linux, Documentation/admin-guide/cgroup-v2.rst, "PID Interface Files", and
cgroup-v1/pids.rst: the files are the same in both versions.

Not covered:
    * ``kernel.pid_max`` and ``kernel.threads-max``: ceilings of the whole machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.limits._types import PidsLimit
from safepool.limits.levels import parse_number, read_levels, read_number

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine


def read_pids(machine: Machine, levels: Iterable[Level]) -> tuple[PidsLimit, ...]:
    """Read ``pids.max`` of every level, in their order; levels without it are left out."""
    return read_levels(machine, levels, _read)


def _read(machine: Machine, directory: str, _version: int) -> PidsLimit | None:
    source = f"{directory}/pids.max"
    text = machine.read(source)
    if text is None:
        return None
    tasks = parse_number(text, source=source, unit="tasks")
    used = None
    if tasks is not None:
        used = read_number(machine, f"{directory}/pids.current", unit="tasks")
    return PidsLimit(
        name="pids.max", tasks=tasks, used_tasks=used, source=source, raw=text.strip()
    )
