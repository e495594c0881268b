"""Limit of workers that end before they did any work. The module computes: no clock, no process.

A crash has a cause that stays: an initializer, a broken library. A kill from outside (``SIGKILL``
and ``SIGTERM``, sent by the out-of-memory killer and by service managers) hits any worker, and on
a busy host several new workers in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from safepool.errors import FROM_OUTSIDE

_MOST_CRASHED = 3
# With the pauses between them a quarter of a minute.
_MOST_KILLED = 20
_FIRST_PAUSE_S = 0.05
_MOST_PAUSE_S = 1.0


@dataclass(slots=True, eq=False, repr=False)
class Patience:
    """Counts of useless workers of one pool, which ended before they did any work.

    Attributes:
        crashed: Number of workers that ended by themselves since the last useful worker.
        killed: Number of workers that were killed from outside since then.

    Example:
        >>> patience = Patience()
        >>> patience.after(-11, ours=False), patience.after(-9, ours=False)
        (0.0, 0.05)
        >>> patience.after(-11, ours=False), patience.after(-11, ours=False)
        (0.0, None)
    """

    crashed: int = 0
    killed: int = 0

    def was_of_use(self) -> None:
        """Set the counters to zero."""
        self.crashed = self.killed = 0

    def after(self, exitcode: int | None, *, ours: bool) -> float | None:
        """Count one that ended.

        Args:
            exitcode: The same as ``multiprocessing.Process.exitcode``.
            ours: The pool has sent the signal.

        Returns:
            Seconds before the next start; ``None``: start no other.
        """
        if exitcode in FROM_OUTSIDE and not ours:
            self.killed += 1
            pause_s = min(_FIRST_PAUSE_S * 2 ** (self.killed - 1), _MOST_PAUSE_S)
            return pause_s if self.killed < _MOST_KILLED else None
        self.crashed += 1
        return 0.0 if self.crashed < _MOST_CRASHED else None

    @property
    def in_a_row(self) -> int:
        """Number of workers in that row."""
        return self.crashed + self.killed
