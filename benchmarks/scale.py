"""What a call costs as there are more of them, more workers, and more that wait.

    python benchmarks/scale.py [--tasks 100 1000 ...] [--workers 1 2 4 ...] [--pending 100000]

Calls that do nothing. The pools of a table are open at the same time and take turns, Dask and Ray
each alone with ours; figures are medians over the rounds. A pool takes no part in a table for
which it would need more than 3 s by what it took before. Nothing here fails for being slow: read
the ratios, and whether a column grows from table to table.

The last table has a program for each pool: one worker is busy, and so many calls are submitted
behind its call. It shows what each of them keeps in memory that is resident in the program.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import contenders
import tasks
from contenders import CONTENDERS, OURS, Contender, Opened, cpu_s, last_line, pss_kb, result_of
from figures import compare as compare_runs

if TYPE_CHECKING:
    from collections.abc import Callable

COLUMNS = ("wall us", "CPU us")
TASKS = (100, 1_000, 10_000, 100_000, 1_000_000)
WORKERS = (1, 4, 16, 64)
OF_WORKERS = 2_000
# All calls by submit() are pending at once, and the last table has more of those.
MOST_SUBMITTED = 10_000
# Seconds for one run of a pool, by what it took before; ours takes part in all.
MOST_S = 3.0
# Those that fork a worker, and so can have 64 on any machine; others start a Python for each.
FORKED = (
    OURS,
    "stdlib fork",
    "stdlib forkserver",
    "multiprocessing fork",
    "multiprocessing",
    "pebble",
)
STARTED, MOST_STARTED = ("loky", "joblib", "mpire"), 4


def submitted(pool: Opened, count: int) -> None:
    """Submit everything, then wait for it."""
    assert pool.submit is not None
    submit = pool.submit
    for future in [submit(tasks.nothing, n) for n in range(count)]:
        result_of(future)


def mapped(pool: Opened, count: int) -> None:
    """Map at the defaults."""
    pool.map(tasks.nothing, range(count))


def once(run: Callable[[Opened, int], None], count: int, pool: Opened) -> tuple[float, float]:
    """Return the wall and the CPU time of a call, in microseconds."""
    cpu, begun = cpu_s(pool.pids), time.perf_counter()
    run(pool, count)
    took, used = time.perf_counter() - begun, cpu_s(pool.pids) - cpu
    return took / count * 1e6, used / count * 1e6


def by_tasks(
    pools: contenders.Pools,
    how: str,
    run: Callable[[Opened, int], None],
    options: argparse.Namespace,
) -> None:
    """Compare with more and more calls."""
    latest_us: dict[str, float] = {}
    for count in options.tasks:
        if how == "submit" and count > MOST_SUBMITTED:
            break

        def turn(name: str, pool: Opened, count: int = count) -> tuple[float, float]:
            found = once(run, count, pool)
            latest_us[name] = found[0]
            return found

        def in_time(name: str, pool: Opened, count: int = count) -> bool:
            left_out = name != OURS and latest_us.get(name, 0) * count > MOST_S * 1e6
            return not left_out and (how == "map" or pool.submit is not None)

        title = f"{count:,} calls by {how}, each"
        contenders.compare(title, COLUMNS, pools, turn, options.rounds, only=in_time)


def by_workers(workers: int, rounds: int) -> None:
    """Compare with so many workers, and count their memory."""

    def turn(_: str, pool: Opened) -> tuple[float, float, float]:
        found = once(mapped, OF_WORKERS, pool)
        return *found, pss_kb(pool.pids) / 1024 / workers

    def takes_part(one: Contender) -> bool:
        return one.name in FORKED or (workers <= MOST_STARTED and one.name in STARTED)

    for group in contenders.groups(takes_part):
        with contenders.open_all(group, workers, tasks.nothing) as pools:
            title = f"{OF_WORKERS:,} calls by map in {workers} workers, each"
            columns = (*COLUMNS, "MiB per worker")
            contenders.compare(title, columns, pools, turn, rounds)


def keep_pending(name: str, count: int) -> None:
    """Submit calls behind one that is busy, print what each costs, and end with all of them."""
    contender = next(one for one in CONTENDERS if one.name == name)
    with contender.open(1) as pool:
        assert pool.submit is not None
        result_of(pool.submit(tasks.nothing, 0))
        kept = [pool.submit(time.sleep, 1000)]
        before, begun = _resident_bytes(), time.perf_counter()
        kept += [pool.submit(tasks.nothing, n) for n in range(count)]
        took = time.perf_counter() - begun
        held = _resident_bytes() - before
        print(json.dumps([held / count, took / count * 1e6]), flush=True)
        os.killpg(0, signal.SIGKILL)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pending(count: int, rounds: int) -> None:
    """Compare what calls that wait keep in the program."""

    def measured(name: str) -> list[float]:
        command = [sys.executable, __file__, "--child", name, "--pending", str(count)]
        found: list[float] = json.loads(last_line(command) or "")
        return found

    runs = {
        one.name: functools.partial(measured, one.name)
        for one in contenders.available()
        if one.name not in ("joblib", "multiprocessing")
        and not one.has_daemons
        and one.name.partition(" ")[2] in ("", "fork")
    }
    title = f"{count:,} calls that wait, each"
    compare_runs(title, ("bytes resident", "us to submit"), runs, rounds, share_s=8.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--pending", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        keep_pending(options.child, options.pending)
        return
    for group in contenders.groups(lambda one: "spawn" not in one.name):
        with contenders.open_all(group, 2, tasks.nothing) as pools:
            by_tasks(pools, "map", mapped, options)
            by_tasks(pools, "submit", submitted, options)
    for workers in options.workers:
        by_workers(workers, options.rounds)
    pending(options.pending, options.rounds)


if __name__ == "__main__":
    main()
