"""Floor 1, limits: CPU quotas and throttling counters: text in, `Limit` out. No decision.

Formats: Linux, Documentation/admin-guide/cgroup-v2.rst, "CPU Interface Files", and
Documentation/scheduler/sched-bwc.rst for version 1.

Not covered, because these settings do not limit sustained run time:
    * ``cpu.shares``, ``cpu.weight``, ``cpu.idle``: they divide the available time.
    * Burst (``cpu.cfs_burst_us``, ``cpu.max.burst``): a bank, filled from the same quota.
    * ``cpu.rt_runtime_us``: real-time tasks only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from safepool.errors import UnreadableLimitError
from safepool.limits._types import Limit, Throttling
from safepool.limits.levels import read_levels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.limits.cgroup import Level
    from safepool.limits.files import Machine

# sched-bwc.rst: the period of a group if none was set.
DEFAULT_PERIOD_US = 100_000

_NUMBER = r"[0-9]{1,20}"
_CPU_MAX = re.compile(rf"\s*(max|{_NUMBER})(?:\s+({_NUMBER})(?:\s.*)?)?\s*", re.ASCII | re.DOTALL)
_ONE_NUMBER = re.compile(rf"\s*(-1|{_NUMBER})\s*", re.ASCII)

_CPU_MAX_SHAPE = "'<quota> <period>' in microseconds, both positive, or 'max <period>'"
_CFS_SHAPE = "a positive number of microseconds, or -1 for no quota"


def parse_cpu_max(text: str, *, source: str) -> Limit:
    r"""Parse the text of one ``cpu.max`` file (control groups, version 2).

    Args:
        text: ``"<quota> <period>\n"``, both in microseconds. The quota may be the word
            ``max``, which sets no ceiling. A quota without a period has the default period,
            100 ms. Further fields, of future kernels, are ignored.
        source: Path the text was read from. The result and the error name it.

    Returns:
        The quota divided by the period, in CPUs. Division of two integers is correctly
        rounded, so comparing the results never turns the exact order round.

    Raises:
        UnreadableLimitError: The text has another shape, or a number is zero.

    Source:
        Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max".

    Example:
        >>> parse_cpu_max("250000 100000\n", source="cpu.max").cpus
        2.5
    """
    match = _CPU_MAX.fullmatch(text)
    if match is None:
        raise UnreadableLimitError(source, text, _CPU_MAX_SHAPE)
    quota, period = match[1], match[2] or str(DEFAULT_PERIOD_US)
    if quota == "max":
        cpus = None
    elif int(quota) and int(period):
        cpus = int(quota) / int(period)
    else:
        raise UnreadableLimitError(source, text, _CPU_MAX_SHAPE)
    return Limit(name="cpu.max", cpus=cpus, source=source, raw=text.strip())


def parse_cfs_quota(quota: str, period: str, *, source: str) -> Limit:
    r"""Parse the texts of ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (version 1).

    Args:
        quota: Number of microseconds, or ``-1``, which sets no ceiling.
        period: Number of microseconds. Ignored without a quota; an empty text is the default of
            100 ms.
        source: Path of the quota's file. The result and the error name it.

    Returns:
        The quota divided by the period, in CPUs. Its raw text has both numbers, ``150000 /
        100000``.

    Raises:
        UnreadableLimitError: A text has another shape, or a number is zero.

    Source:
        Linux, Documentation/scheduler/sched-bwc.rst, "Management".

    Example:
        >>> parse_cfs_quota("150000\n", "100000\n", source="cpu.cfs_quota_us").cpus
        1.5
    """
    found = _ONE_NUMBER.fullmatch(quota)
    if found is None or int(found[1]) == 0:
        raise UnreadableLimitError(source, quota, _CFS_SHAPE)
    if found[1] == "-1":
        return Limit(name="cpu.cfs_quota_us", cpus=None, source=source, raw=quota.strip())
    length = _ONE_NUMBER.fullmatch(period if period.strip() else str(DEFAULT_PERIOD_US))
    if length is None or int(length[1]) <= 0:
        raise UnreadableLimitError(
            source.replace("cfs_quota_us", "cfs_period_us"), period, _CFS_SHAPE
        )
    return Limit(
        name="cpu.cfs_quota_us",
        cpus=int(found[1]) / int(length[1]),
        source=source,
        raw=f"{found[1]} / {length[1]}",
    )


def parse_cpu_stat(text: str, *, source: str) -> Throttling:
    r"""Parse the text of one ``cpu.stat`` file, of either version.

    Args:
        text: Lines ``<name> <number>``. Version 2 tells ``throttled_usec``, version 1
            ``throttled_time`` in nanoseconds.
        source: Path the text was read from. The result and the error name it.

    Returns:
        The counters since the group was made.

    Raises:
        UnreadableLimitError: A counter is missing (version 2 without the cpu controller).

    Source:
        cgroup-v2.rst, "cpu.stat"; sched-bwc.rst, "Statistics".

    Example:
        >>> text = "nr_periods 10\nnr_throttled 4\nthrottled_time 2000000\n"
        >>> parse_cpu_stat(text, source="cpu.stat").throttled_us
        2000
    """
    numbers = {
        name: int(number)
        for name, number in re.findall(rf"^(\w+) ({_NUMBER})$", text, re.ASCII | re.MULTILINE)
    }
    throttled_us = numbers.get("throttled_usec")
    if throttled_us is None and "throttled_time" in numbers:
        throttled_us = numbers["throttled_time"] // 1000
    if throttled_us is None or not numbers.keys() >= {"nr_periods", "nr_throttled"}:
        raise UnreadableLimitError(
            source, text, "lines nr_periods, nr_throttled, and throttled_usec or throttled_time"
        )
    return Throttling(
        periods=numbers["nr_periods"],
        throttled_periods=numbers["nr_throttled"],
        throttled_us=throttled_us,
        source=source,
    )


def read_binding(machine: Machine, levels: Iterable[Level]) -> Limit | None:
    """Read the smallest quota; ``None`` if no group sets one."""
    quotas = [one for one in read_levels(machine, levels, read_quota) if one.cpus is not None]
    return min(quotas, key=lambda limit: limit.cpus or 0.0, default=None)


def read_throttling(machine: Machine, levels: Iterable[Level]) -> Throttling | None:
    """Read the counters of the group whose quota binds; `safepool.limits.read_throttling`."""
    binding = read_binding(machine, levels)
    if binding is None:
        return None
    source = binding.source.removesuffix(binding.name) + "cpu.stat"
    text = machine.read(source)
    if text is None:
        return None
    try:
        return parse_cpu_stat(text, source=source)
    except UnreadableLimitError as error:
        machine.note_unreadable(error)
        return None


def read_quota(machine: Machine, directory: str, version: int) -> Limit | None:
    """Read the quota of one group, for :func:`~safepool.limits.levels.read_levels`.

    The leaf alone is not enough: a group gets no more than any group above it, and
    systemd writes a slice's CPUQuota= above the groups of the slice's services.
    """
    source = f"{directory}/{'cpu.max' if version == 2 else 'cpu.cfs_quota_us'}"
    text = machine.read(source)
    if text is None:
        return None
    if version == 2:
        return parse_cpu_max(text, source=source)
    # Most groups have no quota; then the second file need not be opened.
    period = "" if text.strip() == "-1" else machine.read(f"{directory}/cpu.cfs_period_us")
    return parse_cfs_quota(text, period or "", source=source)
