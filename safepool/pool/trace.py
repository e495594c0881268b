"""A picture of a run: what each worker did when, in the Trace Event Format.

The scheduler's thread tells what it sees, through the few methods of `Trace`; the workers of a
traced pool tell when each call began and ended (``workers.timed``). Both come in the order of
positions, either may come first, and here they are joined. Without a trace nothing of this exists.

Events, all of one process, each in a line of its own (``trace_file``):

    X   cat "task": a call, in the row of its worker: name of the function, begin, duration; args:
            outcome        returned, raised, retried (its worker died, it is run again), died,
                           timed out, cancelled, ended (with the pool)
            error          type of what it raised
            attempt        if not the first
            waited_us      from its submission to its begin
            pickled_us     what the program took to pickle it
            loaded_us      what the worker took to read function and arguments,
            packed_us      and to pickle the result: both are part of the duration
        Short calls that follow each other are one event:
            calls          how many
            busy_us        the sum of their durations
            functions      how many of each, if there are several, which then is the name
            outcomes       how many of each, if there are several
    X   cat "start": a worker, from its start until its initializer has ended
    i   cat "worker", in its row: start, end, death; args: pid, and how it ended
        cat "pool": resize; args: before, after, why; break; args: why; end
    C   calls that wait; workers that run something or none; milliseconds for which the kernel
        has frozen the group, and the periods of the quota in which it did; CPU time of the
        scheduler's thread in percent
    M   names of the process and the rows; "safepool": version of this form, and when it began

A row is a place: a worker that replaces one which has ended gets its row.

Size: calls that end within a millisecond of the row's last event are joined with it. So a row
has at most some 1,000 events a second, of about 170 bytes. With each further 32 MiB that time
doubles, and so does the one between two looks at the counters: twice as long a run adds 32 MiB,
not twice as much. Workers that end and are replaced are each told, in half a kilobyte.

Not covered:
    * What a worker that was killed had ended but not sent: its times are estimated from those
      of the calls around.

Source: Trace Event Format, "Event Descriptions": complete, instant, counter, metadata events.
"""

from __future__ import annotations

import bisect
import json
import os
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from safepool.errors import TaskTimeoutError, describe_exit
from safepool.limits import read_throttling
from safepool.pool.dispatch import Dispatch
from safepool.pool.mapping import Span
from safepool.pool.tasks import Task
from safepool.pool.trace_file import EVERY_S, TraceFile
from safepool.transport.frames import Kind, encode
from safepool.workers.timed import Timed, read_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.limits import Throttling
    from safepool.pool.dispatch import Pieces
    from safepool.pool.mapping import MapRun
    from safepool.pool.policy import Policy
    from safepool.pool.staff import Worker
    from safepool.pool.tasks import Call, Pickled, PoolFuture
    from safepool.workers.inheritance import Inheritance

__all__ = ["SCHEMA", "Trace", "TracedDispatch", "TracedTask"]

# Of the form above; keys are added without a new number.
SCHEMA = 1

# As above.
_SHORT_NS = 1_000_000
_DOUBLES_BYTES = 32 << 20
# Functions that are named in an event of several.
_MOST_NAMES = 20
# Portions of a run whose time of submission is known; those before count as the oldest of these.
_MOST_PORTIONS = 4096


class TracedTask(Task):
    """A task that knows since when it waits.

    Attributes:
        queued_ns: When it was submitted, by the monotonic clock.
        pickled_ns: How long it took to be pickled.
    """

    __slots__ = ("pickled_ns", "queued_ns")

    def __init__(self, future: PoolFuture, call: Call, name: str, policy: Policy) -> None:
        super().__init__(future, call, name, policy)
        self.queued_ns = time.monotonic_ns()
        self.pickled_ns = 0


class TracedDispatch(Dispatch):
    """Makes messages as its base does, and measures.

    Args:
        trace: Told of workers that are started.
        settled: As of the base.
        wake: As of the base.
    """

    def __init__(
        self, trace: Trace, settled: Callable[[MapRun, int], None], wake: Callable[[], None]
    ) -> None:
        super().__init__(settled, wake)
        self._trace = trace

    def initialize(self, worker: Worker, inheritance: Inheritance) -> Pieces:
        """Return what a new worker is sent first."""
        self._trace.hired(worker)
        return [*encode(Kind.TRACE, 0), *super().initialize(worker, inheritance)]

    def pack_span(self, worker: Worker, span: Span) -> tuple[Pieces, list[Span]]:
        """Give calls of a run to a worker."""
        before = time.monotonic_ns()
        packed = super().pack_span(worker, span)
        span.pickled_ns = (time.monotonic_ns() - before) // max(1, span.count)
        return packed

    def _pickle(self, task: Task) -> Pickled:
        before = time.monotonic_ns()
        pickled = super()._pickle(task)
        if isinstance(task, TracedTask):
            task.pickled_ns = time.monotonic_ns() - before
        return pickled


