"""Floor 7: ``safepool top PID``: present work of another process's workers, on Linux.

The command reads the boards that the process shares with its workers (``workers.board``), and
``/proc``. It sends nothing, so it disturbs no worker and no pool, and shows a stuck pool as well.

Not covered:
    * A process in another process-id namespace, such as a container's, seen from outside: its
      workers have other numbers there. Run the command in the container.
    * Workers of a pool without boards (no ``memfd_create`` or ``membarrier``).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

from safepool import procfs
from safepool.cli.text import WIDTH, CommandError, as_ascii, counted, json_of
from safepool.shown import size
from safepool.workers.board import boards_of

_EVERY_S = 1.0
# ECMA-48, 8.3.21 "CUP" and 8.3.39 "ED": to the top left, and nothing below.
_CLEAR = "\x1b[H\x1b[J"


class TopError(CommandError):
    """The workers of a process cannot be shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """State of one worker."""

    pid: int
    task: str | None
    running_s: float | None
    resident_bytes: int | None
    native_threads: int


def read(pid: int) -> list[Row]:
    """Read the workers of a process.

    Raises:
        TopError: The process does not exist, or access is refused.
    """
    if not os.path.isdir("/proc/self/fd"):
        raise TopError("top reads /proc, which only Linux has")
    try:
        owner = _owner(pid)
        if owner != _owner("self"):
            raise TopError(
                f"process {pid} belongs to user {owner}, and top shows processes of your own "
                f"user. Run it as that user: sudo -u '#{owner}' safepool top {pid}"
            )
        boards = boards_of(pid)
    except PermissionError as error:
        raise TopError(
            f"the system hides process {pid}: {error.strerror}. Run top as its user, in its "
            "container"
        ) from error
    except OSError as error:
        raise TopError(f"there is no process {pid}. Pass the id of a running process") from error
    now_ns = time.monotonic_ns()
    found = []
    for board in boards:
        threads = len(procfs.threads(board.pid))
        if threads:
            runs_s = None if board.name is None else max(0, now_ns - board.since_ns) / 1e9
            memory = procfs.resident_bytes(board.pid)
            found.append(Row(board.pid, board.name, runs_s, memory, threads))
    return found


def _owner(process: int | str) -> int:
    return os.stat(f"/proc/{process}").st_uid


def as_text(pid: int, rows: Iterable[Row]) -> str:
    """Return the workers for people."""
    rows = list(rows)
    lines = [f"process {pid}: {counted(len(rows), 'worker')}", ""]
    lines.append(f"{'pid':>8}{'since s':>10}{'memory':>12}{'threads':>9}  task")
    for row in rows:
        since = "-" if row.running_s is None else f"{row.running_s:.1f}"
        memory = "-" if row.resident_bytes is None else size(row.resident_bytes)
        head = f"{row.pid:>8}{since:>10}{memory:>12}{row.native_threads:>9}  "
        # The end of a long name is more useful than its beginning.
        lines.append(head + as_ascii(row.task or "(idle)")[len(head) - WIDTH :])
    return "\n".join(lines)


def run(pid: int, *, as_json: bool) -> int:
    """Print the workers of a process; on a terminal again and again until Ctrl-C.

    Raises:
        TopError: The workers cannot be shown, or the process has none.
    """
    rows = read(pid)
    if not rows:
        raise TopError(
            f"process {pid} has no worker of a safepool pool. Pass the process that has made the "
            "pool; workers start with its first task"
        )
    if as_json:
        print(json_of({"pid": pid, "workers": rows}))
        return 0
    if sys.stdout is None or not sys.stdout.isatty():
        print(as_text(pid, rows))
        return 0
    while True:
        print(_CLEAR + as_text(pid, rows), flush=True)
        time.sleep(_EVERY_S)
        try:
            rows = read(pid)
        except TopError as error:
            print(error)
            return 0
