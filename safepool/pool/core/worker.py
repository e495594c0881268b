"""A worker as the core knows it: its open calls, its last known progress, and its phase.

`Phase` only goes up, and only the core changes it (``machine``):

    STARTING --> READY --> RETIRING --> STOPPING --> ENDED
       any that is not leaving      --> DYING, STOPPING
       STARTING, STOPPING           --> FAILED
       any that owes a call         --> CONDEMNED
       all                          --> ENDED
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from safepool.pool.core.ledger import Ledger

if TYPE_CHECKING:
    from safepool.errors import MemoryExceeded


class Phase(enum.IntEnum):
    """Phase in the life of a worker. From `DYING` on it is given nothing more."""

    STARTING = 1
    """Its initializer has not ended."""
    READY = 2
    """It takes calls."""
    RETIRING = 3
    """The worker gets the order to stop as soon as it owes no answer."""
    DYING = 4
    """Nothing more can be sent to it: it ends by itself, or for what it has sent."""
    STOPPING = 5
    """The pool has told it to stop, or ends it with all others."""
    FAILED = 6
    """Its initializer has failed."""
    CONDEMNED = 7
    """The pool ends it in the middle of a call."""
    ENDED = 8
    """Its process has ended, or the pool goes on without it."""


class Member:
    """One worker.

    Attributes:
        pid: Its process id.
        index: Index of the worker in the pool, from 0: no other worker has the same at the same
            time.
        phase: Stage that the worker has reached. Only the core writes it.
        leaving_since_ns: Time at which the worker came to `Phase.DYING`, or beyond.
        ready: Whether the initializer has ended well.
        has_board: Whether the worker shares a board with the pool, by which work that has not
            begun can be taken back.
        ledger: Work that the worker was sent and has not answered.
        done: Number of calls that the worker has finished.
        tasks_done: Number of tasks that the worker has finished: a chunk of a map is one task, if
            the caller set its size.
        claimed: The last position whose claim by the worker the pool has seen.
        since_ns: Time at which that position was seen first.
        awaited: First position of the calls that were last taken back; 0 once the worker has
            reached it.
        doubted: Position that the worker had claimed, and perhaps not begun, when calls were last
            taken back.
        sent_ns: Time at which the worker was last sent something.
        unsent: Position of the work that is being copied for the worker; otherwise 0. Nothing else
            is sent meanwhile.
        exclusive: Whether nothing may follow the work of the worker.
        overdue: Position of a call that had exceeded its timeout at the last look.
        idle_since_ns: Time since which the worker was seen without work.
        condemned: Reason of the pool to end the worker in the middle of a call.
        failure: Exception of the initializer.
    """

    pid: int
    index = 0
    phase = Phase.STARTING
    leaving_since_ns = 0
    ready = False
    has_board = False
    done = 0
    tasks_done: float = 0.0
    claimed = 0
    since_ns = 0
    awaited = 0
    doubted = 0
    sent_ns = 0
    unsent = 0
    exclusive = False
    overdue = 0
    idle_since_ns: int | None = None
    condemned: BaseException | MemoryExceeded | None = None
    failure: BaseException | None = None

    def __init__(self) -> None:
        self.ledger: Ledger = Ledger()

    @property
    def leaving(self) -> bool:
        """Whether it gets nothing more."""
        return self.phase >= Phase.DYING

    @property
    def dismissed(self) -> bool:
        """Whether the pool wants its end, or a failed initializer leads to it."""
        return self.phase in (Phase.STOPPING, Phase.FAILED)

    @property
    def fails_to_start(self) -> bool:
        """Whether its initializer has failed, or it is ending before that was through."""
        return self.phase is Phase.FAILED or (self.phase is Phase.DYING and not self.ready)

    @property
    def next(self) -> int:
        """The position of the call that it is to answer next; 0 if it owes none."""
        head = self.ledger.head
        return 0 if head is None else int(head.position + head.done)

    @property
    def is_in_a_call(self) -> bool:
        """Whether the next call to be answered is the running one, as far as it was seen."""
        return self.next > 0 and (not self.has_board or self.claimed == self.next)

    @property
    def silent(self) -> bool:
        """Whether the worker has not yet confirmed the calls that were taken back from it."""
        return self.claimed < self.awaited

    @property
    def may_pass_over(self) -> bool:
        """Whether it may pass over its next call, which then comes before what it has not got."""
        return 0 < self.next <= self.doubted

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do, and may be given something."""
        return self.ready and not (
            self.ledger.owed or self.phase >= Phase.DYING or self.claimed < self.awaited
        )

    @property
    def is_bound(self) -> bool:
        """Whether it is in a chunk, or about to be, that is not to be divided."""
        head = self.ledger.head
        return head is not None and head.bound

    @property
    def takes_more(self) -> bool:
        """Whether it may be sent anything behind its present calls."""
        tail = self.ledger.tail
        if tail is None:
            return not self.unsent
        # Calls behind a bound chunk could not be taken back without a part of the chunk.
        return self.has_board and not (self.exclusive or self.unsent or tail.bound)

    @property
    def is_ahead(self) -> bool:
        """Whether the worker holds calls that the pool may take back."""
        return self.ledger.owed > 1 and self.has_board and not self.unsent and not self.is_bound

    @property
    def may_be_unheard(self) -> bool:
        """Whether its next call may be taken back if it has not come to it."""
        return (
            self.ledger.owed > 0
            and self.has_board
            and not (self.exclusive or self.unsent)
            and self.claimed < self.next
        )

    def can_be_at(self, position: int) -> bool:
        """Tell whether it can still be at this position, if what follows was taken back.

        It is not if it has claimed the next: the answer of this one is in the channel, unread.
        """
        return not self.has_board or self.claimed <= position
