"""Copies of large payloads into memory files.

Copying 100 MB takes tens of milliseconds, in which the scheduler's thread would not serve the
other workers. Hence other threads (``hands``) copy, and the scheduler sends the message when the
copy is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.calls.mapping import Span
    from safepool.pool.calls.tasks import Task
    from safepool.pool.shell.worker import Worker
    from safepool.transport.frames import Segment


@dataclass(slots=True, eq=False)
class Packing:
    """One large payload of a worker.

    Attributes:
        position: Position of the work in the ledger.
        function: Number of the function that is called, 0 if it is in the payload.
        segments: The payload; after the copy, the segments to send.
        error: Reason why the payload could not be copied.
    """

    worker: Worker
    work: Task | Span
    position: int
    function: int
    segments: Sequence[Segment] = field(repr=False)
    error: BaseException | None = None

    def store(self, given_up: Callable[[], bool] = bool) -> None:
        """Copy it into files, or learn why that cannot be."""
        try:
            self.segments = self.worker.channel.store(self.segments, given_up)
        except BaseException as error:  # noqa: BLE001 -- told to the task
            # The frames in its traceback would keep their objects alive as long as the error.
            self.error, self.segments = error.with_traceback(None), ()

    @property
    def wanted(self) -> bool:
        """Whether the worker still owes it."""
        owed = any(work is self.work for work in self.worker.ledger)
        return owed and self.work.position == self.position and not self.worker.leaving
