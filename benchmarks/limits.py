"""How long reading the limits takes, beside what loky and joblib take for their count.

Run: ``python benchmarks/limits.py``. Every figure is microseconds per call, the minimum and
the median over the rounds; a ratio below 1 means that ours is the faster one.

They differ in what they read: loky and joblib one file at its conventional name, ours the
own group, the mounts and every ancestor, and `read_limits` memory, processes and files too.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

from figures import show

from safepool import limits

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 300

# A pool's start waits for one full reading.
TARGET_US = 1000.0


def measure(call: Callable[[], object]) -> list[float]:
    """Return the microseconds of each of many calls."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return times


def main() -> int:
    """Print the table; 1 if the full reading misses its target."""
    calls: dict[str, Callable[[], object]] = {
        "read_limits": limits.read_limits,
        "read_cpu_limits": limits.read_cpu_limits,
        "QuotaWatch.read": limits.QuotaWatch().read,
        "read_throttling": limits.read_throttling,
    }
    others: dict[str, Callable[[], object]] = {}
    for name in ("loky", "joblib"):
        try:
            module = __import__(name)
        except ImportError:
            print(f"{name} is not installed: not compared")
            continue
        others[f"{name}.cpu_count"] = module.cpu_count
    measured = {name: measure(call) for name, call in {**calls, **others}.items()}
    rows = {name: [(us,) for us in found] for name, found in measured.items()}
    show("one reading", ["us"], rows, base="read_limits")
    median = statistics.median(measured["read_limits"])
    print(f"read_limits: {median:.0f} us of {TARGET_US:.0f} us allowed")
    return int(median > TARGET_US)


if __name__ == "__main__":
    sys.exit(main())
