"""A fork server below a keeper, with the interface of ``subprocess.Popen``.

The keeper (``keeper``) is this process's child, the server the keeper's. On request, the keeper
ends the server and reports how it ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING

from safepool.workers import forked, keeper

if TYPE_CHECKING:
    import subprocess

assert sys.platform == "linux"

# From the end of the keeper's socket to that of the process.
_ENDING_S = 1.0


class KeptServer:
    """A fork server that was started by a keeper, and the keeper.

    Args:
        sock: This end of its socket. Closed, it tells the keeper that the program is gone.

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

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._sock.fileno()

    def poll(self) -> int | None:
        """Return how the server ended, ``None`` while it runs."""
        return self._ask(0.0)

    def wait(self, timeout: float) -> int:
        """Wait for the end of the server, and return how it ended.

        Raises:
            subprocess.TimeoutExpired: The server runs on.
        """
        found = self._ask(timeout)
        if found is None:
            raise TimeoutExpired("the fork server", timeout)
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
