"""The trace of a cluster pool: one file that shows which worker of which node ran each call.

Times travel with the answers of calls, so a trace adds no message for engine or network.

    in the file                               comes from
    a process for each node, with its name    the first answers of its agent
    a row for each worker of it               its place in the node's pool (``worker_index``)
    calls that have ended                     the worker: when it began and ended them
                                              the program: the outcome, when they were submitted
    node opened, node lost                    the shell

The clock of each node is set against the program's by the fastest answer: events of a node are
late by the duration of that answer, some milliseconds at the most.

Not covered:
    * The begin of a call whose worker died: the trace shows it from the end of the call before.
    * The worker of a call that was cancelled, or lost with its node: such calls have no row. The
      event of the node has their number.
    * Starts of workers, and how often the kernel freezes a node's group: ``safepool --cluster``.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safepool.cluster.messages import Ran, Source
from safepool.errors import TaskTimeoutError
from safepool.pool.tracing.costs import queued_ns
from safepool.pool.tracing.counted import CountedTrace
from safepool.pool.tracing.rows import Row, Settled

if TYPE_CHECKING:
    import os

    from safepool.cluster.core import Answer
    from safepool.pool.core.work import Call


@dataclass(slots=True)
class _Seat:
    """A worker's place in the pool of its node."""

    row: Row
    pid: int = 0


@dataclass(slots=True)
class _Node:
    """The process that holds the pool of a node.

    Attributes:
        ahead_ns: Time by which the program's clock is ahead of the node's.
        seats: Workers of the node, by index.
    """

    number: int
    ahead_ns: int
    seats: dict[int, _Seat] = field(default_factory=dict)


class ClusterTrace(CountedTrace):
    """The trace of one cluster pool."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        # By host and process id of the agent: an executor may run the next call anywhere.
        self._nodes: dict[tuple[str, int], _Node] = {}
        self._at: dict[str, _Node] = {}
        self._rows = 0

    def opened(self, node: str, workers: int) -> None:
        """A node is used from now on."""
        self._events.of_pool("node opened", node=node, workers=workers)

    def lost(self, node: str, why: str, calls: int) -> None:
        """A node is lost, and ``calls`` calls failed with it."""
        self._events.of_pool("node lost", node=node, why=why, calls=calls)

    def reported(self, place: str, name: str, source: Source) -> None:
        """Answers have arrived; :meth:`ended` follows for each.

        Args:
            place: The engine's name for the agent's place.
            name: Name of the node.
            source: The agent that has sent them.
        """
        ahead_ns = time.monotonic_ns() - source.now_ns
        key = source.host, source.pid
        node = self._nodes.get(key)
        if node is None:
            number = len(self._nodes) + 1
            node = self._nodes[key] = _Node(number, ahead_ns)
            self._events.process(number, f"node {name}, process {source.pid}")
        node.ahead_ns = min(node.ahead_ns, ahead_ns)
        self._at[place] = node

    def ended(
        self, place: str, call: Call, answer: Answer, outcome: str, error: object = None
    ) -> None:
        """A call has ended, or will run again.

        Args:
            place: The engine's name for the agent's place.
            call: The call.
            answer: Answer of the call.
            outcome: Word of ``safepool.pool.tracing.events``; for "raised" the error decides
                further.
            error: The exception that the call has raised.
        """
        node = self._at.get(place)
        if node is None or answer.ran is None:
            return
        ran = Ran(*answer.ran)
        begin_ns, end_ns = ran.begin_ns + node.ahead_ns, ran.end_ns + node.ahead_ns
        ends = ran.worker is None
        if isinstance(error, TaskTimeoutError):
            outcome, begin_ns = "timed out", end_ns - int(error.timeout_s * 1e9)
        elif ends:
            begin_ns = queued_ns(call, 0) or end_ns
            outcome = "died" if outcome == "raised" else outcome
        # The core has counted one that died.
        attempt = call.attempts + (not answer.died)
        with self._lock:
            seat = self._seat(node, ran, begin_ns)
            told = type(error).__name__ if outcome == "raised" else None
            settled = Settled(0, 1, call, 0, outcome, told)
            seat.row.add(settled, begin_ns, end_ns, attempt, ran.loaded_ns, ran.packed_ns)
            if ends:
                seat.pid = 0
                number = seat.row.number
                self._events.of_worker("death", number, end_ns, pid=ran.pid, how=outcome)

    def _seat(self, node: _Node, ran: Ran, begin_ns: int) -> _Seat:
        index = ran.worker
        if index is None:
            # A worker that has ended nothing has the first place where none is known to be.
            taken = {n for n, one in node.seats.items() if one.pid}
            free = next(n for n in range(len(taken) + 1) if n not in taken)
            index = next((n for n, one in node.seats.items() if one.pid == ran.pid), free)
        seat = node.seats.get(index)
        if seat is None:
            self._rows += 1
            self._events.row(self._rows, node.number)
            seat = node.seats[index] = _Seat(Row(self._rows, self._events, begin_ns))
        if seat.pid != ran.pid:
            seat.row.end(begin_ns, begin_ns, ())
            seat.pid = ran.pid
            self._events.of_worker("start", seat.row.number, begin_ns, pid=ran.pid)
        return seat

    def _write_rows(self, now_ns: int, *, last: bool) -> None:
        with self._lock:
            for node in self._nodes.values():
                for seat in node.seats.values():
                    if last:
                        seat.row.end(now_ns, now_ns, ())
                    else:
                        seat.row.write_old(now_ns)
