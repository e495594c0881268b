"""Events of a pool, which the core processes, and actions, which it returns.

The tables say what each means; a class has a docstring if its fields need one.

event           delivered when                                     by
Hired           a worker was started                               `Hire`
Refused         a worker could not be started                      `Hire`
Ready           a worker's initializer has ended well              the worker
InitFailed      a worker's initializer has failed                  the worker
Queued          calls were submitted                              a caller
Fed             further calls of a map were queued                 a caller
Answered        answers have arrived                               the worker
Revoked         calls that had not begun were taken back           `Revoke`
Seen            boards were read                                   `Look`
Skipped         a worker claimed a call while it was taken back    the worker
Unreadable      a worker could not read the batch at a position    the worker
Sent            a worker was sent work, or a part of it            `Send`
Turned          callers have sent calls, and read answers          the turns
Copied          work that was being copied was sent                the packer
NotSent         work that was being copied cannot be sent          the packer
Returned        work that the hands have pickled may be sent       the hands
Cancelled       a call or run that a worker has was cancelled      a caller
Outgrown        a worker holds too much memory: replace it         a memory check
Exceeded        a worker holds too much memory: end it             a memory check
Strangers       workers have rights that the program gave up       a check of the rights
Parted          a worker can no longer be sent anything            the staff
Died            a worker's process has ended                       the staff
Step            the pool checks all of its workers                 the scheduler
HandOut         the pool gives its workers the waiting work        the scheduler
Fill            all workers are to be started, before calls come   a caller
Close           no calls come any more; how the pool is to end     a caller
Break           the whole pool breaks                              a caller, `GiveUp`
End             all workers are to end                             the scheduler

action          effect                                             answered by
Send            pickle work, and send it to a worker               `Sent`
Hire            start workers                                      `Hired` for each, `Refused`
Look            read boards                                        `Seen`
Revoke          take back calls that a worker has not begun        `Revoked`
Settle          end calls by their answers
Wait            calls wait again that were marked as running
Cancel          calls, and maps, end as cancelled
Fail            calls, and maps, end as the pool breaks
Bury            report how a worker ended, fail its lost calls
Stop            tell a worker to end after the calls that it was sent
Condemn         end a worker in the middle of a call
EndNow          end a worker at once, even in the middle of a call
Distrust        end a worker that has violated the protocol
PutOff          report that a start was refused, and is tried again later
GiveUp          break the pool                                     `Break`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safepool.errors import MemoryExceeded, OutOfMemory
    from safepool.pool.core.ending import Ending
    from safepool.pool.core.work import Call, Given, Run, Span
    from safepool.pool.core.worker import Member

# A member, with what its owner has added: its type is the owner's.
Who = Any
# Ways to end the workers of a pool without waiting for their calls.
Force = Literal["", "ask", "terminate", "kill"]


class Hired(NamedTuple):
    worker: Member
    has_board: bool


class Refused(NamedTuple):
    """A worker could not be started; ``by_script``: because the program's script has failed."""

    why: BaseException
    by_script: bool = False


class Ready(NamedTuple):
    worker: Member
    has_board: bool


class InitFailed(NamedTuple):
    worker: Member
    error: BaseException | None = None


class Queued(NamedTuple):
    calls: Sequence[Call]


class Fed(NamedTuple):
    """Further calls of a map were queued; ``last``: there will be no more."""

    run: Run
    items: list[Any]
    last: bool


class Answered(NamedTuple):
    """Answers have arrived, or were read from the board.

    Attributes:
        answers: For each: the first position, how many calls, and the microseconds that they took
            together, if that is known.
        payload: Contents of the answers, for `Settle`.
        plain: They are values of calls of maps.
        peeked: They were read from the board: an earlier message may not have been read.
    """

    worker: Member
    answers: Sequence[tuple[int, int, int | None]]
    payload: Any
    plain: bool = False
    peeked: bool = False


class Then(NamedTuple):
    """Reason for taking calls back, and the decision that follows.

    Attributes:
        overdue: Position of a call that has exceeded its timeout; otherwise 0.
        cancelled: A cancelled call, or a run without any wanted call.
        exceeded: Memory of the worker, if it exceeds the limit.
    """

    overdue: int = 0
    cancelled: Call | Run | None = None
    exceeded: MemoryExceeded | None = None


class Revoked(NamedTuple):
    """A worker has received the list of calls that are taken back.

    Attributes:
        claimed: The last position that the worker had claimed at that time.
        began: The last position that the worker had begun at that time.
        results: Results that the worker had left on its board.
    """

    worker: Member
    claimed: int
    began: int
    results: Sequence[Answered]
    then: Then


class Seen(NamedTuple):
    """Boards were read: worker, last claimed position, and time of each."""

    boards: Sequence[tuple[Member, int, int]]


class Skipped(NamedTuple):
    worker: Member
    position: int


class Unreadable(NamedTuple):
    worker: Member
    position: int


class Sent(NamedTuple):
    """A worker was sent work.

    Attributes:
        worker: The worker.
        given: Work that the worker has now, or that is being copied for it.
        back: Work that the worker must not have yet.
        exclusive: Whether nothing may follow until the work is answered.
        unsent: Position of the work that is being copied; otherwise 0.
        full: ``True`` if no worker gets more work before the next :class:`HandOut`.
    """

    worker: Member
    given: Sequence[Given]
    back: Sequence[Given]
    exclusive: bool = False
    unsent: int = 0
    full: bool = False


