"""Workers that a context of ``multiprocessing`` or loky starts, each in its own way.

All workers get the same facts (``main.worker_main``). The methods differ in the way to set the
caps before any import of the caller's modules. loky takes an environment. ``spawn`` and
``forkserver`` unpickle the process's name first, and ``forkserver`` has a capped server as well.
In a fork ``worker_main`` sets the caps.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import io
import itertools
import multiprocessing.context
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from safepool.threads.environment import worker_environment
from safepool.transport.fingerprints import ABSENT, UNKNOWN
from safepool.transport.marks import main_space, marks_of
from safepool.workers.begin import BEGIN, facts_for, popen_with
from safepool.workers.interpreter import check_executable
from safepool.workers.main import worker_main
from safepool.workers.safe_path import SAFE_PATH, is_safe, safe_path
from safepool.workers.settings_table import filters_of
from safepool.workers.start import StartMethod, WorkerStart
from safepool.workers.tree import try_to_signal

if sys.platform == "linux":
    from safepool import linux

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping
    from multiprocessing.context import BaseContext

    from safepool.workers.board import Board

# Two pipes to the worker and back, one that reports the exec, and a few that a start method opens
# meanwhile.
_START_DESCRIPTORS = 8


class StandardProcess:
    """A process of ``multiprocessing``, in the words of :class:`~safepool.workers.start.Started`.

    Before Linux 5.3 and elsewhere its sentinel is a pipe, which the worker's own children can hold
    open; on Windows only the channel tells.
    """

    def __init__(self, process: Any) -> None:
        self.process: Any = process
        self.pid: int = process.pid or 0
        # The standard sentinel is a pipe that a task's own children can hold open; a pidfd tells
        # about this process alone (pidfd_open(2)).
        self._pidfd: int | None = None
        if sys.platform == "linux":
            self._pidfd = linux.find_pidfd(self.pid)
        self.sentinel: int | None = _sentinel(process, self._pidfd)

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        return self.process is not None and bool(self.process.is_alive())

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still the process that was started."""
        if sys.platform == "linux" and linux.send_signal(self._pidfd, number):
            return
        # Nobody has waited for the process yet, so the number cannot belong to another process.
        if self.is_alive():
            try_to_signal(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end and return the exit code, ``None`` if unknown."""
        deadline = time.monotonic() + timeout_s
        # join() is not used: it waits for multiprocessing's pipe, which a child of the worker may
        # hold open. And a fork server passes the code on a moment after the end.
        exitcode: int | None
        while (exitcode := self.process.exitcode) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if exitcode is not None:
            self.process.join()  # returns at once, and takes it off multiprocessing's list
        return exitcode

    def close(self) -> None:
        """Close every descriptor of this object."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        # multiprocessing's object is not closed: a caller with the object from _processes may
        # still join() it, or read its exit code. The last reference frees its descriptors.
        self.process = None


class Standard(StartMethod):
    """Starts workers by any context that is like ``multiprocessing``'s."""

    def __init__(self, context: BaseContext) -> None:
        self.context: Any = context

    def start(
        self, told: WorkerStart, end: socket.socket, board: Board, given_up: Callable[[], bool]
    ) -> StandardProcess:
        """Start a worker, without regard to ``given_up``."""
        del given_up
        handles = [_handle(end)]
        try:
            shared = None
            if board:
                shared = _handle_of(os.dup(board.fileno()))
                handles.append(shared)
            inherited = [_handle_of(os.dup(number)) for number in told.descriptors]
            handles += inherited
            # A descriptor of another pool may be closed there and open here.
            own = {handle.fileno() for handle in handles if self.is_fork}
            foreign = tuple(one for one in told.foreign if self.is_fork and one not in own)
            told = replace(told, descriptors=(), foreign=foreign, forked=self.is_fork)
            process = self.create(told, (handles[0], shared, told, inherited))
            _check_descriptors(handles[0].fileno())
            with safe_path():
                self.begin(process)
            # The pool waits for its end. multiprocessing would join it at the exit of the program,
            # and of a fork of the program, where that fails with a traceback.
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        finally:
            for handle in handles:
                handle.close()
        return StandardProcess(process)

    def create(self, told: WorkerStart, arguments: tuple[Any, ...]) -> Any:
        """Return a process that is not started yet."""
        process = self.kind(told)(target=worker_main, args=arguments)
        # spawn imports the caller's ``__main__`` before any code of this package runs; the
        # process's name is unpickled before that.
        process.name = _NameWithCaps(
            f"safepool-{process.name}", facts_for(told.variables, told.threads, told.cpus)
        )
        return process

    def kind(self, told: WorkerStart) -> Callable[..., Any]:
        """Return what makes a process."""
        del told
        create: Callable[..., Any] = self.context.Process
        return create

    if sys.platform == "win32":

        def begin(self, process: Any) -> None:
            """Start it."""
            process.start()

    else:

        def begin(self, process: Any) -> None:
            """Start the process, with ``SIGINT`` blocked until the worker can handle it.

            An interrupt cannot end a worker that still imports, or make it print a traceback.
            """
            self.start_trackers()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                with _no_missing_streams():
                    process.start()
            except OSError as error:
                _close_lost_pipe(error)
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        def start_trackers(self) -> None:
            """Start the resource trackers that come with exec'ing start methods.

            They unblock the signal in the thread that first needs one.
            """
            from multiprocessing import resource_tracker  # noqa: PLC0415

            resource_tracker.ensure_running()


class _Spawn(Standard):
    runs_script = True

    if sys.platform != "win32":

        def start_trackers(self) -> None:
            """Start them, with the interpreter that the workers get as well."""
            check_executable()
            super().start_trackers()


class _Loky(Standard):
    def create(self, told: WorkerStart, arguments: tuple[Any, ...]) -> Any:
        """Return a process that is born with the variables."""
        # loky's can only set. Variables to remove are removed by worker_main, before any import
        # that reads them.
        given = {name: value for name, value in told.variables.items() if value is not None}
        if is_safe("loky") and SAFE_PATH not in {**os.environ, **given}:
            given[SAFE_PATH] = "1"
            told = replace(told, environment={**told.environment, SAFE_PATH: None})
            first, shared, _, inherited = arguments
            arguments = first, shared, told, inherited
        process = self.context.Process(target=worker_main, args=arguments, env=given)
        process.name = f"safepool-{process.name}"
        return process

    if sys.platform != "win32":

        def start_trackers(self) -> None:
            """Start loky's as well."""
            super().start_trackers()
            from loky.backend import resource_tracker  # noqa: PLC0415

            resource_tracker.ensure_running()


class _LokyByValue(_Loky):
    by_value = True


METHODS: dict[str, type[Standard]] = {
    "spawn": _Spawn,
    "loky": _LokyByValue,
    "loky_init_main": _Loky,
}
"""By the name of a context's start method; any other is a :class:`Standard`."""


def _check_descriptors(existing: int) -> None:
    """Raise now an error that would otherwise come in the middle of a start, and leak pipes."""
    spare: list[int] = []
    try:
        while len(spare) < _START_DESCRIPTORS:
            spare.append(os.dup(existing))
    finally:
        for descriptor in spare:
            os.close(descriptor)


class _NameWithCaps(str):
    """A process name that binds and caps the interpreter that unpickles it."""

    __slots__ = ("facts",)

    facts: dict[str, Any]

    def __new__(cls, name: str, facts: dict[str, Any]) -> Self:
        self = super().__new__(cls, name)
        self.facts = facts
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Builtins only: the child has no sys.path yet to find a function of this package.
        own_name = str(self)
        return eval, (f"(exec({BEGIN!r}), {own_name!r})[1]", self.facts)


@contextlib.contextmanager
def _no_missing_streams() -> Iterator[None]:
    """Give loky streams to flush if the program has no stdout or stderr (``>&-``)."""
    missing = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in missing:
        setattr(sys, name, io.StringIO())
    try:
        yield
    finally:
        for name in missing:
            setattr(sys, name, None)


def _close_lost_pipe(error: OSError) -> None:
    """Close the pipe that loky leaves open when the system has no process to give.

    A pool that tries again every second would be out of descriptors some day. Source: loky
    3.7.0, backend/popen_loky_posix.py, ``_launch``.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame, inner in itertools.pairwise(frames):
        if (frame.f_code.co_name, inner.f_code.co_name) == ("_launch", "fork_exec"):
            os.close(frame.f_locals["parent_w"])


if sys.platform == "win32":

    def _handle(sock: socket.socket) -> Any:
        return sock

    def _handle_of(descriptor: int) -> Any:
        raise OSError(f"cannot use descriptor {descriptor}: workers on Windows have no board")

    def _sentinel(_process: Any, _pidfd: int | None) -> int | None:
        return None

else:

    class _ForkServer(_Spawn):
        def kind(self, told: WorkerStart) -> Callable[..., Any]:
            create = super().kind(told)
            if create is not multiprocessing.context.ForkServerProcess:
                return create
            from safepool.workers.capped_server import CappedProcess  # noqa: PLC0415 -- seldom

            # What follows gets into a command line, where everybody may read it: no variable that
            # bounds no threads. The name of the process sets those.
            known = worker_environment(told.threads)
            caps = {name: text for name, text in told.environment.items() if name in known}
            return lambda **more: CappedProcess(caps, told.threads, told.cpus, **more)

    class _Fork(Standard):
        is_fork = True

        def __init__(self, context: BaseContext) -> None:
            super().__init__(context)
            self._names: frozenset[str] = frozenset()
            self._marks: Mapping[str, bytes] = {}
            # Another thread forks: it has no values of context variables.
            self._values = contextvars.copy_context()

        def run_script(
            self, told: WorkerStart, given_up: Callable[[], bool]
        ) -> Mapping[str, bytes]:
            """Return what workers have of the script: what this process has before the first."""
            del told, given_up
            if not self._marks:
                self._names = frozenset(main_space())
                self._marks = marks_of(sys.modules["__main__"])
            return self._marks

        def prints(
            self, told: WorkerStart, names: list[str], given_up: Callable[[], bool]
        ) -> Mapping[str, bytes | None]:
            """Return marks of changed data and of objects that cannot be pickled."""
            del told, given_up
            # Attributes of functions and classes among them, by their path.
            there = (name.partition(".")[0] in self._names for name in names)
            return {
                name: UNKNOWN if one else ABSENT for name, one in zip(names, there, strict=True)
            }

        def kind(self, told: WorkerStart) -> Callable[..., Any]:
            create = super().kind(told)
            if create is not multiprocessing.context.ForkProcess:
                return create
            return functools.partial(_QuietProcess, self._values)

        def start_trackers(self) -> None:
            """Start none: nothing is executed."""

    METHODS |= {"forkserver": _ForkServer, "fork": _Fork}

    class _QuietProcess(multiprocessing.context.ForkProcess):
        """A process whose fork raises no warning.

        From Python 3.12 on ``os.fork()`` warns in a process that has threads. Where warnings are
        errors (``-W error``), Python 3.15 raises the warning after the fork, and the child would
        be unknown. The pool has warned before (:class:`safepool.ProcessPool`).

        Args:
            values: The values of context variables that it has.
        """

        def __init__(self, values: contextvars.Context, **arguments: Any) -> None:
            super().__init__(**arguments)
            self._values = values

        def run(self) -> None:
            """Run its function."""
            self._values.run(super().run)

        @staticmethod
        def _Popen(process_obj: Any) -> Any:  # noqa: N802 -- the standard library's name
            from multiprocessing import popen_fork  # noqa: PLC0415 -- seldom

            return popen_with(popen_fork.Popen, os=_QuietOs())(process_obj)

    class _QuietOs:
        """The module ``os`` with another ``fork()``."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fork(self) -> int:
            # Filters belong to the whole process: they are changed where that is needed alone.
            if not any(action == "error" for action, *_ in filters_of(warnings)):
                return os.fork()
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                return os.fork()

    def _handle(sock: socket.socket) -> Any:
        return _handle_of(sock.detach())

    def _handle_of(descriptor: int) -> Any:
        # Every start method knows how to hand a Connection over.
        from multiprocessing.connection import Connection  # noqa: PLC0415

        return Connection(descriptor)

    def _sentinel(process: Any, pidfd: int | None) -> int | None:
        return pidfd if pidfd is not None else int(process.sentinel)
