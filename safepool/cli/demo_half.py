"""Floor 7: one half of ``safepool demo``: one pool, the whole batch, in a separate process.

The script that people write: NumPy and SciPy imported at the top, a pool with its defaults, every
task submitted, results taken as they come. The process measures only its own seconds.

Arguments: ``standard`` or ``safepool``, tasks, points, and the ``.npy`` file for the results: one
row for each task, whose first number turns from 0 to 1 when the row is complete. Hence the work of
a half can be compared even if a signal ended it. Standard output carries one JSON object a line:

    {"start_method": "fork"}    imports are done, the clock starts
    {"pids": [17, 18]}          the pool's worker processes, when they change
    {"done": 17}                results that are in the file
    {"seconds": 0.45}           the last result is in, the pool still open

Then the process waits for the end of its standard input with its workers alive, so that even a
batch of milliseconds can be counted from outside.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import RBFInterpolator, griddata

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Results kept of each of the five operations: enough to compare, small enough to send. A task has
# as many points at least.
_KEPT = 16
# griddata answers NaN outside the convex hull; with the corners every query is inside.
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def interpolate_and_solve(seed: int, points: int) -> NDArray[np.float64]:
    """Interpolate scattered measurements twice, then solve and decompose a system.

    The input depends only on the seed, so that two pools work on the same numbers.

    Args:
        seed: Number of the task.
        points: Scattered points, and rows and columns of the matrices; at least 16.

    Returns:
        16 numbers each of ``RBFInterpolator``, ``griddata``, ``solve``, ``eigvalsh`` and the
        singular values. Never NaN.
    """
    random = np.random.default_rng(seed)
    places = np.vstack([_CORNERS, random.random((points - len(_CORNERS), 2))])
    measured = np.sin(4.0 * places[:, 0]) * np.cos(3.0 * places[:, 1])
    wanted = random.random((_KEPT, 2))
    matrix = random.standard_normal((points, points))
    # Symmetric and far from singular: a last bit of difference in BLAS stays a last bit.
    system = matrix @ matrix.T / points + np.eye(points)
    return np.concatenate(
        [
            RBFInterpolator(places, measured)(wanted),
            griddata(places, measured, wanted),
            np.linalg.solve(system, measured)[:_KEPT],
            np.linalg.eigvalsh(system)[:_KEPT],
            np.linalg.svd(matrix, compute_uv=False)[:_KEPT],
        ],
        dtype=np.float64,
    )


def _pool(name: str) -> Executor:
    if name == "standard":
        return ProcessPoolExecutor()
    # Imported here: the other half is a program that has never met safepool's pool.
    from safepool import ProcessPool  # noqa: PLC0415

    return ProcessPool()


def _main(name: str, tasks: int, points: int, results_file: str) -> None:
    # For multiprocessing's folder, which stays when this process is killed (of its fork server,
    # the default from Python 3.14 on): it goes with the results.
    tempfile.tempdir = os.path.dirname(results_file)
    results = np.lib.format.open_memmap(results_file, mode="w+", shape=(tasks, 1 + 5 * _KEPT))
    _tell(start_method=multiprocessing.get_context().get_start_method())
    started = time.perf_counter()
    with _pool(name) as pool:
        numbers, known = {}, list[int]()
        for number in range(tasks):
            # Unless it forks workers itself, the standard pool starts a worker with each of the
            # first calls.
            numbers[pool.submit(interpolate_and_solve, number, points)] = number
            known = _tell_workers(pool, known=known)
        for done, future in enumerate(as_completed(numbers), 1):
            row = results[numbers[future]]
            row[1:] = future.result()
            row[0] = 1.0
            known = _tell_workers(pool, known=known)
            _tell(done=done)
        _tell(seconds=time.perf_counter() - started)
        sys.stdin.read()


def _tell_workers(pool: Executor, *, known: list[int]) -> list[int]:
    # Both pools keep their processes under the standard library's name.
    pids: list[int] = list(getattr(pool, "_processes", None) or ())
    if pids != known:
        _tell(pids=pids)
    return pids


def _tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
