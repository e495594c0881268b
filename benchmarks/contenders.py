"""The pools that the benchmarks compare, opened side by side, and what a process tree costs.

CPU time and memory of workers are read from Linux (clock_getcpuclockid(3),
proc_pid_smaps(5)); elsewhere only this process's own CPU time is known.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Function = Callable[[Any], Any]

__all__ = [
    "CONTENDERS",
    "OURS",
    "Opened",
    "available",
    "cpu_s",
    "descendants",
    "groups",
    "open_all",
    "pss_kb",
]


@dataclass(frozen=True, slots=True)
class Opened:
    """A pool that has its workers.

    Attributes:
        submit: Starts one call and returns something with ``result()`` or ``get()``.
        map: Runs many at the pool's defaults, and returns their results.
        executor: What ``loop.run_in_executor()`` takes; ``None`` if there is nothing.
    """

    submit: Callable[[Function, Any], Any] | None
    map: Callable[[Function, Iterable[Any]], list[Any]]
    executor: Any = None


@dataclass(frozen=True, slots=True)
class Contender:
    """A pool that can be opened.

    Attributes:
        name: What the tables call it.
        module: Where it comes from; skipped if it is not installed.
        open: A context manager that is given the number of workers.
        has_daemons: It has processes beside its workers, which use CPU time all the time: it is
            opened alone beside ours.
    """

    name: str
    module: str
    open: Callable[[int], contextlib.AbstractContextManager[Opened]]
    has_daemons: bool = False


def _executor(make: Callable[[int], Any]) -> Any:
    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Opened]:
        with make(workers) as pool:
            yield Opened(
                pool.submit, lambda function, items: list(pool.map(function, items)), pool
            )

    return opened


def _standard(method: str) -> Any:
    context = multiprocessing.get_context(method)
    return _executor(lambda workers: ProcessPoolExecutor(workers, mp_context=context))


def _ours(workers: int) -> Any:
    import safepool

    return safepool.ProcessPool(workers)


def _loky(workers: int) -> Any:
    import loky

    return loky.ProcessPoolExecutor(workers)


def _multiprocessing(method: str) -> Any:
    @contextlib.contextmanager
    def opened(workers: int) -> Iterator[Opened]:
        with multiprocessing.get_context(method).Pool(workers) as pool:
            yield Opened(lambda function, item: pool.apply_async(function, (item,)), pool.map)

    return opened


@contextlib.contextmanager
def _joblib(workers: int) -> Iterator[Opened]:
    import joblib

    with joblib.Parallel(workers) as parallel:
        yield Opened(None, lambda function, items: parallel(map(joblib.delayed(function), items)))


@contextlib.contextmanager
def _mpire(workers: int) -> Iterator[Opened]:
    import mpire

    with mpire.WorkerPool(workers, start_method="forkserver", keep_alive=True) as pool:
        yield Opened(lambda function, item: pool.apply_async(function, (item,)), pool.map)


@contextlib.contextmanager
def _pebble(workers: int) -> Iterator[Opened]:
    import pebble

    context = multiprocessing.get_context("forkserver")
    with pebble.ProcessPool(workers, context=context) as pool:
        yield Opened(
            lambda function, item: pool.schedule(function, args=[item]),
            lambda function, items: list(pool.map(function, items).result()),
        )


@contextlib.contextmanager
def _dask(workers: int) -> Iterator[Opened]:
    from distributed import Client

    with Client(
        n_workers=workers, threads_per_worker=1, dashboard_address=":0", silence_logs=50
    ) as client:
        executor = client.get_executor(pure=False)

        def mapped(function: Function, items: Iterable[Any]) -> list[Any]:
            found: list[Any] = client.gather(client.map(function, [*items], pure=False))
            return found

        yield Opened(executor.submit, mapped, executor)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[Opened]:
    import ray

    # Its workers begin in another folder.
    variables = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=variables,
    )
    remotes: dict[Function, Any] = {}

    def started(function: Function, item: Any) -> Any:
        if function not in remotes:
            remotes[function] = ray.remote(function)
        return remotes[function].remote(item)

    try:
        yield Opened(
            lambda function, item: started(function, item).future(),
            lambda function, items: ray.get([started(function, item) for item in items]),
        )
    finally:
        ray.shutdown()


# The forked ones first: they must be opened while this process has few threads.
CONTENDERS = (
    Contender("multiprocessing fork", "multiprocessing", _multiprocessing("fork")),
    Contender("stdlib fork", "concurrent.futures", _standard("fork")),
    Contender(OURS, "safepool", _executor(_ours)),
    Contender("stdlib forkserver", "concurrent.futures", _standard("forkserver")),
    Contender("stdlib spawn", "concurrent.futures", _standard("spawn")),
    Contender("loky", "loky", _executor(_loky)),
    Contender("multiprocessing", "multiprocessing", _multiprocessing("forkserver")),
    Contender("multiprocessing spawn", "multiprocessing", _multiprocessing("spawn")),
    Contender("joblib", "joblib", _joblib),
    Contender("mpire", "mpire", _mpire),
    Contender("pebble", "pebble", _pebble),
    Contender("dask", "distributed", _dask, has_daemons=True),
    Contender("ray", "ray", _ray, has_daemons=True),
)


def available() -> list[Contender]:
    """Return those that are installed, and print which are not."""
    found = []
    for contender in CONTENDERS:
        if importlib.util.find_spec(contender.module) is None:
            print(f"{contender.name}: skipped, not installed (pip install 'safepool[bench]')")
        else:
            found.append(contender)
    return found


def groups() -> list[list[Contender]]:
    """Return those that are installed, in the groups in which they are opened together."""
    found = available()
    ours = [one for one in found if one.name == OURS]
    together = [one for one in found if not one.has_daemons]
    return [together, *([*ours, one] for one in found if one.has_daemons)]


@contextlib.contextmanager
def open_all(
    contenders: Iterable[Contender], workers: int, warm_up: Function
) -> Iterator[dict[str, Opened]]:
    """Open pools, and let each of their workers run something."""
    with contextlib.ExitStack() as stack:
        pools: dict[str, Opened] = {}
        for contender in contenders:
            pools[contender.name] = stack.enter_context(contender.open(workers))
            pools[contender.name].map(warm_up, range(50 * workers))
        yield pools


def descendants() -> list[int]:
    """Return the ids of the processes that come from this one; none where /proc is missing."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # proc_pid_stat(5): the name in parentheses may hold anything, also a parenthesis.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, at = [os.getpid()], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found[1:]


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time of this process and of the others, in seconds."""
    total = time.process_time()
    if sys.platform == "linux":
        for pid in pids:
            with contextlib.suppress(OSError):
                # The clock of a process by its id: glibc, sysdeps/unix/sysv/linux/
                # clock_getcpuclockid.c; 2 is CPUCLOCK_SCHED.
                total += time.clock_gettime(((~pid) << 3) | 2)
    return total


def pss_kb(pids: Iterable[int]) -> int:
    """Return the memory of processes, what they share divided among those who share it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total
