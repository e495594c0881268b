"""The fork server reports how each worker ended, whatever comes in the middle of the report."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING

import pytest

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

from safepool.workers.server import _Server
from safepool.workers.start import EXIT_CODE

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def server() -> Iterator[_Server]:
    """A server in this process, whose workers are its children."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = _Server(theirs, -1)
        before = signal.signal(signal.SIGCHLD, lambda *_: server._reap())
        yield server
        signal.signal(signal.SIGCHLD, before)
        server._wake_receiver.close()
        server._wake_sender.close()


def end_a_worker_of(server: _Server) -> int:
    """Return the pipe that tells how it ended, which nobody has been told of yet."""
    reader, writer = os.pipe()
    gate, opener = os.pipe()
    with warnings.catch_warnings():
        # pytest-timeout's thread is beside this one.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.read(gate, 1)
        os._exit(7)
    server._workers[pid] = writer
    os.write(opener, b"\0")
    os.close(opener)
    os.close(gate)
    return reader


def told(reader: int) -> int | None:
    """Return the exit code that a pipe tells, ``None`` if it ends without one."""
    with os.fdopen(reader, "rb") as file:
        code = file.read()
    return EXIT_CODE.unpack(code)[0] if code else None


def test_a_signal_in_the_middle_of_a_report_leaves_the_exit_code(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers that end at once: the second's signal comes when the first was just reaped."""
    waitpid = os.waitpid

    def be_interrupted(pid: int, options: int) -> tuple[int, int]:
        found = waitpid(pid, options)
        signal.raise_signal(signal.SIGCHLD)
        return found

    monkeypatch.setattr(os, "waitpid", be_interrupted)
    readers = [end_a_worker_of(server), end_a_worker_of(server)]
    deadline = time.monotonic() + 30
    while server._workers and time.monotonic() < deadline:
        server._reap()

    assert [told(reader) for reader in readers] == [7, 7]


def test_a_signal_at_the_end_of_a_report_is_not_forgotten(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks again at those whom it has just found running."""
    waitpid = os.waitpid
    seen: list[int] = []

    def miss_the_first_time(pid: int, _options: int) -> tuple[int, int]:
        seen.append(pid)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGCHLD)
            return 0, 0
        return waitpid(pid, 0)

    monkeypatch.setattr(os, "waitpid", miss_the_first_time)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader = end_a_worker_of(server)
    signal.signal(signal.SIGCHLD, lambda *_: server._reap())
    server._reap()

    assert told(reader) == 7
    assert len(seen) == 2


def test_an_exit_code_that_something_else_has_taken_is_not_invented(server: _Server) -> None:
    """A preloaded module may wait for every child of its process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader = end_a_worker_of(server)
    (pid,) = server._workers
    os.waitpid(pid, 0)  # not any child: others may have ended
    server._reap()

    assert told(reader) is None
