"""A worker's process, as its pool and a program's own threads see it at one moment."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import pytest

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

from safepool import linux
from safepool.workers import forked
from safepool.workers.forked import ForkedProcess
from safepool.workers.start import EXIT_CODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Where processes share the run there is a second thread; Python 3.15 raises after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork")


@pytest.fixture
def process() -> Iterator[ForkedProcess]:
    """One that has ended with exit code 7, which nobody has asked for yet."""
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    pidfd = linux.pidfd_open(pid)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.waitpid(pid, 0)
    os.write(writer, EXIT_CODE.pack(7))
    os.close(writer)
    process = ForkedProcess("worker", pid, pidfd, reader)
    yield process
    process.close()


class Beside:
    """Something that another thread does in the middle of a call, if it need not wait for its end.

    Attributes:
        result: What it returned.
        came_between: It had ended before the call.
    """

    def __init__(self, does: Callable[[], object]) -> None:
        self.result: object = None
        self.came_between = False
        self._does = does
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.result = self._does()

    def run(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
            self._thread.join(0.2)
            self.came_between = not self._thread.is_alive()

    def end(self) -> None:
        self._thread.join(30)


def test_an_exit_code_that_the_program_asks_for_is_there_for_the_pool_too(
    process: ForkedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in a pipe, once: who comes second finds the pipe empty and at its end."""
    read = os.read
    pool = Beside(lambda: process.wait(5))

    def read_beside(descriptor: int, size: int) -> bytes:
        told = read(descriptor, size)
        pool.run()
        return told

    monkeypatch.setattr(os, "read", read_beside)
    mine = process.exitcode
    monkeypatch.undo()
    pool.end()

    assert (mine, pool.result) == (7, 7)


def test_a_signal_of_the_program_meets_this_process_or_none(
    process: ForkedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool closes the descriptor that names it, and its number is soon another worker's."""
    pool = Beside(process.close)

    def send_beside(_descriptor: int, _number: int) -> None:
        pool.run()

    monkeypatch.setattr(linux, "pidfd_send_signal", send_beside)
    process.kill()
    pool.end()

    assert not pool.came_between
    assert process.closed


def test_who_joins_a_process_does_not_wait_for_another(
    process: ForkedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool closes the descriptor meanwhile, and its number becomes that of something else."""
    pool = Beside(process.close)
    is_readable = forked.is_readable
    waited_for: list[int] = []
    sentinel = process.sentinel

    def wait_beside(descriptor: int, timeout_s: float | None) -> bool:
        if timeout_s == 0.0:
            return False  # it runs still
        waited_for.append(descriptor)
        pool.run()
        return is_readable(descriptor, timeout_s)

    monkeypatch.setattr(ForkedProcess, "exitcode", None)
    monkeypatch.setattr(forked, "is_readable", wait_beside)
    process.join(5)
    pool.end()

    assert process.closed
    assert len(waited_for) == 1
    assert waited_for != [sentinel]
