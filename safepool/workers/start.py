"""Facts for a new worker, the interface of its start method, and the worker that was started.

A new option of workers is a field of `WorkerStart`, and what ``main`` does with it. A new way to
start them is a `StartMethod`, and its row in ``methods``.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from safepool import procfs
from safepool.errors import naming
from safepool.transport.channel import Channel
from safepool.transport.files import invite
from safepool.workers.board import NO_BOARD, Board

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

    from safepool.workers.inheritance import Initializer

EXIT_CODE = struct.Struct("!i")
"""What a fork server writes into a worker's pipe when it has ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class WorkerStart:
    """Facts for a new worker.

    Attributes:
        environment: Environment variables of the worker; ``None`` for a variable that the worker
            must not have.
        threads: Threads for each native pool of the worker.
        own: Variables of this worker, which take precedence over those of all workers.
        cpus: CPUs that the worker is bound to before it imports anything of the caller's; empty
            for no binding.
        by_name: Whether functions of the script are sent as names, because the worker has run the
            script.
        learns: Whether the worker reports which libraries tasks import.
        descriptors: Descriptors of the program, to which the initializer's arguments refer.
        forked: Whether the worker is a fork of the program, with all that the program had at the
            start.
        initializer: Initializer of a fork of the program, instead of a pickle.
        foreign: Descriptors of the program that a fork must close: otherwise the other end would
            not see another worker's channel close.
    """

    environment: Mapping[str, str | None]
    threads: int
    own: Mapping[str, str] = field(default_factory=dict)
    index: int = 0
    cpus: tuple[int, ...] = ()
    by_name: bool = False
    learns: bool = False
    descriptors: tuple[int, ...] = ()
    forked: bool = False
    initializer: Initializer | None = None
    foreign: tuple[int, ...] = ()

    @property
    def variables(self) -> dict[str, str | None]:
        """All that it is born with, and without."""
        return {**self.environment, **self.own}


class Started(Protocol):
    """A worker process that was started."""

    pid: int

    @property
    def sentinel(self) -> int | None:
        """A descriptor."""

    @property
    def process(self) -> Any:
        """In the words of ``multiprocessing.Process``."""

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still the process that was started."""

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end and return the exit code, ``None`` if it is not known by then."""

    def close(self) -> None:
        """Close every descriptor. The process has ended, or goes on without the pool."""


class StartMethod:
    """A way of starting workers. The defaults here fit most start methods.

    Attributes:
        is_fork: Whether a worker is a copy of this process.
        by_value: Whether functions of the script always travel by value.
        runs_script: Whether each worker runs the script itself, and does not report the result.
        script_error: Exception of the script in each worker, as far as it is known.
    """

    is_fork = False
    by_value = False
    runs_script = False
    script_error: BaseException | None = None

    def start(
        self, told: WorkerStart, end: socket.socket, board: Board, given_up: Callable[[], bool]
    ) -> Started:
        """Start a worker, or raise ``InterruptedError`` if the pool no longer needs it."""
        raise NotImplementedError

    def is_asked_by(self, frame: FrameType | None) -> None:
        """Take note of the caller that the first worker is for, before it is started."""

    def prepare(self, told: WorkerStart) -> bool:
        """Prepare the first worker; return whether later ones need no new process."""
        del told
        return False

    def run_script(self, told: WorkerStart, given_up: Callable[[], bool]) -> Mapping[str, bytes]:
        """Run the program's script in the process that workers come from, if that is the plan.

        Returns names of the script that workers have, from
        :func:`~safepool.transport.marks.marks_of`.
        """
        del told, given_up
        return {}

    def prints(
        self, told: WorkerStart, names: list[str], given_up: Callable[[], bool]
    ) -> Mapping[str, bytes | None]:
        """Return what globals of the script are like where it was run, as far as that is known.

        By name what :func:`~safepool.transport.fingerprints.fingerprint` says there.
        """
        del told, names, given_up
        return {}

    def finish(self, told: WorkerStart) -> None:
        """Prepare a faster start of the next pool, without waiting."""


class WorkerProcess:
    """A running worker process. Its board is closed with this object, also if the start fails.

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
