"""A worker as its pool sees it: the process, its open calls and its state."""

from __future__ import annotations

import selectors
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

from safepool.errors import users_stack
from safepool.pool.core.worker import Member
from safepool.workers.board import NO_BOARD
from safepool.workers.start import WorkerProcess

if TYPE_CHECKING:
    from safepool.pool.calls.tasks import Task
    from safepool.pool.core.gauge import Gauge
    from safepool.pool.core.work import Span
    from safepool.procfs import MemoryFile
    from safepool.workers.settings import Packed
    from safepool.workers.tree import TreeEnd

    class Lane(Protocol):
        """Calls that the scheduler does not know yet: of :mod:`safepool.pool.shell.turns`."""

        @property
        def done(self) -> int:
            """Number of calls that were ended here."""
            ...

        @property
        def work(self) -> Task | Span | None:
            """Work that is under way, if any."""
            ...


# Signals whose stack faulthandler writes (Modules/faulthandler.c, faulthandler_handlers).
_CRASHES = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL}
if sys.platform != "win32":
    _CRASHES.add(signal.SIGBUS)


class Worker(Member, WorkerProcess):
    """A worker process, with the pool's records about it.

    Attributes:
        functions: Numbers of the functions that the worker keeps.
        names: Versions of the script's names that the worker has.
        delivered: Numbers of the needs that the worker has.
        shared: Numbers of the shared objects that the worker keeps.
        logged: Whether the worker's last message was a log record.
        memory_look_ns: Time of the next check of its resident memory.
        memory: File with the worker's memory, and ``gauge``: its next check; ``None`` without
            ``memory_limit``.
        killed: Whether the worker was sent ``SIGKILL``, or its life-line was cut.
        unkillable: Whether the worker could not be ended: the pool goes on without it.
        tree: Ending of the worker together with all processes that it has started.
        signals: Signals that the pool has sent to the worker.
        fault: Reason why the pool ended it, if its messages were invalid or its channel failed.
        deadline: Time of ``SIGKILL``, by the monotonic clock, or, once that was sent, of giving
            up.
        events: Events for which the selector watches the channel.
        stack_begin: Offset on the board of the stack that a condemned worker writes.
        guard: Lock held while another thread uses the descriptors, and while they are closed.
        lane: Lane by which callers may send calls while the scheduler's thread sleeps.
    """

    told: object = None
    logged: bool = False
    memory_look_ns: int = 0
    memory: MemoryFile | None = None
    gauge: Gauge | None = None
    terminated: bool = False
    killed: bool = False
    unkillable: bool = False
    tree: TreeEnd | None = None
    fault: BaseException | None = None
    deadline: float | None = None
    events: int = selectors.EVENT_READ
    stack_begin: int | None = None
    closed: bool = False
    lane: Lane | None = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Start it, as :class:`WorkerProcess` does."""
        Member.__init__(self)
        # Before the process: its descriptors are closed if it cannot start.
        self.guard: threading.RLock = threading.RLock()
        WorkerProcess.__init__(self, *arguments, **keywords)
        self.signals: set[int] = set()
        self.functions: set[int] = set()
        self.shared: set[int] = set()
        self.settings: dict[str, Packed] = {}
        self.names: dict[str, int] = {}
        self.delivered: set[int] = set()

    @property
    def is_plain(self) -> bool:
        """Whether another thread than the scheduler's could send it something."""
        return self.sentinel is not None and self.deadline is None and self.channel.is_clear

    def end(self, number: int) -> None:
        """Send it a signal, as the base does, and remember that."""
        self.signals.add(number)
        super().end(number)

    def was_ours(self, exitcode: int | None) -> bool:
        """Tell whether it was ended by a signal that the pool has sent it."""
        return self.unkillable if exitcode is None else -exitcode in self.signals

    def stack(self, exitcode: int | None) -> str:
        """Return the stack that it was asked for, or that it has left if it crashed."""
        asked, crashed = self.stack_begin is not None, exitcode is None or -exitcode in _CRASHES
        # Not in every case: a process that a task has forked leaves its stack on the same board if
        # it crashes.
        if not (asked or crashed):
            return ""
        return users_stack(self.board.fault(self.stack_begin))

    def close(self) -> None:
        """Give back every descriptor, which no other thread uses meanwhile."""
        with self.guard:
            self.closed = True
            if self.memory is not None:
                self.memory.close()
                self.memory = None
            super().close()

    def descriptors(self) -> list[int]:
        """Return the descriptors of this worker, as the base class does."""
        memory = self.memory  # another thread may drop it
        return super().descriptors() + ([] if memory is None else [memory.fileno()])

    def drop_board(self) -> None:
        """Do without the board: the worker's system cannot use it."""
        with self.guard:
            self.board.close()
            self.board = NO_BOARD
