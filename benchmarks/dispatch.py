"""What a pool costs for each task, beside the other pools; and what it costs to do nothing.

    python benchmarks/dispatch.py [--rounds 7] [--slow] [--only NAME ...]

All pools are open at the same time and take turns, so that a slow moment of the machine
meets each of them (Dask and Ray, each alone with ours); figures are medians over the
rounds. CPU is that of this process and
of all workers. Nothing here fails for being slow: read the ratios.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import os
import signal
import statistics
import sys
import time
import tracemalloc
from concurrent.futures import as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks
from contenders import OURS, Opened, cpu_s, descendants, groups, open_all
from figures import show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
SHORT_TASKS, SHORT_US, LONG_US = 2000, 100, 1_000_000


def compare(
    pools: dict[str, Opened],
    rounds: int,
    title: str,
    run: Callable[[str, Opened], int | None],
) -> None:
    """Let pools take turns with ``run``, which returns how many tasks it did."""
    pids = descendants()
    rows: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(rounds):
        for name, pool in pools.items():
            cpu, begun = cpu_s(pids), time.perf_counter()
            try:
                done = run(name, pool)
            except Exception as error:
                if name == OURS:
                    raise
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                rows.setdefault(name, []).append((math.nan, math.nan))
                continue
            took, used = time.perf_counter() - begun, cpu_s(pids) - cpu
            if done:
                rows.setdefault(name, []).append((took / done * 1e6, used / done * 1e6))
    show(title, COLUMNS, rows)


def result_of(future: Any) -> Any:
    """Wait for a future, or for what multiprocessing and mpire have in its place."""
    return future.result() if hasattr(future, "result") else future.get()


def submit_many(_: str, pool: Opened) -> int | None:
    """Submit everything, then wait for it."""
    if pool.submit is None:
        return None
    submit, function = pool.submit, tasks.nothing
    for future in [submit(function, n) for n in range(SUBMITTED)]:
        result_of(future)
    return SUBMITTED


def round_trips(_: str, pool: Opened) -> int | None:
    """Submit one, wait for it, submit the next."""
    if pool.submit is None:
        return None
    for n in range(ROUND_TRIPS):
        result_of(pool.submit(tasks.nothing, n))
    return ROUND_TRIPS


def map_many(name: str, pool: Opened) -> int | None:
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


def fairness(pools: dict[str, Opened], rounds: int) -> None:
    """One long task among short ones: when are the short ones done, against an ideal schedule?

    The long one sleeps, so that it takes no CPU from the others: what is measured is the
    schedule. Ideal: until the long one begins all workers do short ones, then all but one.
    """
    durations = [SHORT_US] * SHORT_TASKS
    places = {"first": 0, "in the middle": SHORT_TASKS // 2}
    print(
        f"\n{SHORT_TASKS} tasks of {SHORT_US} us and one of {LONG_US / 1e6:.0f} s: the time until "
        "the short ones are done,\nas a multiple of an ideal schedule, which has no cost of its "
        "own; and beside the\nsame pool's time without the long one, scaled to one worker"
    )
    print(f"{'':20}{'the long one is':>18}{'submit':>10}{'map':>8}{'submit, own':>14}")
    for name, pool in pools.items():
        if pool.submit is None:
            continue
        for place, at in places.items():
            work = [*durations[:at], LONG_US, *durations[at:]]
            ideal_s = (at / WORKERS + (SHORT_TASKS - at) / (WORKERS - 1)) * SHORT_US / 1e6
            submitted, mapped, own = [], [], []
            for _ in range(rounds):
                alone = _short_ones_done_s(pool, durations, mapped=False)
                own.append(
                    alone * (at / SHORT_TASKS + (1 - at / SHORT_TASKS) * WORKERS / (WORKERS - 1))
                )
                submitted.append(_short_ones_done_s(pool, work, mapped=False))
                mapped.append(_short_ones_done_s(pool, work, mapped=True))
            by_submit, by_map = statistics.median(submitted), statistics.median(mapped)
            by_own = statistics.median(s / o for s, o in zip(submitted, own, strict=True))
            print(
                f"{name:20}{place:>18}{by_submit / ideal_s:>10.2f}{by_map / ideal_s:>8.2f}"
                f"{by_own:>14.2f}",
                flush=True,
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
    print(f"\nworkers killed in 4 of {len(values)} tasks: lost {lost}, {kept} returned")


def idle(seconds: float = 3.0) -> None:
    """A pool that has nothing to do."""
    import safepool

    with safepool.ProcessPool(WORKERS) as pool:
        list(pool.map(tasks.nothing, range(1000)))
        time.sleep(0.2)
        pids = descendants()
        before = cpu_s(pids)
        time.sleep(seconds)
        used = cpu_s(pids) - before
    print(f"\nidle for {seconds:.0f} s: {used * 1e3:.2f} ms of CPU time, workers included")


def pending(count: int = 100_000) -> None:
    """Futures that wait, and what each keeps in this process."""
    import safepool

    print(f"\n{count:,} pending futures, each:", end=" ")
    for how, held in (("resident", _resident_bytes), ("traced", _traced_bytes)):
        pool = safepool.ProcessPool(1)
        pool.submit(tasks.nothing, 0).result()
        pool.submit(time.sleep, 1000)
        if how == "traced":
            tracemalloc.start()
        before = held()
        futures = [pool.submit(tasks.nothing, n) for n in range(count)]
        print(f"{(held() - before) / count:,.0f} bytes {how}", end="  ", flush=True)
        tracemalloc.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        for pid in pool._processes:
            os.kill(pid, signal.SIGKILL)
        pool.shutdown()
        assert all(future.done() for future in futures)
    print()


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
    print(f"\nmap over an endless iterator: at most {most:,} items read ahead of the results")


def flat(count: int = 1_000_000) -> None:
    """A million tasks: does the last tenth cost what the first did?"""
    import safepool

    with safepool.ProcessPool(WORKERS) as pool:
        pool.submit(tasks.nothing, 0).result()
        for how in ("map", "submit"):
            times = [time.perf_counter()]
            if how == "map":
                results: Iterator[Any] = iter(pool.map(tasks.nothing, range(count)))
            else:
                futures = collections.deque(pool.submit(tasks.nothing, n) for n in range(count))
                print(f"submit() took {time.perf_counter() - times[0]:.1f} s")
                times = [time.perf_counter()]
                results = (futures.popleft().result() for _ in range(count))
            for n, value in enumerate(results, 1):
                assert value == n - 1
                if n % (count // 10) == 0:
                    times.append(time.perf_counter())
            tenths = [after - before for before, after in itertools.pairwise(times)]
            rates = " ".join(f"{count / 10 / tenth / 1000:.0f}" for tenth in tenths)
            print(f"{count:,} tasks by {how}, thousands per second, by tenths: {rates}")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow", action="store_true", help="the million tasks as well")
    parser.add_argument("--only", nargs="*", choices=[*COMPARED, *ALONE])
    options = parser.parse_args()
    wanted = options.only or [*COMPARED, *(name for name in ALONE if name != "flat")]
    if options.slow:
        wanted.append("flat")

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
            measure()


COMPARED: dict[str, Callable[[dict[str, Opened], int], None]] = {
    "submit": lambda pools, rounds: compare(
        pools, rounds, f"{SUBMITTED} tasks that do nothing, by submit, each", submit_many
    ),
    "round-trip": lambda pools, rounds: compare(
        pools, rounds, "submit(...).result(), one at a time, each", round_trips
    ),
    "map": lambda pools, rounds: compare(
        pools, rounds, "tasks that do nothing, by map at its defaults, each", map_many
    ),
    "unordered": lambda _, rounds: unordered(rounds),
    "fairness": lambda pools, rounds: fairness(pools, max(1, rounds // 2)),
}
ALONE: dict[str, Callable[[], None]] = {
    "lost": lost_workers,
    "idle": idle,
    "pending": pending,
    "endless": endless,
    "flat": flat,
}


if __name__ == "__main__":
    main()
