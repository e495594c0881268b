"""A fork server's start: an interpreter that serves, with the caps in its environment.

    program  --- unnamed socket pair --->  server
             --- life-line (a pipe) ---->

An interpreter that is started by ``-c`` learns its path over the socket first. With ``is_kept``
the server is below a keeper (``keeper``), which starts it.

And what this program gives a worker that is no child of it: its state, and descriptors.
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import multiprocessing.process
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from safepool import linux, procfs
from safepool.errors import naming
from safepool.workers import forked, keeper
from safepool.workers.interpreter import executable, no_interpreter
from safepool.workers.off_path import modules_off_path
from safepool.workers.safe_path import is_safe, safe_path

assert sys.platform == "linux"

IMPORT_S = 60.0
"""For one import. Those of large libraries take ten seconds under a small quota."""

# From the end of a keeper's socket to that of the process.
_ENDING_S = 1.0
# A variable that is always in the server's own environment, in characters.
_SMALL_VARIABLE = 4096
# execve(2): there is none, it is not for this user, or no program at all.
_NOT_EXECUTABLE = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ENOEXEC, errno.ELOOP, errno.EISDIR),
}
# First statements of a server. The path comes over the socket: one argument has 128 KiB at most
# (execve(2), MAX_ARG_STRLEN). Only built-in modules are imported before it is set; for "-c" itself
# Python 3.13 imports linecache.
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
"""
# The imports make next to no garbage, and what they make stays.
_SERVE = """
import gc
gc.disable()
from safepool.workers.server import serve
gc.enable()
serve({}, {}, greets={}, kept={})
"""
_KEEP = """
from safepool.workers.keeper import keep
keep({}, {}, {!r}, {})
"""


_LIMITS = (
    *("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE"),
    *("RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_STACK"),
)


