"""A cluster pool on other engines than Dask that people have, run for real."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# ruff: noqa: E501 -- programs
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROGRAM = """
import json, os, sys, threading, time
import safepool
from safepool import ClusterPool

FACTOR = 3

def times(x):
    return x * FACTOR

def together(folder):
    # Both nodes run one: neither ends before the other has begun.
    open(f"{folder}/{os.getppid()}", "w").close()
    while len(os.listdir(folder)) < 2:
        time.sleep(0.01)
    return os.getpid()

def fragile(x):
    if x == 5:
        os._exit(7)
    return x

def counted(path):
    with open(path, "a") as file:
        file.write("x")
    os._exit(1)

def error_of(future):
    return type(future.exception()).__name__

def main():
    facts = {}
    os.mkdir("nodes")
    with ENGINE as executor, ClusterPool(executor, workers_per_node=1, NODES) as pool:
        facts["both"] = len({one.result() for one in [pool.submit(together, os.path.abspath("nodes")) for _ in range(2)]})
        facts["size"] = pool.size
        facts["ordered"] = list(pool.map(times, range(500))) == [3 * x for x in range(500)]
        facts["alone"] = [type(one).__name__ for one in pool.map(fragile, range(8), return_exceptions=True)]
        shared = safepool.share(list(range(10)))
        facts["shared"] = pool.submit(lambda: shared[7]).result()
        facts["late"] = error_of(pool.submit(safepool.worker(time.sleep, timeout=0.3), 60))
        facts["unpicklable"] = error_of(pool.submit(threading.Lock))
        facts["retried"] = error_of(pool.submit(safepool.worker(counted, retries=2), os.path.abspath("starts")))
        facts["starts"] = os.path.getsize("starts")
    with open("facts", "w") as file:
        json.dump(facts, file)

if __name__ == "__main__":
    main()
"""


class Engine(NamedTuple):
    """An engine: its module, what makes an executor of two parallel calls, what runs a program."""

    module: str
    made: str
    nodes: str
    command: tuple[str, ...] = ()


ENGINES = {
    "mpi4py": Engine(
        "mpi4py",
        '__import__("mpi4py.futures").futures.MPIPoolExecutor()',
        "nodes=None",
        ("mpiexec", "-n", "3", sys.executable, "-W", "ignore", "-m", "mpi4py.futures"),
    ),
    "executorlib": Engine(
        "executorlib",
        '__import__("executorlib").SingleNodeExecutor(max_workers=2, block_allocation=True)',
        "nodes=2",
        (sys.executable, "-W", "ignore"),
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_executor_that_people_have_carries_calls(name: str, tmp_path: Path) -> None:
    engine = ENGINES[name]
    if importlib.util.find_spec(engine.module) is None:
        pytest.skip(f"{engine.module} is not installed: pip install {engine.module}")
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    program = shutil.which(engine.command[0], path=places)
    if program is None:
        pytest.skip(f"{engine.command[0]} is not installed: pip install mpich")
    text = PROGRAM.replace("ENGINE", engine.made).replace("NODES", engine.nodes)
    (tmp_path / "program.py").write_text(text)
    done = subprocess.run(
        [program, *engine.command[1:], "program.py"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "facts").read_text()) == {
        "both": 2,
        "size": 2,
        "ordered": True,
        "alone": [*["int"] * 5, "WorkerDiedError", "int", "int"],
        "shared": 7,
        "late": "TaskTimeoutError",
        "unpicklable": "TypeError",
        "retried": "WorkerDiedError",
        "starts": 3,
    }
