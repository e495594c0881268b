"""Floor 1, limits: time that processes waited for a CPU while CPUs were idle.

A quota that this process cannot see (of a group outside its control-group namespace, or of the
virtual machine) is not in the counters of its own group. The sign of such a quota: processes wait
for a CPU although CPUs that they may use are idle.

Formats: Linux, Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat", and
proc_stat(5).

Not covered:
    * A kernel without CONFIG_SCHED_INFO, or another system: there is no sample.
    * Threads of a process besides its first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

from safepool import procfs


class WaitSample(NamedTuple):
    """CPU time and waiting of some processes between two readings.

    Attributes:
        ran_s: Seconds for which they ran, all together.
        waited_s: Seconds for which they could have run and were not given a CPU.
        idle_s: Seconds for which the CPUs of the affinity mask stood idle, all together.
    """

    ran_s: float
    waited_s: float
    idle_s: float


def parse_schedstat(text: str) -> tuple[int, int] | None:
    """Return nanoseconds run and nanoseconds waited; ``None`` for any other text.

    Example:
        >>> parse_schedstat("1027455921 1006301150 40")
        (1027455921, 1006301150)
    """
    words = text.split()
    if len(words) < 2 or not (words[0].isascii() and words[0].isdigit()):
        return None
    if not (words[1].isascii() and words[1].isdigit()) or max(map(len, words[:2])) > 20:
        return None
    return int(words[0]), int(words[1])


def parse_idle(text: str, cpus: Iterable[int]) -> int:
    r"""Return the clock ticks for which these CPUs were idle, from the text of ``/proc/stat``.

    Example:
        >>> parse_idle("cpu  9 9 9 9 9\ncpu0 1 0 1 70 5\ncpu1 1 0 1 30 5\n", {1})
        30
    """
    names = {f"cpu{cpu}" for cpu in cpus}
    idle = 0
    for line in text.splitlines():
        words = line.split()
        if len(words) > 4 and words[0] in names and words[4].isascii() and words[4].isdigit():
            idle += int(words[4][:18])
    return idle


class WaitWatch:
    """Measures the time that processes wait for CPUs between two calls of :meth:`sample`."""

    def __init__(self) -> None:
        self._processes: dict[int, tuple[int, int]] = {}
        self._idle_s: float | None = None

    def sample(self, pids: Iterable[int]) -> WaitSample | None:
        """Return the times since the last call, for the processes of both calls.

        Returns:
            The differences; ``None`` for the first call, and if the system does not report them.
        """
        before, idle_before_s = self._processes, self._idle_s
        self._processes = {pid: found for pid in pids if (found := _schedstat(pid)) is not None}
        self._idle_s = _idle_s()
        both = before.keys() & self._processes.keys()
        if not both or idle_before_s is None or self._idle_s is None:
            return None
        return WaitSample(
            ran_s=sum(self._processes[pid][0] - before[pid][0] for pid in both) / 1e9,
            waited_s=sum(self._processes[pid][1] - before[pid][1] for pid in both) / 1e9,
            idle_s=max(0.0, self._idle_s - idle_before_s),
        )


def _idle_s() -> float | None:
    text = procfs.read("/proc/stat")
    if sys.platform == "linux" and text is not None:
        try:
            return parse_idle(text, os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
        except OSError:  # a filter refuses the call
            pass
    return None


def _schedstat(pid: int) -> tuple[int, int] | None:
    text = procfs.read(f"/proc/{pid}/schedstat")
    return None if text is None else parse_schedstat(text)
