"""A worker as its pool sees it: the process, what it owes, and what it is up to."""

from __future__ import annotations

import selectors
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from safepool.pool.core.ledger import Ledger
from safepool.workers.process import WorkerProcess

if TYPE_CHECKING:
    from safepool.pool.mapping import Span
    from safepool.pool.tasks import Task
    from safepool.workers.board import Board
    from safepool.workers.settings import Packed
    from safepool.workers.tree import TreeEnd

    class Unsent(Protocol):
        """What is being copied for a worker: a :class:`~safepool.pool.packing.Packing`."""

        position: int


__all__ = ["Worker"]


class Worker(WorkerProcess):
    """A worker process with what its pool knows about it.

    Attributes:
        ready: Its initializer has ended well.
        ledger: What it was sent and has not answered.
        done: How many calls it has finished.
        tasks_done: The same in tasks: a chunk of a map is one, if the caller said its size.
        functions: Numbers of the functions that it keeps.
        names: The versions of the script's names that it has.
        delivered: Numbers of the needs that it was found to have.
        settings: Those of the program that it was sent last, by name.
        told: What it was told of the settings, all in all.
        shared: Numbers of the shared objects that it keeps.
        exclusive: What it holds must not be followed by anything.
        packing: What is being copied for it; nothing else is sent meanwhile.
        awaited: The first position of what was taken back from it last.
        sent_ns: When it was last sent something, by the monotonic clock.
        condemned: Why the pool ends it in the middle of a task.
        retiring: It gets no more tasks, and is told to stop when it has finished.
        logged: It has sent a log record, and nothing else since.
        idle_since: Since when it was seen to have nothing to do, by the monotonic clock; only
            of a pool that lets such workers go.
        overdue: The position whose time was over at the last look.
        memory_look_ns: When its memory is next to be looked at.
        leaving: It gets no more tasks.
        dismissed: It was told to stop or was ended by the pool.
        terminated: It was sent ``SIGTERM``.
        killed: It was sent ``SIGKILL``, or its life-line was cut.
        unkillable: That has not ended it: the pool goes on without it.
        tree: Its end together with all that it has started.
        signals: What the pool has sent it.
        fault: Why the pool ended it, if what it sent could not be read or no more could come.
        failure: What its initializer raised.
        deadline: When, by the monotonic clock, it is ended by ``SIGKILL``, or given up if that was
            sent.
        events: What the selector watches its channel for.
        stack_begin: Where on its board the stack begins that it was asked for when it was
            condemned.
        guard: Held while another thread uses its descriptors, and while they are closed.
        closed: They are.
    """

    ready: bool = False
    told: object = None
    done: int = 0
    tasks_done: float = 0.0
    exclusive: bool = False
    packing: Unsent | None = None
    awaited: int = 0
    sent_ns: int = 0
    condemned: BaseException | None = None
    retiring: bool = False
    logged: bool = False
    idle_since: float | None = None
    overdue: int = 0
    memory_look_ns: int = 0
    leaving: bool = False
    dismissed: bool = False
    terminated: bool = False
    killed: bool = False
    unkillable: bool = False
    tree: TreeEnd | None = None
    fault: BaseException | None = None
    failure: BaseException | None = None
    deadline: float | None = None
    events: int = selectors.EVENT_READ
    stack_begin: int | None = None
    closed: bool = False
    board: Board | None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Start it, as :class:`WorkerProcess` does."""
        # Before the process: its descriptors are closed if it cannot start.
        self.guard: threading.RLock = threading.RLock()
        super().__init__(*arguments, **keywords)
        self.signals: set[int] = set()
        self.ledger: Ledger[Task | Span] = Ledger()
        self.functions: set[int] = set()
        self.shared: set[int] = set()
        self.settings: dict[str, Packed] = {}
        self.names: dict[str, int] = {}
        self.delivered: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do, and may be given something."""
        return self.ready and not (self.leaving or self.ledger.owed or self.silent)

    @property
    def takes_more(self) -> bool:
        """Whether anything may be sent to it behind what it has."""
        tail = self.ledger.tail
        # What is behind a bound chunk could not be taken back without a part of that.
        return not (self.exclusive or self.packing is not None or (tail and tail.bound))

    @property
    def is_bound(self) -> bool:
        """Whether it is in a chunk, or about to be, that is not to be divided."""
        head = self.ledger.head
        return head is not None and head.bound

    @property
    def fails_to_start(self) -> bool:
        """Whether its initializer has failed, or it is ending before that was through."""
        dies = self.leaving and not (self.ready or self.dismissed)
        return self.failure is not None or dies

    @property
    def unheard(self) -> bool:
        """Whether it has not come to what it is to do next: stopped, or still reading it."""
        work = self.ledger.head
        return (
            self.board is not None
            and work is not None
            and self.board.claimed < work.position + work.done
        )

    @property
    def silent(self) -> bool:
        """Whether it has not come to what was taken back from it: stopped, or in a long task."""
        return self.board is not None and self.board.claimed < self.awaited

    def end(self, number: int) -> None:
        """Send it a signal, as the base does, and remember that."""
        self.signals.add(number)
        super().end(number)

    def was_ours(self, exitcode: int | None) -> bool:
        """Tell whether it was ended by a signal that the pool has sent it."""
        return self.unkillable if exitcode is None else -exitcode in self.signals

    def can_be_at(self, position: int) -> bool:
        """Tell whether it can still be at this position, if what follows was taken back.

        It is not if it has claimed the next: the answer of this one is in the channel, unread.
        """
        return self.board is None or self.board.claimed <= position

    def due_in_s(self) -> float | None:
        """Return when what it runs has had its time; ``None`` if that is not limited."""
        work = self.ledger.head
        if work is None or work.policy.timeout_s is None or self.condemned is not None:
            return None
        since_ns, board = self.sent_ns, self.board
        if board is not None:
            if board.claimed < work.position + work.done:
                return work.policy.timeout_s  # not begun
            since_ns = board.since_ns
        elapsed_s = (time.monotonic_ns() - since_ns) / 1e9
        return max(0.0, work.policy.timeout_s - elapsed_s)

    def close(self) -> None:
        """Give back every descriptor, which no other thread uses meanwhile."""
        with self.guard:
            self.closed = True
            super().close()

    def drop_board(self) -> None:
        """Do without the board: the worker's system cannot use it."""
        with self.guard:
            if self.board is not None:
                self.board.close()
                self.board = None
