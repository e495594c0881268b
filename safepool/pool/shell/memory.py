"""Memory checks of workers: during a call, to end a worker, and after it, to replace one.

After a call the limit is for the resident memory. During a call, memory is checked often enough to
end a worker that holds too much; the same limit holds after the call. Its measure is the memory of
a worker alone: resident less shared pages of ``/proc/PID/statm``, minus its memory at birth. The
measure excludes mapped files (libraries, ``numpy.memmap``), shared memory (:func:`safepool.share`,
arguments that no task has written to, ``/dev/shm``), and pages of its parent. A read takes two
microseconds; the kernel's exact sums (``smaps_rollup``) take 17 ms for each gigabyte, and stop the
worker meanwhile.

Not covered:
    * Memory that was swapped out, and memory of processes that a task has started.
    * Pages that a fork had from its birth and has since written to: they count as part of the
      birth.
    * Memory of a worker while it runs no call. The pool replaces a worker that exceeds the limit
      then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from safepool.errors import MemoryExceeded
from safepool.pool.core.events import Exceeded
from safepool.pool.core.gauge import LEAST_NS, Gauge
from safepool.pool.core.worker import Phase
from safepool.procfs import MemoryFile
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from safepool.pool.shell.worker import Worker

_log = ContainedLogger()

# Pause between two checks of the resident memory of a worker that goes on with the next call.
_RESIDENT_NS = 200_000_000
# Who is to be looked at so soon is looked at together with others: each time takes a wake-up.
_SOON_NS = 50_000_000


class MemoryWatch:
    """Looks at the workers of one pool.

    Args:
        limit_bytes: The most that a worker may hold during a call; ``None`` sets no limit.
        resident_bytes: The most that a worker may hold between two calls.

    Raises:
        ValueError: There is a limit for calls, and this system does not report the memory of a
            process.
    """

    def __init__(self, limit_bytes: int | None, resident_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._resident_bytes = resident_bytes
        if limit_bytes is None:
            return
        try:
            MemoryFile("self").close()
        except OSError as error:
            raise ValueError(
                "memory_limit= needs /proc/PID/statm, the kernel's figures of a process's memory, "
                f"and this process cannot read that file ({error}). Leave memory_limit= out"
            ) from error

    def meet(self, worker: Worker) -> None:
        """Begin with a worker that was just born."""
        if self._limit_bytes is None:
            return
        try:
            worker.memory = MemoryFile(worker.pid)
        except OSError as error:
            _log.warning("memory_limit= is not enforced for worker %d: %s", worker.pid, error)
            return
        worker.gauge = Gauge(self._limit_bytes, worker.memory.private_bytes() or 0)

    def has_outgrown(self, worker: Worker) -> bool:
        """Tell whether a worker holds too much after a call."""
        if worker.phase is not Phase.READY:
            return False
        now_ns, most, busy = time.monotonic_ns(), self._resident_bytes, bool(worker.ledger.owed)
        # One that falls idle is looked at in any case: it might hold its memory for ever.
        if most is not None and not (busy and now_ns < worker.memory_look_ns):
            worker.memory_look_ns = now_ns + _RESIDENT_NS
            held = worker.resident_bytes()
            if held is not None and held > most:
                _log.info("worker %d holds %d MiB and is replaced", worker.pid, held >> 20)
                return True
        exceeded = None if busy else self._look_at(worker, now_ns)
        if exceeded is not None:
            _log.info("the pool replaces worker %d: %s", worker.pid, exceeded)
        return exceeded is not None

    def look(self, workers: Iterable[Worker]) -> list[Exceeded]:
        """Check the workers that run calls and are due; return those that exceed the limit."""
        now_ns = time.monotonic_ns()
        busy = [*_gauges(workers)]
        if not any(gauge.look_ns <= now_ns for _, gauge in busy):
            return []
        soon = [worker for worker, gauge in busy if gauge.look_ns <= now_ns + _SOON_NS]
        found = ((worker, self._look_at(worker, now_ns)) for worker in soon)
        return [Exceeded(worker, what) for worker, what in found if what is not None]

    def next_look(self, workers: Iterable[Worker]) -> float | None:
        """Return when to look next, by the monotonic clock; ``None`` while no call runs."""
        # A call that has just been sent is not looked at: most have ended by then.
        looks = [
            max(gauge.look_ns, worker.sent_ns + LEAST_NS) for worker, gauge in _gauges(workers)
        ]
        return min(looks) / 1e9 if looks else None

    def _look_at(self, worker: Worker, now_ns: int) -> MemoryExceeded | None:
        gauge, file = worker.gauge, worker.memory
        private_bytes = None if file is None else file.private_bytes()
        if gauge is None or private_bytes is None:
            return None
        held_bytes = gauge.note(private_bytes, now_ns)
        if held_bytes is None:
            return None
        return MemoryExceeded(
            limit_bytes=gauge.limit_bytes,
            held_bytes=held_bytes,
            born_bytes=gauge.born_bytes,
            source=f"/proc/{worker.pid}/statm",
        )


def _gauges(workers: Iterable[Worker]) -> Iterator[tuple[Worker, Gauge]]:
    """Yield the workers that run calls, as far as they are known to hold anything."""
    for worker in workers:
        gauge = worker.gauge
        if gauge is not None and worker.ledger.owed and worker.phase < Phase.CONDEMNED:
            yield worker, gauge