@dataclass(slots=True)
class _Calls:
    """Calls of one worker that follow each other and have one event.

    Attributes:
        names: How many of each function; ``None`` while it is one, ``name``.
        outcomes: How many of each; ``None`` while it is one, ``outcome``.
    """

    begin_ns: int
    end_ns: int
    name: str
    outcome: str
    calls: int
    error: str | None
    attempt: int
    waited_ns: int
    busy_ns: int
    pickled_ns: int
    loaded_ns: int
    packed_ns: int
    names: dict[str, int] | None = None
    outcomes: dict[str, int] | None = None

    def join(self, name: str, outcome: str, count: int, error: str | None) -> None:
        """Take calls that follow; the times are added by the caller."""
        if self.names is not None or name != self.name:
            self.names = self.names or {self.name: self.calls}
            self.names[name] = self.names.get(name, 0) + count
        if self.outcomes is not None or outcome != self.outcome:
            self.outcomes = self.outcomes or {self.outcome: self.calls}
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        self.calls += count
        self.error = self.error or error


# Nothing is lost that somebody would look for if these are joined with others.
_PLAIN = frozenset({"returned", "raised"})


@dataclass(slots=True)
class _Settled:
    """Calls of one work whose answers have arrived."""

    first: int
    count: int
    work: Task | Span
    place: int
    outcome: str
    error: str | None


@dataclass(slots=True)
class _Row:
    """One worker's row.

    Attributes:
        number: From 1.
        hired_ns: When its worker was started.
        settled: Answers whose times have not arrived.
        times: Times whose answers have not arrived.
        end_ns: When the last event ends.
        calls: The last event, which others may join.
        given_up: What its worker ran when the pool broke.
    """

    number: int
    hired_ns: int
    settled: deque[_Settled] = field(default_factory=deque)
    times: deque[Timed] = field(default_factory=deque)
    end_ns: int = 0
    calls: _Calls | None = None
    given_up: tuple[Task | Span, int] | None = None


