"""What a call costs over nodes: `ClusterPool` beside Dask's own ways to run calls, in one run.

    python benchmarks/cluster.py [--nodes 1 2] [--rounds 5] [--kill]

Real ``dask scheduler`` and ``dask worker`` processes on the loopback interface, one worker process
per node; nodes of one machine are told apart by a variable that bounds each to one CPU. Figures
are milliseconds for each call, medians over the rounds, and before them the ratio to ours: above 1
is slower than ours. With ``--kill`` calls of 100 ms run while the process that runs the
latest is killed every second; ``--nodes --kill`` is that alone.

The aims, of medians: ahead of each of the others from calls of 1 ms on, and at most 1.2 times
``client.map`` for those that do nothing; all results right while workers are killed, with no start
beyond one for each call and kill. The last line names each aim that was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from distributed import Client
from figures import compare, show_outcomes

import safepool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    # Runs so many calls of a kind, and waits for their results.
    Run = Callable[[Callable[[Any], Any], list[Any]], object]

# Each node is bounded to one CPU by another variable, so that it is a node of its own.
NODES = ("LOKY_MAX_CPU_COUNT", "SLURM_CPUS_PER_TASK")


def tiny(x: int) -> int:
    """Return at once."""
    return x + 1


def one_ms(x: int) -> int:
    """Compute for a millisecond."""
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
    return x


def ten_ms(x: int) -> int:
    """Wait for ten."""
    time.sleep(0.01)
    return x


def total(array: Any) -> float:
    """Read 8 MB."""
    return float(array.sum())


def noted(path: str) -> str:
    """Note the start, and wait for 100 ms."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.1)
    return path


OURS = "ClusterPool"

# Function, number of calls, and the argument of each.
KINDS: dict[str, tuple[Callable[[Any], Any], int, Callable[[int], Any]]] = {
    "tiny": (tiny, 200, int),
    "1 ms": (one_ms, 100, int),
    "10 ms": (ten_ms, 50, int),
    "8 MB": (total, 10, lambda number: np.full(1 << 20, float(number))),
}


def _start(folder: Path, module: str, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-m", f"distributed.cli.{module}"]
    command += ["--scheduler-file", str(folder / "scheduler.json"), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Client]:
    """Start a scheduler and a worker with a nanny per node."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scheduler = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0")
        processes = [_start(folder, "dask_scheduler", *scheduler)]
        worker = ("--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
        processes += [
            _start(folder, "dask_worker", *worker, **{NODES[n]: "1"}) for n in range(nodes)
        ]
        try:
            while not (folder / "scheduler.json").exists():
                time.sleep(0.05)
            with Client(scheduler_file=str(folder / "scheduler.json")) as client:
                client.wait_for_workers(nodes)
                yield client
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


@contextlib.contextmanager
def contenders(client: Client, retries: int = 0) -> Iterator[dict[str, Run]]:
    """Open all ways at the same time."""

    def by_map(function: Callable[[Any], Any], items: list[Any]) -> object:
        return client.gather(client.map(function, items, pure=False))

    def by_joblib(function: Callable[[Any], Any], items: list[Any]) -> object:
        with joblib.parallel_config(backend="dask", client=client):
            return joblib.Parallel(n_jobs=-1)(joblib.delayed(function)(item) for item in items)

    executor = client.get_executor(pure=False)
    with safepool.ClusterPool(client, retries=retries) as pool:
        ways: dict[str, Run] = {
            "ClusterPool": lambda function, items: list(pool.map(function, items)),
            "client.map": by_map,
            "get_executor": lambda function, items: wait(
                [executor.submit(function, item) for item in items]
            ),
        }
        if len(client.nthreads()) > 1:  # with one job joblib runs calls in this process
            ways["joblib"] = by_joblib
        yield ways


def measure(nodes: int, rounds: int) -> Iterator[str]:
    """Show a table for each kind of call; yield the aims that were missed."""
    with cluster(nodes) as client, contenders(client) as ways:
        for run in ways.values():
            run(tiny, [*range(100)])
        for kind, (function, count, make) in KINDS.items():

            def turn(
                run: Run,
                function: Callable[[Any], Any] = function,
                count: int = count,
                make: Callable[[int], Any] = make,
            ) -> tuple[float]:
                items = [make(number) for number in range(count)]
                begun = time.perf_counter()
                run(function, items)
                return ((time.perf_counter() - begun) * 1000 / count,)

            runs = {name: partial(turn, run) for name, run in ways.items()}
            title = f"{nodes} node{'s' * (nodes > 1)}, {kind}, each call"
            # One that is cut off would leave its calls in the cluster that all of them share.
            found = compare(title, ["ms"], runs, rounds, base=OURS, turn_s=60.0)
            yield from _missed(title, kind, found)


def _missed(title: str, kind: str, found: dict[str, list[Sequence[float]]]) -> Iterator[str]:
    medians = {
        name: statistics.median(first for first, *_ in rounds)
        for name, rounds in found.items()
        if rounds
    }
    ours = medians.pop(OURS)
    for name, other in medians.items():
        most = 1.0 if kind != "tiny" else 1.2 if name == "client.map" else math.inf
        if ours > most * other:
            yield f"{title} takes {ours / other:.2f} times that of {name}"


def killed(count: int = 60, limit_s: float = 60.0) -> Iterator[str]:
    """Show what becomes of calls whose processes are killed; yield the aims that were missed."""
    found: dict[str, list[str]] = {}
    for name in (OURS, "client.map", "joblib"):
        with cluster(2) as client, contenders(client, retries=5) as ways:
            ways[name](tiny, [*range(4)])
            outcome, kills, starts = _killed_while(ways[name], count, limit_s)
        found[name] = [outcome, f"{kills}", f"{starts}"]
        if name == OURS and not (outcome.endswith("all right") and starts <= count + kills):
            yield f"with workers killed: {outcome}, {kills} kills, {starts} starts"
    title = f"{count} calls of 100 ms on 2 nodes; what runs the latest is killed every second"
    show_outcomes(title, ["calls", "kills", "starts"], found)


def _killed_while(run: Run, count: int, limit_s: float) -> tuple[str, int, int]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}" for number in range(count)]
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(run(noted, paths)), daemon=True)
        begun, kills = time.perf_counter(), 0
        thread.start()
        while thread.is_alive() and time.perf_counter() - begun < limit_s:
            thread.join(1)
            started = [Path(path) for path in paths if os.path.exists(path)]
            if started and thread.is_alive():
                latest = max(started, key=lambda path: path.stat().st_mtime)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(latest.read_text().split()[-1]), signal.SIGKILL)
                    kills += 1
        seconds = time.perf_counter() - begun
        starts = sum(len(Path(path).read_text().split()) for path in paths if os.path.exists(path))
        if thread.is_alive():
            return f"not ended after {limit_s:.0f} s", kills, starts
        right = "all right" if found == [paths] else "failed"
        return f"{seconds:.1f} s, {right}", kills, starts


def main() -> None:
    """Run what is asked for."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("--nodes", type=int, nargs="*", default=[1, 2], choices=[1, 2])
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--kill", action="store_true")
    options = asked.parse_args()
    missed = [aim for nodes in options.nodes for aim in measure(nodes, options.rounds)]
    if options.kill:
        missed += killed()
    print("\naims: " + ("; ".join(missed) or "all met"), flush=True)


if __name__ == "__main__":
    main()
