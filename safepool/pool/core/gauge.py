"""Time of a worker's next memory check, and its result. The module computes, and reads nothing.

A check wakes the scheduler's thread, so a worker that does not grow is checked ten times a second.
A growing worker is checked more often the less memory it has left, at most a hundred times a
second.
"""

from __future__ import annotations

LEAST_NS = 10_000_000
"""Least time between two checks. A task that allocates 1 GB a second grows by 10 MB meanwhile."""

# The most: a task that begins to grow at this rate is met 0.1 s later.
_MOST_NS = 100_000_000
# What a worker is expected to grow by at the most, in bytes for each nanosecond: 4 GB/s.
_FASTEST = 4
# What counts as growth: an interpreter's own comings and goings do not.
_GROWN_BYTES = 1 << 20


class Gauge:
    """Memory of one worker beyond that of its birth.

    Args:
        limit_bytes: The most that it may hold.
        born_bytes: Memory that it had at its birth: a fork has all that its parent had.

    Attributes:
        look_ns: When to look next, by the monotonic clock; at once if in the past.

    Example:
        >>> gauge = Gauge(1_000, 500)
        >>> gauge.note(900, 0), gauge.note(1_501, gauge.look_ns)
        (None, 1001)
    """

    __slots__ = ("_held_bytes", "_pause_ns", "born_bytes", "limit_bytes", "look_ns")

    def __init__(self, limit_bytes: int, born_bytes: int) -> None:
        self.limit_bytes: int = limit_bytes
        self.born_bytes: int = born_bytes
        self.look_ns: int = 0
        self._held_bytes = 0
        self._pause_ns = _MOST_NS

    def note(self, private_bytes: int, now_ns: int) -> int | None:
        """Note a measurement; return the worker's memory if it exceeds the limit."""
        held = private_bytes - self.born_bytes
        if held - self._held_bytes > _GROWN_BYTES or held > self.limit_bytes:
            self._pause_ns = max(0, self.limit_bytes - held) // _FASTEST
        else:
            self._pause_ns *= 2
        self._pause_ns = min(max(self._pause_ns, LEAST_NS), _MOST_NS)
        self._held_bytes = held
        self.look_ns = now_ns + self._pause_ns
        return held if held > self.limit_bytes else None
