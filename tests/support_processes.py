"""Other processes, seen from a test. Linux: ``/proc`` is the source."""

from __future__ import annotations

import time
from pathlib import Path


def still_alive(pids: list[int], *, after_s: float) -> list[int]:
    """Return the processes that live on after so many seconds; a zombie does not live."""
    deadline = time.monotonic() + after_s
    while True:
        alive = [pid for pid in pids if _is_alive(pid)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
