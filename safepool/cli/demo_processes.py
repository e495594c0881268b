"""Floor 7: other processes seen from outside: count their threads, end their whole tree.

It starts nothing and measures no time. On Linux it reads ``/proc``; elsewhere threads are
not counted, and a tree is ended by its process group (macOS) or by ``taskkill`` (Windows).

Format: proc_pid_stat(5).
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safepool import procfs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["count_threads", "end_tree", "kill", "undisturbed"]

_PROC = Path("/proc")

# A process that its quota has frozen dies when it runs again: at most one period (0.1 s) for
# each share of the quota that it owes. Longer means that the kernel itself holds it.
_GONE_WITHIN_S = 5.0


def count_threads(pids: Iterable[int]) -> dict[int, int] | None:
    """Count the threads of each process, as the kernel lists them.

    Args:
        pids: The processes; those that have ended are left out of the answer.

    Returns:
        Threads by process id, the main thread included; ``None`` where this system does
        not list them (everywhere but on Linux).
    """
    if platform.system() != "Linux":
        return None
    return {pid: count for pid in pids if (count := len(procfs.threads(pid)))}


def end_tree(process: subprocess.Popen[str]) -> None:
    """End a child process and everything that it has started, and wait for their end.

    Args:
        process: A child that was started with ``start_new_session=True`` (not used on
            Windows). It may have ended already.
    """
    if sys.platform == "win32":
        # Ends the children by their parent's id; there is no group to signal.
        command = ["taskkill", "/T", "/F", "/PID", str(process.pid)]
        subprocess.run(command, check=False, capture_output=True)
        process.wait()
    else:
        # Stopped first: a process that still runs could start another one behind the listing.
        # Popen signals only a child that it has not waited for, so never a reused id.
        process.send_signal(signal.SIGSTOP)
        below = [] if process.returncode is not None else _descendants(process.pid)
        for pid in below:
            kill(pid)
        # Its own session is its own process group: this reaches what has lost its parent.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_until_gone(below)


def kill(pid: int) -> None:
    """Kill one process, unless it has ended already."""
    if sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep a second Ctrl-C, a SIGTERM or a closed terminal from cutting a clean-up short.

    Outside the main thread Python never delivers them, so there is nothing to hold off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: installed by native code, which Python cannot put back.
            if handler is not None:
                signal.signal(number, handler)


def _descendants(pid: int) -> list[int]:
    """Return every process below this one; none where there is no ``/proc``."""
    children: dict[int, list[int]] = {}
    for number in procfs.processes():
        if (stat := procfs.read_stat(number)) is not None:
            children.setdefault(stat.parent, []).append(number)
    found: list[int] = []
    reached = [pid]
    while reached:
        below = children.get(reached.pop(), [])
        found += below
        reached += below
    return found


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + _GONE_WITHIN_S
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    stat = procfs.read_stat(pid)
    # Zombies have ended; only their parent, or init, can take them off the list.
    return stat is not None and stat.state not in "ZX"