class KeptServer:
    """A fork server below a keeper, with the interface of ``subprocess.Popen``.

    The keeper (``keeper``) is this process's child, the server the keeper's. On request, the
    keeper ends the server and reports how it ended. The end of ``sock`` tells it that the program
    is gone.

    Attributes:
        pid: Process id of the server; 0 until the server has sent it.
        returncode: Exit code of the server; ``None`` while it is not known.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.pid = 0
        self.keeper: int = process.pid
        self.returncode: int | None = None
        self._sock = sock
        self._has_ended = False
        process.returncode = 0  # waited for here

    def __del__(self) -> None:
        # At the program's end: no other code closes a server that its keeper outlives.
        self._sock.close()

    def poll(self) -> int | None:
        """Return how the server ended, ``None`` while it runs."""
        return self._ask(0.0)

    def wait(self, timeout: float) -> int:
        """Wait for the end of the server, and return how it ended, as ``Popen.wait()``."""
        found = self._ask(timeout)
        if found is None:
            raise subprocess.TimeoutExpired("the fork server", timeout)
        return found

    def kill(self) -> None:
        """End the server. Processes that tasks have started go on, and the keeper with them."""
        try:
            if self.pid:
                self._sock.send(b"\0")
            else:  # it may be no keeper at all, but what somebody took for an interpreter
                os.kill(self.keeper, signal.SIGKILL)
        except OSError:
            pass  # it has ended

    def _ask(self, timeout_s: float) -> int | None:
        if self.returncode is None and forked.is_readable(self._sock.fileno(), timeout_s):
            left = self._hear()
            deadline = time.monotonic() + _ENDING_S
            while not (left or self.has_ended()) and time.monotonic() < deadline:
                time.sleep(0.001)
        return self.returncode

    def _hear(self) -> bool:
        """Read how the server ended; return whether the keeper has something to wait for."""
        left = False
        try:
            told = self._sock.recv(keeper.SERVER_END.size, socket.MSG_DONTWAIT)
        except OSError:
            told = b""
        if len(told) == keeper.SERVER_END.size:
            self.returncode, left = keeper.SERVER_END.unpack(told)
        return left

    def has_ended(self) -> bool:
        """Return whether the keeper has ended as well. Then nothing is left of the two."""
        if not self._has_ended:
            code = 0
            try:
                ended, status = os.waitpid(self.keeper, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status)
            except ChildProcessError:  # the program has waited for it, or ignores SIGCHLD
                ended = self.keeper
            self._has_ended = ended != 0
            if self._has_ended and self.returncode is None:
                self._hear()
                if self.returncode is None:
                    self.returncode = code
        return self._has_ended

    def close(self) -> None:
        """Close the socket: the keeper then ends its descendants."""
        self._sock.close()


line: list[int] = []
"""The life-line: reading and writing end, opened by the table of servers. One for the process,
never closed: the workers of a server that was killed still hold it."""

# Those below a keeper, until that has ended: after the server, if tasks have left something.
_kept: list[KeptServer] = []


def keepers() -> list[KeptServer]:
    """Return the servers below a keeper that has not ended."""
    for one in [*_kept]:
        if one.has_ended():
            _kept.remove(one)
            one.close()
    return [*_kept]


def forget() -> None:
    """Give up the copies that a fork of the program has made."""
    while _kept:
        _kept.pop().close()
    while line:
        os.close(line.pop())


def launch(
    changes: Mapping[str, str | None], *, becomes: bool, is_kept: bool
) -> tuple[subprocess.Popen[bytes] | KeptServer, socket.socket]:
    """Start an interpreter that serves, or becomes a worker; return it and its socket."""
    ours, theirs = _pair()
    # Above the standard streams, which the child gets others for; a program may have closed
    # its own.
    handed: list[int] = []
    # SIGINT is blocked, so that Ctrl-C ends neither the server nor a worker before it has a
    # handler.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        handed.append(_above_streams(theirs.fileno()))
        handed.append(_above_streams(line[0]))
        command = [executable(), *_interpreter_flags(), "-c"]
        serve = _SERVE.format(*handed, not becomes, is_kept)
        server = [*command, _BOOTSTRAP.format(handed[0]) + serve]
        begin = _begin_below_keeper if is_kept else _execute
        process = begin(server, handed, environment_of(changes))
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        for descriptor in handed:
            os.close(descriptor)
    _send_path(ours)
    return process, ours


def _pair() -> tuple[socket.socket, socket.socket]:
    with naming("socketpair()"):
        ours, theirs = socket.socketpair()
    # Independent of socket.setdefaulttimeout(): it may read before anything was sent.
    theirs.setblocking(True)
    return ours, theirs


def _begin_below_keeper(
    server: Sequence[str], handed: Sequence[int], environment: dict[str, str]
) -> KeptServer:
    ours, theirs = _pair()
    number = -1
    try:
        number = _above_streams(theirs.fileno())
        code = _BOOTSTRAP.format(number) + _KEEP.format(number, os.getpid(), server, handed)
        # Nothing that a site brings along: it may be threads.
        command = [*server[:-2], "-S", "-P", "-c", code]
        found = KeptServer(_execute(command, [*handed, number], environment), ours)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        if number >= 0:
            os.close(number)
    _kept.append(found)
    _send_path(ours)
    return found


def _execute(
    command: Sequence[str], handed: Sequence[int], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    while True:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if is_stream(2) else subprocess.DEVNULL,
                pass_fds=handed,
                env=environment,
                # In a directory that is gone, Python 3.13 cannot import socket (by "-c").
                # Workers go where the program is when they are born.
                cwd=None if _has_directory() else "/",
            )
        except OSError as error:
            if error.errno in _NOT_EXECUTABLE:
                who = f"cannot be started by user {os.geteuid()}"
                raise no_interpreter(f"{who}: {error}") from error
            if error.errno != errno.E2BIG:
                raise
            # execve(2): 128 KiB for a variable, a quarter of the stack for all. Workers get
            # it over the socket.
            largest = max(environment, key=lambda name: len(environment[name]))
            if len(environment.pop(largest)) < _SMALL_VARIABLE:
                raise


def environment_of(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return this process's environment with changes."""
    wanted = dict.fromkeys(os.environ) | dict(changes)
    for name in wanted.keys() - changes.keys():
        wanted[name] = os.environ.get(name)  # another thread may have removed it
    return {name: value for name, value in wanted.items() if value is not None}


