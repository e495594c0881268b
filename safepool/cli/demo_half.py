"""Floor 7: one half of ``safepool demo``: one pool, the whole batch, in a process of its own.

The script that people write: NumPy and SciPy imported at the top (through
``demo_tasks``), a pool with its defaults, every task submitted, results taken as they
come. What it adds tells the measuring process outside how far it is. It measures nothing
but its own seconds, and ends nothing.

Arguments: ``standard`` or ``safepool``, tasks, points, and the ``.npy`` file to make for the
results: one row per task, whose first number turns from 0 to 1 when the rest is there.
So what a half has done before a signal ended it can still be compared. Standard output
carries one JSON object a line:

    {"event": "started", "start_method": "fork"}   imports are done, the clock starts
    {"event": "workers", "pids": [17, 18]}          the pool's worker processes, when they change
    {"event": "done"}                               one task's result is in the file
    {"event": "finished", "seconds": 0.45}          the last result is in, the pool still open

After ``finished`` it waits for the end of its standard input with its workers alive, so that
even a batch of milliseconds can be counted from outside.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed

import numpy as np

from safepool.cli.demo_tasks import ANSWERS, interpolate_and_solve

__all__: list[str] = []


def _standard_pool() -> Executor:
    return ProcessPoolExecutor()


def _safepool_pool() -> Executor:
    # Imported here: the other half is a program that has never met safepool's pool.
    from safepool import ProcessPool  # noqa: PLC0415

    return ProcessPool()


_POOLS = {"standard": _standard_pool, "safepool": _safepool_pool}


def _main(name: str, tasks: int, points: int, results_file: str) -> None:
    # For multiprocessing's folder, which stays when this process is killed (of its fork server,
    # the default from Python 3.14 on): it goes with the results.
    tempfile.tempdir = os.path.dirname(results_file)
    results = np.lib.format.open_memmap(results_file, mode="w+", shape=(tasks, 1 + ANSWERS))
    _tell(event="started", start_method=multiprocessing.get_context().get_start_method())
    started = time.perf_counter()
    with _POOLS[name]() as pool:
        numbers, known = {}, list[int]()
        for number in range(tasks):
            # Unless it forks by itself, the standard pool starts a worker with each of the first.
            numbers[pool.submit(interpolate_and_solve, number, points)] = number
            known = _tell_workers(pool, known=known)
        for future in as_completed(numbers):
            row = results[numbers[future]]
            row[1:] = future.result()
            row[0] = 1.0
            known = _tell_workers(pool, known=known)
            _tell(event="done")
        _tell(event="finished", seconds=time.perf_counter() - started)
        sys.stdin.read()


def _tell_workers(pool: Executor, *, known: list[int]) -> list[int]:
    # Both pools keep their processes under the name that the standard library gave it.
    pids: list[int] = list(getattr(pool, "_processes", None) or ())
    if pids != known:
        _tell(event="workers", pids=pids)
    return pids


def _tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