class Turned(NamedTuple):
    """Callers have sent calls to an idle worker, one after the other, and have read the answers.

    Attributes:
        answered: Number of calls that were answered.
        spent: Name of the last function, and nanoseconds of each call that was sent with it.
        call: The work that was sent last and is not answered: from now on the pool treats it as
            usual.
    """

    worker: Member
    answered: int
    spent: tuple[str, int] | None
    call: Given | None


class Copied(NamedTuple):
    """Work that was being copied for a worker is on its way, unless it was taken back."""

    worker: Member


class NotSent(NamedTuple):
    """Work that was being copied for a worker could not be sent; ``again`` waits in its place."""

    worker: Member
    position: int
    again: Sequence[Given]


class Returned(NamedTuple):
    works: Sequence[Given]


class Cancelled(NamedTuple):
    worker: Member
    call: Call | Run


class Outgrown(NamedTuple):
    worker: Member


class Exceeded(NamedTuple):
    worker: Member
    what: MemoryExceeded


class Strangers(NamedTuple):
    """All workers have rights that the program has given up."""


class Parted(NamedTuple):
    worker: Member


class Died(NamedTuple):
    """A worker's process has ended, after everything that it had sent was delivered.

    Attributes:
        by_pool: The pool has sent the signal that ended it.
        lost: Number of workers that could not be ended, and are still there.
        claimed: The last position that the worker had claimed, by its board.
        began: The last position that the worker had begun.
        results: Results on the worker's board.
    """

    worker: Member
    exitcode: int | None
    by_pool: bool = False
    lost: int = 0
    claimed: int = 0
    began: int = 0
    results: Sequence[Answered] = ()
    oom: OutOfMemory | None = None
    fault: BaseException | None = None
    stack: str = ""


class Step(NamedTuple):
    """The pool checks its workers.

    Attributes:
        size: The most workers that it may have now.
        lost: The same as in :class:`Died`.
    """

    size: int
    lost: int = 0


class HandOut(NamedTuple):
    """The pool hands out waiting work.

    Attributes:
        told: Workers can be told the program's settings, which come first.
        kept: Number of idle workers that are kept for calls that are being pickled. If no more
            are idle, none is given anything.
        before: Place of the first of these calls. Workers are kept only from what came later.
    """

    told: bool = True
    kept: int = 0
    before: int = 0


class Fill(NamedTuple):
    """All workers that the pool may have are to be started."""


class Close(NamedTuple):
    """The pool takes no more calls. Twice is once.

    Attributes:
        cancel: Waiting calls are cancelled.
        forces: Ways to end its workers without waiting for their calls.
    """

    cancel: bool = False
    forces: Sequence[Force] = ()


class Break(NamedTuple):
    """The whole pool breaks; ``why`` is the reason for the listener."""

    why: str = ""


class End(NamedTuple):
    """Order to end workers: after their calls, or by force.

    Attributes:
        force: The way to end it.
        worker: The worker to end; ``None`` is all.
    """

    force: Force
    worker: Member | None = None


class Send(NamedTuple):
    worker: Who
    work: Span | list[Any]


class Hire(NamedTuple):
    """Start ``workers`` workers; let at most ``hurry`` of those that end slowly end at once."""

    workers: int
    hurry: int


class Look(NamedTuple):
    workers: Sequence[Who]


class Revoke(NamedTuple):
    """Take back the calls that a worker has not begun, up to the last one that it was sent."""

    worker: Who
    last: int
    then: Then


class Settle(NamedTuple):
    """End calls by their answers.

    Attributes:
        settled: For each part: the work, the place there of the first call, how many calls, and
            the place of the first answer in the payload.
    """

    worker: Who
    settled: Sequence[tuple[Given, int, int, int]]
    payload: Any
    plain: bool


class Wait(NamedTuple):
    works: Sequence[Given]


class Cancel(NamedTuple):
    works: Sequence[Given]


class Fail(NamedTuple):
    works: Sequence[Given]


class Bury(NamedTuple):
    """Report how a worker ended, and fail its lost calls that do not run again."""

    worker: Who
    ending: Ending


class Stop(NamedTuple):
    worker: Who


class Condemn(NamedTuple):
    """End a worker with all that its call has started; ``stack``: first read its Python stack."""

    worker: Who
    stack: bool


class EndNow(NamedTuple):
    worker: Who
    force: Force


class Distrust(NamedTuple):
    worker: Who
    error: ValueError


class PutOff(NamedTuple):
    why: BaseException


class GiveUp(NamedTuple):
    """Break the pool.

    Attributes:
        ask: Whether to look for a likely cause: a system call that is refused to every worker, or
            the script.
    """

    reason: str
    cause: BaseException | None = None
    ask: bool = False


Event = (
    Hired
    | Refused
    | Ready
    | InitFailed
    | Queued
    | Fed
    | Answered
    | Revoked
    | Seen
    | Skipped
    | Unreadable
    | Sent
    | Turned
    | Copied
    | NotSent
    | Returned
    | Cancelled
    | Outgrown
    | Exceeded
    | Strangers
    | Parted
    | Died
    | Step
    | HandOut
    | Fill
    | Close
    | Break
    | End
)
Action = (
    Send
    | Hire
    | Look
    | Revoke
    | Settle
    | Wait
    | Cancel
    | Fail
    | Bury
    | Stop
    | Condemn
    | EndNow
    | Distrust
    | PutOff
    | GiveUp
)
