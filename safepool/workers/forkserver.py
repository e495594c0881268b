"""The fork servers of this process: started by exec, asked for workers, started again.

    program  --- unnamed socket pair --->  server  --- fork --->  worker, worker, ...
             --- life-line (a pipe) ---->          ----------->

A server is born with the caps in its environment, imports what its workers will need
(``server``, ``preload``), and forks one in milliseconds. There is one for each distinct setting,
shared by the pools of this process and kept for the next ones; it ends with the program.

What goes wrong, and what is done:
    It is killed            its workers live on; another is started when one is needed.
    An import crashes or    another is started without that library; one that started threads
    starts threads          would make every fork unsafe.
    It does not answer      it is killed, and another is started.
    It cannot fork          each worker is started afresh: a server that becomes the worker
                            itself. An agent or a debugger has threads in every interpreter, or
                            something refuses the fork. The reason is logged once.
    It never says a word    an error names the executable: it is no Python interpreter.
    The program forks       the child gives up its copies: it would keep the server alive. What
                            a start needs is imported here, in the thread that makes the pool: a
                            child could never import what another thread was importing.

Not covered:
    * A worker that ends while the server is inside one long call of an import: its exit code
      is asked for in vain.
    * A preloaded library that reads a variable when it is imported has read it as it was when
      the server imported it, unless it is one of those that bound threads.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import marshal
import multiprocessing
import multiprocessing.context
import multiprocessing.spawn  # the tracker's start imports it: see below
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from safepool import linux
from safepool.errors import describe_exit
from safepool.transport import letters
from safepool.workers import birth, forked
from safepool.workers.contained import ContainedLogger
from safepool.workers.preload import modules_to_preload

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

assert sys.platform == "linux"

__all__ = ["ServerContext", "descriptors", "running", "stop_all"]

_log = ContainedLogger()

# Seconds for one import, and for one fork. Imports of large libraries take ten seconds under a
# small quota; a fork of a few hundred megabytes takes milliseconds.
_IMPORT_S = 60.0
_FORK_S = 5.0
# From the end of its socket to that of the process.
_ENDING_S = 1.0
# Between two looks whether an import is still waited for: Ctrl-C must not have to.
_LOOK_S = 0.1
# A variable that is always in the server's own environment, in characters.
_SMALL_VARIABLE = 4096
# execve(2): there is none, it is not for this user, or no program at all.
_NOT_EXECUTABLE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENOEXEC,
    errno.ELOOP,
    errno.EISDIR,
}
# How a server begins. The path comes over the socket: one argument has 128 KiB at most
# (execve(2), MAX_ARG_STRLEN). Nothing is imported before it is set but what is built in: of "-c"
# the current directory is the first on the path.
_BOOTSTRAP = """
import marshal, posix, sys
def take(count):
    taken = b""
    while len(taken) < count:
        part = posix.read({0}, count - len(taken))
        if not part:
            posix._exit(0)
        taken += part
    return taken
sys.path[:] = marshal.loads(take(int.from_bytes(take(8), "little")))
from safepool.workers.server import serve
serve({0}, {1}, greets={2})
"""
_HAD_THREADS = "it had threads from its start, as an agent or a debugger brings them: {}"
# With offenders left out, then with nothing preloaded, then once more for bad luck.
_MOST_STARTS = 4
# Servers without workers beyond this number are ended: a program may make pools of ever new
# settings.
_MOST_IDLE = 3


class ServerContext(multiprocessing.context.SpawnContext):
    """How workers are started by default: forked from a server that has no threads.

    Everything else that a ``multiprocessing`` context offers is that of ``spawn``.

    Args:
        preload: What the server imports ahead, as :func:`modules_to_preload`.
    """

    _name = "safepool"

    def __init__(self, preload: str | Sequence[str] = "auto") -> None:
        super().__init__()
        self.preload = preload
        self._modules: list[str] | None = None

    def prepare(self, changes: Mapping[str, str | None]) -> bool:
        """Start the server, if none runs: from then on a worker costs this process no process.

        Args:
            changes: As for :meth:`fork_worker`.

        Returns:
            Whether that is so: ``False`` if each worker is started afresh.

        Raises:
            OSError: The system has no room for a process or a descriptor.
            RuntimeError: The interpreter shuts down.
        """
        with _server_for(changes) as server:
            return server.start()

    def fork_worker(
        self,
        changes: Mapping[str, str | None],
        threads: int,
        channel: int,
        board: int | None,
        inherited: Sequence[int],
        given_up: Callable[[], bool],
        cpus: Collection[int] = (),
    ) -> forked.ForkedProcess:
        """Start a worker.

        Args:
            changes: To the environment: the caps, and what the user sets.
            threads: Threads for each of its native pools.
            channel: Its end of the channel, which stays open here too.
            board: Its board.
            inherited: Descriptors for its initializer.
            given_up: Asked now and then: nobody wants the worker any more.
            cpus: What it is bound to; none is where this program may run.

        Raises:
            OSError: The system has no room for a process or a descriptor, or no server
                could be kept running.
            InterruptedError: It was given up.
        """
        asked = self.preload != "auto"
        if self._modules is None:  # what is there when the pool begins its work
            # With more threads a BLAS starts them when it is loaded, and nobody could fork that.
            wanted = self.preload if asked or threads == 1 else []
            self._modules = modules_to_preload(wanted)
        files = [channel, *inherited] if board is None else [channel, board, *inherited]
        details: dict[str, Any] = {"threads": threads, "board": board is not None}
        if cpus:
            details["affinity"] = set(cpus)
        with _server_for(changes) as server:
            return server.fork_worker(self._modules, details, files, given_up, strict=asked)


class _LostError(Exception):
    """The server has ended, or does not answer."""


class _StartedThreadsError(Exception):
    """The server has threads that a fork would lose."""


class _CannotForkError(Exception):
    """No server can be forked, whatever is left out."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a server has for good: pools with another need another server."""

    changes: tuple[tuple[str, str | None], ...]
    # User, groups, capabilities, control group, name spaces, root directory: a program that
    # has given up rights must not get workers that still have them.
    identity: tuple[str, ...]