def _send_path(sock: socket.socket) -> None:
    path = marshal.dumps([entry for entry in sys.path if isinstance(entry, str)], 2)
    try:
        sock.settimeout(IMPORT_S)
        sock.sendall(len(path).to_bytes(8, "little") + path)
    except OSError:
        pass  # it has ended; the next request notices that


def _interpreter_flags() -> list[str]:
    flags: Any = subprocess
    found: list[str] = flags._args_from_interpreter_flags()  # as multiprocessing's spawn does
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        if option not in found:
            found += ["-X", option]
    return [*found, "-P"] if is_safe() else found


def is_stream(number: int) -> bool:
    """Return whether a child of the program would have the standard stream of that number.

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


def _circumstances() -> dict[str, Any]:
    """Return the inherited state that a child of this process can still set later."""
    return {
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "off_path": modules_off_path(),
        "argv": list(sys.argv),
        "umask": _umask(),
        "nice": linux.asked(os.getpriority, os.PRIO_PROCESS, 0),
        "affinity": linux.asked(os.sched_getaffinity, 0),
        "limits": {name: linux.limit_of(name) for name in _LIMITS},
        "recursion": sys.getrecursionlimit(),
    }


def _umask() -> int | None:
    # umask(2) can only be asked by setting it, for all threads. Linux 4.7.
    _, found, rest = (procfs.read("/proc/self/status") or "").partition("\nUmask:")
    return int(rest.partition("\n")[0], 8) if found else None


def details_of(changes: Mapping[str, str | None], *, script: bool) -> dict[str, Any]:
    """Return the state of a child of this process, besides descriptors."""
    me = multiprocessing.current_process()
    return {
        **_circumstances(),
        "environ": environment_of(changes),
        "changes": changes,
        "parent": os.getpid(),
        "parent_name": me.name,
        "authkey": bytes(me.authkey),
        "script": script,
    }


@contextmanager
def handing(
    details: Mapping[str, Any], files: Sequence[int]
) -> Iterator[tuple[dict[str, Any], list[int], list[int]]]:
    """Open the descriptors for a worker, for the time of handing them over.

    Yields its details, its descriptors, and this side of it, for :func:`let_in`.
    """
    me: Any = multiprocessing.current_process()
    # Numbered as multiprocessing numbers the children of a process, over all its pools: no number
    # is used again.
    number = next(multiprocessing.process._process_counter)  # type: ignore[attr-defined]
    identity = (*me._identity, number)
    name = f"safepool-{':'.join(map(str, identity))}"
    opened: list[int] = []
    ours: list[int] = []
    try:
        status, told = os.pipe()
        ours.append(status)
        opened.append(told)
        os.set_blocking(status, False)
        # The worker waits here until it is known: a server that answers too late, or
        # never, may have forked one all the same, and another would share its channel.
        gate, key = os.pipe()
        ours.append(key)
        opened.append(gate)
        folder = open_directory()
        opened.append(folder)
        streams = [_stream(number, opened) for number in (1, 2)]
        given = [told, gate, folder, *streams, tracker(), *files]
        yield {**details, "name": name, "identity": identity, "files": len(given)}, given, ours
    finally:
        for descriptor in (*opened, *ours):
            os.close(descriptor)


def let_in(ours: list[int]) -> tuple[int, int]:
    """Let a worker begin, now that its pid is known; take over its exit-code pipe and its line."""
    status, key = ours
    os.write(key, b"\0")
    ours.clear()
    return status, key


def tracker() -> int:
    """Return the pipe to the resource tracker.

    Workers share the program's tracker: their own would unlink shared memory at their end.
    """
    with safe_path():
        found = resource_tracker.getfd()
    assert found is not None
    return found


def open_directory() -> int:
    """Open the working directory."""
    flags = os.O_RDONLY | getattr(os, "O_PATH", 0)
    try:
        return os.open(".", flags)
    except PermissionError:  # a program that has given up root in a directory of root's
        return os.open("/", flags)


def _stream(number: int, opened: list[int]) -> int:
    """Return the standard stream of that number, or a substitute where the program has none."""
    if not is_stream(number):
        number = os.open(os.devnull, os.O_WRONLY)
        opened.append(number)
    return number
