"""One worker process and the pool's end of its channel: start, signals, end."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from safepool import procfs
from safepool.errors import naming
from safepool.transport.channel import Channel
from safepool.transport.files import invite
from safepool.workers.board import NO_BOARD, Board

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.workers.start import StartMethod, WorkerStart


class WorkerProcess:
    """A running worker process.

    Args:
        board: The worker's shared board; closed with this object, also if the start fails.

    Raises:
        OSError: The system gave no process or no descriptor.

    Attributes:
        process: The process, with the interface of ``multiprocessing.Process``; ``None`` after the
            close.
        board: Memory that worker and pool both read and write.
        channel: The pool's end, which never blocks.
        sentinel: Descriptor that turns readable when the process ends; ``None`` where only the
            channel reports the end.
    """

    channel: Channel

    def __init__(
        self,
        method: StartMethod,
        told: WorkerStart,
        *,
        board: Board = NO_BOARD,
        given_up: Callable[[], bool] = bool,
    ) -> None:
        self.board: Board = board
        self.cpus: tuple[int, ...] = told.cpus
        ours: socket.socket | Channel | None = None
        theirs: socket.socket | None = None
        try:
            with naming("socketpair()"):
                ours, theirs = socket.socketpair()
            ours.setblocking(False)
            ours = self.channel = Channel(ours, invite(ours))
            told = replace(told, foreign=(*told.foreign, *ours.descriptors()))
            self._started = method.start(told, theirs, board, given_up)
        except BaseException:
            board.close()
            if ours is not None:
                ours.close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        self.process: Any = self._started.process
        self.pid: int = self._started.pid
        self.sentinel: int | None = self._started.sentinel

    def descriptors(self) -> list[int]:
        """Return the descriptors of this worker, which no other worker must inherit."""
        found = [*self.channel.descriptors(), self.board.fileno()]
        return [descriptor for descriptor in found if descriptor >= 0]

    def resident_bytes(self) -> int | None:
        """Return the resident memory of the process; ``None`` if unknown."""
        return procfs.resident_bytes(self.pid)

    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        return self._started.is_alive()

    def end(self, number: int) -> None:
        """Send the signal ``number`` to the process, if it is still the one we started."""
        self._started.signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end of the process and return its exit code, ``None`` if unknown."""
        return self._started.wait(timeout_s)

    def close(self) -> None:
        """Give back every descriptor. The process has ended or is left to itself."""
        self.channel.close()
        self.board.close()
        self._started.close()
        self.process = None
