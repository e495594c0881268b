"""Begin, counters and end of the trace of any pool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from safepool.pool.tracing.events import Events

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable


class CountedTrace:
    """A trace with counters of the pool's calls and workers, in addition to its rows."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._events = Events(path)
        self._look: Callable[[], tuple[int, int, int]] | None = None
        self._look_at_ns = 0

    def descriptors(self) -> Iterable[int]:
        """Return the descriptors that a forked worker must close."""
        return self._events.descriptors()

    def start(self, look: Callable[[], tuple[int, int, int]]) -> None:
        """Begin to write.

        ``look`` returns how many calls wait, how many workers run something, and how many there
        are. It is called in another thread.
        """
        self._look = look
        self._events.start(self._tick)

    def close(self) -> None:
        """Write the remaining lines, and close the file. Twice is once."""
        if self._events.ours:
            self._tick(last=True)
        self._events.close()

    # In the thread that writes.

    def _write_rows(self, now_ns: int, *, last: bool) -> None:
        raise NotImplementedError

    def _count_more(self, now_ns: int) -> None:
        """Write further counters; none by default."""

    def _tick(self, *, last: bool = False) -> None:
        now_ns = time.monotonic_ns()
        self._write_rows(now_ns, last=last)
        due = now_ns - self._look_at_ns > self._events.look_every_ns * 0.9
        if self._look is None or not (last or due):
            return
        self._look_at_ns = now_ns
        waiting, running, workers = self._look()
        self._events.count("queue", now_ns, f'"calls":{waiting}')
        self._events.count("workers", now_ns, f'"running":{running},"idle":{workers - running}')
        self._count_more(now_ns)
        if self._events.dropped:
            self._events.count("dropped events", now_ns, f'"events":{self._events.dropped}')
