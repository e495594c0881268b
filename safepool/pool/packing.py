"""Large payloads on their way into files: copied in a thread of its own.

To copy 100 MB takes tens of milliseconds, in which the scheduler's thread would do nothing for the
other workers. It goes on instead, and sends the message when the copy is there.

    scheduler's thread                          packer's thread
    put()    payload, for a worker  -------->   copy into files
    done()   <--------------------------------  and wake the scheduler
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.mapping import Span
    from safepool.pool.tasks import Task
    from safepool.pool.worker import Worker
    from safepool.transport.frames import Segment

__all__ = ["Packer", "Packing"]


@dataclass(slots=True, eq=False)
class Packing:
    """One payload.

    Attributes:
        worker: Who is to get it.
        work: What it is, written in that worker's ledger.
        position: There.
        function: Number of the function that is called, 0 if it is in the payload.
        segments: The payload; when it is done, as it is to be sent.
        error: Why it could not be copied.
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
            # What the frames of its way here refer to would be kept as long as the error.
            self.error, self.segments = error.with_traceback(None), ()

    @property
    def wanted(self) -> bool:
        """Whether the worker still owes it."""
        owed = any(work is self.work for work in self.worker.ledger)
        return owed and self.work.position == self.position and not self.worker.leaving


class Packer:
    """Copies payloads, one after the other. The thread is started with the first.

    Args:
        wake: Called when one is done. From the packer's thread; must not block.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: queue.SimpleQueue[Packing | None] = queue.SimpleQueue()
        self._done: deque[Packing] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, packing: Packing) -> None:
        """Copy this one soon; at once where no thread can be started."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="safepool-packer", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter shuts down, or there are too many
                self._pack(packing)
                return
            self._thread = thread
        self._waiting.put(packing)

    def done(self) -> list[Packing]:
        """Return what is done, or could not be."""
        found = []
        while self._done:
            found.append(self._done.popleft())
        return found

    def close(self) -> None:
        """Give up what is not done, and end the thread."""
        self._closed = True
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        self._done.clear()

    def _run(self) -> None:
        while (packing := self._waiting.get()) is not None:
            if self._closed:
                return
            self._pack(packing)
            del packing  # what it refers to is not to live on here

    def _pack(self, packing: Packing) -> None:
        packing.store(lambda: self._closed)
        self._done.append(packing)
        self._wake()
