"""Calls that leave a line in a log when they begin, and then do something, good or bad."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from support_tasks import RaisesWhenUnpickled, append_line

from safepool.pool.core.policy import Policy

__all__ = ["ENDINGS", "fail_first", "overtime", "run", "runs_of"]

# One row per thing that a call can do after it has signed the log: what becomes of it, in
# words that test_machine.py knows.
ENDINGS: dict[str, str] = {
    "quick": "value",
    "slow": "value",
    "large": "value",
    "forking": "value",
    "closing": "value",
    "raising": "ValueError",
    "unpicklable": "TypeError",
    "unreadable": "ValueError",
    "killed": "WorkerDiedError",
    "exiting": "WorkerDiedError",
}


def run(log: str, number: int, ending: str = "quick", _argument: object = None) -> Any:
    """Sign the log and end in one of the ways above; the value is the number."""
    append_line(log, number)
    match ending:
        case "slow":
            time.sleep(0.005 + number % 10 * 0.005)
        case "large":
            return Large(number)
        case "forking":
            os.fork()
        case "closing":
            os.closerange(3, 1000)
        case "raising":
            raise ValueError(number)
        case "unpicklable":
            return threading.Lock()
        case "unreadable":
            return RaisesWhenUnpickled()
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exiting":
            os._exit(3)
    return number


class Large:
    """A number that takes 100 KB, so that it is no matter for the board."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ballast = bytes(100_000)

    def __eq__(self, other: object) -> bool:
        return self.number == (other.number if isinstance(other, Large) else other)

    __hash__ = None  # type: ignore[assignment]


def overtime(log: str, number: int) -> None:
    """Sign the log, and take longer than the policy below allows."""
    append_line(log, number)
    time.sleep(60)


def fail_first(log: str, number: int) -> int:
    """Sign the log, and be killed unless it has done so before."""
    append_line(log, number)
    if runs_of(log)[number] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


Policy(timeout_s=0.1).attach(overtime)
Policy(retries=2).attach(fail_first)


def runs_of(log: str) -> dict[int, int]:
    """Return how often each number has signed."""
    found: dict[int, int] = {}
    for line in Path(log).read_text().split():
        found[int(line)] = found.get(int(line), 0) + 1
    return found
