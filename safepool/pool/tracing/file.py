"""The file of a trace, which a separate thread writes in pieces.

The format is the Trace Event Format's JSON array, one event in each line. Viewers read the array
without the closing bracket, too: the file is valid at any moment, also after ``kill -9``, up to
the last half second. The thread's purpose: a slow disk delays no worker.

An existing file is replaced, unless a running pool writes it.

Not covered:
    * A program that is killed in the middle of a write leaves a torn line. Perfetto and ``safepool
      report`` skip it; chrome://tracing does not.
    * Windows: nothing notices that another pool writes the file.

Source: Trace Event Format, "JSON Array Format"; Perfetto, json_trace_tokenizer.cc,
``NotifyEndOfFile``.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable

from safepool.errors import TraceFileError
from safepool.named_file import open_named
from safepool.workers.contained import ContainedLogger

if sys.platform != "win32":
    import fcntl

_log = ContainedLogger()

# Pause between two writes: a kill loses that time, and writing twice a second costs nothing.
EVERY_S = 0.5
# A larger backlog in memory is written at once. If the disk stays slower than that, the trace
# loses events, and the program no memory.
_MANY_BYTES = 256 * 1024
_MOST_BYTES = 16 << 20
# For the last writes, when the pool ends.
_ENDING_S = 10.0


class TraceFile:
    """Lines for one file, added by any thread. It is created or emptied.

    Attributes:
        written_bytes: Number of bytes handed to the file so far.
        dropped: Number of lines that were left out because the disk was too slow.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self._pid = os.getpid()
        self._lines: deque[str] = deque()
        self._waiting_bytes = self._good_bytes = 0
        self.written_bytes: int = 0
        self.dropped: int = 0
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ending = False
        self._descriptor = _open(self._path)

    @property
    def ours(self) -> bool:
        """Whether lines are still written, by this process."""
        return self._descriptor >= 0 and os.getpid() == self._pid

    def descriptors(self) -> list[int]:
        """Return the descriptors that a forked worker must close."""
        return [self._descriptor] if self._descriptor >= 0 else []

    def last_lines(self) -> str:
        """Return what ends the file."""
        return ""

    def start(self, look: Callable[[], object]) -> None:
        """Write new lines from now on, and call ``look`` before each write."""

        def run() -> None:
            while not self._ending:
                self._wake.wait(EVERY_S)
                self._wake.clear()
                look()
                self.write()

        thread = threading.Thread(target=run, name="safepool-trace", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread could be started: they are written as they come
            return
        self._thread = thread

    def add(self, line: str) -> None:
        """Write this soon, or drop and count it."""
        if self._descriptor < 0:
            return
        size = len(line)
        if self._waiting_bytes + size > _MOST_BYTES:
            self.dropped += 1
            return
        self._lines.append(line)
        self.written_bytes += size
        self._waiting_bytes += size
        if self._waiting_bytes > _MANY_BYTES:
            if self._thread is not None:
                self._wake.set()
            else:
                self.write()

    def close(self) -> None:
        """Write waiting and last lines, and close the file. May be called twice."""
        if os.getpid() != self._pid:  # a fork of the program: the lines are the program's
            self._give_back()
            return
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ending = True
            self._wake.set()
            thread.join(_ENDING_S)
            if thread.is_alive():
                self._descriptor = -1  # the kernel's: it is used there
                _log.warning("the trace %s is incomplete: its disk does not answer", self._path)
                return
        if self._descriptor >= 0:
            self._lines.append(self.last_lines())
            self.write()
        self._give_back()

    def write(self) -> None:
        """Write the new lines. Only in the thread, if one was started."""
        # Others add meanwhile.
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        self._waiting_bytes = 0
        descriptor = self._descriptor
        if descriptor < 0 or not lines:
            return
        data = memoryview("".join(lines).encode())
        size = len(data)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            try:  # a part of the last lines was written
                os.ftruncate(descriptor, self._good_bytes)
            except OSError:
                pass  # no regular file
            self._give_back()
            _log.warning(
                "the trace %s is incomplete, its file cannot be written: %s", self._path, error
            )
            return
        self._good_bytes += size

    def _give_back(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        if os.getpid() == self._pid:
            _unlock(descriptor)
        try:
            os.close(descriptor)
        except OSError:
            pass  # the program has closed it


def _open(path: str) -> int:
    flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)
    # A pipe without a reader is refused instead of waited for.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = open_named(path, flags)
    except OSError as error:
        raise TraceFileError(error.errno, error.strerror, path) from None
    except ValueError as error:  # a zero byte
        raise TraceFileError(errno.EINVAL, str(error), path) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        if not _lock(descriptor):
            os.close(descriptor)
            reason = "another running pool writes it"
            raise TraceFileError(errno.EBUSY, reason, path)
        os.ftruncate(descriptor, 0)
    return descriptor


def _lock(descriptor: int) -> bool:
    """Lock the file until it is closed; ``False`` if another process has locked it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks
    return True


def _unlock(descriptor: int) -> None:
    # A fork of the program that has the descriptor too would keep it locked.
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except OSError:
            pass
