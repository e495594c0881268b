"""A process and what it has started, ended together.

Source: proc_pid_stat(5), field 4. Elsewhere than on Linux only the process itself is ended.

Not covered:
    * A process that its parent has left behind (a daemon): nothing says whose it was.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safepool.workers.process import WorkerProcess

__all__ = ["descendants", "end_with_descendants"]

_KILL = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
_STOP = None if sys.platform == "win32" else signal.SIGSTOP


def end_with_descendants(worker: WorkerProcess) -> None:
    """Kill a worker and every process that descends from it."""
    if _STOP is None or sys.platform == "win32":
        worker.end(_KILL)
        return
    # Stopped first: it can start nothing more, nor end and leave its children to init.
    worker.end(_STOP)
    ended: set[int] = set()
    # A child may start others while we look; each round sees those of the one before.
    while found := descendants(worker.pid) - ended:
        for pid in found:
            try:
                os.kill(pid, _STOP)
            except (ProcessLookupError, PermissionError):
                pass
        ended |= found
    worker.end(_KILL)
    for pid in ended:
        try:
            os.kill(pid, _KILL)
        except (ProcessLookupError, PermissionError):
            pass


def descendants(pid: int) -> set[int]:
    """Return the process ids of children, their children, and so on; empty off Linux."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return set()
    for name in names:
        if name.isdecimal() and (parent := _parent(name)) is not None:
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    look_at = [pid]
    while look_at:
        for child in children.get(look_at.pop(), ()):
            if child not in found:
                found.add(child)
                look_at.append(child)
    return found


def _parent(name: str) -> int | None:
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            # The command in parentheses may hold anything, parentheses and blanks too.
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[1])
    except (OSError, IndexError, ValueError):
        return None
