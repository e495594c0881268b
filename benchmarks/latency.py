"""What one call takes from its caller back to its caller, beside the standard pools.

    python benchmarks/latency.py [--rounds 9] [--calls 300]

One worker for a sequential caller, two for coroutines. The pools are open at the same time and
take turns in every round; figures are medians over the rounds, in microseconds for each call, with
the ratio to ours before them: above 1 is slower than ours. CPU is that of the program and of the
workers, each for itself. Nothing here fails for being slow: read the ratios.

On a machine that idles, a wake-up of a sleeping processor takes most of the wall time; on a busy
one the CPU time does.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import tasks
from contenders import OURS, cpu_s
from figures import show

from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable

    # Does so many calls.
    Run = Callable[[int], object]

CONTEXT = multiprocessing.get_context("fork")


def of_script(value: int) -> int:
    """Do nothing, in ``__main__``."""
    return value


def round_trips(pool: Any, function: Callable[[int], int], calls: int) -> None:
    """Submit one, wait for it, submit the next."""
    for number in range(calls):
        pool.submit(function, number).result()


def applied(pool: Any, function: Callable[[int], int], calls: int) -> None:
    """Do the same by ``apply()``."""
    for number in range(calls):
        pool.apply(function, (number,))


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
        for number in range(calls // at_once):
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
            run(max(1, calls // 10))
            program, both, begun = time.process_time(), cpu_s(workers), time.perf_counter()
            run(calls)
            took, used = time.perf_counter() - begun, time.process_time() - program
            in_workers = cpu_s(workers) - both - used
            rows[name].append((took, used, in_workers))
    each = {
        name: [[figure / calls * 1e6 for figure in one] for one in found]
        for name, found in rows.items()
    }
    show(title, ("wall us", "CPU program us", "CPU workers us"), each)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300)
    wanted = parser.parse_args()
    measure = partial(compare, rounds=wanted.rounds, calls=wanted.calls)
    with (
        ProcessPoolExecutor(1, mp_context=CONTEXT) as standard,
        ProcessPoolExecutor(2, mp_context=CONTEXT) as standard_2,
        CONTEXT.Pool(1) as multi,
        ProcessPool(1) as ours,
        ProcessPool(2) as ours_2,
    ):
        for pool in (standard, standard_2, ours, ours_2):
            list(pool.map(tasks.nothing, range(100)))
        multi.map(tasks.nothing, range(100))
        # Their ids: what they are called differs.
        pids = {
            "standard": list(standard._processes),
            "standard, two": list(standard_2._processes),
            "multi": [process.pid for process in multi._pool],  # type: ignore[attr-defined]
            OURS: list(ours._processes),
            "ours, two": list(ours_2._processes),
        }
        for title, function in (("of a module", tasks.nothing), ("of the script", of_script)):
            measure(
                f"submit(f, n).result(), a function {title}",
                {
                    OURS: (partial(round_trips, ours, function), pids[OURS]),
                    "stdlib fork": (partial(round_trips, standard, function), pids["standard"]),
                    "Pool.apply": (partial(applied, multi, function), pids["multi"]),
                },
            )
            measure(
                f"map(f, (1, 2)), a function {title}",
                {
                    OURS: (partial(maps_of_two, ours, function), pids[OURS]),
                    "stdlib fork": (partial(maps_of_two, standard, function), pids["standard"]),
                },
            )
        measure(
            "wait([submit(f, n)])",
            {
                OURS: (partial(waited_for, ours), pids[OURS]),
                "stdlib fork": (partial(waited_for, standard), pids["standard"]),
            },
        )
        for at_once in (1, 8, 64):
            measure(
                f"run_in_executor(), {at_once} at a time",
                {
                    OURS: (partial(awaited, ours_2, at_once), pids["ours, two"]),
                    "stdlib fork": (
                        partial(awaited, standard_2, at_once),
                        pids["standard, two"],
                    ),
                },
            )


if __name__ == "__main__":
    main()
