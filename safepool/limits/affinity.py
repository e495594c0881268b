"""Floor 1, limits: number of CPUs on which a captured process may run: text in, number out.

Not covered:
    * This machine's own process: its mask comes from `os.sched_getaffinity`, which also works
      without ``/proc``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safepool.errors import UnreadableLimitError
from safepool.limits._types import Limit
from safepool.procfs import parse_fields

if TYPE_CHECKING:
    from safepool.limits.files import Machine

AFFINITY = "affinity"

_STATUS_FILES = ("/proc/thread-self/status", "/proc/self/status")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)


def parse_cpu_list(text: str, *, source: str) -> int:
    r"""Count the CPUs in a list as the kernel writes it.

    Args:
        text: Ranges and single numbers, ``"0-3,8,10-11\n"``.
        source: Path the text was read from. Kept in the error.

    Returns:
        Number of CPUs in the list, each counted once; at least 1.

    Raises:
        UnreadableLimitError: The text has another shape, or names none.

    Source:
        Linux, lib/bitmap.c, ``bitmap_print_to_pagebuf``; proc_pid_status(5).

    Example:
        >>> parse_cpu_list("0-3,8,10-11\n", source="status")
        7
    """
    count = 0
    end = -1
    ranges = []
    for part in text.strip().split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UnreadableLimitError(source, text, "CPU numbers and ranges, as in '0-3,8'")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    # Counted, not expanded: a broken text may name a thousand million CPUs.
    for first, last in sorted(ranges):
        count += max(0, last - max(first - 1, end))
        end = max(end, last)
    return count


def read_captured_affinity(machine: Machine) -> Limit:
    """Read the affinity of the process whose ``/proc/self/status`` was captured."""
    for path in _STATUS_FILES:
        value = parse_fields(machine.read(path) or "").get("Cpus_allowed_list")
        if value is None:
            continue
        try:
            cpus = parse_cpu_list(value, source=path)
        except UnreadableLimitError as error:
            machine.note_unreadable(error)
            continue
        return Limit(name=AFFINITY, cpus=float(cpus), source=path, raw=value)
    return Limit(name=AFFINITY, cpus=None, source=_STATUS_FILES[-1], raw="")
