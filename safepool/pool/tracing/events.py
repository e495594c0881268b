"""Events that are written into a trace, in the Trace Event Format, and their number.

Events of one process, one in each line (``file``). A ``ClusterPool`` has a process for each node
as well, with the rows of its workers, and numbers the rows of all nodes together:

    X   cat "task": a call, in the row of its worker: name of the function, begin, duration; args:
            outcome        returned, raised, retried (its worker died, and the call runs again),
                           died, timed out, cancelled, ended (with the pool)
            error          type of the exception
            attempt        number of the attempt, except for the first
            waited_us      time from the submission to the begin
            pickled_us     time of pickling in the program
            loaded_us      time of reading function and arguments in the worker
            packed_us      time of pickling the result; like loaded_us a part of the duration
        Short calls that follow each other are one event:
            calls          number of calls
            busy_us        sum of their durations
            functions      calls by function, if there are several: the name is "3 functions"
            outcomes       calls by outcome, if there are several
    X   cat "start": a worker, from its start until its initializer has ended
    i   cat "worker", in its row: start, end, death; args: pid, and how it ended
        cat "pool": safepool, the first event; args: schema (of this form), began
            resize; args: before, after, why; break; args: why; end
            node opened; args: node, workers; node lost; args: node, why, calls (that failed)
    C   number of waiting calls; number of busy and of idle workers; milliseconds for which the
        kernel froze the group, and the number of such periods; CPU time of the scheduler's thread
        in percent; number of events left out because the disk was too slow
    M   names of the process and the rows

A row is an index in the pool: a replacement continues the row of its predecessor.

Size: calls that end within a millisecond of the row's last event are joined with it. Hence a row
has at most some 1,000 events a second, of about 170 bytes. With each further 32 MiB that time
doubles, and so does the pause between two readings of the counters: a run of double length adds
only 32 MiB. Each worker that ends and is replaced adds half a kilobyte.

Not covered:
    * The times at which calls began and ended: ``rows``.

Source: Trace Event Format, "Event Descriptions": complete, instant, counter, metadata events.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from safepool.pool.tracing.file import EVERY_S, TraceFile

if TYPE_CHECKING:
    import os

# Number of the format above; new keys do not change it.
SCHEMA = 1

# The same as above.
_SHORT_NS = 1_000_000
_DOUBLES_BYTES = 32 << 20
# Functions that are named in an event of several.
_MOST_NAMES = 20

# Calls with these outcomes are joined with others, without losing anything of interest.
PLAIN = frozenset({"returned", "raised"})


@dataclass(slots=True)
class Calls:
    """Calls of one worker that follow each other and have one event.

    The numbers by name and outcome are ``None`` while there is one.
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


