"""From nothing to workers that have NumPy and SciPy loaded: the time, and the memory.

    python benchmarks/startup.py [--workers 2] [--rounds 5] [--library matplotlib.pyplot]

Each figure is from a fresh interpreter that has imported NumPy and SciPy itself; the pools
take turns. Measured is what is the default of each pool; a pool that preloads what the
caller has imported starts with it, the others let every worker import it.

The second table is of a library that the caller has *not* imported, and each task does: the time
until every worker has run one, in the first pool and in the second, and the workers' memory there.

Below that, a script with a guard that imports the library itself: its first and its second pool of
one worker, with the script run in the fork server and by value.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
import tempfile
import time

import contenders
import figures
import tasks

# Enough for each worker to get some, whatever the others do meanwhile.
CALLS_PER_WORKER = 4
# joblib's calls cannot be submitted one by one, and multiprocessing's pools start as the standard
# ones of the same method do.
MEASURED = tuple(
    one.name
    for one in contenders.CONTENDERS
    if one.name != "joblib" and not one.name.startswith("multiprocessing")
)
# For the late imports, one for each way to start.
LATE = (figures.OURS, "stdlib fork", "stdlib spawn", "loky")
# Seconds for a program, and for those of one pool.
LIMIT_S, SHARE_S = 60, 15
FIELDS = ("first_s", "second_s", "pss_mb", "cpu_s")
LATE_FIELDS = ("first_s", "second_s", "pss_mb")
HEADS = {"first_s": "first s", "second_s": "second s", "pss_mb": "Pss MiB", "cpu_s": "CPU s"}


def measure(name: str, workers: int) -> dict[str, float]:
    """Open the pool twice in this process.

    Returns:
        Seconds until all workers are ready, the first and the second time; MiB of the
        workers together and per worker; CPU seconds of the first time.
    """
    import numpy as np
    import scipy.linalg

    assert np
    assert scipy.linalg
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    found: dict[str, float] = {}
    for which in ("first", "second"):
        before = contenders.cpu_s(())
        begun = time.perf_counter()
        with contender.open(workers) as pool:
            pids = _fill(pool, workers)
            found[f"{which}_s"] = time.perf_counter() - begun
            if which == "first":
                found["cpu_s"] = contenders.cpu_s(contenders.descendants()) - before
                found["pss_mb"] = contenders.pss_kb(pids) / 1024
    return found


def measure_late(name: str, workers: int, library: str) -> dict[str, float]:
    """Open the pool twice; each task imports the library, which this process has not.

    Returns:
        Seconds until all workers have it, the first and the second time; MiB of the workers
        together, the second time.
    """
    contender = next(c for c in contenders.CONTENDERS if c.name == name)
    found: dict[str, float] = {}
    for which in ("first", "second"):
        begun = time.perf_counter()
        with contender.open(workers) as pool:
            assert pool.submit is not None
            pids: set[int] = set()
            while len(pids) < workers:
                calls = [
                    pool.submit(import_and_tell, library)
                    for _ in range(CALLS_PER_WORKER * workers)
                ]
                pids |= {*map(contenders.result_of, calls)}
            found[f"{which}_s"] = time.perf_counter() - begun
            found["pss_mb"] = contenders.pss_kb(pids) / 1024
    return found


def import_and_tell(library: str) -> int:
    """Import a library, and return the id of this process."""
    importlib.import_module(library)
    time.sleep(0.01)
    return os.getpid()


def _fill(pool: contenders.Opened, workers: int) -> set[int]:
    """Return the ids of the workers when so many have answered."""
    assert pool.submit is not None
    pids: set[int] = set()
    while len(pids) < workers:
        calls = [
            pool.submit(tasks.numpy_and_scipy_loaded, n) for n in range(CALLS_PER_WORKER * workers)
        ]
        pids |= {*map(contenders.result_of, calls)}
    return pids


# A script whose one task uses the library that its top level imports.
SCRIPT = """
import json, time
import contenders
import safepool
import {library} as library
def use():
    return library.__name__
if __name__ == "__main__":
    found = []
    for _ in range(2):
        before, begun = contenders.cpu_s(contenders.descendants()), time.perf_counter()
        with safepool.ProcessPool(1, main="{main}") as pool:
            pool.submit(use).result()
            cpu_s = contenders.cpu_s(contenders.descendants()) - before
            found += [time.perf_counter() - begun, cpu_s]
    print(json.dumps(found))
"""


def print_script_rows(library: str, rounds: int) -> None:
    """Print what the pools of a guarded script cost, by how its functions get into workers."""

    def measured(main: str) -> list[float]:
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(SCRIPT.format(library=library, main=main))
            script.flush()
            command = [sys.executable, script.name]
            found: list[float] = json.loads(contenders.last_line(command, env=environ) or "")
        return found

    environ = {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
    runs = {f"main={main!r}": functools.partial(measured, main) for main in ("run", "value")}
    heads = ("first s", "first CPU s", "second s", "second CPU s")
    title = f"a guarded script that imports {library}, one worker"
    figures.compare(title, heads, runs, rounds, base="main='run'")


def main() -> None:
    """Print one row per pool, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--library", default="matplotlib.pyplot", help="of the last two tables")
    parser.add_argument("--only-script", action="store_true", help="print the last table alone")
    parser.add_argument("--imports", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_script:
        print_script_rows(options.library, options.rounds)
        return
    if options.child:
        if options.imports:
            found = measure_late(options.child, options.workers, options.library)
        else:
            found = measure(options.child, options.workers)
        print(json.dumps(found))
        return
    print(
        f"Python {sys.version.split()[0]}, {options.workers} workers, {os.cpu_count()} CPUs, ",
        end="",
    )
    print(f"load {os.getloadavg()[0]:.1f}, median of {options.rounds} rounds; / is to ours")
    _table("NumPy and SciPy, which the program has imported", options, [], FIELDS)
    late = ["--imports", "--library", options.library]
    _table(f"late imports: {options.library}, which tasks import", options, late, LATE_FIELDS)
    print_script_rows(options.library, options.rounds)


def _table(
    title: str, options: argparse.Namespace, more: list[str], fields: tuple[str, ...]
) -> None:
    """Measure all of them in turns and print one row for each."""

    def measured(name: str) -> list[float]:
        arguments = ["--child", name, "--workers", str(options.workers), *more]
        found = json.loads(contenders.last_line([sys.executable, __file__, *arguments]) or "")
        return [found[field] for field in fields]

    runs = {
        one.name: functools.partial(measured, one.name)
        for one in contenders.available()
        if one.name in (LATE if more else MEASURED)
    }
    heads = [HEADS[field] for field in fields]
    figures.compare(title, heads, runs, options.rounds, turn_s=LIMIT_S, share_s=SHARE_S)


if __name__ == "__main__":
    main()
