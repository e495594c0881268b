"""What a pool still does while one of its workers is killed every 100 ms.

    python benchmarks/failure.py [--seconds 3] [--rounds 5]

Tasks of 5 ms are submitted all the time, twice as many as there are workers. Each pool has a fresh
program, the programs take turns, and the worker that returned the latest result is killed. A pool
that has returned nothing for 2 s is given up. Results are counted over all of the time, also if
the pool was broken for most of it. Nothing here fails for being slow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import sys
import time
from typing import Any

from contenders import CONTENDERS, available, last_line
from figures import show, show_outcomes
from tasks import spin_and_tell

WORKERS = 2
TASK_US = 5_000
KILLED_EVERY_S = 0.1
HANGS_AFTER_S = 2.0


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Run tasks in one pool of this process, and kill its workers."""
    contender = next(one for one in CONTENDERS if one.name == name)
    returned = lost = kills = 0
    outcome = "goes on"
    with contender.open(WORKERS) as pool:
        assert pool.submit is not None
        pool.map(spin_and_tell, [TASK_US] * 10 * WORKERS)
        pending: list[Any] = []
        begun = killed = progress = time.monotonic()
        while time.monotonic() - begun < seconds:
            try:
                while len(pending) < 2 * WORKERS:
                    pending.append(pool.submit(spin_and_tell, TASK_US))
            except Exception as error:  # noqa: BLE001 -- of each pool its own
                outcome = f"breaks after {time.monotonic() - begun:.1f} s: {type(error).__name__}"
                break
            first = pending[0]
            try:
                worker = first.result(0.5) if hasattr(first, "result") else first.get(0.5)
            except (TimeoutError, queue.Empty, _multiprocessing_timeout()):
                if time.monotonic() - progress > HANGS_AFTER_S:
                    outcome = f"no result for {HANGS_AFTER_S:g} s, after {progress - begun:.1f} s"
                    break
                continue
            except Exception:  # noqa: BLE001 -- of each pool its own
                lost += 1
            else:
                returned += 1
                if time.monotonic() - killed >= KILLED_EVERY_S:
                    killed = time.monotonic()
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                        kills += 1
            progress = time.monotonic()
            del pending[0]
        print(json.dumps([returned / seconds, lost, kills, outcome]), flush=True)
        # What is left of a pool that hangs would hang here, too.
        os.killpg(0, signal.SIGKILL)
    raise AssertionError


def _multiprocessing_timeout() -> type[Exception]:
    import multiprocessing

    return multiprocessing.TimeoutError


def run(name: str, seconds: float) -> list[Any]:
    """Measure one pool in a program of its own, whose session ends with it."""
    command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds)]
    limit_s = seconds + 15
    output = last_line(command, limit_s=limit_s)
    return json.loads(output) if output else [*[math.nan] * 3, f"not done after {limit_s:g} s"]


def main() -> None:
    """Compare the pools."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child, options.seconds)
    # joblib has no submit(). Workers die in the same way however they began.
    names = [one.name for one in available() if one.name.partition(" ")[2] in ("", "fork")]
    names = [name for name in names if name not in ("joblib", "multiprocessing")]
    found: dict[str, list[list[Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(run(name, options.seconds))
    title = f"tasks of {TASK_US // 1000} ms while a worker is killed every 100 ms"
    rows = {name: [one[:3] for one in runs] for name, runs in found.items()}
    show(title, ("results/s", "lost", "kills"), rows)
    show_outcomes("and then", ["the pool"], {name: [runs[-1][3]] for name, runs in found.items()})


if __name__ == "__main__":
    main()
