"""A process and what it has started, ended together.

Source: proc_pid_stat(5), fields 4 and 22. Off Linux only the process itself is ended.

Not covered:
    * A process that its parent has left behind (a daemon): nothing says whose it was.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.workers.process import WorkerProcess

__all__ = ["Descendant", "descendants", "end_with_descendants"]


def end_with_descendants(worker: WorkerProcess) -> None:
    """Kill a worker and every process that descends from it."""
    if sys.platform == "win32":
        worker.end(signal.SIGTERM)  # TerminateProcess
    else:
        # Stopped first: it can start nothing more, nor end and leave its children to init.
        worker.end(signal.SIGSTOP)
        if not worker.process.is_alive():
            return  # its number may be somebody else's by now
        ended: set[Descendant] = set()
        # A child may start others while we look; each round sees those of the one before.
        while found := descendants(worker.pid) - ended:
            _signal_all(found, signal.SIGSTOP)
            ended |= found
        worker.end(signal.SIGKILL)
        _signal_all(ended, signal.SIGKILL)


class Descendant(NamedTuple):
    """One process, which its number alone does not name: that may be another's later.

    Attributes:
        pid: Its process id.
        started: When, in ticks since the system started.
    """

    pid: int
    started: int


def descendants(pid: int) -> set[Descendant]:
    """Return children, their children, and so on; empty off Linux."""
    children: dict[int, list[Descendant]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return set()
    for name in names:
        if name.isdecimal() and (read := _parent_and_start(int(name))) is not None:
            parent, started = read
            children.setdefault(parent, []).append(Descendant(int(name), started))
    found: set[Descendant] = set()
    look_at = [pid]
    while look_at:
        for child in children.get(look_at.pop(), ()):
            if child not in found:
                found.add(child)
                look_at.append(child.pid)
    return found


def _signal_all(processes: Iterable[Descendant], number: int) -> None:
    for pid, started in processes:
        read = _parent_and_start(pid)
        if read is None or read[1] != started:
            continue  # it has ended, and this one is nobody's business
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


def _parent_and_start(pid: int) -> tuple[int, int] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command in parentheses may hold anything, parentheses and blanks too.
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[1]), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
