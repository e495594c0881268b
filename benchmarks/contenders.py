"""The pools that the benchmarks compare, opened side by side, and what a process tree costs.

CPU time and memory of workers are read from Linux (clock_getcpuclockid(3),
proc_pid_smaps(5)); elsewhere only this process's own CPU time is known.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import figures
from figures import OURS, TurnEndedError, at_most

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Function = Callable[[Any], Any]

__all__ = [
    "CONTENDERS",
    "OURS",
    "Opened",
    "Pools",
    "available",
    "compare",
    "cpu_s",
    "descendants",
    "groups",
    "last_line",
    "open_all",
    "pss_kb",
    "result_of",
]

# Seconds for a pool to open and run something, and to close.
OPEN_S, CLOSE_S = 60.0, 10.0


@dataclass(frozen=True, slots=True)
class Opened:
    """A pool that has its workers.

    Attributes:
        submit: Starts one call and returns something with ``result()`` or ``get()``.
        map: Runs many at the pool's defaults, and returns their results.
        executor: What ``loop.run_in_executor()`` takes; ``None`` if there is nothing.
        pids: Ids of its processes.
    """

    submit: Callable[[Function, Any], Any] | None
    map: Callable[[Function, Iterable[Any]], list[Any]]
    executor: Any = None
    pids: tuple[int, ...] = ()


# By the names of contenders; None is one that has not opened, or has hung.
Pools = dict[str, Opened | None]


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


def groups(
    wanted: Callable[[Contender], bool] = lambda _: True,
) -> list[list[Contender]]:
    """Return those that are installed, in the groups in which they are opened together."""
    found = [one for one in available() if wanted(one)]
    ours = [one for one in found if one.name == OURS]
    together = [one for one in found if not one.has_daemons]
    return [together, *([*ours, one] for one in found if one.has_daemons)]


@contextlib.contextmanager
def open_all(contenders: Iterable[Contender], workers: int, warm_up: Function) -> Iterator[Pools]:
    """Open pools, and let each of their workers run something.

    One that cannot open, or cannot close, says so and is in nobody's way.
    """
    with contextlib.ExitStack() as stack:
        pools: Pools = {}
        for contender in contenders:
            others = {*descendants()}
            pools[contender.name] = pool = stack.enter_context(
                _opened(contender, workers, warm_up)
            )
            if pool is not None:
                pids = (*{*descendants()} - others,)
                pools[contender.name] = replace(pool, pids=pids)
        yield pools


@contextlib.contextmanager
def _opened(contender: Contender, workers: int, warm_up: Function) -> Iterator[Opened | None]:
    opening = contender.open(workers)
    try:
        with at_most(OPEN_S):
            pool = opening.__enter__()
            pool.map(warm_up, range(50 * workers))
    except (Exception, TurnEndedError) as error:
        if contender.name == OURS:
            raise
        print(f"{contender.name}: not opened: {error!r}", file=sys.stderr)
        yield None
        return
    try:
        yield pool
    finally:
        try:
            with at_most(CLOSE_S):
                opening.__exit__(None, None, None)
        except (Exception, TurnEndedError) as error:  # noqa: BLE001 -- of each pool its own
            print(f"{contender.name}: not closed: {error!r}", file=sys.stderr)


def compare(
    title: str,
    columns: Sequence[str],
    pools: Pools,
    run: Callable[[str, Opened], Sequence[float]],
    rounds: int,
    *,
    only: Callable[[str, Opened], object] = lambda *_: True,
    more: Mapping[str, Callable[[], Sequence[float]]] | None = None,
    **options: Any,
) -> None:
    """Let pools take turns, and show a table; one that hangs takes no part from then on.

    Args:
        title: Question that the table answers.
        columns: Name and unit of each figure.
        pools: Opened by `open_all`.
        run: One turn, which returns its figures.
        rounds: Turns of each.
        only: Whether one takes part.
        more: Contenders that are no pools.
        options: For `figures.compare`.
    """
    runs = {
        name: partial(run, name, pool)
        for name, pool in pools.items()
        if pool is not None and only(name, pool)
    }
    if runs.keys() == {OURS} != pools.keys():
        return
    rows = figures.compare(title, columns, {**(more or {}), **runs}, rounds, **options)
    pools.update({name: None for name in runs if rows[name] and rows[name][-1][0] == math.inf})


def result_of(future: Any) -> Any:
    """Wait for a future, or for what multiprocessing and mpire have in its place."""
    return future.result() if hasattr(future, "result") else future.get()


def last_line(
    command: Sequence[str], *, limit_s: float | None = None, env: Mapping[str, str] | None = None
) -> str | None:
    """Run a program, and end all processes of its session when it ends or its time is up.

    Args:
        command: The program and its arguments.
        limit_s: Seconds that it has.
        env: Variables that it gets beside those of this process.

    Returns:
        The last line that it has printed, "" for none; ``None`` if it has not ended in time.
    """
    # joblib's folder is in memory as ever, and does not outlive a program that is killed.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with (
        tempfile.TemporaryDirectory(dir=memory, ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "JOBLIB_TEMP_FOLDER": folder, **(env or {})},
        ) as program,
    ):
        try:
            return (program.communicate(timeout=limit_s)[0].splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


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
