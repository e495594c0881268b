"""A process and its descendants, ended together.

Off Linux only the process itself is ended.

Not covered:
    * A process that its parent has left behind (a daemon): nothing says whose it was.
    * A process of another user, which this one may not signal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from safepool import procfs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    class Root(Protocol):
        """A process that has started others."""

        pid: int

        def is_alive(self) -> bool:
            """Return whether it has not ended."""
            raise NotImplementedError

        def end(self, number: int) -> None:
            """Send it a signal."""


# For all of them to stop: a fork that is under way in the kernel is finished first, which takes
# tens of milliseconds for each gigabyte.
_STOPPING_S = 1.0
# A thread that sleeps uninterruptibly for so long (vfork(2) waits so for its child, which is
# stopped) does not fork now.
_UNINTERRUPTIBLE_S = 0.05


if sys.platform == "win32":
    _STOP = KILL = signal.SIGTERM  # TerminateProcess; there are no descendants to be found
    _AT_ONCE = 0
else:
    _STOP, KILL = signal.SIGSTOP, signal.SIGKILL
    _AT_ONCE = os.WNOHANG


class TreeEnd:
    """The end of a worker and of every process that descends from it, in steps that do not wait.

    First all processes are stopped. A stopped process cannot start another, and cannot end and
    orphan its children. A fork in progress ends before the stop, and its child is found. Then all
    processes are killed.
    """

    def __init__(self, worker: Root) -> None:
        self._worker = worker
        self.found: set[Descendant] = set()
        self._begun = time.monotonic()
        worker.end(_STOP)

    def advance(self) -> bool:
        """Do all possible steps; return whether all were killed. If not, call again soon."""
        worker = self._worker
        elapsed_s = time.monotonic() - self._begun
        at_rest = "TtZXxD" if elapsed_s > _UNINTERRUPTIBLE_S else "TtZXx"
        if worker.is_alive():  # otherwise the number may belong to another process by now
            pids = [worker.pid, *(one.pid for one in self.found)]
            stopped = all(procfs.states(pid).issubset(at_rest) for pid in pids)
            # A child may start others while we look; each round sees those of the one before.
            new = descendants(worker.pid) - self.found
            signal_all(new, _STOP)
            self.found |= new
            if (new or not stopped) and elapsed_s < _STOPPING_S:
                return False
            worker.end(KILL)
        signal_all(self.found, KILL)
        return True


class Descendant(NamedTuple):
    """One process, and when it was started, in ticks since the system started.

    Its id alone is not enough: another process may get the id later.
    """

    pid: int
    started: int


def descendants(pid: int) -> set[Descendant]:
    """Return children, their children, and so on; empty off Linux."""
    children: dict[int, list[Descendant]] = {}
    for number in procfs.processes():
        if (stat := procfs.read_stat(number)) is not None:
            children.setdefault(stat.parent, []).append(Descendant(number, stat.started))
    found: set[Descendant] = set()
    look_at = [pid]
    while look_at:
        for child in children.get(look_at.pop(), ()):
            if child not in found:
                found.add(child)
                look_at.append(child.pid)
    return found


def signal_all(processes: Iterable[Descendant], number: int) -> None:
    """Send a signal to each process whose id was not reused."""
    for pid, started in processes:
        stat = procfs.read_stat(pid)
        if stat is None or stat.started != started:
            continue  # it has ended, and this process is not related
        try_to_signal(pid, number)


def try_to_signal(pid: int, number: int) -> None:
    """Send a signal, if the process exists and this one may signal it."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def bury(processes: Collection[Descendant]) -> set[Descendant]:
    """Reap processes that were handed over to this process, which has not started them.

    In a container they come to its first process. Never waits; returns those that have not ended.
    """
    left = set()
    pids = {one.pid for one in processes}
    for one in processes:
        stat = procfs.read_stat(one.pid)
        if stat is None or stat.started != one.started:
            continue  # another thread has waited for it
        if stat.parent in pids:
            left.add(one)  # it comes to this process when that one ends
        elif stat.parent == os.getpid():
            try:
                if os.waitpid(one.pid, _AT_ONCE)[0] == 0:
                    left.add(one)
            except ChildProcessError:
                pass
    return left
