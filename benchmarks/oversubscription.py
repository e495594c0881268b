"""Numeric work in a container: pools at their defaults, and each one tuned by hand.

    python benchmarks/oversubscription.py [--cpus 0.5 1 1.5 2] [--work blas fft scipy sklearn]
                                          [--host-cpus 48] [--rounds 3] [--limit 60]

Linux, as root. Each run is a fresh program in a control group with a real quota, and the pools
take turns. ``--host-cpus`` lets programs believe that the machine has so many CPUs (0: those that
it has). "by hand" is what a user who has found the problem writes: as many workers as the quota
has CPUs, at least one, and one native thread in each, by variables that are set before NumPy is
imported. Figures are seconds for the batch, the most threads in all workers, and how long the
kernel has frozen the group; "never" is a run that had not ended when its time was up.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contenders import descendants
from figures import show
from host.groups import QuotaGroup, quota_group
from host.pretend import environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COLUMNS = ("seconds", "threads", "frozen s")
TASKS = 16
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


def _joblib(work: Callable[[int], float]) -> None:
    import joblib

    joblib.Parallel(n_jobs=-1)(joblib.delayed(work)(n) for n in range(TASKS))


def _loky(work: Callable[[int], float]) -> None:
    import loky

    with loky.ProcessPoolExecutor() as pool:
        list(pool.map(work, range(TASKS)))


def _safepool(work: Callable[[int], float]) -> None:
    import safepool

    with safepool.ProcessPool() as pool:
        list(pool.map(work, range(TASKS)))


def _standard(work: Callable[[int], float]) -> None:
    with ProcessPoolExecutor() as pool:
        list(pool.map(work, range(TASKS)))


def _pool(work: Callable[[int], float]) -> None:
    import multiprocessing

    with multiprocessing.Pool() as pool:
        pool.map(work, range(TASKS))


def _by_hand(work: Callable[[int], float]) -> None:
    with ProcessPoolExecutor(int(os.environ["WORKERS"])) as pool:
        list(pool.map(work, range(TASKS)))


def _mpire(work: Callable[[int], float]) -> None:
    import mpire

    with mpire.WorkerPool() as pool:
        pool.map(work, range(TASKS))


def _pebble(work: Callable[[int], float]) -> None:
    import pebble

    with pebble.ProcessPool() as pool:
        list(pool.map(work, range(TASKS)).result())


def _dask(work: Callable[[int], float]) -> None:
    from distributed import Client

    with Client(dashboard_address=":0", silence_logs=50) as client:
        client.gather(client.map(work, range(TASKS), pure=False))


def _ray(work: Callable[[int], float]) -> None:
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    remote = ray.remote(work)
    ray.get([remote.remote(n) for n in range(TASKS)])


POOLS: dict[str, Callable[[Callable[[int], float]], None]] = {
    "safepool": _safepool,
    "stdlib": _standard,
    "Pool": _pool,
    "loky": _loky,
    "joblib": _joblib,
    "by hand": _by_hand,
    "mpire": _mpire,
    "pebble": _pebble,
    "dask": _dask,
    "ray": _ray,
}
# Each starts in its own way, and so is run with the case of the README alone.
MORE = {"mpire": "mpire", "pebble": "pebble", "dask": "distributed", "ray": "ray"}


def compared(work: str) -> list[str]:
    """Return the pools that are installed and are run with a kind of work."""
    return [
        pool
        for pool in POOLS
        if pool not in MORE
        or (work == "scipy" and importlib.util.find_spec(MORE[pool]) is not None)
    ]


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
    POOLS[pool](WORK[work])
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
    environ = {**os.environ, **variables}
    if pool == "by hand":
        environ |= dict.fromkeys(VARIABLES, "1")
        environ["WORKERS"] = str(max(1, math.floor(group.limit.cpus or 1)))
    with subprocess.Popen(
        command,
        stdout=-1,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=environ,
    ) as program:
        try:
            output = program.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    after = group.throttling()
    group.empty()
    frozen_s = math.nan
    if before is not None and after is not None:
        frozen_s = (after.throttled_us - before.throttled_us) / 1e6
    if not output:
        return [math.inf, math.nan, frozen_s]
    return [*json.loads(output.splitlines()[-1]), frozen_s]


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
    parser.add_argument("--cpus", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--host-cpus", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(*options.child)
        return
    # Ended by kill, it takes its group away all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with host(options.host_cpus) as variables:
        for cpus in options.cpus:
            for work in options.work:
                rows: dict[str, list[Any]] = {pool: [] for pool in compared(work)}
                with quota_group(cpus) as group:
                    for _ in range(options.rounds):
                        for pool, found in rows.items():
                            if math.inf in [one[0] for one in found]:
                                continue  # it takes its whole time, and tells nothing new
                            found.append(run(group, pool, work, variables, options.limit))
                where = f"a quota of {cpus:g} CPUs"
                if options.host_cpus:
                    where += f", a host of {options.host_cpus}"
                show(f"{work}, {TASKS} tasks, {where}", COLUMNS, rows)


if __name__ == "__main__":
    main()
