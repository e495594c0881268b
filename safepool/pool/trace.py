"""A picture of a run: what each worker did when, in the Trace Event Format.

The scheduler's thread tells what it sees, through the few methods of `Trace`; the workers of a
traced pool tell when each call began and ended. Without a trace nothing of this exists.

    trace_dispatch   what calls cost before a worker has them
    trace_rows       which call ran from when to when: a row for each worker
    trace_events     the events, as lines; their form is described there
    trace_file       the file, and the thread that writes it

A row is a place: a worker that replaces one which has ended gets its row.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

from safepool.limits import read_throttling
from safepool.pool.core.ending import Lost
from safepool.pool.mapping import Span
from safepool.pool.trace_dispatch import TracedDispatch, TracedTask, note_queued
from safepool.pool.trace_events import Events
from safepool.pool.trace_rows import Row, Settled
from safepool.workers.timed import read_times

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence

    from safepool.limits import Throttling
    from safepool.pool.core.ending import Ending
    from safepool.pool.dispatch import Dispatch
    from safepool.pool.mapping import MapRun
    from safepool.pool.tasks import Task
    from safepool.pool.worker import Worker
    from safepool.transport.main_names import MainNames

__all__ = ["Trace"]


class Trace:
    """The trace of one pool.

    Args:
        path: Where it is written. An existing file is replaced.

    Raises:
        TraceFileError: It cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._events = Events(path)
        # Reentrant: the collector may run a __del__ that resizes the pool, in the middle.
        self._lock = threading.RLock()
        self._rows: dict[Worker, Row] = {}
        self._most_rows = 0
        self._free: list[int] = []
        self._look: Callable[[], tuple[int, int, int]] | None = None
        self._look_at_ns = self._cpu_at_ns = 0
        self._throttling: Throttling | None = None
        self._thread: threading.Thread | None = None
        self._cpu_ns = 0

    def descriptors(self) -> Iterable[int]:
        """Return what a forked worker must not keep."""
        return self._events.descriptors()

    def measured(
        self,
        settled: Callable[[MapRun, int], None],
        wake: Callable[[], None],
        names: MainNames | None = None,
    ) -> tuple[type[Task], Dispatch]:
        """Return what a pool uses in place of `Task` and ``Dispatch(settled, wake, names)``."""
        return TracedTask, TracedDispatch(self.hired, settled, wake, names)

    def start(self, look: Callable[[], tuple[int, int, int]]) -> None:
        """Begin to write, in the scheduler's thread.

        Args:
            look: Returns how many calls wait, how many workers run something, and how many
                there are. Called in another thread.
        """
        self._thread = threading.current_thread()
        self._look, self._throttling = look, read_throttling()
        self._events.start(self._tick)

    def close(self) -> None:
        """Write what is left, and close the file. Twice is once."""
        if self._events.ours:
            self._tick(last=True)
        self._events.close()

    # What the scheduler tells, in its thread unless it says otherwise.

    def queued(self, run: MapRun, count: int) -> None:
        """So many further calls of a run were queued. From any thread."""
        note_queued(run, count)

    def resized(self, before: int, after: int, why: str) -> None:
        """The pool has another number of workers. From any thread."""
        self._events.of_pool("resize", before=before, after=after, why=why)

    def hired(self, worker: Worker) -> None:
        """A worker was started."""
        with self._lock:
            if self._free:
                number = min(self._free)
                self._free.remove(number)
            else:
                self._most_rows = number = self._most_rows + 1
                self._events.row(number)
            self._rows[worker] = Row(number, self._events, time.monotonic_ns())
        self._events.of_worker("start", number, pid=worker.pid)

    def ready(self, worker: Worker) -> None:
        """A worker's initializer has ended well."""
        self._rows[worker].ready(time.monotonic_ns(), worker.pid)

    def settled(
        self,
        worker: Worker,
        work: Task | Span,
        place: int,
        count: int,
        error: BaseException | None = None,
    ) -> None:
        """Calls of one work were answered."""
        outcome, name = ("returned", None) if error is None else ("raised", type(error).__name__)
        with self._lock:
            self._rows[worker].settle(
                Settled(work.position + place, count, work, place, outcome, name)
            )

    def timed(self, worker: Worker, segments: Sequence[bytes | bytearray | memoryview]) -> None:
        """A worker has told when calls began and ended.

        Raises:
            CorruptFrameError: It has not.
        """
        times = read_times(segments)
        with self._lock:
            self._rows[worker].time(times)

    def gave_up(self, why: str) -> None:
        """The pool breaks."""
        self._events.of_pool("break", why=why)

    def broken(self, worker: Worker) -> None:
        """The pool breaks, whatever this worker does; what it owes is struck next."""
        work = worker.ledger.head
        if work is None:
            return
        if worker.board is None or worker.board.claimed >= work.position + work.done:
            self._rows[worker].given_up = (work, work.done)

    def ended(self, worker: Worker, ending: Ending) -> None:
        """A worker's process has ended."""
        # What it began last; of the shortest calls it says so seldom.
        since = worker.sent_ns if worker.board is None else worker.board.since_ns
        lost: Sequence[Lost] = ending.lost
        with self._lock:
            row = self._rows.pop(worker)
            if row.given_up is not None:
                lost = [Lost(*row.given_up, begun=True, again=None)]
            told = []
            for one in lost:
                attempt = one.work.attempts + (one.again is None or isinstance(one.work, Span))
                told.append((one.work, one.place, ending.outcome_of(one), attempt))
            row.end(since, time.monotonic_ns(), told)
            self._free.append(row.number)
        kind = "death" if lost or ending.died else "end"
        self._events.of_worker(kind, row.number, pid=worker.pid, how=ending.how)

    # Counters, in the thread that writes.

    def _tick(self, *, last: bool = False) -> None:
        now = time.monotonic_ns()
        with self._lock:
            for row in self._rows.values():
                row.write_old(now)
        due = now - self._look_at_ns > self._events.look_every_ns * 0.9
        if self._look is None or not (last or due):
            return
        self._look_at_ns = now
        waiting, running, workers = self._look()
        self._events.count("queue", now, f'"calls":{waiting}')
        self._events.count("workers", now, f'"running":{running},"idle":{workers - running}')
        self._count_throttling(now)
        self._count_cpu(now)
        if self._events.dropped:
            self._events.count("dropped events", now, f'"events":{self._events.dropped}')

    def _count_throttling(self, now: int) -> None:
        before, current = self._throttling, read_throttling()
        self._throttling = current
        if before is None or current is None or before.source != current.source:
            return
        grown = current - before
        frozen = grown.throttled_periods
        self._events.count("throttled", now, f'"ms":{grown.throttled_us / 1000:.3f}')
        self._events.count("periods", now, f'"frozen":{frozen},"free":{grown.periods - frozen}')

    if sys.platform == "linux":

        def _count_cpu(self, now: int) -> None:
            thread = self._thread
            if thread is None or thread.ident is None or not thread.is_alive():
                return
            used = time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
            before, since = self._cpu_ns, self._cpu_at_ns
            self._cpu_ns, self._cpu_at_ns = used, now
            if since:
                share = (used - before) / max(1, now - since)
                self._events.count("scheduler", now, f'"cpu_percent":{share:.0%}'.replace("%", ""))

    else:

        def _count_cpu(self, _now: int) -> None:
            pass