class _Server:
    """One fork server, started when it is needed."""

    def __init__(self, changes: Mapping[str, str | None]) -> None:
        self._changes = dict(changes)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._asked: set[str] = set()
        self._answers = False  # until then it may still be starting
        # Each worker is an interpreter of its own from now on.
        self._afresh = False
        # Libraries that cannot be preloaded, by the first part of their name.
        self._left_out: set[str] = set()
        self._workers: list[forked.ForkedProcess] = []
        # Pools that use it at the moment; under the lock of the servers' table.
        self.users = 0

    @property
    def pid(self) -> int | None:
        """Its process id; ``None`` while none runs."""
        return None if self._process is None else self._process.pid

    def descriptors(self) -> list[int]:
        """Return what it holds in this process."""
        sock = self._sock
        return [] if sock is None else [sock.fileno()]

    def is_idle(self) -> bool:
        """Return whether nobody uses it and no pool has a worker of it."""
        # Not whether they live: their exit codes are read once, by the threads of their pools.
        return not self.users and all(worker.closed for worker in self._workers)

    def fork_worker(
        self,
        modules: Sequence[str],
        details: Mapping[str, Any],
        files: Sequence[int],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> forked.ForkedProcess:
        """Preload what is new and fork a worker; start the server first, or again."""
        while not self._lock.acquire(timeout=_LOOK_S):  # another pool waits for an import
            _check(given_up)
        try:
            process = self._start_one(modules, details, files, given_up, strict=strict)
            self._workers = [worker for worker in self._workers if not worker.closed]
            self._workers.append(process)
            return process
        finally:
            self._lock.release()

    def _start_one(
        self,
        modules: Sequence[str],
        details: Mapping[str, Any],
        files: Sequence[int],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> forked.ForkedProcess:
        if not self._afresh:
            try:
                return self._fork_one(modules, details, files, given_up, strict=strict)
            except _CannotForkError as error:
                self._afresh = True
                _log_once(
                    "each worker is started afresh, as no fork server can be used "
                    f"(a start takes longer, and no memory is shared): {error}"
                )
        return self._start_afresh(modules if strict else (), details, files)

    def _fork_one(
        self,
        modules: Sequence[str],
        details: Mapping[str, Any],
        files: Sequence[int],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> forked.ForkedProcess:
        why = ""
        for attempt in range(_MOST_STARTS):
            if self._process is None:
                self._start()
            try:
                if attempt < 2:
                    self._preload(modules, given_up, strict=strict)
                return self._fork(details, files, given_up)
            except (_LostError, ConnectionError, TimeoutError) as error:
                why = self._lose(error, attempt)
            except _StartedThreadsError as error:
                self._stop()
                why = f"had threads: {error}"
            except (_CannotForkError, InterruptedError):
                self._stop()  # it may be in the middle of an import
                raise
        raise _CannotForkError(f"{_MOST_STARTS} in a row were of no use; the last {why}")

    def _lose(self, error: Exception, attempt: int) -> str:
        """End a server that was lost, and say how it ended.

        Raises:
            OSError: None has ever said a word, so it is no Python interpreter.
        """
        silent = not self._answers
        if not isinstance(error, TimeoutError):
            self._await_the_end()
        ending = self._stop()
        if silent and (attempt or isinstance(error, TimeoutError)):
            raise OSError(_no_interpreter(f"was started as an interpreter, and {ending}"))
        _log.info("a fork server was lost and is started again: it %s", ending)
        return ending

    def start(self) -> bool:
        """Start it, if it does not run; return whether it forks the workers."""
        if self._process is None:  # or somebody starts it now, who would not be waited for
            with self._lock:
                if self._process is None and not self._afresh:
                    self._start()
        return not self._afresh

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # Above the standard streams, which the child gets others for; a program may have closed
        # its own.
        handed = [_above_streams(theirs.fileno()), _above_streams(_line[0])]
        # Blocked, so that Ctrl-C ends neither the server nor a worker before it has a handler.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = self._execute(_BOOTSTRAP.format(*handed, not self._afresh), handed)
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            for descriptor in handed:
                os.close(descriptor)
        path = marshal.dumps([entry for entry in sys.path if isinstance(entry, str)], 2)
        try:
            ours.settimeout(_IMPORT_S)
            ours.sendall(len(path).to_bytes(8, "little") + path)
        except OSError:
            pass  # it has ended, which is found out by whoever asks it for something
        self._sock = ours
        self._asked = set()
        self._answers = False
        _log.debug("fork server %d started", self._process.pid)

    def _execute(self, code: str, handed: Sequence[int]) -> subprocess.Popen[bytes]:
        environment = self._environment()
        while True:
            try:
                return subprocess.Popen(
                    [_executable(), *_interpreter_flags(), "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if _is_stream(2) else subprocess.DEVNULL,
                    pass_fds=handed,
                    env=environment,
                    # In a directory that is gone, Python 3.13 cannot import socket (by "-c").
                    # Workers go where the program is when they are born.
                    cwd=None if _has_directory() else "/",
                )
            except OSError as error:
                if error.errno in _NOT_EXECUTABLE:
                    raise OSError(_no_interpreter(f"cannot be started: {error}")) from error
                if error.errno != errno.E2BIG:
                    raise
                # execve(2): 128 KiB for a variable, a quarter of the stack for all. Workers get
                # it over the socket.
                largest = max(environment, key=lambda name: len(environment[name]))
                if len(environment.pop(largest)) < _SMALL_VARIABLE:
                    raise

    def _environment(self) -> dict[str, str]:
        wanted = dict.fromkeys(os.environ) | self._changes
        for name in wanted.keys() - self._changes.keys():
            wanted[name] = os.environ.get(name)  # another thread may have removed it
        return {name: value for name, value in wanted.items() if value is not None}

    def _preload(
        self, modules: Sequence[str], given_up: Callable[[], bool], *, strict: bool
    ) -> None:
        new = [
            name
            for name in modules
            if name not in self._asked and name.partition(".")[0] not in self._left_out
        ]
        if not new:
            return
        before = bool(self._asked)
        self._asked.update(new)
        self._send(("preload", new))
        importing = ""
        while True:
            try:
                (what, told), _ = self._receive(_IMPORT_S, given_up)
            except (_LostError, ConnectionError, TimeoutError) as error:
                if importing:
                    self._leave_out(importing, error)
                raise
            if what == "preloaded":
                break
            if what == "threads":
                raise self._useless(told, imported=before)
            importing = told
        failed, started = told
        for name, reason in failed.items():
            level = logging.WARNING if strict else logging.DEBUG
            _log.log(level, "%s could not be preloaded: %s", name, reason)
        for name, threads in started.items():
            _log.info("%s is not preloaded: its import starts %s", name, ", ".join(threads))
            self._left_out.add(name.partition(".")[0])
        if started:
            raise _StartedThreadsError(", ".join(sorted(started)))

    def _leave_out(self, importing: str, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            why = "the fork server's import takes too long"
        else:
            why = f"while it was imported, the fork server {self._await_the_end()}"
        _log.warning("%s is not preloaded: %s", importing, why)
        self._left_out.add(importing.partition(".")[0])

    def _fork(
        self, more: Mapping[str, Any], files: Sequence[int], given_up: Callable[[], bool]
    ) -> forked.ForkedProcess:
        with self._handing(more, files) as (details, given, status, key):
            self._send(("fork", details), given)
            limit_s = _FORK_S if self._answers else _IMPORT_S
            (what, answer), descriptors = self._receive(limit_s, given_up)
            if what == "forked":
                os.write(key, b"\0")
                pidfd = descriptors[0] if descriptors else None
                return forked.ForkedProcess(details["name"], answer, pidfd, os.dup(status))
        if what == "refused":
            raise OSError(answer, os.strerror(answer))
        if what == "unforkable":
            raise _CannotForkError(f"its fork raised {answer}")
        raise self._useless(answer, imported=bool(self._asked))

    def _useless(self, threads: Sequence[str], *, imported: bool) -> Exception:
        """Leave out what may have started threads, and return what the server is given up for."""
        told = ", ".join(threads)
        if not imported:
            return _CannotForkError(_HAD_THREADS.format(told))
        _log.warning("nothing is preloaded: the fork server has threads: %s", told)
        self._left_out.update(name.partition(".")[0] for name in self._asked)
        return _StartedThreadsError(told)

    def _start_afresh(
        self, modules: Sequence[str], more: Mapping[str, Any], files: Sequence[int]
    ) -> forked.ForkedProcess:
        """Start a server that becomes a worker, by the pool's thread: it may end with that."""
        self._start()
        process = self._process
        assert process is not None
        try:
            with self._handing(more, files) as (details, given, status, key):
                self._send(("become", {**details, "modules": modules}), given)
                os.write(key, b"\0")
                # Not waited for: several can start at the same time.
                return forked.ChildProcess(details["name"], process, os.dup(status))
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sock, self._process, self._sock = self._sock, None, None
            assert sock is not None
            sock.close()

    @contextmanager
    def _handing(
        self, more: Mapping[str, Any], files: Sequence[int]
    ) -> Iterator[tuple[dict[str, Any], list[int], int, int]]:
        """Open what a worker is given, for as long as it is handed over.

        Yields:
            What it is told, what it is given, where its end is told, and where to write a byte
            when it is known here.
        """
        me: Any = multiprocessing.current_process()
        # As multiprocessing numbers the children of a process, all its pools together: nobody
        # gets the number of one that has ended.
        number = next(multiprocessing.process._process_counter)  # type: ignore[attr-defined]
        identity = (*me._identity, number)
        details = {
            **birth.circumstances(),
            "environ": self._environment(),
            "changes": self._changes,
            **more,
            "name": f"safepool-{':'.join(map(str, identity))}",
            "identity": identity,
            "parent": os.getpid(),
            "parent_name": me.name,
            "authkey": bytes(me.authkey),
        }
        opened: list[int] = []
        try:
            status, told = os.pipe()
            opened += [status, told]
            os.set_blocking(status, False)
            # The worker waits here until it is known: a server that answers too late, or
            # never, may have forked one all the same, and another would share its channel.
            gate, key = os.pipe()
            opened += [gate, key]
            folder = os.open(".", os.O_RDONLY | getattr(os, "O_PATH", 0))
            opened.append(folder)
            streams = [_stream(number, opened) for number in (1, 2)]
            # Shared, so that shared memory is not unlinked by the worker's own at its end.
            tracker = resource_tracker.getfd()
            assert tracker is not None
            given = [told, gate, folder, *streams, tracker, *files]
            yield {**details, "files": len(given)}, given, status, key
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        assert self._sock is not None
        self._sock.settimeout(_FORK_S)
        letters.send(self._sock, message, descriptors)

    def _receive(
        self, timeout_s: float, given_up: Callable[[], bool] | None = None
    ) -> tuple[Any, list[int]]:
        assert self._sock is not None
        self._sock.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        while given_up is not None and not forked.is_readable(self._sock.fileno(), _LOOK_S):
            _check(given_up)
            if time.monotonic() > deadline:
                raise TimeoutError
        received = letters.receive(self._sock)
        if received is None:
            raise _LostError
        if not self._answers:  # what it says first is that it is there
            self._answers = True
            return self._receive(timeout_s, given_up)
        return received

    def stop(self) -> None:
        """End it; its workers live on."""
        with self._lock:
            if self._process is not None:
                self._stop()

    def _await_the_end(self) -> str:
        """Say how it ended, whose end of the socket is closed: that is a moment before."""
        assert self._process is not None
        try:
            return describe_exit(self._process.wait(_ENDING_S))
        except subprocess.TimeoutExpired:
            return "closed its socket"

    def _stop(self) -> str:
        """End what is left of it, and say how it ended."""
        process, self._process = self._process, None
        assert process is not None
        assert self._sock is not None
        self._sock.close()
        self._sock = None
        if process.poll() is None:
            process.kill()
            process.wait()
            return "did not answer and was ended"
        return describe_exit(process.returncode)

    def forget(self) -> None:
        """Give up the copies that a fork of the program has made."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # not this process's child
        if self._sock is not None:
            self._sock.close()
        self._process, self._sock, self._workers = None, None, []


_servers: dict[_Setting, _Server] = {}
_servers_lock = threading.Lock()
# The life-line: reading and writing end. One for the process, never closed: the workers of a
# server that was killed still hold it.
_line: list[int] = []


@contextmanager
def _server_for(changes: Mapping[str, str | None]) -> Iterator[_Server]:
    """Give the server of a setting, which nobody ends meanwhile."""
    setting = _Setting(tuple(sorted(changes.items())), _identity())
    with _servers_lock:
        found = _servers.get(setting)
        if found is None:
            idle = [key for key, other in _servers.items() if other.is_idle()]
            for key in idle[: max(0, len(idle) - _MOST_IDLE + 1)]:
                _servers.pop(key).stop()
            found = _servers[setting] = _Server(changes)
        found.users += 1
        if not _line:
            _line[:] = os.pipe()
    try:
        yield found
    finally:
        with _servers_lock:
            found.users -= 1


def running() -> list[int]:
    """Return the process id of each server that this process has started."""
    return [pid for one in [*_servers.values()] if (pid := one.pid) is not None]


def descriptors() -> list[int]:
    """Return what this process keeps open for its servers and their workers."""
    return [*_line, *(number for one in [*_servers.values()] for number in one.descriptors())]


def stop_all() -> None:
    """End the servers of this process; the next pool starts another."""
    with _servers_lock:
        for one in _servers.values():
            one.stop()
        _servers.clear()


def _forget_all() -> None:
    global _servers_lock  # noqa: PLW0603 -- a thread that the child has not may hold it
    _servers_lock = threading.Lock()
    # multiprocessing does not do so itself.
    tracker: Any = resource_tracker
    tracker._resource_tracker._lock._at_fork_reinit()
    for one in _servers.values():
        one.forget()
    _servers.clear()
    while _line:
        os.close(_line.pop())


os.register_at_fork(after_in_child=_forget_all)
atexit.register(stop_all)


def _identity() -> tuple[str, ...]:
    """Return what this process may do and where it is: nothing of it can be handed on later.

    Source: proc_pid_status(5), cgroups(7), namespaces(7).
    """
    found = []
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            found += [line for line in file if line.startswith(_RIGHTS)]
        with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
            found.append(file.read())
        names = sorted(os.listdir("/proc/self/ns"))
        found += [os.readlink(f"/proc/self/ns/{name}") for name in names]
        found.append(os.readlink("/proc/self/root"))
    except OSError:
        pass  # not Linux, or not shown; what was read still counts
    return (*found, repr(os.getresuid()), repr(os.getresgid()))


_RIGHTS = ("Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:", "Seccomp:")


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        _log.warning("%s", text)


_logged: set[str] = set()


def _executable() -> str:
    """Return the interpreter, as multiprocessing's own start methods find it.

    Raises:
        OSError: Nothing says where it is: Python is embedded in another program.
    """
    found = multiprocessing.spawn.get_executable()
    if not found:
        if not sys.executable:
            raise OSError(_no_interpreter("is empty, as in a program that embeds Python"))
        # Set after multiprocessing was imported, whose resource tracker needs it as well.
        multiprocessing.spawn.set_executable(sys.executable)
        found = sys.executable
    return os.fsdecode(found)


def _no_interpreter(what: str) -> str:
    name = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable or "")
    return (
        f"the interpreter for workers, {name!r} (sys.executable, or what "
        f"multiprocessing.set_executable() was given), {what}. Give "
        "multiprocessing.set_executable() the path of a Python interpreter that can import "
        'safepool, or pass mp_context="fork" if this program has no threads'
    )


def _interpreter_flags() -> list[str]:
    flags: Any = subprocess
    found: list[str] = flags._args_from_interpreter_flags()  # as multiprocessing's spawn does
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        if option not in found:
            found += ["-X", option]
    return found


def _stream(number: int, opened: list[int]) -> int:
    """Return the standard stream of that number, or a substitute where the program has none."""
    if not _is_stream(number):
        number = os.open(os.devnull, os.O_WRONLY)
        opened.append(number)
    return number


def _is_stream(number: int) -> bool:
    """Return whether a child of the program would have it.

    What Python opens where a stream was closed has its number and is none: a socket of a pool,
    a file that somebody reads. No child inherits it (PEP 446), and nothing is to be printed
    into it.
    """
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def _has_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _above_streams(number: int) -> int:
    return fcntl.fcntl(number, linux.F_DUPFD_CLOEXEC, 3)


def _check(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise InterruptedError("the pool was shut down while the server imported")
