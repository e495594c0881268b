"""Start a worker process, watch it, end it.

A worker is started through a context: on Linux our own by default, which forks it from a server
that has no threads (``forkserver``); elsewhere loky's (fork and exec with an environment of its
own, ``__main__`` never imported); or the one of ``multiprocessing`` that the caller gave.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal, Self

from safepool import procfs
from safepool.errors import naming
from safepool.transport.channel import Channel
from safepool.transport.files import invite
from safepool.transport.lazy import eager_imports
from safepool.workers.begin import BEGIN, facts_for
from safepool.workers.main import worker_main
from safepool.workers.plan import plan_main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.context import BaseContext
    from types import FrameType

    from safepool.workers.board import Board
    from safepool.workers.inheritance import Inheritance

__all__ = [
    "WorkerProcess",
    "find_context",
    "finish",
    "is_asked_by",
    "prepare",
    "prints",
    "run_script",
    "script_context",
]


# Two pipes to the worker and back, one that tells whether exec worked, and a few for what a
# start method opens on the way.
_START_DESCRIPTORS = 8


def find_context(
    wanted: BaseContext | str | None,
    preload: str | Sequence[str] = "auto",
    main: Literal["auto", "run", "value"] = "value",
    *,
    end_subprocesses: bool = False,
) -> BaseContext:
    """Return the context that starts workers.

    Args:
        wanted: A context, or the name of one: ``"safepool"`` (forked from a server, Linux only),
            ``"loky"`` (each worker a fresh interpreter, started by exec), or one of
            ``multiprocessing``'s. ``None`` is the first of these that works here.
        preload: What the server imports ahead.
        main: How the program's ``__main__`` gets into workers, as :func:`plan_main`.
        end_subprocesses: What tasks have started does not outlive the program.

    Raises:
        ValueError: There is no context of this name; or ``main`` is ``"run"``, and there is no
            script that could be run; or it cannot see to it that ``end_subprocesses`` holds.
    """
    if wanted is None or wanted == "safepool":
        ours = _server_context(preload, main, end_subprocesses)
        if ours is not None:
            return ours
        if wanted is not None:
            raise ValueError(
                'mp_context="safepool" forks workers from a server of its own, which needs Linux '
                "with /proc, and a program that is not frozen into one file"
            )
    if end_subprocesses:
        raise ValueError(
            "end_subprocesses=True needs workers that safepool forks from a server of its own: on "
            'Linux with /proc, and with mp_context=None or "safepool"'
        )
    if wanted is None or wanted == "loky":
        # Its reducers are registered by imports, which -X lazy_imports=all would put off.
        with eager_imports():
            from loky.backend import get_context  # noqa: PLC0415 -- a pool's start, not our import

        context: BaseContext = get_context("loky")
        return context
    return multiprocessing.get_context(wanted) if isinstance(wanted, str) else wanted


if sys.platform == "linux":
    from safepool import linux

    # Not where it is used: a signal's handler that makes a pool above that import would find half
    # a module.
    from safepool.workers.forkserver import ServerContext

    def _server_context(preload: str | Sequence[str], main: str, kept: bool) -> BaseContext | None:
        # A frozen program would be started again instead of an interpreter.
        # The server counts its threads there before each fork.
        if hasattr(sys, "frozen") or not os.path.isdir("/proc/self/task"):
            return None
        return ServerContext(preload, plan_main(main), kept=kept)

    def _script_context(main: str) -> BaseContext:
        from safepool.workers.forkserver import ServerContext  # noqa: PLC0415 -- Linux only

        plan = plan_main(main)
        if plan.name.rpartition(".")[2] == "__main__":  # spawn runs no such module
            plan = plan.without("it is a package")
        return ServerContext([], plan, asked_only=True)

else:

    def _server_context(
        _preload: str | Sequence[str], _main: str, _kept: bool
    ) -> BaseContext | None:
        return None

    def _script_context(main: str) -> BaseContext:
        raise NotImplementedError(main)


def script_context(context: BaseContext, main: str) -> BaseContext:
    """Return what tells which names of the script workers have.

    Args:
        context: From :func:`find_context`: itself, but where the standard library runs the script
            in each worker and says nothing of it.
        main: As for :func:`find_context`.
    """
    standard = context.get_start_method() in ("spawn", "forkserver")
    if standard and main != "value" and os.path.isdir("/proc/self/task"):
        return _script_context("auto")
    return context


def is_asked_by(context: BaseContext, frame: FrameType | None) -> None:
    """Take note of the caller that the first worker is for, before it is started.

    Args:
        context: From :func:`find_context`.
        frame: Of the caller.
    """
    if context.get_start_method() == "safepool":
        own: Any = context
        own.is_asked_by(frame)


def run_script(
    context: BaseContext,
    environment: Mapping[str, str | None],
    threads: int,
    given_up: Callable[[], bool],
) -> Mapping[str, bytes]:
    """Run the program's script where workers are forked from, if that is the plan.

    Args:
        context: From :func:`find_context`.
        environment: Of the workers.
        threads: Threads for each of their native pools.
        given_up: Asked while it takes its time: nobody wants workers any more.

    Returns:
        What workers have under its own name in ``__main__``, as
        :class:`~safepool.transport.main_names.MainNames` takes it.

    Raises:
        OSError: The system has no room for a server.
        InterruptedError: It was given up.
    """
    if context.get_start_method() != "safepool":
        return {}
    own: Any = context
    marks: Mapping[str, bytes] = own.run_script(environment, threads, given_up)
    return marks


def prints(
    context: BaseContext,
    environment: Mapping[str, str | None],
    names: list[str],
    given_up: Callable[[], bool],
) -> Mapping[str, bytes | None]:
    """Return what globals of a script that was run are like where workers are forked from.

    Args:
        context: From :func:`find_context`.
        environment: Of the workers.
        names: Of the globals.
        given_up: Asked while it takes its time.
    """
    own: Any = context
    found: Mapping[str, bytes | None] = own.prints(environment, names, given_up)
    return found


def prepare(context: BaseContext, environment: Mapping[str, str | None]) -> bool:
    """Do what must be done before the first worker; return whether others need no new process.

    Args:
        context: From :func:`find_context`.
        environment: Of the workers.

    Raises:
        OSError: The system has no room for it.
        RuntimeError: The interpreter shuts down.
    """
    if context.get_start_method() != "safepool":
        return False
    own: Any = context
    forks: bool = own.prepare(environment)
    return forks


def finish(context: BaseContext, environment: Mapping[str, str | None]) -> None:
    """Do what makes the start of the next pool faster, without waiting for it.

    Args:
        context: From :func:`find_context`.
        environment: Of the workers.
    """
    if context.get_start_method() == "safepool":
        own: Any = context
        own.preload_ahead(environment)


class WorkerProcess:
    """One running worker and the pool's end of its channel.

    Attributes:
        process: The ``multiprocessing`` process.
        pid: Its process id.
        cpus: What it is bound to; empty if to nothing.
        board: What it and the pool both read and write; ``None`` if there is none.
        channel: The pool's end, which never blocks.
        sentinel: A descriptor that turns readable when the process ends; ``None`` on
            Windows, where only the channel tells. Before Linux 5.3 and elsewhere it is a
            pipe, which the worker's own children can hold open.
    """

    def __init__(
        self,
        context: BaseContext,
        *,
        environment: Mapping[str, str | None],
        threads: int,
        foreign_descriptors: Sequence[int],
        inheritance: Inheritance,
        board: Board | None = None,
        given_up: Callable[[], bool] = bool,
        cpus: tuple[int, ...] = (),
        by_name: bool = False,
    ) -> None:
        """Start a worker process.

        Args:
            context: How to start it.
            environment: Variables it is born with, ``None`` for those it is born without.
            threads: Threads for each of its native pools.
            foreign_descriptors: Descriptors of the pool that a forked child must close.
            inheritance: What its initializer finds beside the pickle.
            given_up: Asked while the start takes its time: nobody wants it any more.
            board: To be shared with it; closed with this object, also if it cannot start.
            cpus: Bind it to these CPUs, before it imports anything of the caller's.
            by_name: Functions of the script are sent as names.

        Raises:
            OSError: The system gave no process or no descriptor.
        """
        self.board = board
        self.cpus = cpus
        try:
            with naming("socketpair()"):
                ours, theirs = socket.socketpair()
        except OSError:
            if board is not None:
                board.close()
            raise
        self.process: Any
        self._pidfd: int | None = None
        try:
            ours.setblocking(False)
            side = invite(ours)
        except BaseException:
            ours.close()
            theirs.close()
            if board is not None:
                board.close()
            raise
        self.channel = Channel(ours, side)
        try:
            if context.get_start_method() == "safepool":
                fork: Any = context
                number = None if board is None else board.fileno()
                self.process = fork.fork_worker(
                    environment,
                    threads,
                    theirs.fileno(),
                    number,
                    inheritance.descriptors,
                    given_up,
                    cpus,
                )
            else:
                more = (*foreign_descriptors, *self.channel.descriptors())
                self.process = _launch(
                    context, theirs, board, environment, threads, more, inheritance, cpus, by_name
                )
                self._pidfd = _open_pidfd(self.process.pid)
        except BaseException:
            self.channel.close()
            if board is not None:
                board.close()
            raise
        finally:
            theirs.close()
        self.pid: int = self.process.pid or 0
        self.sentinel: int | None = _sentinel(self.process, self._pidfd)

    def descriptors(self) -> list[int]:
        """Return what belongs to this worker alone, and no other must inherit."""
        board = self.board  # another thread may drop it
        found = [*self.channel.descriptors(), -1 if board is None else board.fileno()]
        return [descriptor for descriptor in found if descriptor >= 0]

    def resident_bytes(self) -> int | None:
        """Return the memory that the process holds; ``None`` where the system does not tell."""
        return procfs.resident_bytes(self.pid)

    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        alive: bool = self.process.is_alive()
        return alive

    def end(self, number: int) -> None:
        """Send the signal ``number`` to the process, if it is still the one we started."""
        if hasattr(self.process, "send_signal"):
            self.process.send_signal(number)
            return
        if self._pidfd is not None and sys.platform == "linux":
            try:
                linux.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return  # it has ended
            except OSError:
                pass  # a filter refuses this call, and not kill(2)
            else:
                return
        # Not yet waited for by us, so the number cannot belong to another process.
        if self.process.is_alive():
            try:
                os.kill(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end of the process and return its exit code, ``None`` if unknown."""
        if hasattr(self.process, "wait"):
            told: int | None = self.process.wait(timeout_s)
            return told
        deadline = time.monotonic() + timeout_s
        # Not by join(): that waits for multiprocessing's pipe, which a child of the worker
        # may hold open. And a fork server passes the code on a moment after the end.
        exitcode: int | None
        while (exitcode := self.process.exitcode) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if exitcode is not None:
            self.process.join()  # returns at once, and takes it off multiprocessing's list
        return exitcode

    def close(self) -> None:
        """Give back every descriptor. The process has ended or is left to itself."""
        self.channel.close()
        if self.board is not None:
            self.board.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        # multiprocessing's is not closed: who holds it from _processes may still join() it, or
        # ask how it ended. Its descriptors go with the last reference.
        if hasattr(self.process, "send_signal"):
            self.process.close()
        self.process = None


