"""Facts for a new worker, and the interface of its start method.

A new option of workers is a field of `WorkerStart`, and what ``main`` does with it. A new way to
start them is a `StartMethod`, and its row in ``methods``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from types import FrameType

    from safepool.workers.board import Board
    from safepool.workers.inheritance import Initializer


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
    """A worker process that was started.

    Attributes:
        sentinel: Descriptor that turns readable when it has ended; ``None`` where nothing does.
        process: In the words of ``multiprocessing.Process``.
    """

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
    """

    is_fork = False
    by_value = False
    runs_script = False

    def start(
        self,
        told: WorkerStart,
        end: socket.socket,
        board: Board,
        given_up: Callable[[], bool],
    ) -> Started:
        """Start a worker.

        Raises:
            OSError: The system gave no process or no descriptor.
            InterruptedError: The pool no longer needs the start.
        """
        raise NotImplementedError

    def is_asked_by(self, frame: FrameType | None) -> None:
        """Take note of the caller that the first worker is for, before it is started."""

    def prepare(self, environment: Mapping[str, str | None]) -> bool:
        """Prepare the first worker; return whether later ones need no new process.

        Raises:
            OSError: The system lacks memory, processes or descriptors.
            RuntimeError: The interpreter shuts down, or no interpreter can be started.
        """
        del environment
        return False

    def run_script(
        self, environment: Mapping[str, str | None], threads: int, given_up: Callable[[], bool]
    ) -> Mapping[str, bytes]:
        """Run the program's script in the process that workers come from, if that is the plan.

        Returns:
            Names of the script that workers have, from :func:`~safepool.transport.marks.marks_of`.

        Raises:
            OSError: The system has no room for a process or a descriptor.
            InterruptedError: The pool no longer needs the start.
        """
        del environment, threads, given_up
        return {}

    def prints(
        self, environment: Mapping[str, str | None], names: list[str], given_up: Callable[[], bool]
    ) -> Mapping[str, bytes | None]:
        """Return what globals of the script are like where it was run, as far as that is known.

        Returns:
            By name what :func:`~safepool.transport.fingerprints.fingerprint` says there.
        """
        del environment, names, given_up
        return {}

    def finish(self, environment: Mapping[str, str | None]) -> None:
        """Prepare a faster start of the next pool, without waiting."""
