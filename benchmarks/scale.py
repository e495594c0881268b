"""What a call costs as there are more of them, more workers, and more that wait.

    python benchmarks/scale.py [--tasks 100 1000 ...] [--workers 1 2 4 ...] [--rounds 3]

Calls that do nothing. The pools of a row are open at the same time and take turns; figures are
medians over the rounds. Nothing here fails for being slow: read the ratios, and whether a column
grows from table to table.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import tasks
from contenders import cpu_s, descendants
from figures import OURS, show

import safepool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COLUMNS = ("wall us", "CPU us")
TASKS = (100, 1_000, 10_000, 100_000, 1_000_000)
WORKERS = (1, 2, 4, 8, 16, 32, 64)
# The standard pool takes a minute for a million by map().
MOST_BY_EACH = 100_000
OF_WORKERS = 10_000


@contextlib.contextmanager
def pools(workers: int) -> Iterator[dict[str, Any]]:
    """Open pools of so many workers, all of which have run something."""
    context = multiprocessing.get_context("forkserver")
    with (
        ProcessPoolExecutor(workers, mp_context=context) as standard,
        context.Pool(workers) as multi,
        safepool.ProcessPool(workers) as ours,
    ):
        opened = {OURS: ours, "stdlib": standard, "Pool": multi}
        for pool in opened.values():
            list(pool.map(tasks.nothing, range(50 * workers)))
        yield opened


def submitted(pool: Any, count: int) -> None:
    """Submit everything, then wait for it."""
    if hasattr(pool, "submit"):
        for future in [pool.submit(tasks.nothing, n) for n in range(count)]:
            future.result()
    else:
        for result in [pool.apply_async(tasks.nothing, (n,)) for n in range(count)]:
            result.get()


def mapped(pool: Any, count: int) -> None:
    """Map at the defaults."""
    for _ in pool.map(tasks.nothing, range(count)):
        pass


def compare(
    title: str, opened: dict[str, Any], run: Callable[[Any, int], None], count: int, rounds: int
) -> None:
    """Let pools take turns."""
    pids = descendants()
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for name, pool in opened.items():
            if name == "stdlib" and count > MOST_BY_EACH:
                continue
            cpu, begun = cpu_s(pids), time.perf_counter()
            run(pool, count)
            took, used = time.perf_counter() - begun, cpu_s(pids) - cpu
            rows.setdefault(name, []).append((took / count * 1e6, used / count * 1e6))
    show(title, COLUMNS, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with pools(2) as opened:
        for count in options.tasks:
            compare(f"{count:,} calls by map, each", opened, mapped, count, options.rounds)
        for count in options.tasks:
            # All of them are pending at once.
            if count <= MOST_BY_EACH:
                title = f"{count:,} calls by submit, each"
                compare(title, opened, submitted, count, options.rounds)
    for workers in options.workers:
        with pools(workers) as opened:
            title = f"{OF_WORKERS:,} calls by map in {workers} workers, each"
            compare(title, opened, mapped, OF_WORKERS, options.rounds)


if __name__ == "__main__":
    main()
