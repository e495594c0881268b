r"""Floor 1, limits: one file of every control group that this process is in, innermost first.

Quotas, memory and the out-of-memory killer's counters are read with it, and here the limits on
tasks. A level that more than one mount shows is read where it can be; a text of another shape is
noted, and the next mount is tried.

Not covered:
    * ``kernel.pid_max`` and ``kernel.threads-max``: ceilings of the whole machine.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from safepool.errors import UnreadableLimitError
from safepool.limits._types import PidsLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

_T = TypeVar("_T")

# Version 1 has no word for "no limit": it prints the largest number of whole pages below
# 2**63 (memory.rst; mm/page_counter.c, PAGE_COUNTER_MAX). Which one depends on the size of
# a page: 0x7FFFFFFFFFFFF000 for 4 KiB, 0x7FFFFFFFFFFF0000 for 64 KiB. No machine has 4 EiB.
NO_LIMIT = 1 << 62

_NUMBER = re.compile(r"\s*(max|[0-9]{1,20})\s*", re.ASCII)


def read_levels(
    machine: Machine, levels: Iterable[Level], read: Callable[[Machine, str, int], _T | None]
) -> tuple[_T, ...]:
    """Read every level, in their order; levels without the file are left out.

    Args:
        machine: The machine to read.
        levels: This process's groups.
        read: Function of a directory, without a slash at its end, and a version that reads the
            directory; ``None`` if the directory lacks the file.

    Returns:
        Values in the first directory of each level.
    """
    found = []
    for level in levels:
        for directory in level.directories:
            try:
                one = read(machine, directory.rstrip("/"), level.version)
            except UnreadableLimitError as error:
                machine.note_unreadable(error)
                continue
            if one is not None:
                found.append(one)
                break
    return tuple(found)


def parse_number(text: str, *, source: str, unit: str = "bytes") -> int | None:
    r"""Parse a file that holds one number, of either version.

    Args:
        text: A number, or the word ``max``.
        source: Path the text was read from. The error names it.
        unit: ``bytes``, or ``tasks`` (threads count).

    Returns:
        The number; ``None`` for no ceiling, which is ``max`` or a number of at least 2**62.

    Raises:
        UnreadableLimitError: The text has another shape.

    Example:
        >>> parse_number("1073741824\n", source="memory.max")
        1073741824
        >>> parse_number("9223372036854771712\n", source="memory.limit_in_bytes") is None
        True
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UnreadableLimitError(source, text, f"a number of {unit}, or 'max'")
    number = NO_LIMIT if match[1] == "max" else int(match[1])
    return number if number < NO_LIMIT else None


def read_number(machine: Machine, source: str, *, unit: str = "bytes") -> int | None:
    """Read a file of one number; ``None`` if the file is missing or holds no number (noted)."""
    text = machine.read(source)
    if text is None:
        return None
    try:
        return parse_number(text, source=source, unit=unit)
    except UnreadableLimitError as error:
        machine.note_unreadable(error)
        return None


def read_pids(machine: Machine, directory: str, _version: int) -> PidsLimit | None:
    """Read ``pids.max``, which is the same in both versions, for :func:`read_levels`.

    Source:
        Linux, Documentation/admin-guide/cgroup-v2.rst, "PID Interface Files"; cgroup-v1/pids.rst.
    """
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