class Events(TraceFile):
    """The file of one pool's events.

    Attributes:
        short_ns: Calls that end within this time of an event's begin are joined with it; grows
            with the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._zero_ns = time.monotonic_ns()
        self.short_ns: int = _SHORT_NS
        self._next_bytes = _DOUBLES_BYTES
        # Functions' names as they are written.
        self._quoted: dict[str, str] = {}
        # For rows and processes other than the pool's own.
        self._pids: dict[int, int] = {}
        self._counted: dict[str, str] = {}
        began = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.add("[\n")
        self.of_pool("safepool", schema=SCHEMA, began=began)
        self.process(0, f"pool of process {self._pid}")
        self._meta("thread_name", 0, name="pool")
        self.write()

    @property
    def look_every_ns(self) -> int:
        """The time between two readings of the counters."""
        return int(EVERY_S * 1e9) * (self.short_ns // _SHORT_NS)

    def last_lines(self) -> str:
        """Return the end of the file, with the number of dropped events."""
        now, dropped = time.monotonic_ns(), ""
        if self.dropped:  # also if the counter's own event was
            rest = f'"name":"dropped events","args":{{"events":{self.dropped}}}'
            dropped = self._line("C", 0, now, rest)
        last = self._line("i", 0, now, f"{_instant('pool', 'end', 'p')}{{}}")
        return f"{dropped}{last[:-2]}\n]\n"

    def process(self, number: int, name: str) -> None:
        """Begin another process; the pool's own has the number 0."""
        zero = self._zero_ns
        rest = f'"name":"process_name","args":{_compact({"name": name})}'
        self.add(self._line("M", 0, zero, rest, self._pid + number))

    def row(self, number: int, process: int = 0) -> None:
        """Begin another row, of the process of that number."""
        self._pids[number] = self._pid + process
        self._meta("thread_name", number, name=f"worker {number}")
        self._meta("thread_sort_index", number, sort_index=number)

    def of_pool(self, name: str, **args: Any) -> None:
        """Something happened to the pool."""
        rest = f"{_instant('pool', name, 'p')}{_compact(args)}"
        self.add(self._line("i", 0, time.monotonic_ns(), rest))

    def of_worker(self, name: str, number: int, at_ns: int | None = None, **args: Any) -> None:
        """Something happened to the worker of a row, now if no time is given."""
        at_ns = time.monotonic_ns() if at_ns is None else at_ns
        rest = f"{_instant('worker', name, 't')}{_compact(args)}"
        self.add(self._line("i", number, at_ns, rest))

    def start_of_worker(self, number: int, begin_ns: int, end_ns: int, pid: int) -> None:
        """A worker has started."""
        rest = f'"cat":"start","name":"start of a worker","args":{{"pid":{pid}}}'
        self.add(self._span(number, begin_ns, end_ns, rest))

    def count(self, name: str, now_ns: int, args: str) -> None:
        """Write the values of counters; nothing is written again if nothing has changed."""
        # A counter keeps its value until the next event.
        if self._counted.get(name) != args:
            self._counted[name] = args
            self.add(self._line("C", 0, now_ns, f'"name":"{name}","args":{{{args}}}'))

    def calls(self, number: int, calls: Calls) -> None:
        """Calls have ended."""
        name = calls.name if calls.names is None else f"{len(calls.names)} functions"
        quoted = self._quoted.get(name) or self._quote(name)
        rest = f'"cat":"task","name":{quoted},"args":{{{_arguments(calls)}}}'
        self.add(self._span(number, calls.begin_ns, calls.end_ns, rest))
        if self.written_bytes > self._next_bytes:
            self._next_bytes += _DOUBLES_BYTES
            self.short_ns *= 2

    def _quote(self, name: str) -> str:
        if len(self._quoted) > 1000:
            self._quoted.clear()
        quoted = self._quoted[name] = json.dumps(name)
        return quoted

    # Lines.

    def _span(self, number: int, begin_ns: int, end_ns: int, rest: str) -> str:
        return self._line("X", number, begin_ns, f'"dur":{_us(end_ns - begin_ns)},{rest}')

    def _line(self, kind: str, number: int, at_ns: int, rest: str, pid: int | None = None) -> str:
        at = _us(at_ns - self._zero_ns)
        pid = pid or self._pids.get(number, self._pid)
        return f'{{"ph":"{kind}","pid":{pid},"tid":{number},"ts":{at},{rest}}},\n'

    def _meta(self, name: str, number: int, /, **args: Any) -> None:
        rest = f'"name":"{name}","args":{_compact(args)}'
        self.add(self._line("M", number, self._zero_ns, rest))


def _instant(category: str, name: str, scope: str) -> str:
    return f'"s":"{scope}","cat":"{category}","name":"{name}","args":'


def _arguments(calls: Calls) -> str:
    if calls.outcomes is None:
        args = f'"outcome":"{calls.outcome}"'
    else:
        args = f'"outcomes":{_compact(calls.outcomes)}'
    if calls.error is not None:
        args += f',"error":{json.dumps(calls.error)}'
    if calls.attempt != 1:
        args += f',"attempt":{calls.attempt}'
    costs = calls.waited_ns, calls.pickled_ns, calls.loaded_ns, calls.packed_ns
    for name, ns in zip(("waited", "pickled", "loaded", "packed"), costs, strict=True):
        if ns >= 1000:
            args += f',"{name}_us":{ns // 1000}'
    if calls.calls > 1:
        args += f',"calls":{calls.calls},"busy_us":{_us(calls.busy_ns)}'
    if calls.names is not None:
        most = dict(Counter(calls.names).most_common(_MOST_NAMES))
        args += f',"functions":{_compact(most)}'
    return args


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _us(ns: int) -> str:
    """Return nanoseconds as microseconds, with every digit.

    Example:
        >>> _us(1_002_003)
        '1002.003'
    """
    return f"{ns // 1000}.{ns % 1000:03d}"
