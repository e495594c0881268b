"""What a pool costs for each task, beside the other pools; and what it costs to do nothing.

    python benchmarks/dispatch.py [--rounds 5] [--only NAME ...]

All pools are open at the same time and take turns, so that a slow moment of the machine
meets each of them (Dask and Ray, each alone with ours); figures are medians over the
rounds. CPU is that of this process and of the pool's workers. Nothing here fails for being slow:
read the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import as_completed
from typing import TYPE_CHECKING

import tasks
from contenders import (
    OURS,
    Opened,
    Pools,
    available,
    compare,
    cpu_s,
    descendants,
    groups,
    open_all,
    result_of,
)
from figures import show, show_outcomes

if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS = 2
COLUMNS = ("wall us", "CPU us")
SUBMITTED = 2000
ROUND_TRIPS = 200
MAPPED = 2000
# For those that send them in chunks: enough for several of them.
MAPPED_IN_CHUNKS = 40_000
UNORDERED = 20_000
CHUNKED = {
    OURS, "multiprocessing", "multiprocessing fork", "multiprocessing spawn", "joblib", "mpire",
}  # fmt: skip
# What is compared with pools that have daemons, too.
OF_EACH = {"submit", "round-trip", "map"}
# One of each kind of queue.
FAIR = (OURS, "stdlib forkserver", "multiprocessing", "mpire", "pebble")
SHORT_TASKS, SHORT_US, LONG_US = 2000, 100, 300_000


def each_us(
    run: Callable[[str, Opened], int],
) -> Callable[[str, Opened], tuple[float, float]]:
    """Return a turn: the microseconds of each of the tasks that ``run`` does."""

    def turn(name: str, pool: Opened) -> tuple[float, float]:
        cpu, begun = cpu_s(pool.pids), time.perf_counter()
        done = run(name, pool)
        took, used = time.perf_counter() - begun, cpu_s(pool.pids) - cpu
        return took / done * 1e6, used / done * 1e6

    return turn


def has_submit(_: str, pool: Opened) -> bool:
    """All but joblib: its calls cannot be submitted one by one."""
    return pool.submit is not None


def submit_many(_: str, pool: Opened) -> int:
    """Submit everything, then wait for it."""
    assert pool.submit is not None
    submit, function = pool.submit, tasks.nothing
    for future in [submit(function, n) for n in range(SUBMITTED)]:
        result_of(future)
    return SUBMITTED


def round_trips(_: str, pool: Opened) -> int:
    """Submit one, wait for it, submit the next."""
    assert pool.submit is not None
    for n in range(ROUND_TRIPS):
        result_of(pool.submit(tasks.nothing, n))
    return ROUND_TRIPS


def map_many(name: str, pool: Opened) -> int:
    """Map at the defaults."""
    many = MAPPED_IN_CHUNKS if name in CHUNKED else MAPPED
    pool.map(tasks.nothing, range(many))
    return many


def unordered(rounds: int) -> None:
    """``map`` in the order of the items, and in that in which calls end, in turns."""
    import safepool

    rows: dict[str, list[tuple[float, ...]]] = {}
    with safepool.ProcessPool(WORKERS) as pool:
        for how in (True, False):  # the workers are there, and the pace is known
            list(pool.map(tasks.nothing, range(MAPPED), ordered=how))
        pids = descendants()
        for ordered in [True, False] * rounds:
            cpu, begun = cpu_s(pids), time.perf_counter()
            count = sum(1 for _ in pool.map(tasks.nothing, range(UNORDERED), ordered=ordered))
            took, used = time.perf_counter() - begun, cpu_s(pids) - cpu
            name = OURS if ordered else "ordered=False"
            rows.setdefault(name, []).append((took / count * 1e6, used / count * 1e6))
    show(f"{UNORDERED:,} tasks that do nothing, by map, each", COLUMNS, rows)


def fairness(pools: Pools, rounds: int) -> None:
    """One long task among short ones: when are the short ones done, against an ideal schedule?

    The long one sleeps, so that it takes no CPU from the others: what is measured is the
    schedule. Ideal: until the long one begins all workers do short ones, then all but one. It has
    no cost of its own; "of its own" is beside the same pool's time without the long one, scaled to
    the workers that are left.
    """
    durations = [SHORT_US] * SHORT_TASKS
    for place, at in {"first": 0, "in the middle": SHORT_TASKS // 2}.items():
        work = [*durations[:at], LONG_US, *durations[at:]]
        left = at / SHORT_TASKS / WORKERS + (1 - at / SHORT_TASKS) / (WORKERS - 1)

        def turn(
            _: str, pool: Opened, work: list[int] = work, left: float = left
        ) -> tuple[float, ...]:
            ideal_s = left * SHORT_TASKS * SHORT_US / 1e6
            own_s = left * WORKERS * _short_ones_done_s(pool, durations, mapped=False)
            by_submit = _short_ones_done_s(pool, work, mapped=False)
            by_map = _short_ones_done_s(pool, work, mapped=True)
            return by_submit / ideal_s, by_map / ideal_s, by_submit / own_s

        compare(
            f"{SHORT_TASKS} tasks of {SHORT_US} us and one of {LONG_US / 1e6:g} s, {place}: "
            "time until the short ones are done, of an ideal schedule's",
            ("submit", "map", "submit, of its own"),
            pools,
            turn,
            rounds,
            only=lambda name, _: name in FAIR,
        )


def _short_ones_done_s(pool: Opened, work: list[int], *, mapped: bool) -> float:
    """Return when the last short task ended in its worker, in seconds from the start."""
    begun = time.monotonic()
    if mapped:
        ends = pool.map(tasks.sleep_or_spin, work)
    else:
        assert pool.submit is not None
        ends = [result_of(f) for f in [pool.submit(tasks.sleep_or_spin, us) for us in work]]
    return max(end for end, us in zip(ends, work, strict=True) if us == SHORT_US) - begun


def lost_workers() -> None:
    """Kill a worker in one of a thousand tasks: which tasks are lost?"""
    import safepool

    values = range(4000)
    with safepool.ProcessPool(WORKERS) as pool:
        futures = {pool.submit(tasks.die_if_odd_one_out, value): value for value in values}
        lost = sorted(futures[f] for f in as_completed(futures) if f.exception() is not None)
        kept = sum(f.exception() is None and f.result() == value for f, value in futures.items())
    title = f"workers killed in 4 of {len(values)} tasks"
    rows = {OURS: [", ".join(map(str, lost)), str(kept)]}
    show_outcomes(title, ["tasks that are lost", "tasks that returned"], rows)


def idle(rounds: int, seconds: float = 0.3) -> None:
    """Pools that have nothing to do, each alone."""
    rows: dict[str, list[tuple[float]]] = {}
    for contender in available():
        if contender.name.partition(" ")[2] not in ("", "fork"):
            continue
        with open_all([contender], WORKERS, tasks.nothing) as pools:
            time.sleep(0.5)
            for _ in range(rounds if pools[contender.name] is not None else 0):
                before = cpu_s(descendants())
                time.sleep(seconds)
                used_ms = (cpu_s(descendants()) - before) * 1e3
                rows.setdefault(contender.name, []).append((used_ms / seconds,))
    show("nothing to do, program and workers", ["CPU ms per s"], rows)


def endless(results: int = 100_000) -> None:
    """``map`` over an iterator without an end: how far does it read ahead?"""
    import safepool

    read = itertools.count()
    most = 0
    with safepool.ProcessPool(WORKERS) as pool:
        for n, value in enumerate(pool.map(tasks.nothing, read)):
            assert value == n
            if n % 100 == 0:
                most = max(most, read.__reduce__()[1][0] - n)
            if n == results:
                break
    show("map over an endless iterator", ["items read ahead of results"], {OURS: [(most,)]})


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*COMPARED, *ALONE])
    options = parser.parse_args()
    wanted = options.only or [*COMPARED, *ALONE]

    print(f"Python {sys.version.split()[0]}, {WORKERS} workers, {os.cpu_count()} CPUs, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, median of {options.rounds} rounds")
    if any(name in COMPARED for name in wanted):
        for number, group in enumerate(groups()):
            with open_all(group, WORKERS, tasks.nothing) as pools:
                for name, run in COMPARED.items():
                    if name in wanted and (number == 0 or name in OF_EACH):
                        run(pools, options.rounds)
    for name, measure in ALONE.items():
        if name in wanted:
            measure(options.rounds)


COMPARED: dict[str, Callable[[Pools, int], None]] = {
    "submit": lambda pools, rounds: compare(
        f"{SUBMITTED} tasks that do nothing, by submit, each",
        COLUMNS,
        pools,
        each_us(submit_many),
        rounds,
        only=has_submit,
    ),
    "round-trip": lambda pools, rounds: compare(
        "submit(...).result(), one at a time, each",
        COLUMNS,
        pools,
        each_us(round_trips),
        rounds,
        only=has_submit,
    ),
    "map": lambda pools, rounds: compare(
        "tasks that do nothing, by map at its defaults, each",
        COLUMNS,
        pools,
        each_us(map_many),
        rounds,
    ),
    "fairness": fairness,
}
ALONE: dict[str, Callable[[int], None]] = {
    "unordered": unordered,
    "lost": lambda _: lost_workers(),
    "idle": idle,
    "endless": lambda _: endless(),
}


if __name__ == "__main__":
    main()
