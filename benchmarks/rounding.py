"""Floor against ceil under real quotas: throughput, and how long everybody is frozen.

    sudo python benchmarks/rounding.py [--seconds 4] [--rounds 3]

Linux, as root: each run is in a control group with a real quota. The two roundings take
turns. Workers burn CPU in tasks of 10 ms; a thread of the parent asks to be woken each
millisecond and notes how late it was, which is what a heartbeat, an event loop or a user
of the parent feels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from typing import Any

from figures import show

QUOTAS = (1.1, 1.5, 1.9)
ROUNDINGS = ("floor", "ceil")
LATE_S = 0.005
COLUMNS = {
    "tasks_per_s": "tasks/s",
    "workers": "workers",
    "frozen_ms_per_s": "parent frozen ms/s",
    "worst_ms": "worst ms",
}


def burn(_: int) -> None:
    """Use 10 ms of CPU time."""
    end = time.thread_time() + 0.010
    while time.thread_time() < end:
        pass


def measure(rounding: Any, seconds: float) -> dict[str, float]:
    """Run tasks for so long in this process, which is in the group already."""
    import safepool

    late: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            asked = time.monotonic()
            time.sleep(0.001)
            late.append(time.monotonic() - asked - 0.001)

    with safepool.ProcessPool(rounding=rounding) as pool:
        workers = pool._max_workers
        list(pool.map(burn, range(4 * workers)))
        thread = threading.Thread(target=beat)
        thread.start()
        started, done = time.monotonic(), 0
        futures = [pool.submit(burn, n) for n in range(3 * workers)]
        while time.monotonic() - started < seconds:
            futures.pop(0).result()
            futures.append(pool.submit(burn, 0))
            done += 1
        took = time.monotonic() - started
        stop.set()
        thread.join()
        pool.shutdown(cancel_futures=True)
    return {
        "workers": workers,
        "tasks_per_s": done / took,
        "frozen_ms_per_s": 1000 * sum(gap for gap in late if gap > LATE_S) / took,
        "worst_ms": 1000 * max(late),
    }


def main() -> None:
    """Compare, and print one row per quota and rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=ROUNDINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.seconds)))
        return

    from host.groups import quota_group

    for quota in QUOTAS:
        runs: dict[str, list[list[float]]] = {rounding: [] for rounding in ROUNDINGS}
        with quota_group(quota) as group:
            for _ in range(options.rounds):
                for rounding in ROUNDINGS:
                    enter = f'echo 0 > "{group.members_file}" && exec "$@"'
                    arguments = [sys.executable, __file__, "--child", rounding]
                    done = subprocess.run(
                        ["sh", "-c", enter, "sh", *arguments, "--seconds", str(options.seconds)],
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    runs[rounding].append([json.loads(done.stdout)[key] for key in COLUMNS])
        show(f"a quota of {quota:g} CPUs", list(COLUMNS.values()), runs, base="floor")


if __name__ == "__main__":
    main()
