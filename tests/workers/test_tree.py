"""Only what a worker has started ends with it, whoever has its number by now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from support_processes import wait_until

from safepool.workers import tree

if sys.platform != "linux":
    pytest.skip("descendants are found in /proc", allow_module_level=True)


class Process:
    """A process in the words of ``Worker``."""

    def __init__(self, command: list[str]) -> None:
        self._started = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.process = self
        self.pid = self._started.pid

    def is_alive(self) -> bool:
        return self._started.poll() is None

    def end(self, number: int) -> None:
        self._started.send_signal(number)

    def line(self) -> int:
        assert self._started.stdout is not None
        return int(self._started.stdout.readline())

    def finish(self) -> None:
        self._started.kill()
        with self._started:
            pass


def test_a_number_that_is_another_process_by_now_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A descendant ended after it was seen, and its number went to somebody else."""
    worker = Process(["sh", "-c", "sleep 1000 & echo $!; wait"])
    stranger = Process(["sleep", "1000"])
    child = worker.line()
    (seen,) = tree.descendants(worker.pid)
    assert seen.pid == child
    find = tree.descendants
    (now,) = (one for one in find(os.getpid()) if one.pid == stranger.pid)

    def find_with_one_that_has_ended(pid: int) -> set[tree.Descendant]:
        return {*find(pid), tree.Descendant(now.pid, now.started - 1)}

    monkeypatch.setattr(tree, "descendants", find_with_one_that_has_ended)
    sent: list[tuple[int, int]] = []
    kill = tree.os.kill

    def note(pid: int, number: int) -> None:
        sent.append((pid, number))
        kill(pid, number)

    monkeypatch.setattr(tree.os, "kill", note)
    try:
        given: Any = worker
        ending = tree.TreeEnd(given)
        wait_until(ending.advance)
        sent = [(pid, number) for pid, number in sent if pid != worker.pid]
        assert sent == [(child, signal.SIGSTOP), (child, signal.SIGKILL)]
        assert stranger.is_alive()
    finally:
        monkeypatch.undo()
        worker.finish()
        stranger.finish()
