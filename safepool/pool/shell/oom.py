"""Counters of the kernel's out-of-memory killer before and after a worker's death.

The kernel counts its kills by control group, and its signal looks like any other SIGKILL. Hence a
killed worker is matched with a count that has grown meanwhile.

Not covered:
    * The process: if the kernel killed another process of the group, and a person kills a worker
      within seconds, the error names the kernel. An idle pool does not read the counters: its
      errors may name the kernel for an older kill.
    * A worker that its task has moved to another group.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from safepool.errors import OutOfMemory
from safepool.limits import read_oom_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.limits import OutOfMemoryCount

# Between two looks: one costs about half a millisecond, and short-lived workers are started
# all the time.
_LOOK_S = 1.0
# A kill that was counted and whose victim has not been seen by then was not a worker. The kernel
# may kill several workers at once, and the pool notices them one after the other.
_CLAIM_S = 5.0


class OutOfMemoryWatch:
    """Kill counters of the control groups of the thread that starts workers, and so of workers.

    Args:
        read: Reads them, this thread's own group first.
        clock: Seconds; only differences count.
    """

    def __init__(
        self,
        read: Callable[[], tuple[OutOfMemoryCount, ...]] = read_oom_counts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._clock = clock
        self._counts: dict[str, OutOfMemoryCount] | None = None
        self._looked_at = 0.0
        # Number of counted kills that are not matched with a worker yet, and the time of that
        # reading.
        self._unclaimed = 0
        self._seen_at = 0.0
        self._latest: OutOfMemory | None = None
        # By the counters' file, when a group's ceiling was last seen to have been met.
        self._met_at: dict[str, float] = {}

    def look(self) -> None:
        """Remember the counters as they are now, unless that was done just before.

        Called repeatedly while tasks run: a kill has the time of the look that found it.
        """
        since_s = self._clock() - self._looked_at
        if self._counts is None or since_s >= _LOOK_S:
            self._compare()
            if since_s > _CLAIM_S:  # a kill of any time while no call ran
                self._unclaimed = 0

    @property
    def next_look(self) -> float | None:
        """When to look again, by the clock; ``None`` if nothing is counted here."""
        return self._looked_at + _LOOK_S if self._counts else None

    def explain(self) -> OutOfMemory | None:
        """Return the kernel's counts for a worker that was killed just now.

        Returns:
            Each kill explains one worker only; ``None`` if none was counted.
        """
        self._compare()
        if self._clock() - self._seen_at > _CLAIM_S:
            self._unclaimed = 0
        if not self._unclaimed:
            return None
        self._unclaimed -= 1
        return self._latest

    def _compare(self) -> None:
        self._looked_at = self._clock()
        before = self._counts
        now = self._read()
        self._counts = {count.source: count for count in now}
        # Only the own group's: an ancestor of version 2 counts its other groups' as well.
        if not before or not now or now[0].source not in before:
            return
        for count in now:
            earlier = before.get(count.source)
            if count.limit_bytes is None or count.used_up is None or earlier is None:
                continue
            if count.used_up > (earlier.used_up or 0):
                self._met_at[count.source] = self._looked_at
        own, kills_before = now[0], before[now[0].source].kills
        if own.kills <= kills_before:
            return
        if self._looked_at - self._seen_at > _CLAIM_S:
            self._unclaimed = 0
        self._unclaimed += own.kills - kills_before
        self._seen_at = self._looked_at
        full = self._used_up(now)
        self._latest = OutOfMemory(
            kills_before=kills_before,
            kills=own.kills,
            source=own.source,
            limit_bytes=None if full is None else full.limit_bytes,
            used_bytes=None if full is None else full.peak_bytes,
            group=own.group if full is None else full.group,
        )

    def _used_up(self, now: tuple[OutOfMemoryCount, ...]) -> OutOfMemoryCount | None:
        """Return the innermost group whose own limit was used up just now."""
        for count in now:
            met_at = self._met_at.get(count.source)
            # The limit is met before the kill is counted, and a check may have come between.
            if met_at is not None and self._looked_at - met_at <= 2 * _LOOK_S:
                return count
        return None
