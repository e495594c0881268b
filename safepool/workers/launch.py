"""A fork server's start: an interpreter that serves, with the caps in its environment.

    program  --- unnamed socket pair --->  server
             --- life-line (a pipe) ---->

With ``kept`` it is below a keeper (``keeper``), which starts it. Nothing of it is imported here:
an interpreter that is started by ``-c`` learns its path over the socket first.
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import multiprocessing.spawn
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from safepool import linux
from safepool.errors import naming
from safepool.workers import kept
from safepool.workers.safe_path import is_safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

assert sys.platform == "linux"

IMPORT_S = 60.0
"""For one import. Those of large libraries take ten seconds under a small quota."""

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


class NoInterpreterError(RuntimeError):
    """The interpreter for workers is no Python, or this user may not start it."""


line: list[int] = []
"""The life-line: reading and writing end, opened by the table of servers. One for the process,
never closed: the workers of a server that was killed still hold it."""

# Those below a keeper, until that has ended: after the server, if tasks have left something.
_kept: list[kept.KeptServer] = []


def keepers() -> list[kept.KeptServer]:
    """Return the servers below a keeper that has not ended."""
    for one in [*_kept]:
        if one.has_ended():
            _kept.remove(one)
            one.close()
    return [*_kept]


def descriptors() -> list[int]:
    """Return the descriptors that this process holds for its servers."""
    return [*line, *(one.fileno() for one in [*_kept])]


def forget() -> None:
    """Give up the copies that a fork of the program has made."""
    while _kept:
        _kept.pop().close()
    while line:
        os.close(line.pop())


def launch(
    changes: Mapping[str, str | None], *, becomes: bool, is_kept: bool
) -> tuple[subprocess.Popen[bytes] | kept.KeptServer, socket.socket]:
    """Start an interpreter that serves, or becomes a worker; return it and this end of its socket.

    Raises:
        OSError: The system lacks memory, processes or descriptors.
        NoInterpreterError: No interpreter can be started.
    """
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
) -> kept.KeptServer:
    ours, theirs = _pair()
    number = -1
    try:
        number = _above_streams(theirs.fileno())
        code = _BOOTSTRAP.format(number) + _KEEP.format(number, os.getpid(), server, handed)
        # Nothing that a site brings along: it may be threads.
        command = [*server[:-2], "-S", "-P", "-c", code]
        found = kept.KeptServer(_execute(command, [*handed, number], environment), ours)
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


def executable() -> str:
    """Return the interpreter, as multiprocessing's own start methods find it.

    Raises:
        NoInterpreterError: The path is unknown, because Python is embedded in another program.
    """
    found = multiprocessing.spawn.get_executable()
    if not found:
        if not sys.executable:
            raise no_interpreter("is empty, as in a program that embeds Python")
        # Set after multiprocessing was imported, whose resource tracker needs it as well.
        multiprocessing.spawn.set_executable(sys.executable)
        found = sys.executable
    return os.fsdecode(found)


def no_interpreter(what: str) -> NoInterpreterError:
    """Return the error that describes the problem with the interpreter."""
    name = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable or "")
    return NoInterpreterError(
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
