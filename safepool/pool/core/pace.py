"""Expected time of a function's calls, and so the number to send ahead.

A worker that waits for its next task wastes its CPU; a task that waits behind a long one loses
time. The number of calls sent ahead follows from the duration of earlier calls of the same
function.
"""

from __future__ import annotations

# Work that a worker holds. More than the 5 ms for which a thread of this process may hold the
# interpreter (sys.getswitchinterval), and so keep the scheduler from sending. Less than a person
# or another task would notice.
_AHEAD_NS = 10_000_000
# Of one kind in one message: for calls so short that the measurement says little.
_MOST_AT_ONCE = 2048
# Weight of the newest measurement.
_WEIGHT = 0.3
# Functions whose time is remembered.
_MOST_NAMES = 4096


class Pace:
    """The time that calls take, by the function's name.

    Attributes:
        ahead_ns: Work that a worker holds.
    """

    def __init__(self) -> None:
        self.ahead_ns: int = _AHEAD_NS
        self._nanoseconds: dict[str, float] = {}

    def note(self, name: str, nanoseconds: float, count: int = 1) -> None:
        """Remember that ``count`` calls took this long together."""
        each = nanoseconds / count
        before = self._nanoseconds.get(name)
        if before is None:
            if len(self._nanoseconds) >= _MOST_NAMES:
                self._nanoseconds.clear()
            self._nanoseconds[name] = each
        else:
            self._nanoseconds[name] = before + _WEIGHT * (each - before)

    def expected_ns(self, name: str) -> int:
        """Return how long one call is thought to take, 0 if nothing is known."""
        return int(self._nanoseconds.get(name, 0.0))

    def room(self, name: str, held_ns: int, *, idle: bool) -> int:
        """Return how many calls to send to a worker now.

        Args:
            name: The function's.
            held_ns: Expected time of the calls that it holds.
            idle: Whether it holds nothing.

        Returns:
            At least 1 for an idle worker; 0 for a busy one if nothing is known of the
            function, or it holds enough.

        Example:
            >>> pace = Pace()
            >>> pace.room("f", 0, idle=True), pace.room("f", 1, idle=False)
            (1, 0)
            >>> pace.note("f", 1_000_000)
            >>> pace.room("f", 0, idle=True)
            10
        """
        each = self._nanoseconds.get(name)
        if each is None:
            return int(idle)
        # Refilled when half is done: messages of many calls are cheaper than many messages.
        if not idle and held_ns > self.ahead_ns // 2:
            return 0
        fit = int((self.ahead_ns - held_ns) / max(each, 1.0))
        return min(max(fit, int(idle)), _MOST_AT_ONCE)
