"""From nothing to workers that have NumPy and SciPy loaded: the time, and the memory.

    python benchmarks/startup.py [--workers 8] [--rounds 5]

Each figure is from a fresh interpreter that has imported NumPy and SciPy itself; the pools
take turns. Measured is what is the default of each pool; a pool that preloads what the
caller has imported starts with it, the others let every worker import it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import contenders
import tasks

# Enough for each worker to get some, whatever the others do meanwhile.
CALLS_PER_WORKER = 4
MEASURED = ("stdlib forkserver", "stdlib spawn", "loky", "multiprocessing", contenders.OURS)
FIELDS = ("first_s", "second_s", "pss_mb", "cpu_s")


def measure(name: str, workers: int) -> dict[str, float]:
    """Open the pool twice in this process.

    Returns:
        Seconds until all workers are ready, the first and the second time; MiB of the
        workers together and per worker; CPU seconds of the first time.
    """
    import numpy as np
    import scipy.linalg

    assert np
    assert scipy.linalg
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    found: dict[str, float] = {}
    for which in ("first", "second"):
        before = contenders.cpu_s(())
        begun = time.perf_counter()
        with contender.open(workers) as pool:
            pids = _fill(pool, workers)
            found[f"{which}_s"] = time.perf_counter() - begun
            if which == "first":
                found["cpu_s"] = contenders.cpu_s(contenders.descendants()) - before
                found["pss_mb"] = contenders.pss_kb(pids) / 1024
    return found


def _fill(pool: contenders.Opened, workers: int) -> set[int]:
    """Return the ids of the workers when so many have answered."""
    assert pool.submit is not None
    pids: set[int] = set()
    while len(pids) < workers:
        calls = [
            pool.submit(tasks.numpy_and_scipy_loaded, n) for n in range(CALLS_PER_WORKER * workers)
        ]
        pids |= {call.result() if hasattr(call, "result") else call.get() for call in calls}
    return pids


def main() -> None:
    """Print one row per pool, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.workers)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MEASURED}
    for _ in range(options.rounds):
        for name in MEASURED:
            arguments = ["--child", name, "--workers", str(options.workers)]
            done = subprocess.run(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True
            )
            runs[name].append(json.loads(done.stdout))
    medians = {
        name: {field: statistics.median(run[field] for run in found) for field in FIELDS}
        for name, found in runs.items()
    }
    ours = medians[contenders.OURS]
    print(
        f"Python {sys.version.split()[0]}, {options.workers} workers, {os.cpu_count()} CPUs, ",
        end="",
    )
    print(f"load {os.getloadavg()[0]:.1f}, median of {options.rounds} rounds; / is to ours")
    heads = {"first_s": "first s", "second_s": "second s", "pss_mb": "Pss MiB", "cpu_s": "CPU s"}
    print(" " * 20 + "".join(f"{heads[field]:>12}{'/ ours':>9}" for field in FIELDS))
    for name, row in medians.items():
        shown = "".join(f"{row[f]:>12.3f}{row[f] / ours[f]:>9.2f}" for f in FIELDS)
        print(f"{name:20}{shown}")


if __name__ == "__main__":
    main()