def _launch(
    context: BaseContext,
    theirs: socket.socket,
    board: Board | None,
    environment: Mapping[str, str | None],
    threads: int,
    foreign_descriptors: Sequence[int],
    inheritance: Inheritance,
    cpus: tuple[int, ...],
    by_name: bool,
) -> Any:
    """Start a worker by a context of ``multiprocessing`` or loky."""
    handles = [_handle(theirs)]
    try:
        shared = None
        if board is not None:
            shared = _handle_of(os.dup(board.fileno()))
            handles.append(shared)
        inherited = [_handle_of(os.dup(number)) for number in inheritance.descriptors]
        handles += inherited
        foreign: list[int] = []
        forked = context.get_start_method() == "fork"
        if forked:
            # What was another pool's a moment ago may be closed there and open here.
            own = {handle.fileno() for handle in handles}
            foreign = [number for number in foreign_descriptors if number not in own]
        arguments = (
            handles[0],
            shared,
            dict(environment),
            threads,
            foreign,
            inheritance.itself or inherited,
            cpus,
            by_name,
            forked,
        )
        process = _create(context, arguments, environment, threads, cpus)
        _check_descriptors(handles[0].fileno())
        _start(process, context.get_start_method())
        # The pool sees to its end. multiprocessing would join it at the exit of the program,
        # and at that of a fork of the program, where that fails with a traceback.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
    finally:
        for handle in handles:
            handle.close()
    return process


