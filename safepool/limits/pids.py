"""Floor 1, limits: ceilings on processes and threads of control groups.

Format: Linux, Documentation/admin-guide/cgroup-v2.rst, "PID Interface Files", and
cgroup-v1/pids.rst: the files are the same in both versions.

Not covered:
    * ``kernel.pid_max`` and ``kernel.threads-max``: ceilings of the whole machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safepool.errors import UnreadableLimitError
from safepool.limits._types import PidsLimit

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

__all__ = ["parse_pids", "read_pids"]

_TASKS = re.compile(r"\s*(max|[0-9]{1,20})\s*", re.ASCII)


def parse_pids(text: str, *, source: str) -> int | None:
    r"""Parse the text of one ``pids.max`` or ``pids.current`` file.

    Args:
        text: One number of tasks (threads count), or the word ``max``.
        source: Path the text was read from. Kept in the error.

    Returns:
        The number; ``None`` for ``max``.

    Raises:
        UnreadableLimitError: The text has another shape.

    Example:
        >>> parse_pids("1024\n", source="pids.max")
        1024
    """
    match = _TASKS.fullmatch(text)
    if match is None:
        raise UnreadableLimitError(source, text, "a number of tasks, or 'max'")
    return None if match[1] == "max" else int(match[1])


def read_pids(machine: Machine, levels: Iterable[Level]) -> tuple[PidsLimit, ...]:
    """Read ``pids.max`` of every level, in their order; levels without it are left out."""
    found = (_read_level(machine, level) for level in levels)
    return tuple(limit for limit in found if limit is not None)


def _read_level(machine: Machine, level: Level) -> PidsLimit | None:
    for directory in level.directories:
        source = f"{directory.rstrip('/')}/pids.max"
        text = machine.read(source)
        if text is None:
            continue
        try:
            tasks = parse_pids(text, source=source)
        except UnreadableLimitError as error:
            machine.note_unreadable(error)
            continue
        used = None if tasks is None else _read_used(machine, source)
        return PidsLimit(
            name="pids.max", tasks=tasks, used_tasks=used, source=source, raw=text.strip()
        )
    return None


def _read_used(machine: Machine, source: str) -> int | None:
    current = source.removesuffix("max") + "current"
    text = machine.read(current)
    if text is None:
        return None
    try:
        return parse_pids(text, source=current)
    except UnreadableLimitError as error:
        machine.note_unreadable(error)
        return None
