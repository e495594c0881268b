"""What a trace costs: the same work in a pool with one and in a pool without, in turns.

    python benchmarks/trace.py [--rounds 101]

Both pools are open all the time and each round runs both, in an order that alternates; figures are
medians over the rounds. CPU is that of this process and of all workers. Nothing here fails for
being slow: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tasks
from contenders import cpu_s, descendants
from figures import show

import safepool

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 2


def submitted(pool: safepool.ProcessPool, count: int, microseconds: int) -> None:
    """Submit everything, then wait for it."""
    for future in [pool.submit(tasks.spin, microseconds) for _ in range(count)]:
        future.result()


def mapped(pool: safepool.ProcessPool, count: int, microseconds: int) -> None:
    """Map at the defaults."""
    for _ in pool.map(tasks.spin, [microseconds] * count):
        pass


def tiny(pool: safepool.ProcessPool, count: int, _: int) -> None:
    """Map what does nothing."""
    for _ in pool.map(tasks.nothing, range(count)):
        pass


def tiny_submitted(pool: safepool.ProcessPool, count: int, _: int) -> None:
    """Submit what does nothing."""
    for future in [pool.submit(tasks.nothing, n) for n in range(count)]:
        future.result()


# One row per kind of work: how, how many, and how long each takes.
WORK: dict[str, tuple[Callable[[safepool.ProcessPool, int, int], None], int, int]] = {
    "1 ms, submit": (submitted, 200, 1000),
    "1 ms, map": (mapped, 200, 1000),
    "0.1 ms, map": (mapped, 2000, 100),
    "nothing, submit": (tiny_submitted, 4000, 0),
    "nothing, map": (tiny, 100_000, 0),
}


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--only", nargs="*", choices=WORK)
    options = parser.parse_args()
    print(
        f"Python {sys.version.split()[0]}, {WORKERS} workers, {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}, {options.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        with safepool.ProcessPool(WORKERS) as plain:
            mapped(plain, 200, 1000)
            plain_pids = descendants()
            with safepool.ProcessPool(WORKERS, trace=path) as traced:
                mapped(traced, 200, 1000)
                pids = {plain: plain_pids, traced: descendants()}
                pools = [plain, traced]
                for name, (run, count, microseconds) in WORK.items():
                    if options.only and name not in options.only:
                        continue
                    took: dict[safepool.ProcessPool, list[float]] = {plain: [], traced: []}
                    used: dict[safepool.ProcessPool, list[float]] = {plain: [], traced: []}
                    for _ in range(options.rounds):
                        pools.reverse()
                        for pool in pools:
                            cpu, begun = cpu_s(pids[traced]), time.perf_counter()
                            run(pool, count, microseconds)
                            took[pool].append(time.perf_counter() - begun)
                            used[pool].append(cpu_s(pids[traced]) - cpu)
                    rows = {
                        what: [
                            (wall / count * 1e6, cpu / count * 1e6)
                            for wall, cpu in zip(took[pool], used[pool], strict=True)
                        ]
                        for what, pool in (("without", plain), ("with a trace", traced))
                    }
                    show(name, ("wall us", "CPU us"), rows, base="without")
        size, events = path.stat().st_size, len(json.loads(path.read_text()))
    print(f"the file: {size:,} bytes, {events:,} events, {size / events:.0f} bytes each")


if __name__ == "__main__":
    main()
