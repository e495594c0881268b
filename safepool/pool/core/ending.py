"""Facts about the end of a worker, collected once for all reports and decisions.

    reader                attributes
    the futures' errors   `error_of`
    the log               `line`, `line_of`
    the trace             `how`, `died`, `outcome_of`
    the pool              `was_of_use`, `was_for_nothing`, `unasked`, `breaks`

The module only computes: no process, no clock.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from safepool.errors import TaskTimeoutError, WorkerDiedError, describe_exit
from safepool.shown import printable

if TYPE_CHECKING:
    from safepool.errors import MemoryExceeded, OutOfMemory
    from safepool.pool.core.work import Given

# Levels of the log's, which is not imported here.
_DEBUG, _WARNING = 10, 30


class Lost(NamedTuple):
    """A call that was lost with its worker.

    Attributes:
        work: The work that was lost, whole or in part.
        place: Index of the call in the work.
        begun: Whether the worker may have begun the call; otherwise the pool had sent it and kept
            no copy.
        again: The work that is queued for the call; ``None`` if the call has failed.
    """

    work: Given
    place: int
    begun: bool
    again: Given | None


class Stage(enum.Enum):
    """Stage that a worker reached. The value says when it ended, if it ran no call then."""

    STARTING = "before it was initialized"
    READY = "before it began a task"
    READING = "while it read arguments of"
    USED = "while it ran nothing"


class Ending(NamedTuple):
    """Facts about a worker that has ended.

    Attributes:
        by_pool: The pool has sent the signal that ended it.
        reading: Name of the function whose arguments the worker read.
        dismissed: ``True`` if the pool told the worker to stop, or ended it.
        pool_ends: Whether the pool ends all workers.
        exceeded: Memory of the worker, if the pool ended it for its memory: a death like any
            other.
        fault: Defect for which the pool ended the worker, such as a broken connection.
        stack: The Python stack of the worker at its end.
    """

    pid: int
    exitcode: int | None
    by_pool: bool
    oom: OutOfMemory | None
    stage: Stage
    reading: str
    dismissed: bool
    pool_ends: bool
    condemned: BaseException | None
    exceeded: MemoryExceeded | None
    fault: BaseException | None
    stack: str
    lost: tuple[Lost, ...]

    @property
    def how(self) -> str:
        """Words for the way it ended, as the second half of a sentence."""
        return describe_exit(self.exitcode, self.oom, by_pool=self.by_pool, exceeded=self.exceeded)

    @property
    def died(self) -> bool:
        """Whether it ended without an order, or with calls that it had."""
        return bool(self.lost) or not self.dismissed

    @property
    def was_of_use(self) -> bool:
        """Whether the worker reached a call."""
        return bool(self.lost) or self.stage is Stage.READING

    @property
    def was_for_nothing(self) -> bool:
        """Return whether the worker ended by itself before it did anything."""
        idle = self.stage in (Stage.STARTING, Stage.READY)
        return idle and not (self.lost or self.dismissed or self.condemned)

    @property
    def breaks(self) -> bool:
        """Whether this end breaks a pool of ``on_worker_death="break"``."""
        costs = any(one.again is None for one in self.lost) or not (self.lost or self.dismissed)
        return costs and not (self.pool_ends or self.condemned)

    def error_of(self, lost: Lost) -> BaseException:
        """Return a new error for a call that has failed."""
        said = self.condemned
        if isinstance(said, TaskTimeoutError):
            return TaskTimeoutError(said.pid, said.timeout_s, said.task, self.stack)
        name = lost.work.name
        error = WorkerDiedError(
            self.pid,
            self.exitcode,
            name,
            self.stack,
            self.oom,
            self.by_pool,
            lost.begun,
            self.exceeded,
        )
        if self.fault is not None:
            error.__cause__ = self.fault
        return error

    def outcome_of(self, lost: Lost) -> str:
        """Return the outcome of a call in a word of the trace."""
        if isinstance(self.condemned, TaskTimeoutError):
            return "timed out"
        if self.condemned is not None:
            return "cancelled"
        if lost.again is not None:
            return "retried"
        return "ended" if self.pool_ends else "died"

    @property
    def line(self) -> tuple[int, str]:
        """Return the log line about the worker itself, with its level."""
        if self.lost or self.dismissed or self.condemned is not None:
            return _DEBUG, f"worker {self.pid} {self.how}"
        return _WARNING, f"worker {self.unasked}"

    @property
    def unasked(self) -> str:
        """Words for the process id, the way and the time of the end, after "worker"."""
        return f"{self.pid} {self.how} {self.stage.value} {printable(self.reading)}".rstrip()

    def line_of(self, lost: Lost, error: BaseException | None) -> tuple[int, str]:
        """Return the log line about one call, with its level."""
        if error is None:
            text = (
                f"worker {self.pid} {self.how} while it ran {printable(lost.work.name)}, "
                "which is run again"
            )
            return _WARNING, text
        quiet = self.pool_ends or self.condemned is not None
        return _DEBUG if quiet else _WARNING, f"{error}"
