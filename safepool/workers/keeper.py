"""Program of the keeper: a fork server's parent, which ends the processes that tasks have started.

A process that a task starts and does not wait for loses its parent at the worker's end, and a
daemon leaves its parent by itself. With ``end_subprocesses=True`` a fork server is the child of a
small process that adopts all such processes (prctl(2), ``PR_SET_CHILD_SUBREAPER``). Each of them
is a descendant of the keeper for life, even after the server's end:

    program  --- unnamed socket pair --->  keeper  --- posix_spawn --->  server  --- fork --->  ...

    to the keeper     one byte: end the server       from it    SERVER_END, when it has ended
                      its end: the program is gone

The keeper waits for the program's end, and then kills its descendants until none is left. The
keeper also ends when the server and all of its descendants have ended. The keeper imports almost
nothing, and holds only its end of the program's socket. Signals to a whole process group do not
end it.

Not covered:
    * A keeper that is killed: the server ends too, and the next workers have a new keeper.
    * A process of another user, which the program may not signal.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from safepool import linux
from safepool.workers.tree import Descendant, descendants, signal_all

assert sys.platform == "linux"

SERVER_END = struct.Struct("!i?")
"""How the server ended, and whether something is left that has come from it."""

# prctl(2), PR_SET_CHILD_SUBREAPER, Linux 3.4.
_SET_CHILD_SUBREAPER = 36
# For all of them to end: one may be in a system call that nothing ends, or another user's.
_ENDING_S = 10.0
_LOOK_S = 0.005
# Python has made these two ignored, and a child would inherit that.
_IGNORED = (signal.SIGPIPE, signal.SIGXFSZ)


def keep(
    sock_descriptor: int, program: int, command: Sequence[str], handed: Sequence[int]
) -> None:
    """Start the server by a command, and end all of its descendants with the program."""
    # Ctrl-C, a hang-up and the end of a session are sent to the whole group.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGCHLD})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    os.set_inheritable(sock_descriptor, False)
    sock = socket.socket(fileno=sock_descriptor)
    adopt_orphans()
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server = os.posix_spawnp(
        command[0], [*command], os.environ, setsigmask=mask, setsigdef=_IGNORED
    )
    _let_go(handed)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(woken, select.POLLIN)
    _watch(program, poll)
    _Keeper(sock, woken, server).run(poll)
    os._exit(0)


class _Keeper:
    def __init__(self, sock: socket.socket, woken: socket.socket, server: int) -> None:
        self._sock = sock
        self._woken = woken
        # Process id of the server; 0 after its end.
        self._server = server

    def run(self, poll: select.poll) -> None:
        while self._reap():
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._woken.fileno() in ready:
                self._woken.recv(4096)
                ready.remove(self._woken.fileno())
            if ready == {self._sock.fileno()} and self._is_asked():
                if self._server:
                    os.kill(self._server, signal.SIGKILL)
            elif ready:
                self._end_all()

    def _is_asked(self) -> bool:
        try:
            return self._sock.recv(1) != b""
        except OSError:
            return False

    def _reap(self) -> bool:
        """Wait for ended children; return whether any child is left."""
        ended = None
        left = True
        try:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._server:
                    self._server, ended = 0, os.waitstatus_to_exitcode(found[1])
        except ChildProcessError:
            left = False
        if ended is not None:
            try:
                self._sock.send(SERVER_END.pack(ended, left))
            except OSError:
                pass  # the program is gone
        return left

    def _end_all(self) -> NoReturn:
        """Stop all processes first, so that none starts another one; then kill them."""
        begun = time.monotonic()
        while self._reap() and time.monotonic() - begun < _ENDING_S:
            found: set[Descendant] = set()
            while new := descendants(os.getpid()) - found:
                signal_all(new, signal.SIGSTOP)
                found |= new
            signal_all(found, signal.SIGKILL)
            time.sleep(_LOOK_S)
        os._exit(0)


def adopt_orphans() -> None:
    """Become the parent of descendants' orphans, instead of the container's first process."""
    import ctypes  # noqa: PLC0415

    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _let_go(handed: Sequence[int]) -> None:
    """Release everything that others may wait for: pipes, the working directory."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    for descriptor in {nothing, *handed} - {0, 1, 2}:
        os.close(descriptor)
    os.chdir("/")


def _watch(program: int, poll: select.poll) -> None:
    """Notice the program's end, also when a fork of the program has kept its end of the socket."""
    pidfd = linux.find_pidfd(program)
    if pidfd is None:  # the socket tells
        return
    # In another pid name space the number belongs to another process, or to none.
    if os.getppid() == program:
        poll.register(pidfd, select.POLLIN)
    else:
        os.close(pidfd)
