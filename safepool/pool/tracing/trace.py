"""The listener that makes a trace of a pool: it passes events to the rows of the workers."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from safepool.limits import Throttling, read_throttling
from safepool.pool.core.ending import Lost
from safepool.pool.core.events import Break, Bury, Event, Fed, Hired, Ready, Settle, Who
from safepool.pool.core.work import Call, Span
from safepool.pool.shell.listener import Listener
from safepool.pool.tracing.costs import note_brought, note_pickled
from safepool.pool.tracing.counted import CountedTrace
from safepool.pool.tracing.rows import Row, Settled
from safepool.transport.frames import Kind, encode
from safepool.workers.timed import read_times

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from safepool.pool.shell.listener import Bring, Buffer, Handle, Pickles, Settles, Table
    from safepool.pool.shell.worker import Worker


class Trace(CountedTrace, Listener):
    """The trace of one pool."""

    greeting: Sequence[bytes | memoryview] = encode(Kind.TRACE, 0)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        # Reentrant: the collector may run a __del__ that resizes the pool, in the middle.
        self._lock = threading.RLock()
        self._rows: dict[Who, Row] = {}
        self._most_rows = 0
        self._free: list[int] = []
        self._throttling: Throttling | None = None
        self._thread: threading.Thread | None = None
        self._cpu_ns = self._cpu_at_ns = 0

    def start(self, look: Callable[[], tuple[int, int, int]]) -> None:
        """Begin to write, in the scheduler's thread."""
        self._thread = threading.current_thread()
        self._throttling = read_throttling()
        super().start(look)

    def resized(self, before: int, after: int, why: str) -> None:
        """The pool has another number of workers. From any thread."""
        self._events.of_pool("resize", before=before, after=after, why=why)

    def timed(self, worker: Worker, segments: Sequence[Buffer]) -> None:
        """A worker has sent the times at which calls began and ended."""
        times = read_times(segments)
        with self._lock:
            self._rows[worker].time(times)

    # Replacements of the pool's functions.

    def of_calls(self, bring: Bring) -> Bring:
        """Note when calls are submitted."""

        def noted(brought: Call | Fed) -> None:
            note_brought(brought)
            bring(brought)

        return noted

    def of_pickles(self, pickle: Pickles) -> Pickles:
        """Note how long work takes to be pickled."""

        def noted(work: Any) -> Any:
            before = time.monotonic_ns()
            pickled = pickle(work)
            note_pickled(work, before)
            return pickled

        return noted

    def of_events(self, handle: Handle) -> Handle:
        """Note new workers, and a breaking pool before its workers' calls are removed."""
        hears: dict[type[Event], Callable[[Any], None]] = {
            Hired: self._hired,
            Ready: self._ready,
            Break: self._broken,
        }

        def heard(event: Event, now_ns: int) -> Any:
            hear = hears.get(type(event))
            if hear is not None:
                hear(event)
            return handle(event, now_ns)

        return heard

    def of_actions(self, table: Table) -> Table:
        """Hear of workers that have ended, once their last answers were settled."""
        bury = table[Bury]

        def heard(scheduler: Any, staff: Any, action: Bury) -> None:
            bury(scheduler, staff, action)
            self._ended(action)

        return {**table, Bury: heard}

    def of_answers(self, settle: Settles) -> Settles:
        """Hear of calls that were answered."""

        def heard(done: Settle) -> dict[int, BaseException]:
            raised = settle(done)
            with self._lock:
                row = self._rows[done.worker]
                for work, place, count, at in done.settled:
                    error, outcome = None, "returned"
                    if at in raised:
                        error, outcome = type(raised[at]).__name__, "raised"
                    position = work.position + place
                    row.settle(Settled(position, count, work, place, outcome, error))
            return raised

        return heard

    # Events in the scheduler's thread.

    def _hired(self, event: Hired) -> None:
        with self._lock:
            if self._free:
                number = min(self._free)
                self._free.remove(number)
            else:
                self._most_rows = number = self._most_rows + 1
                self._events.row(number)
            self._rows[event.worker] = Row(number, self._events, time.monotonic_ns())
        self._events.of_worker("start", number, pid=event.worker.pid)

    def _ready(self, event: Ready) -> None:
        self._rows[event.worker].ready(time.monotonic_ns(), event.worker.pid)

    def _broken(self, event: Break) -> None:
        self._events.of_pool("break", why=event.why)
        for worker, row in self._rows.items():
            work, board = worker.ledger.head, worker.board
            if work is not None and (not board or board.claimed >= worker.next):
                row.given_up = (work, work.done)

    def _ended(self, action: Bury) -> None:
        worker, ending = action.worker, action.ending
        # The call that it began last; of the shortest calls it reports few.
        since = worker.board.since_ns if worker.board else worker.sent_ns
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

    def _write_rows(self, now_ns: int, *, last: bool) -> None:
        del last
        with self._lock:
            for row in self._rows.values():
                row.write_old(now_ns)

    def _count_more(self, now_ns: int) -> None:
        self._count_throttling(now_ns)
        self._count_cpu(now_ns)

    def _count_throttling(self, now: int) -> None:
        before, current = self._throttling, read_throttling()
        self._throttling = current
        if before is None or current is None or before.source != current.source:
            return
        grown = current - before
        frozen = grown.throttled_periods
        self._events.count("throttled", now, f'"ms":{grown.throttled_us / 1000:.3f}')
        self._events.count("periods", now, f'"frozen":{frozen},"free":{grown.periods - frozen}')

    def _count_cpu(self, now: int) -> None:
        thread = self._thread
        ident = thread.ident if thread is not None and thread.is_alive() else None
        if sys.platform == "linux" and ident is not None:
            used = time.clock_gettime_ns(time.pthread_getcpuclockid(ident))
            before, since = self._cpu_ns, self._cpu_at_ns
            self._cpu_ns, self._cpu_at_ns = used, now
            if since:
                share = (used - before) / max(1, now - since)
                self._events.count("scheduler", now, f'"cpu_percent":{share:.0%}'.replace("%", ""))