def _check_descriptors(existing: int) -> None:
    """Raise now what would be raised in the middle of a start, which then leaks its pipes.

    Args:
        existing: A descriptor, of which copies are made.

    Raises:
        OSError: There are fewer descriptors left than a start method opens.
    """
    spare: list[int] = []
    try:
        while len(spare) < _START_DESCRIPTORS:
            spare.append(os.dup(existing))
    finally:
        for descriptor in spare:
            os.close(descriptor)


def _create(
    context: BaseContext,
    arguments: tuple[Any, ...],
    environment: Mapping[str, str | None],
    threads: int,
    cpus: tuple[int, ...],
) -> Any:
    create: Any = context.Process  # type: ignore[attr-defined]
    if context.get_start_method() in ("loky", "loky_init_main"):
        # loky's can only set. What is to be removed is removed by worker_main, before
        # anything that reads it is imported.
        born_with = {name: value for name, value in environment.items() if value is not None}
        process = create(target=worker_main, args=arguments, env=born_with)
        process.name = f"safepool-{process.name}"
    else:
        process = _own_kind(create, environment, threads)(target=worker_main, args=arguments)
        # spawn imports the caller's ``__main__`` before anything of ours runs; the process's
        # name is what it unpickles before that.
        process.name = _NameWithCaps(
            f"safepool-{process.name}", {**facts_for(environment, threads), "cpus": cpus}
        )
    return process


