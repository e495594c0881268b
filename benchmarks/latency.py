"""What one call takes from its caller back to its caller, beside the standard pools.

    python benchmarks/latency.py [--rounds 9] [--calls 300]

One worker for a sequential caller, two for coroutines. All pools are open at the same time and
take turns in every round; figures are medians over the rounds, in microseconds for each call, with
the ratio to ours before them: above 1 is slower than ours. CPU is that of the program and of the
workers, each for itself. Nothing here fails for being slow: read the ratios.

On a machine that idles, a wake-up of a sleeping processor takes most of the wall time; on a busy
one the CPU time does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING, Any

import tasks
from contenders import OURS, Opened, available, cpu_s, descendants
from figures import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Does so many calls.
    Run = Callable[[int], object]


def of_script(value: int) -> int:
    """Do nothing, in ``__main__``."""
    return value


def round_trips(pool: Opened, function: Callable[[int], int], calls: int) -> None:
    """Submit one, wait for it, submit the next."""
    assert pool.submit is not None
    for number in range(calls):
        future = pool.submit(function, number)
        # multiprocessing's and mpire's have get().
        _ = future.result() if hasattr(future, "result") else future.get()


def waited_for(pool: Any, calls: int) -> None:
    """Wait for each by ``wait()``."""
    for number in range(calls):
        wait([pool.submit(tasks.nothing, number)])


def maps_of_two(pool: Any, function: Callable[[int], int], calls: int) -> None:
    """Map two items, again and again."""
    for _ in range(calls):
        list(pool.map(function, (1, 2)))


def awaited(pool: Any, at_once: int, calls: int) -> None:
    """Let so many coroutines call and wait."""

    async def one(loop: asyncio.AbstractEventLoop) -> None:
        for number in range(max(1, calls // at_once)):
            await loop.run_in_executor(pool, tasks.nothing, number)

    async def all_of_them() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[one(loop) for _ in range(at_once)])

    asyncio.run(all_of_them())


def compare(title: str, runs: dict[str, tuple[Run, list[int]]], rounds: int, calls: int) -> None:
    """Let pools take turns, and print what a call takes in each."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, workers) in runs.items():
            try:
                run(max(1, calls // 10))
                program, both, begun = time.process_time(), cpu_s(workers), time.perf_counter()
                run(calls)
            except Exception as error:
                if name == OURS:
                    raise
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                rows[name].append((math.nan, math.nan, math.nan))
                continue
            took, used = time.perf_counter() - begun, time.process_time() - program
            in_workers = cpu_s(workers) - both - used
            rows[name].append((took, used, in_workers))
    each = {
        name: [[figure / calls * 1e6 for figure in one] for one in found]
        for name, found in rows.items()
    }
    show(title, ("wall us", "CPU program us", "CPU workers us"), each)


@contextlib.contextmanager
def opened(workers: int) -> Iterator[dict[str, tuple[Opened, list[int]]]]:
    """Open pools, and yield each with the ids of its processes."""
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple[Opened, list[int]]] = {}
        for contender in available():
            if contender.name == "ray" or contender.name.endswith("spawn"):
                continue  # as with forkserver, once they are there
            others = {*descendants()}
            pool = stack.enter_context(contender.open(workers))
            if pool.submit is not None:
                pool.map(tasks.nothing, range(100))
                found[contender.name] = pool, [*{*descendants()} - others]
        yield found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300)
    wanted = parser.parse_args()
    measure = partial(compare, rounds=wanted.rounds, calls=wanted.calls)
    with opened(1) as pools:
        executors = {
            name: (one.executor, pids) for name, (one, pids) in pools.items() if one.executor
        }
        for title, function in (("of a module", tasks.nothing), ("of the script", of_script)):
            measure(
                f"submit(f, n).result(), a function {title}",
                {
                    name: (partial(round_trips, one, function), pids)
                    for name, (one, pids) in pools.items()
                    # Its workers are other programs.
                    if name != "dask" or function is tasks.nothing
                },
            )
            measure(
                f"map(f, (1, 2)), a function {title}",
                {
                    name: (partial(maps_of_two, one, function), pids)
                    for name, (one, pids) in executors.items()
                    if name != "dask"  # takes no further arguments of map()
                },
            )
        measure(
            "wait([submit(f, n)])",
            {name: (partial(waited_for, one), pids) for name, (one, pids) in executors.items()},
        )
    with opened(2) as pools:
        for at_once in (1, 8, 64):
            measure(
                f"run_in_executor(), {at_once} at a time",
                {
                    name: (partial(awaited, one.executor, at_once), pids)
                    for name, (one, pids) in pools.items()
                    if one.executor
                },
            )


if __name__ == "__main__":
    main()
