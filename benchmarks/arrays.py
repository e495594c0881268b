"""What it costs to give a worker an array, and to get one back.

    python benchmarks/arrays.py [transfer] [share] [threshold] [pages] [memory]
                                [--rounds 7] [--sizes 1 10 100]     (1000: a gigabyte, or several)

The pools are open at the same time and take turns, and a plain ``array.copy()`` takes its turn
with them: figures are medians over the rounds. A task reads one item of every page of its
argument, and the caller of every result, so that whoever only maps memory pays for it as well.
Nothing here fails for being slow: read the ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import contenders
import numpy as np
import tasks
from contenders import Opened, descendants, pss_kb, result_of
from figures import show

import safepool
from safepool.transport import _memfd, channel

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 2
SHARED_TASKS = 100
NEVER = sys.maxsize


def took_ms(do: Callable[[], Any]) -> tuple[float]:
    """Return how long a call takes, with the end of what it returns: one figure of a table."""
    begun = time.perf_counter()
    do()
    return ((time.perf_counter() - begun) * 1e3,)


def transfer(rounds: int, sizes_mb: list[float]) -> None:
    """Compare the pools."""
    for group in contenders.groups(lambda one: "spawn" not in one.name):
        with contenders.open_all(group, WORKERS, tasks.nothing) as pools:
            for pool in filter(None, pools.values()):
                pool.map(tasks.touch, [np.ones(1000)] * 20)
            for size_mb in sizes_mb:
                _transfer(pools, size_mb, rounds)


def _transfer(pools: contenders.Pools, size_mb: float, rounds: int) -> None:
    source = np.random.default_rng(0).random(int(size_mb * 1e6 / 8))
    for at_once in (1, WORKERS) if size_mb >= 100 else (1,):

        def copy(times: int = at_once) -> tuple[float]:
            return took_ms(lambda: [source.copy() for _ in range(times)])

        def argument(_: str, pool: Opened, times: int = at_once) -> tuple[float]:
            return took_ms(lambda: run(pool, tasks.touch, [source] * times))

        def result(_: str, pool: Opened, times: int = at_once) -> tuple[float]:
            arrays = [source.size] * times
            return took_ms(lambda: [*map(tasks.touch, run(pool, tasks.make_array, arrays))])

        for what, turn in {"argument": argument, "result made in the task": result}.items():
            title = f"{what}, {size_mb:g} MB, {at_once} at a time"
            contenders.compare(
                title, ["ms"], pools, turn, rounds, more={"array.copy()": copy}, share_s=4.0
            )


def run(pool: Opened, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Run calls at the same time; joblib's cannot be submitted one by one."""
    if pool.submit is None:
        return pool.map(function, items)
    return [*map(result_of, [pool.submit(function, item) for item in items])]


def share(rounds: int, size_mb: float = 100) -> None:
    """Compare a shared array in many tasks with one that is sent once, and with each."""
    source = np.random.default_rng(0).random(int(size_mb * 1e6 / 8))
    rows: dict[str, list[tuple[float]]] = {}
    with safepool.ProcessPool(WORKERS) as pool:
        list(pool.map(tasks.touch, [np.ones(1000)] * 20))

        def many(item: Any) -> None:
            list(pool.map(tasks.touch, [item] * SHARED_TASKS))

        for _ in range(rounds):
            for name, do in {
                "sent, one task": lambda: pool.submit(tasks.touch, source).result(),
                f"shared, {SHARED_TASKS} tasks": lambda: many(safepool.share(source)),
                "the tasks alone": lambda: [tasks.touch(source) for _ in range(SHARED_TASKS)],
            }.items():
                rows.setdefault(name, []).append(took_ms(do))
        rows[f"sent, {SHARED_TASKS} tasks"] = [took_ms(lambda: many(source))]
    title = f"{size_mb:g} MB in {SHARED_TASKS} tasks on {WORKERS} workers"
    show(title, ["ms"], rows, base="sent, one task")


def threshold(rounds: int) -> None:
    """Send payloads of many sizes through the stream and in files, both ways."""
    with ExitStack() as stack:
        pools = {
            limit: stack.enter_context(
                safepool.ProcessPool(1, initializer=tasks.set_file_bytes, initargs=(limit,))
            )
            for limit in (NEVER, 0)
        }
        for kib in (32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096):
            source = np.ones(kib * 128)
            found: dict[tuple[int, str], list[tuple[float]]] = {}
            for _ in range(rounds * 20):
                for limit, pool in pools.items():
                    channel.FILE_BYTES = limit
                    for what, do in {
                        "argument": lambda p=pool, a=source: p.submit(tasks.touch, a).result(),
                        "result": lambda p=pool, a=source: tasks.touch(
                            p.submit(tasks.make_array, a.size).result()
                        ),
                    }.items():
                        found.setdefault((limit, what), []).append(took_ms(do))
            for what in ("argument", "result"):
                rows = {
                    "through the stream": found[NEVER, what],
                    "in a file": found[0, what],
                }
                show(f"threshold: {what} of {kib} KiB", ["ms"], rows, base="through the stream")


def pages(rounds: int, size_mb: float = 100) -> None:
    """Compare the copy into a file with large pages and with small ones, and reading it."""
    source = np.random.default_rng(0).random(int(size_mb * 1e6 / 8))
    rows: dict[str, list[tuple[float]]] = {}
    for _ in range(rounds):
        rows.setdefault("array.copy()", []).append(took_ms(source.copy))
        for name, large in {"large pages": True, "small pages": False}.items():
            _memfd._collapses = large
            kept: list[Any] = []
            rows.setdefault(f"{name}, copy", []).append(
                took_ms(lambda kept=kept: kept.extend(_memfd.store([memoryview(source)])))
            )
            rows.setdefault(f"{name}, map and read", []).append(
                took_ms(
                    lambda kept=kept: tasks.touch(np.frombuffer(kept[0].segments()[0], dtype="f8"))
                )
            )
    _memfd._collapses = True
    show(f"a file of {size_mb:g} MB", ["ms"], rows, base="array.copy()")


def memory(size_mb: float = 100) -> None:
    """Count what all processes hold while every worker has the array, in sizes of it."""
    size = int(size_mb * 1e6)
    source = np.random.default_rng(0).random(size // 8)
    rows: dict[str, list[tuple[float]]] = {}
    for name, given in {"sent to each": source, "shared": None}.items():
        with safepool.ProcessPool(WORKERS) as pool:
            list(pool.map(tasks.touch, [np.ones(1000)] * 20))
            everybody = [os.getpid(), *descendants()]
            before = pss_kb(everybody)
            item = safepool.share(source) if given is None else given
            held = pool.map(tasks.hold, [item] * WORKERS)
            time.sleep(0.5)
            rows[name] = [((pss_kb(everybody) - before) * 1024 / size,)]
            list(held)
    title = f"memory in all processes beside the caller's own array of {size_mb:g} MB"
    show(title, ["arrays"], rows, base="shared")


GROUPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "transfer": lambda asked: transfer(asked.rounds, asked.sizes),
    "share": lambda asked: share(asked.rounds),
    "threshold": lambda asked: threshold(asked.rounds),
    "pages": lambda asked: pages(asked.rounds),
    "memory": lambda _: memory(),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 10, 100], help="megabytes")
    asked = parser.parse_args()
    for group in asked.groups:
        GROUPS[group](asked)
