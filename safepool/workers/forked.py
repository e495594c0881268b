"""A process that a fork server has started: signals to it, its end, and its exit code.

The process is no child of this process, so the server reaps it and writes its exit code into a
pipe. A pidfd refers to this process alone and reports its end (pidfd_open(2), Linux 5.3). A worker
that is started afresh is a child; all else is the same.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from safepool import linux
from safepool.workers.start import EXIT_CODE
from safepool.workers.tree import try_to_signal

if TYPE_CHECKING:
    import subprocess

assert sys.platform == "linux"


class ForkedProcess:
    """A process that a fork server has started, in the words of ``multiprocessing.Process``.

    Attributes:
        pidfd: Refers to this process alone; ``None`` before Linux 5.3.
        sentinel: Descriptor that turns readable when it has ended.
        daemon: ``False``: it may have children.
    """

    daemon = False

    def __init__(
        self, name: str, pid: int, pidfd: int | None, status: int, line: int = -1
    ) -> None:
        self.name = name
        self.pid = pid
        self.pidfd = pidfd
        self._status = status
        # The process's life-line: closing this end ends the process.
        self._line = line
        self._exitcode: int | None = None
        self._lost = False
        # Held while the descriptors are used, and while they are closed: the program may ask or
        # signal in any thread beside the pool's.
        self._lock = threading.RLock()
        self.sentinel: int = status if pidfd is None else pidfd

    @property
    def process(self) -> ForkedProcess:
        """Itself: it has the words of both."""
        return self

    @property
    def ident(self) -> int:
        """The process id."""
        return self.pid

    @property
    def closed(self) -> bool:
        """Whether its descriptors were given back. Looks at none of them: from any thread."""
        return self._status < 0

    @property
    def exitcode(self) -> int | None:
        """Negative for a signal; ``None`` while it runs, or if the server was lost with it."""
        with self._lock:
            if self._exitcode is None and not self._lost:
                self._ask()
            return self._exitcode

    def _ask(self) -> None:
        try:
            told = os.read(self._status, EXIT_CODE.size)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if len(told) == EXIT_CODE.size:
            self._exitcode = EXIT_CODE.unpack(told)[0]
        else:
            self._lost = True

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        with self._lock:
            if self.exitcode is not None:
                return False
            pidfd = self.pidfd
            return not self._lost if pidfd is None else not is_readable(pidfd, 0.0)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for its end and return the exit code, ``None`` if it is not known by then."""
        deadline = time.monotonic() + timeout_s
        while self.exitcode is None and not self._lost:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._hear(left_s):
                break
        return self._exitcode

    def _hear(self, timeout_s: float) -> bool:
        """Wait until its exit code may be known."""
        return is_readable(self._status, timeout_s)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        with self._lock:
            if not self.is_alive():
                return
            # One of our own: the pool closes its as soon as the process has ended.
            ours = os.dup(self.sentinel)
        try:
            is_readable(ours, timeout)
        finally:
            os.close(ours)

    def terminate(self) -> None:
        """Ask it to end, by ``SIGTERM``."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, by ``SIGKILL``."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with self._lock:
            if number == signal.SIGKILL:
                self.drop_line()  # even where this process may not send it a signal
            if not linux.send_signal(self.pidfd, number) and self.is_alive():
                try_to_signal(self.pid, number)

    def close(self) -> None:
        """Close the descriptors."""
        with self._lock:
            self.drop_line()
            self._wait_as_parent()
            descriptors = [self._status, -1 if self.pidfd is None else self.pidfd]
            self._status, self.pidfd, self._lost = -1, None, True
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)

    def bury(self) -> None:
        """Wait for it if it was closed before its server, which was killed, had ended.

        Only the server's end makes it another process's child.
        """
        with self._lock:
            if self.closed:
                self._wait_as_parent()

    def _wait_as_parent(self) -> None:
        # Its server was killed, and this process is the first of a container: it has become its
        # child, and would stay as a zombie.
        if self._exitcode is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return
            if ended:
                self._exitcode = os.waitstatus_to_exitcode(status)

    def drop_line(self) -> None:
        """Close the life-line. Takes no lock: in a fork, a thread of the parent may hold it."""
        line, self._line = self._line, -1
        if line >= 0:
            os.close(line)

    def __repr__(self) -> str:
        return f"<ForkedProcess name={self.name!r} pid={self.pid} exitcode={self._exitcode}>"


class ChildProcess(ForkedProcess):
    """A worker that this process has started itself, and so waits for itself."""

    def __init__(
        self, name: str, started: subprocess.Popen[bytes], status: int, line: int
    ) -> None:
        super().__init__(name, started.pid, linux.find_pidfd(started.pid), status, line)
        started.returncode = 0  # waited for here

    def _ask(self) -> None:
        try:
            ended, code = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            self._lost = True  # the program has waited for it, or ignores SIGCHLD
            return
        if ended:
            self._exitcode = os.waitstatus_to_exitcode(code)

    def _hear(self, timeout_s: float) -> bool:
        if not is_readable(self.sentinel, timeout_s):
            return False
        time.sleep(0.001)  # a pipe is at its end a moment before the process
        return True


def is_readable(descriptor: int, timeout_s: float | None) -> bool:
    """Wait until a descriptor is readable or at its end; ``None`` waits for ever."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))))
