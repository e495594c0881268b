"""What the globals of a script cost, beside a forked pool that finds them in its memory.

    python benchmarks/names.py [--mebibytes 40]

step      a sampler's: one ``map`` of 4 calls that use an array, again and again
submit    one call of a function of the script, alone and with what it uses: CPU of the program
compare   how long it takes to find out that an array has not changed
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
from figures import OURS, show

import safepool
from safepool.pool.calls.prints import is_equal

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

LIMIT = 3
OPTIONS = {"a": 1, "b": [1, 2, 3]}
data = np.zeros(0)
_STEPS = 30
_CALLS = 2000
_ROUNDS = 3


def log_probability(theta: float) -> float:
    """Use the array."""
    return float(data[0]) * theta


class Wrapped:
    """What a library makes of the user's function."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function

    def __call__(self, theta: float) -> float:
        """Call it."""
        return self.function(theta)


def plain(x: int) -> int:
    """Use nothing."""
    return x


def with_helper(x: int) -> int:
    """Use a function and a number."""
    return plain(x) + LIMIT


def with_dictionary(x: int) -> int:
    """Use a dictionary as well."""
    return plain(x) + OPTIONS["a"]  # type: ignore[operator]


CALLED = (plain, with_helper, with_dictionary)


def step_ms(pool: Executor) -> float:
    """Return what one step takes."""
    took = []
    for _ in range(_STEPS):
        begin = time.perf_counter()
        list(pool.map(Wrapped(log_probability), [1.0, 2.0, 3.0, 4.0]))
        took.append(time.perf_counter() - begin)
    return statistics.median(took[3:]) * 1000


def submit_us(pool: Executor, function: Callable[[int], int]) -> float:
    """Return the program's CPU time for one of many calls."""
    found = []
    for _ in range(5):
        begin = time.process_time()
        for future in [pool.submit(function, n) for n in range(_CALLS)]:
            future.result()
        found.append((time.process_time() - begin) / _CALLS * 1e6)
    return min(found)


def best_ms(call: Callable[[], object]) -> float:
    """Return the fastest of several."""
    found = []
    for _ in range(7):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found) * 1000


def main() -> None:
    """Print the figures."""
    global data  # noqa: PLW0603 -- as the programs do that this is about
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=int, default=40)
    size_mib = parser.parse_args().mebibytes
    data = np.random.default_rng(1).random(size_mib << 17)

    steps: dict[str, list[tuple[float]]] = {}
    with (
        ProcessPoolExecutor(2, mp_context=get_context("fork")) as forked,
        safepool.ProcessPool(2) as pool,
    ):
        for _ in range(_ROUNDS):
            for name, each in {"stdlib fork": forked, OURS: pool}.items():
                steps.setdefault(name, []).append((step_ms(each),))
        show(f"one map of 4 calls that use an array of {size_mib} MiB", ["ms"], steps)
        calls = {f.__name__: [(submit_us(pool, f),)] for f in CALLED}
    show("one call of a function of the script: CPU of the program", ["us"], calls, base="plain")
    buffer, copy = memoryview(data).cast("B"), memoryview(data.copy()).cast("B")
    compared = {
        "memory": [(best_ms(lambda: is_equal(buffer, copy)),)],
        "adler32": [(best_ms(lambda: zlib.adler32(buffer)),)],
        "blake2b": [(best_ms(lambda: hashlib.blake2b(buffer)),)],
    }
    show("finding out that an array has not changed", ["ms"], compared, base="memory")


if __name__ == "__main__":
    main()