class Trace:
    """The trace of one pool.

    Args:
        path: Where it is written. An existing file is replaced.

    Raises:
        TraceFileError: It cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = TraceFile(path)
        self._pid = os.getpid()
        self._zero_ns = time.monotonic_ns()
        # Reentrant: the collector may run a __del__ that resizes the pool, in the middle.
        self._lock = threading.RLock()
        self._rows: dict[Worker, _Row] = {}
        self._most_rows = 0
        self._free: list[int] = []
        self._names: dict[str, str] = {}
        # As the file grows.
        self._short_ns, self._next_bytes = _SHORT_NS, _DOUBLES_BYTES
        self._look: Callable[[], tuple[int, int, int]] | None = None
        self._counted: dict[str, str] = {}
        self._look_at_ns = self._cpu_at_ns = 0
        self._throttling: Throttling | None = None
        self._thread: threading.Thread | None = None
        self._cpu_ns = 0
        began = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.add("[\n")
        self._meta("safepool", 0, schema=SCHEMA, began=began)
        self._meta("process_name", 0, name=f"pool of process {self._pid}")
        self._meta("thread_name", 0, name="pool")
        self._file.flush()

    def descriptors(self) -> Iterable[int]:
        """Return what a forked worker must not keep."""
        return self._file.descriptors()

    def measured(
        self, settled: Callable[[MapRun, int], None], wake: Callable[[], None]
    ) -> tuple[type[Task], Dispatch]:
        """Return what a pool uses in place of `Task` and ``Dispatch(settled, wake)``."""
        return TracedTask, TracedDispatch(self, settled, wake)

    def start(self, look: Callable[[], tuple[int, int, int]]) -> None:
        """Begin to write, in the scheduler's thread.

        Args:
            look: Returns how many calls wait, how many workers run something, and how many
                there are. Called in another thread.
        """
        self._thread = threading.current_thread()
        self._look, self._throttling = look, read_throttling()
        self._file.start(self._tick)

    def close(self) -> None:
        """Write what is left, and close the file. Twice is once."""
        if os.getpid() == self._pid and self._file.open:
            self._tick(last=True)
            now = time.monotonic_ns()
            last = self._line("i", 0, now, '"s":"p","cat":"pool","name":"end","args":{}')
            self._file.close(f"{last[:-2]}\n]\n")
        else:
            self._file.close()

    # What the scheduler tells, in its thread unless it says otherwise.

    def queued(self, run: MapRun, count: int) -> None:
        """So many further calls of a run were queued. From any thread."""
        if run.added is None:
            run.added = deque(maxlen=_MOST_PORTIONS)
        last, _ = run.added[-1] if run.added else (0, 0)
        run.added.append((last + count, time.monotonic_ns()))

    def resized(self, before: int, after: int, why: str) -> None:
        """The pool has another number of workers. From any thread."""
        args = f'"before":{before},"after":{after},"why":{json.dumps(why)}'
        self._instant("pool", "resize", 0, args)

    def hired(self, worker: Worker) -> None:
        """A worker was started."""
        with self._lock:
            if self._free:
                number = min(self._free)
                self._free.remove(number)
            else:
                self._most_rows = number = self._most_rows + 1
                self._meta("thread_name", number, name=f"worker {number}")
                self._meta("thread_sort_index", number, sort_index=number)
            now = time.monotonic_ns()
            self._rows[worker] = _Row(number, now, end_ns=now)
        self._instant("worker", "start", number, f'"pid":{worker.pid}')

    def ready(self, worker: Worker) -> None:
        """A worker's initializer has ended well."""
        row, now = self._rows[worker], time.monotonic_ns()
        row.end_ns = now
        begin, took = _us(row.hired_ns - self._zero_ns), _us(now - row.hired_ns)
        self._file.add(
            f'{{"ph":"X","pid":{self._pid},"tid":{row.number},"ts":{begin},"dur":{took},'
            f'"cat":"start","name":"start of a worker","args":{{"pid":{worker.pid}}}}},\n'
        )

    def settled(
        self,
        worker: Worker,
        work: Task | Span,
        place: int,
        count: int,
        error: BaseException | None = None,
    ) -> None:
        """Calls of one work were answered."""
        row = self._rows[worker]
        outcome, name = ("returned", None) if error is None else ("raised", type(error).__name__)
        row.settled.append(_Settled(work.position + place, count, work, place, outcome, name))
        if row.times:
            self._join(row)

    def timed(self, worker: Worker, segments: Sequence[bytes | bytearray | memoryview]) -> None:
        """A worker has told when calls began and ended.

        Raises:
            CorruptFrameError: It has not.
        """
        row = self._rows[worker]
        row.times += read_times(segments)
        if row.settled:
            self._join(row)

    def gave_up(self, why: str) -> None:
        """The pool breaks."""
        self._instant("pool", "break", 0, f'"why":{json.dumps(why)}')

    def broken(self, worker: Worker) -> None:
        """The pool breaks, whatever this worker does; what it owes is struck next."""
        work = worker.ledger.head
        if work is None:
            return
        if worker.board is None or worker.board.claimed >= work.position + work.done:
            self._rows[worker].given_up = (work, work.done)

    def ended(
        self,
        worker: Worker,
        exitcode: int | None,
        lost: Sequence[tuple[tuple[Task | Span, int], bool]],
        *,
        ending: bool,
    ) -> None:
        """A worker's process has ended.

        Args:
            worker: Which.
            exitcode: As ``multiprocessing.Process.exitcode``.
            lost: The calls that it took along, and whether each is lost for good.
            ending: The pool ends all of them.
        """
        row, now = self._rows.pop(worker), time.monotonic_ns()
        # What it began last; of the shortest calls it says so seldom.
        since = worker.sent_ns if worker.board is None else worker.board.since_ns
        begin = max(row.end_ns, min(now, since))
        if row.given_up is not None:
            lost = [(row.given_up, True)]
        with self._lock:
            self._estimate(row, begin if lost else now)
            for (work, place), for_good in lost:
                outcome = _outcome(worker, ending=ending, for_good=for_good)
                attempt = work.attempts + (for_good or isinstance(work, Span))
                self._add(row, _Settled(0, 1, work, place, outcome, None), begin, now, attempt)
                begin = now
            self._emit(row)
            self._free.append(row.number)
        died = bool(lost) or not worker.dismissed
        how = describe_exit(exitcode, worker.oom)
        args = f'"pid":{worker.pid},"how":{json.dumps(how)}'
        self._instant("worker", "death" if died else "end", row.number, args)

    # Calls, and when.

    def _join(self, row: _Row) -> None:
        settled, times = row.settled, row.times
        with self._lock:
            while settled and times:
                done, timed = settled[0], times[0]
                if timed.first + timed.calls <= done.first:
                    times.popleft()  # of a call that was given up
                elif done.first + done.count <= timed.first:
                    self._estimate(row, timed.begin_ns, 1)
                else:
                    self._join_first(row, done, timed)

    def _join_first(self, row: _Row, done: _Settled, timed: Timed) -> None:
        """Add the calls that both heads are about, and take them off."""
        first = max(done.first, timed.first)
        end = min(done.first + done.count, timed.first + timed.calls)
        count = end - first
        if timed.first < first or count < timed.calls:
            # They were looked at on the board meanwhile: shared out evenly.
            each = (timed.end_ns - timed.begin_ns) / timed.calls
            begin = timed.begin_ns + int(each * (first - timed.first))
            part = Timed(
                first,
                count,
                begin,
                begin + int(each * count),
                timed.loaded_ns * count // timed.calls,
                timed.packed_ns * count // timed.calls,
            )
        else:
            part = timed
        if end == timed.first + timed.calls:
            row.times.popleft()
        else:
            row.times[0] = timed._replace(
                first=end,
                calls=timed.first + timed.calls - end,
                begin_ns=part.end_ns,
                loaded_ns=timed.loaded_ns - part.loaded_ns,
                packed_ns=timed.packed_ns - part.packed_ns,
            )
        if end == done.first + done.count:
            row.settled.popleft()
            whole = done
        else:
            whole = _Settled(
                done.first, end - done.first, done.work, done.place, done.outcome, done.error
            )
            done.count -= whole.count
            done.first, done.place = end, done.place + whole.count
        self._add(row, whole, part.begin_ns, part.end_ns, 0, part.loaded_ns, part.packed_ns)

    def _estimate(self, row: _Row, end_ns: int, most: int = sys.maxsize) -> None:
        """Add calls whose times never came: between the last event and this moment."""
        count = min(most, len(row.settled))
        if not count:
            return
        each = max(0, end_ns - row.end_ns) // count
        for _ in range(count):
            begin = row.end_ns
            self._add(row, row.settled.popleft(), begin, begin + each)

    def _add(
        self,
        row: _Row,
        done: _Settled,
        begin_ns: int,
        end_ns: int,
        attempt: int = 0,
        loaded_ns: int = 0,
        packed_ns: int = 0,
    ) -> None:
        work, count, outcome = done.work, done.count, done.outcome
        # By two clocks that are one, but read in another order: never over each other.
        begin_ns = max(begin_ns, row.end_ns)
        row.end_ns = end_ns = max(end_ns, begin_ns)
        if isinstance(work, TracedTask):
            queued_ns, pickled_ns = work.queued_ns, work.pickled_ns
        elif isinstance(work, Span):
            queued_ns = _queued_ns(work.run, work.start + done.place) or begin_ns
            pickled_ns = work.pickled_ns * count
        else:
            queued_ns, pickled_ns = begin_ns, 0
        attempt = attempt or work.attempts + 1
        plain = attempt == 1 and outcome in _PLAIN
        last = row.calls
        if last is not None:
            if plain and end_ns - last.begin_ns < self._short_ns:
                last.join(work.name, outcome, count, done.error)
                last.end_ns = end_ns
                last.busy_ns += end_ns - begin_ns
                last.pickled_ns += pickled_ns
                last.loaded_ns += loaded_ns
                last.packed_ns += packed_ns
                return
            self._emit(row)
        row.calls = _Calls(
            begin_ns,
            end_ns,
            work.name,
            outcome,
            count,
            done.error,
            attempt,
            begin_ns - queued_ns,
            end_ns - begin_ns,
            pickled_ns,
            loaded_ns,
            packed_ns,
        )
        if not plain or end_ns - begin_ns >= self._short_ns:
            self._emit(row)  # nothing will join it

    def _emit(self, row: _Row) -> None:
        calls, row.calls = row.calls, None
        if calls is None:
            return
        name = calls.name if calls.names is None else f"{len(calls.names)} functions"
        quoted = self._names.get(name) or self._quoted(name)
        begin_ns = calls.begin_ns - self._zero_ns
        self._file.add(
            f'{{"ph":"X","pid":{self._pid},"tid":{row.number},"ts":{_us(begin_ns)},'
            f'"dur":{_us(calls.end_ns - calls.begin_ns)},'
            f'"cat":"task","name":{quoted},"args":{{{_arguments(calls)}}}}},\n'
        )
        if self._file.written_bytes > self._next_bytes:
            self._next_bytes += _DOUBLES_BYTES
            self._short_ns *= 2

    def _quoted(self, name: str) -> str:
        if len(self._names) > 1000:
            self._names.clear()
        quoted = self._names[name] = json.dumps(name)
        return quoted

    # Counters, in the thread that writes.

    def _tick(self, *, last: bool = False) -> None:
        now = time.monotonic_ns()
        with self._lock:
            for row in self._rows.values():
                if row.calls is not None and now - row.calls.begin_ns > self._short_ns:
                    self._emit(row)
        every_ns = int(EVERY_S * 1e9) * (self._short_ns // _SHORT_NS)
        if self._look is None or not (last or now - self._look_at_ns > every_ns * 0.9):
            return
        self._look_at_ns = now
        waiting, running, workers = self._look()
        self._count("queue", now, f'"calls":{waiting}')
        self._count("workers", now, f'"running":{running},"idle":{workers - running}')
        self._count_throttling(now)
        self._count_cpu(now)
        if self._file.dropped:
            self._count("dropped events", now, f'"events":{self._file.dropped}')

    def _count_throttling(self, now: int) -> None:
        before, current = self._throttling, read_throttling()
        self._throttling = current
        if before is None or current is None or before.source != current.source:
            return
        grown = current - before
        frozen = grown.throttled_periods
        self._count("throttled", now, f'"ms":{grown.throttled_us / 1000:.3f}')
        self._count("periods", now, f'"frozen":{frozen},"free":{grown.periods - frozen}')

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
                self._count("scheduler", now, f'"cpu_percent":{share:.0%}'.replace("%", ""))

    else:

        def _count_cpu(self, _now: int) -> None:
            pass

    def _count(self, name: str, now_ns: int, args: str) -> None:
        # A counter keeps its value until it is told another.
        if self._counted.get(name) != args:
            self._counted[name] = args
            self._file.add(self._line("C", 0, now_ns, f'"name":"{name}","args":{{{args}}}'))

    # Lines.

    def _instant(self, category: str, name: str, number: int, args: str) -> None:
        scope = "t" if number else "p"
        rest = f'"s":"{scope}","cat":"{category}","name":"{name}","args":{{{args}}}'
        self._file.add(self._line("i", number, time.monotonic_ns(), rest))

    def _line(self, kind: str, number: int, now_ns: int, rest: str) -> str:
        at = _us(now_ns - self._zero_ns)
        return f'{{"ph":"{kind}","pid":{self._pid},"tid":{number},"ts":{at},{rest}}},\n'

    def _meta(self, name: str, number: int, /, **args: Any) -> None:
        self._file.add(
            f'{{"ph":"M","pid":{self._pid},"tid":{number},"ts":0,"name":"{name}",'
            f'"args":{json.dumps(args)}}},\n'
        )


def _arguments(calls: _Calls) -> str:
    if calls.outcomes is None:
        args = f'"outcome":"{calls.outcome}"'
    else:
        args = f'"outcomes":{json.dumps(calls.outcomes)}'
    if calls.error is not None:
        args += f',"error":{json.dumps(calls.error)}'
    if calls.attempt != 1:
        args += f',"attempt":{calls.attempt}'
    if calls.waited_ns >= 1000:
        args += f',"waited_us":{calls.waited_ns // 1000}'
    if calls.pickled_ns >= 1000:
        args += f',"pickled_us":{calls.pickled_ns // 1000}'
    if calls.loaded_ns >= 1000:
        args += f',"loaded_us":{calls.loaded_ns // 1000}'
    if calls.packed_ns >= 1000:
        args += f',"packed_us":{calls.packed_ns // 1000}'
    if calls.calls > 1:
        args += f',"calls":{calls.calls},"busy_us":{_us(calls.busy_ns)}'
    if calls.names is not None:
        most = dict(Counter(calls.names).most_common(_MOST_NAMES))
        args += f',"functions":{json.dumps(most)}'
    return args


def _us(ns: int) -> str:
    """Return nanoseconds as microseconds, with every digit.

    Example:
        >>> _us(1_002_003)
        '1002.003'
    """
    return f"{ns // 1000}.{ns % 1000:03d}"


def _queued_ns(run: MapRun, index: int) -> int | None:
    added = run.added
    if not added:
        return None
    # The first portion that ends behind the call.
    at = bisect.bisect_right(added, index, key=lambda portion: portion[0])
    return added[min(at, len(added) - 1)][1]


def _outcome(worker: Worker, *, ending: bool, for_good: bool) -> str:
    if isinstance(worker.condemned, TaskTimeoutError):
        return "timed out"
    if worker.condemned is not None:
        return "cancelled"
    if not for_good:
        return "retried"
    return "ended" if ending else "died"