# A fork server may have fewer CPUs by itself: then worker_main() asks the system.
_BEGIN = f"""
import os
if cpus and os.sched_getaffinity(0).issuperset(cpus):
    os.sched_setaffinity(0, cpus)
{BEGIN}"""


@contextlib.contextmanager
def _no_missing_streams() -> Iterator[None]:
    """Give loky something to flush where a program has no stdout or stderr (``>&-``)."""
    missing = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in missing:
        setattr(sys, name, io.StringIO())
    try:
        yield
    finally:
        for name in missing:
            setattr(sys, name, None)


class _NameWithCaps(str):
    """A process name that binds and caps the interpreter that unpickles it."""

    __slots__ = ("facts",)

    facts: dict[str, Any]

    def __new__(cls, name: str, facts: dict[str, Any]) -> Self:
        self = super().__new__(cls, name)
        self.facts = facts
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Builtins only: the child has no sys.path yet to find a function of ours on.
        own_name = str(self)
        return eval, (f"(exec({_BEGIN!r}), {own_name!r})[1]", self.facts)


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

    def _own_kind(create: Any, _environment: Mapping[str, str | None], _threads: int) -> Any:
        return create

    def _start(process: Any, _method: str) -> None:
        process.start()

    def _handle(sock: socket.socket) -> Any:
        return sock

    def _handle_of(descriptor: int) -> Any:
        raise OSError(f"there is no board on Windows, and no descriptor {descriptor} of it")

    def _sentinel(_process: Any, _pidfd: int | None) -> int | None:
        return None

else:

    def _own_kind(create: Any, environment: Mapping[str, str | None], threads: int) -> Any:
        if create is multiprocessing.context.ForkProcess:
            from safepool.workers.quiet_fork import QuietProcess  # noqa: PLC0415 -- seldom

            return QuietProcess
        if create is not multiprocessing.context.ForkServerProcess:
            return create
        from safepool.workers.capped_server import CappedProcess  # noqa: PLC0415 -- seldom

        return functools.partial(CappedProcess, environment, threads)

    def _start(process: Any, method: str) -> None:
        # The resource trackers that come with exec'ing start methods unblock the signal in
        # the thread that first needs one, so they must be running by now.
        if method != "fork":
            from multiprocessing import resource_tracker  # noqa: PLC0415

            resource_tracker.ensure_running()
        if method in ("loky", "loky_init_main"):
            from loky.backend import resource_tracker as loky_tracker  # noqa: PLC0415

            loky_tracker.ensure_running()
        # Born blocked, unblocked when the worker is ready for it: an interrupt cannot end a
        # worker that still imports, nor make it print a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _no_missing_streams():
                process.start()
        except OSError as error:
            _close_lost_pipe(error)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(sock: socket.socket) -> Any:
        return _handle_of(sock.detach())

    def _handle_of(descriptor: int) -> Any:
        # Every start method knows how to hand a Connection over.
        from multiprocessing.connection import Connection  # noqa: PLC0415

        return Connection(descriptor)

    def _sentinel(process: Any, pidfd: int | None) -> int | None:
        return pidfd if pidfd is not None else int(process.sentinel)


if sys.platform == "linux":

    def _open_pidfd(pid: int) -> int | None:
        # The standard sentinel is a pipe that a task's own children can hold open; a pidfd
        # tells about this process alone (pidfd_open(2), Linux 5.3).
        try:
            return linux.pidfd_open(pid)
        except OSError:
            return None

else:

    def _open_pidfd(_pid: int) -> int | None:
        return None
