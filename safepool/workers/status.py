"""What the system says of one process that runs, by its number. Files in, numbers out.

Source: proc_pid_status(5). Elsewhere than on Linux there is nothing to read.

Not covered:
    * A number that belongs to another process by now: who asks knows that its process runs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

__all__ = ["Status", "obstacle", "parse_status", "read_status", "threads_that_block"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A process at one moment.

    Attributes:
        state: One letter: ``R`` runs, ``S`` and ``D`` wait, ``T`` and ``t`` are stopped,
            ``Z`` has ended.
        threads: How many the system counts, native ones included.
        caught: Signals that have a handler; bit 0 is signal 1.
        pending: Signals that were sent and not delivered.
    """

    state: str
    threads: int
    caught: int
    pending: int

    def catches(self, number: int) -> bool:
        """Tell whether the signal would call a handler."""
        return bool(self.caught >> (number - 1) & 1)

    def awaits(self, number: int) -> bool:
        """Tell whether the signal is still to be delivered."""
        return bool(self.pending >> (number - 1) & 1)


def parse_status(text: str) -> Status | None:
    r"""Parse a ``/proc/pid/status``; ``None`` if a field is missing or not a number.

    Example:
        >>> parse_status("State:\tS (sleeping)\nThreads:\t3\nSigPnd:\t0\nShdPnd:\t2\nSigCgt:\t1\n")
        Status(state='S', threads=3, caught=1, pending=2)
    """
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        return Status(
            state=fields["State"].split()[0],
            threads=int(fields["Threads"]),
            caught=int(fields["SigCgt"], 16),
            pending=int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16),
        )
    except (KeyError, ValueError, IndexError):
        return None


def read_status(pid: int) -> Status | None:
    """Return what the system says of a process; ``None`` if it says nothing."""
    text = _read(f"/proc/{pid}/status")
    return None if text is None else parse_status(text)


def obstacle(pid: int) -> str:
    """Say why a process may still be there that was sent ``SIGKILL``."""
    fields = dict(line.split(":", 1) for line in (_read(f"/proc/{pid}/status") or "").splitlines())
    users = fields.get("Uid", "").split()
    geteuid: Any = getattr(os, "geteuid", None)  # Windows has none
    mine = "" if geteuid is None else str(geteuid())
    if users and mine not in {"0", *users[:3:2]}:
        return f"it belongs to user {users[0]}, whose processes user {mine} may not signal"
    state = fields.get("State", "an unknown state").strip()
    return f"SIGKILL has no effect yet, it is in a system call ({state})"


def threads_that_block(pid: int, number: int) -> frozenset[str]:
    """Return the ids of a process's threads that a signal cannot reach now.

    A thread blocks a signal as long as it is in its handler.
    """
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return frozenset()
    return frozenset(
        thread for thread in threads if _blocks(f"/proc/{pid}/task/{thread}/status", number)
    )


def _blocks(path: str, number: int) -> bool:
    for line in (_read(path) or "").splitlines():
        if line.startswith("SigBlk:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
