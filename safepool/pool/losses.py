"""What a worker that has ended leaves behind: answers, calls for others, and calls that are lost.

Letters name the scheduler's races.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

from safepool.errors import TaskTimeoutError, WorkerDiedError
from safepool.pool.mapping import Span
from safepool.pool.tasks import Task, fail
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.mapping import MapRun
    from safepool.pool.settling import Settling
    from safepool.pool.staff import Staff
    from safepool.pool.worker import Worker

__all__ = ["Losses", "Lost"]

_log = ContainedLogger()

# Of which faulthandler leaves the stack (Modules/faulthandler.c, faulthandler_handlers).
_CRASHES = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGILL}
if sys.platform != "win32":
    _CRASHES.add(signal.SIGBUS)


class Lost(NamedTuple):
    """A call that a worker has taken along.

    Attributes:
        work: What it is, or is a part of.
        place: Its place there.
        for_good: It has failed; else it is run again.
    """

    work: Task | Span
    place: int
    for_good: bool


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
        self, staff: Staff, worker: Worker, exitcode: int | None, *, ending: bool
    ) -> list[Lost]:
        """Settle what one worker has left, and return what it has taken along.

        Args:
            staff: The worker's.
            worker: Which.
            exitcode: As ``multiprocessing.Process.exitcode``.
            ending: The pool ends all of them; nothing is run again.
        """
        ledger = worker.ledger
        back = self._have_back(staff, worker)
        fault = _stack_of(worker, exitcode)
        lost = [(*ledger.strike(), True) for _ in range(ledger.owed)]
        # One that was large was not kept: what it refers to may have changed since.
        lost += [(work, 0, False) for work in back if not _can_wait_again(work)]  # race H
        self._wait_again([work for work in back if _can_wait_again(work)])
        found = []
        for work, place, begun in lost:
            again = None if worker.condemned is not None or ending else _again(work, place)
            if again is None:
                error = _error_of(worker, work, exitcode, fault, begun=begun)
                quiet = ending or worker.condemned is not None
                _log.log(logging.DEBUG if quiet else logging.WARNING, "%s", error)
                self._fail(work, place, error)
            else:
                how = worker.ending(exitcode)
                _log.warning(
                    "worker %d %s while it ran %s, which is run again", worker.pid, how, work.name
                )
                self._wait_again([again])
            found.append(Lost(work, place, for_good=again is None))
        return found

    def _have_back(self, staff: Staff, worker: Worker) -> list[Task | Span]:
        """Take what a worker that has ended had not begun, and the results that it left."""
        ledger, board = worker.ledger, worker.board
        if board is None:
            if ledger.head is None:
                return []
            # It answers each call before it begins the next; this one it may have begun.
            return ledger.take_back(ledger.head.position + ledger.head.done)
        if worker.condemned is not None:  # race I
            return ledger.take_back(board.claimed)  # begun, also if it was still reading
        try:
            self._settling.settle_left(staff, worker, board.left())
        except ValueError as error:
            worker.fault = worker.fault or error
        back = ledger.take_back(board.began)
        if back and back[0].position == board.claimed and isinstance(back[0], Span):
            # It died of what it read for several calls: which one's is found out by sending
            # each alone.
            worker.choked_on = back[0]
            return [*(back[0].only(place) for place in range(back[0].count)), *back[1:]]
        return back

    def _fail(self, work: Task | Span, place: int, error: BaseException) -> None:
        if isinstance(work, Task):
            fail(work.future, error)
            return
        work.run.put_error(work.start + place, error)
        self._settled(work.run, 1)
        work.run.tell()


def _error_of(
    worker: Worker, work: Task | Span, exitcode: int | None, fault: str, *, begun: bool
) -> BaseException:
    said = worker.condemned
    if isinstance(said, TaskTimeoutError):
        return TaskTimeoutError(said.pid, said.timeout_s, said.task, fault)
    ours = worker.was_ours(exitcode)
    error = WorkerDiedError(worker.pid, exitcode, work.name, fault, worker.oom, ours, begun)
    error.__cause__ = worker.fault
    return error


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
