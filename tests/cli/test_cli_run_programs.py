"""Programs that nobody changes, under ``safepool run --patch``."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import support_cgroups
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and control groups")


RUN = [sys.executable, "-m", "safepool", "run", "--patch", "--"]


def run_patched(
    folder: Path, text: str, *arguments: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    clean = natives.environment() | environ
    del clean["PYTHONWARNINGS"]
    return subprocess.run(
        [*RUN, sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=clean,
    )


# What a program that was written for forked workers hands to its initializer.
PROGRAM = """
import concurrent.futures, functools, multiprocessing, sys, threading

class Holder:
    def __init__(self, held):
        self.held = held

def init(given):
    global things
    things = given

def init_with(keyword=None):
    init(keyword)

def use(x):
    kind = sys.argv[1]
    if kind in ("Lock", "RLock", "Semaphore", "Condition", "threading.Lock"):
        with things: return x * x
    if kind in ("Event", "Barrier"):
        things.is_set() if kind == "Event" else things.n_waiting
    elif kind == "Queue":
        things.put(x)
    elif kind == "Value":
        with things.get_lock(): things.value += x
    elif kind == "Array":
        things[0] = x
    elif kind == "in an object":
        with things.held["lock"]: return x * x
    elif kind == "in a partial":
        with things: return x * x
    elif kind == "a manager's":
        things.append(x)
    return x * x

if __name__ == "__main__":
    m, kind = multiprocessing, sys.argv[1]
    make = {
        "Lock": m.Lock, "RLock": m.RLock, "Semaphore": m.Semaphore, "Condition": m.Condition,
        "Event": m.Event, "Barrier": lambda: m.Barrier(2), "Queue": m.Queue,
        "Value": lambda: m.Value("i", 0), "Array": lambda: m.Array("i", 3),
        "in an object": lambda: Holder({"lock": m.Lock()}), "in a partial": m.Lock,
        "threading.Lock": threading.Lock, "a manager's": lambda: m.Manager().list(),
    }
    given = make[kind]()
    words = {"initializer": init, "initargs": (given,)}
    if kind == "in a partial":
        words = {"initializer": functools.partial(init_with, keyword=given)}
    with concurrent.futures.ProcessPoolExecutor(2, **words) as pool:
        print(sum(pool.map(use, range(20))), pool._mp_context.get_start_method())
    if kind == "Value":
        print(given.value)
    if kind == "Queue":
        print(sorted(given.get() for _ in range(20)) == list(range(20)))
"""

# One row per thing, and what else the program prints.
THINGS: dict[str, list[str]] = {
    **{name: [] for name in ("Lock", "RLock", "Semaphore", "Condition", "Event", "Barrier")},
    "Array": [],
    "Queue": ["True"],
    "Value": ["190"],
    "in an object": [],
    "in a partial": [],
    "threading.Lock": [],
    "a manager's": [],
}
# These can be pickled in any program.
PICKLED = {"a manager's"}
FORKS = multiprocessing.get_all_start_methods()[0] == "fork"


@pytest.mark.parametrize("thing", THINGS)
def test_what_only_a_fork_can_be_given_makes_workers_forks(thing: str, tmp_path: Path) -> None:
    """As those of the standard pool, and it is said."""
    if thing == "threading.Lock" and not FORKS:
        pytest.skip("the standard pool does not fork here")

    ended = run_patched(tmp_path, PROGRAM, thing)

    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()] == ["2470", *THINGS[thing]]
    said = ended.stderr.count("workers are forked from this process, because nothing else can")
    assert said == (FORKS and thing not in PICKLED)


@pytest.mark.skipif(importlib.util.find_spec("tqdm") is None, reason="tqdm is not installed")
def test_process_map_of_tqdm_works_unchanged(tmp_path: Path) -> None:
    """It hands a lock of the default context to the initializer."""
    text = """
from tqdm.contrib.concurrent import process_map
def f(x): return x * x
if __name__ == "__main__":
    print(sum(process_map(f, range(20), max_workers=2, chunksize=1, disable=True)))
"""
    ended = run_patched(tmp_path, text)

    assert (ended.stdout, ended.returncode) == ("2470\n", 0)


def test_a_broken_initializer_is_told_as_ever(tmp_path: Path) -> None:
    text = """
import concurrent.futures
def init(): raise ValueError("on purpose")
if __name__ == "__main__":
    with concurrent.futures.ProcessPoolExecutor(1, initializer=init) as pool:
        try: pool.submit(abs, -1).result()
        except concurrent.futures.process.BrokenProcessPool as error: print(error.__cause__)
"""
    ended = run_patched(tmp_path, text)

    assert ended.stdout.endswith("on purpose\n")
    assert "workers are forked" not in ended.stderr


ASK = """
import json, multiprocessing, os, sys
if __name__ == "__main__":
    with multiprocessing.Pool() as pool:
        found = [os.cpu_count(), pool._processes, multiprocessing.cpu_count()]
        print(json.dumps([*found, pool.apply(os.cpu_count)]))
"""


@pytest.mark.parametrize("cpus", [1, 2])
def test_multiprocessing_s_pool_is_bounded_by_a_quota(cpus: int, tmp_path: Path) -> None:
    """On a host with 48 CPUs, by every version of Python."""
    preload = natives.shim(tmp_path.parent)
    if preload is None:
        pytest.skip("no compiler to build the shim with")
    script = tmp_path / "script.py"
    script.write_text(ASK, encoding="utf-8")
    environ = natives.environment(preload)
    with (
        support_cgroups.control_group(cpus=cpus, environ=environ) as group,
        group.popen([*RUN, sys.executable, str(script)]) as program,
    ):
        out, _ = program.communicate(timeout=60)

    assert json.loads(out) == [cpus] * 4


def test_os_cpu_count_stays_where_the_user_has_said_a_number(tmp_path: Path) -> None:
    text = "import os; print(os.cpu_count())"

    assert run_patched(tmp_path, text, PYTHON_CPU_COUNT="7").stdout == "7\n"
    machine = f"{os.cpu_count()}\n"
    assert run_patched(tmp_path, text, PYTHON_CPU_COUNT="default").stdout == machine
