"""What one call takes from its caller back to its caller, beside the standard pools.

    python benchmarks/latency.py [--rounds 15] [--calls 300]

One worker for a sequential caller, two for coroutines. All pools are open at the same time and
take turns in every round, Dask and Ray each alone with ours; figures are medians over the rounds,
in microseconds for each call, with the ratio to ours before them: above 1 is slower than ours. CPU
is that of the program and of the workers, each for itself. Nothing here fails for being slow: read
the ratios.

On a machine that idles, a wake-up of a sleeping processor takes most of the wall time; on a busy
one the CPU time does.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING

import tasks
from contenders import Opened, Pools, compare, cpu_s, groups, open_all, result_of

if TYPE_CHECKING:
    from collections.abc import Callable


def of_script(value: int) -> int:
    """Do nothing, in ``__main__``."""
    return value


def round_trips(function: Callable[[int], int], pool: Opened, calls: int) -> None:
    """Submit one, wait for it, submit the next."""
    assert pool.submit is not None
    for number in range(calls):
        result_of(pool.submit(function, number))


def waited_for(pool: Opened, calls: int) -> None:
    """Wait for each by ``wait()``."""
    for number in range(calls):
        wait([pool.executor.submit(tasks.nothing, number)])


def maps_of_two(function: Callable[[int], int], pool: Opened, calls: int) -> None:
    """Map two items, again and again."""
    for _ in range(calls):
        list(pool.executor.map(function, (1, 2)))


def awaited(at_once: int, pool: Opened, calls: int) -> None:
    """Let so many coroutines call and wait."""

    async def one(loop: asyncio.AbstractEventLoop) -> None:
        for number in range(max(1, calls // at_once)):
            await loop.run_in_executor(pool.executor, tasks.nothing, number)

    async def all_of_them() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[one(loop) for _ in range(at_once)])

    asyncio.run(all_of_them())


COLUMNS = ("wall us", "CPU program us", "CPU workers us")


def measure(
    title: str,
    pools: Pools,
    run: Callable[[Opened, int], object],
    only: Callable[[str, Opened], object],
    asked: argparse.Namespace,
) -> None:
    """Let pools take turns, and print what a call takes in each."""

    def turn(_: str, pool: Opened) -> tuple[float, ...]:
        run(pool, max(1, asked.calls // 10))
        program, both, begun = time.process_time(), cpu_s(pool.pids), time.perf_counter()
        run(pool, asked.calls)
        took, used = time.perf_counter() - begun, time.process_time() - program
        in_workers = cpu_s(pool.pids) - both - used
        return tuple(figure / asked.calls * 1e6 for figure in (took, used, in_workers))

    compare(title, COLUMNS, pools, turn, asked.rounds, only=only)


def has_executor(name: str, pool: Opened) -> bool:
    """Dask's executor takes no further arguments of map()."""
    return pool.executor is not None and name != "dask"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    # A round takes place on one CPU or on two, as the kernel likes: a median of few is of chance.
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=300)
    asked = parser.parse_args()
    # With "spawn" they are as with "forkserver", once they are there.
    each = groups(lambda one: one.name != "joblib" and "spawn" not in one.name)
    for group in each:
        with open_all(group, 1, tasks.nothing) as pools:
            for title, function in (("of a module", tasks.nothing), ("of the script", of_script)):
                measure(
                    f"submit(f, n).result(), a function {title}",
                    pools,
                    partial(round_trips, function),
                    # Dask's workers are other programs.
                    lambda name, _, function=function: name != "dask" or function is tasks.nothing,
                    asked,
                )
                measure(
                    f"map(f, (1, 2)), a function {title}",
                    pools,
                    partial(maps_of_two, function),
                    has_executor,
                    asked,
                )
            measure("wait([submit(f, n)])", pools, waited_for, has_executor, asked)
    for group in each:
        with open_all(group, 2, tasks.nothing) as pools:
            for at_once in (1, 8, 64):
                measure(
                    f"run_in_executor(), {at_once} at a time",
                    pools,
                    partial(awaited, at_once),
                    lambda _, pool: pool.executor,
                    asked,
                )


if __name__ == "__main__":
    main()
