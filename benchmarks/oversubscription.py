"""Numeric work in a container: pools at their defaults, and each one tuned by hand.

    python benchmarks/oversubscription.py [--rounds 5] [--limit 6]
                                          [--cpus 0.5 1 [--work blas fft scipy sklearn]
                                                        [--host-cpus 48]]

Linux, as root. Each run is a fresh program in a control group with a real quota, and the pools
take turns. Without ``--cpus`` the cases are those of PLAN. ``--host-cpus`` lets programs believe
that the machine has so many CPUs (0: those that it has). "by hand" is what a user who has found
the problem writes: as many workers as the quota has CPUs, at least one, and one native thread in
each, by variables that are set before NumPy is imported. Figures are seconds for the batch, the
most threads in all workers, and how long the kernel has frozen the group.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from contenders import descendants, last_line
from figures import OURS, compare
from host.groups import QuotaGroup, quota_group
from host.pretend import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

COLUMNS = ("seconds", "threads", "frozen s")
TASKS = 12
# Read by OpenBLAS, by OpenMP's runtimes and by MKL as they are loaded.
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def blas(seed: int) -> float:
    """Multiply and solve."""
    import numpy as np

    random = np.random.default_rng(seed)
    a, b = random.random((400, 400)), random.random(400)
    return float(sum(np.linalg.solve(a @ a.T + np.eye(400), b).sum() for _ in range(4)))


def fft(seed: int) -> float:
    """Transform with as many threads as SciPy sees CPUs, as many examples do."""
    import numpy as np
    import scipy.fft

    data = np.random.default_rng(seed).random((64, 4096))
    return float(sum(abs(scipy.fft.fft(data, workers=-1)).sum() for _ in range(4)))


def scipy_(seed: int) -> float:
    """Interpolate scattered measurements and decompose a matrix: the case of the README."""
    import numpy as np
    from scipy.interpolate import RBFInterpolator

    random = np.random.default_rng(seed)
    places, wanted = random.random((300, 2)), random.random((300, 2))
    values = np.sin(4 * places[:, 0])
    matrix = random.random((300, 300))
    return float(RBFInterpolator(places, values)(wanted).sum() + np.linalg.svd(matrix)[1].sum())


def sklearn(seed: int) -> float:
    """Fit a model whose OpenMP runtime has as many threads as it sees CPUs."""
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier

    data = np.random.default_rng(seed).random((2000, 8))
    model = HistGradientBoostingClassifier(max_iter=10).fit(data, data[:, 0] > 0.5)
    return float(model.score(data, data[:, 0] > 0.5))


WORK: dict[str, Callable[[int], float]] = {
    "blas": blas,
    "fft": fft,
    "scipy": scipy_,
    "sklearn": sklearn,
}


# Each runs one batch; workers is None for the pool's own default.
def _joblib(work: Callable[[int], float], workers: int | None) -> None:
    import joblib

    joblib.Parallel(n_jobs=workers or -1)(joblib.delayed(work)(n) for n in range(TASKS))


def _loky(work: Callable[[int], float], workers: int | None) -> None:
    import loky

    with loky.ProcessPoolExecutor(workers) as pool:
        list(pool.map(work, range(TASKS)))


def _safepool(work: Callable[[int], float], workers: int | None) -> None:
    import safepool

    with safepool.ProcessPool(workers) as pool:
        list(pool.map(work, range(TASKS)))


def _standard(work: Callable[[int], float], workers: int | None) -> None:
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(work, range(TASKS)))


def _multiprocessing(work: Callable[[int], float], workers: int | None) -> None:
    import multiprocessing

    with multiprocessing.Pool(workers) as pool:
        pool.map(work, range(TASKS), chunksize=1)


def _mpire(work: Callable[[int], float], workers: int | None) -> None:
    import mpire

    with mpire.WorkerPool(workers) as pool:
        pool.map(work, range(TASKS))


def _pebble(work: Callable[[int], float], workers: int | None) -> None:
    import pebble

    with pebble.ProcessPool(workers or os.cpu_count() or 1) as pool:
        list(pool.map(work, range(TASKS)).result())


def _dask(work: Callable[[int], float], workers: int | None) -> None:
    from distributed import Client

    sizes = {"n_workers": workers, "threads_per_worker": 1} if workers else {}
    with Client(dashboard_address=":0", silence_logs=50, **sizes) as client:
        client.gather(client.map(work, range(TASKS), pure=False))


def _ray(work: Callable[[int], float], workers: int | None) -> None:
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    remote = ray.remote(work)
    ray.get([remote.remote(n) for n in range(TASKS)])


# By the names that they have in the other benchmarks: the module, and what it runs.
POOLS: dict[str, tuple[str, Callable[[Callable[[int], float], int | None], None]]] = {
    OURS: ("safepool", _safepool),
    "stdlib fork": ("concurrent.futures", _standard),
    "multiprocessing fork": ("multiprocessing", _multiprocessing),
    "loky": ("loky", _loky),
    "joblib": ("joblib", _joblib),
    "mpire": ("mpire", _mpire),
    "pebble": ("pebble", _pebble),
    "dask": ("distributed", _dask),
    "ray": ("ray", _ray),
}
BY_HAND = ", by hand"
IDEAL = f"stdlib fork{BY_HAND}"
# Those that take part everywhere; the others have the README's case alone.
EVERYWHERE = (OURS, "stdlib fork", IDEAL)
# Quota, kind of work, CPUs that the host seems to have: the README's case under all quotas, and
# other work under one.
README_CASE = (1.0, "scipy", 48)
PLAN = (
    (0.5, "scipy", 48),
    README_CASE,
    (1.5, "scipy", 48),
    (2.0, "scipy", 48),
    (1.0, "blas", 48),
    (1.0, "fft", 48),
    (1.0, "sklearn", 48),
)


def compared(*case: object) -> list[str]:
    """Return the pools that are installed and are run in a case of PLAN."""
    installed = [name for name, (module, _) in POOLS.items() if find_spec(module) is not None]
    both = [name for one in installed for name in (one, one + BY_HAND) if name != OURS + BY_HAND]
    return [name for name in both if case == README_CASE or name in EVERYWHERE]


def measure(pool: str, work: str) -> None:
    """Run one batch in this program, which is in the group, and print its figures."""
    most, ended = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not ended.wait(0.05):
            most = max(most, sum(map(_threads, descendants())))

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    begun = time.perf_counter()
    workers = int(os.environ["WORKERS"]) if pool.endswith(BY_HAND) else None
    POOLS[pool.removesuffix(BY_HAND)][1](WORK[work], workers)
    took = time.perf_counter() - begun
    ended.set()
    counter.join()
    print(json.dumps([took, most]), flush=True)


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def run(
    group: QuotaGroup, pool: str, work: str, variables: dict[str, str], limit_s: float
) -> list[float]:
    """Measure in a program of its own that joins the group before it begins."""
    arguments = [sys.executable, __file__, "--child", pool, work]
    command = ["sh", "-c", f'echo 0 > "{group.members_file}"; exec "$@"', "sh", *arguments]
    before = group.throttling()
    if pool.endswith(BY_HAND):
        workers = str(max(1, math.floor(group.limit.cpus or 1)))
        variables = {**variables, **dict.fromkeys(VARIABLES, "1"), "WORKERS": workers}
    output = last_line(command, limit_s=limit_s, env=variables)
    after = group.throttling()
    group.empty()
    frozen_s = math.nan
    if before is not None and after is not None:
        frozen_s = (after.throttled_us - before.throttled_us) / 1e6
    if output is None:
        return [math.inf, math.nan, frozen_s]
    return [*json.loads(output), frozen_s]


@contextlib.contextmanager
def host(cpus: int) -> Iterator[dict[str, str]]:
    """Yield the variables with which a program sees so many CPUs."""
    if not cpus:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield environment(cpus, Path(folder))


def main() -> None:
    """Compare the pools, quota by quota and work by work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", type=float, nargs="+", help="quotas; else a plan of cases")
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--host-cpus", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=6.0, help="seconds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(*options.child)
        return
    # Ended by kill, it takes its group away all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan: Iterable[tuple[float, str, int]] = PLAN
    if options.cpus:
        plan = itertools.product(options.cpus, options.work, [options.host_cpus])
    for cpus, work, host_cpus in plan:
        with host(host_cpus) as variables, quota_group(cpus) as group:
            runs = {
                pool: partial(run, group, pool, work, variables, options.limit)
                for pool in compared(cpus, work, host_cpus)
            }
            where = f"a quota of {cpus:g} CPUs"
            if host_cpus:
                where += f", a host of {host_cpus}"
            title = f"{work}, {TASKS} tasks, {where}"
            compare(title, COLUMNS, runs, options.rounds, turn_s=options.limit, share_s=12.0)


if __name__ == "__main__":
    main()
