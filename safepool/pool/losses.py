"""What a worker that has ended leaves behind: answers, calls for others, and calls that are lost.

Letters name the scheduler's races.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

from safepool.pool.core.ending import Ending, Lost, Stage
from safepool.pool.mapping import Span
from safepool.pool.tasks import Task, fail
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.errors import OutOfMemory
    from safepool.pool.mapping import MapRun
    from safepool.pool.settling import Settling
    from safepool.pool.staff import Staff
    from safepool.pool.worker import Worker

__all__ = ["Losses"]

_log = ContainedLogger()

# Of which faulthandler leaves the stack (Modules/faulthandler.c, faulthandler_handlers).
_CRASHES = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL}
if sys.platform != "win32":
    _CRASHES.add(signal.SIGBUS)


class Losses:
    """Settles what workers leave that have ended.

    Args:
        settling: Ends the calls whose answers they have left.
        settled: Told of calls of a run that failed here, and how many.
        wait_again: Queues what is to be run by others.
    """

    def __init__(
        self,
        settling: Settling,
        settled: Callable[[MapRun, int], None],
        wait_again: Callable[[Sequence[Task | Span]], None],
    ) -> None:
        self._settling = settling
        self._settled = settled
        self._wait_again = wait_again

    def of(
        self,
        staff: Staff,
        worker: Worker,
        exitcode: int | None,
        oom: OutOfMemory | None,
        *,
        pool_ends: bool,
    ) -> Ending:
        """Settle what one worker has left, and return how it has ended.

        Args:
            staff: The worker's.
            worker: Which.
            exitcode: As ``multiprocessing.Process.exitcode``.
            oom: What the kernel has counted, if its out-of-memory killer ended it.
            pool_ends: The pool ends all of them; nothing is run again.
        """
        ledger = worker.ledger
        back, choked_on = self._have_back(staff, worker)
        stack = _stack_of(worker, exitcode)
        lost = [(*ledger.strike(), True) for _ in range(ledger.owed)]
        # One that was large was not kept: what it refers to may have changed since.
        lost += [(work, 0, False) for work in back if not _can_wait_again(work)]  # race H
        self._wait_again([work for work in back if _can_wait_again(work)])
        is_last = worker.condemned is not None or pool_ends
        ending = Ending(
            pid=worker.pid,
            exitcode=exitcode,
            by_pool=worker.was_ours(exitcode),
            oom=oom,
            stage=_stage_of(worker, choked_on),
            reading="" if choked_on is None else choked_on.name,
            dismissed=worker.dismissed,
            pool_ends=pool_ends,
            condemned=worker.condemned,
            fault=worker.fault,
            stack=stack,
            lost=tuple(
                Lost(work, place, begun, None if is_last else _again(work, place))
                for work, place, begun in lost
            ),
        )
        for one in ending.lost:
            error = None if one.again is not None else ending.error_of(one)
            level, text = ending.line_of(one, error)
            _log.log(level, "%s", text)
            if error is not None:
                self._fail(one.work, one.place, error)
            elif one.again is not None:
                self._wait_again([one.again])
        return ending

    def _have_back(self, staff: Staff, worker: Worker) -> tuple[list[Task | Span], Span | None]:
        """Take what a worker that has ended had not begun, and the results that it left.

        Returns:
            The former, and the calls whose arguments it read, all at once, when it ended.
        """
        ledger, board = worker.ledger, worker.board
        if board is None:
            if ledger.head is None:
                return [], None
            # It answers each call before it begins the next; this one it may have begun.
            return ledger.take_back(ledger.head.position + ledger.head.done), None
        if worker.condemned is not None:  # race I
            return ledger.take_back(board.claimed), None  # begun, also if it was still reading
        try:
            self._settling.settle_left(staff, worker, board.left())
        except ValueError as error:
            worker.fault = worker.fault or error
        back = ledger.take_back(board.began)
        if back and back[0].position == board.claimed and isinstance(back[0], Span):
            # It died of what it read for several calls: which one's is found out by sending
            # each alone.
            alone = [back[0].only(place) for place in range(back[0].count)]
            return [*alone, *back[1:]], back[0]
        return back, None

    def _fail(self, work: Task | Span, place: int, error: BaseException) -> None:
        if isinstance(work, Task):
            fail(work.future, error)
            return
        work.run.put_error(work.start + place, error)
        self._settled(work.run, 1)
        work.run.tell()


def _stage_of(worker: Worker, choked_on: Span | None) -> Stage:
    if choked_on is not None:
        return Stage.READING
    if worker.done:
        return Stage.USED
    return Stage.READY if worker.ready else Stage.STARTING


def _stack_of(worker: Worker, exitcode: int | None) -> str:
    """Return the stack that a worker was asked for, or that it has left if it crashed."""
    asked, crashed = worker.stack_begin is not None, exitcode is None or -exitcode in _CRASHES
    # Not in any case: what a task has forked leaves its stack on the same board if it crashes.
    return worker.board.fault(worker.stack_begin) if worker.board and (asked or crashed) else ""


def _can_wait_again(work: Task | Span) -> bool:
    return isinstance(work, Span) or work.pickled is not None


def _again(work: Task | Span, place: int) -> Task | Span | None:
    """Return a lost call as it is to be queued again, if it may be."""
    retries = work.policy.retries or 0
    if isinstance(work, Task):
        if work.attempts >= retries or work.pickled is None:
            return None
        work.attempts += 1
        return work
    again = work.only(place)
    if again.attempts >= retries:
        return None
    again.attempts += 1
    return again
