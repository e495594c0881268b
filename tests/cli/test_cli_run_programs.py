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
    said = ended.stderr.count("workers are forks of this process, because only forks inherit")
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


WAYS = """
import multiprocessing
import multiprocessing.pool
from multiprocessing import Pool as imported
from multiprocessing.pool import Pool as imported_below, ThreadPool
{early}
def pid(_):
    import os
    return os.getpid()

class Derived(multiprocessing.pool.Pool):
    def map(self, *arguments):
        return super().map(*arguments)

class OwnProcess(multiprocessing.get_context("fork").Process):
    daemon = False

class OwnContext(type(multiprocessing.get_context("fork"))):
    Process = OwnProcess

class Nestable(multiprocessing.pool.Pool):
    def __init__(self, *arguments):
        super().__init__(*arguments, context=OwnContext())

if __name__ == "__main__":
    import json, os, safepool
    from unittest import mock
    {late}
    told = {}
    for name, make in {
        "multiprocessing.Pool": multiprocessing.Pool,
        "multiprocessing.pool.Pool": multiprocessing.pool.Pool,
        "imported": imported,
        "imported below": imported_below,
        "of a context": multiprocessing.get_context().Pool,
        "of a chosen context": multiprocessing.get_context("spawn").Pool,
        "derived": Derived,
        "of a context of its own": Nestable,
        "ThreadPool": ThreadPool,
        **more,
    }.items():
        with make(1) as pool:
            ours = isinstance(pool, safepool.Pool)
            assert isinstance(pool, multiprocessing.pool.Pool), name
            assert (pool.map(pid, [1]) == [os.getpid()]) == (name == "ThreadPool"), name
            told[name] = pool._engine._mp_context.get_start_method() if ours else ""
    with mock.patch("multiprocessing.pool.Pool", dict):
        assert multiprocessing.Pool is not dict and multiprocessing.pool.Pool is dict
    assert multiprocessing.pool.Pool is imported_below
    assert not isinstance(ThreadPool(1), Derived) and issubclass(ThreadPool, imported_below)
    with multiprocessing.Manager() as manager:
        assert manager.Pool(1).map(abs, [-1]) == [1]
    print(json.dumps(told))
"""
CHOSEN = {
    "of a context": multiprocessing.get_all_start_methods()[0],  # it may be a chosen one
    "of a chosen context": "spawn",
    "of a context of its own": "fork",
    "ThreadPool": "",
}


def ways(early: str = "", late: str = "more = {}") -> str:
    return WAYS.replace("{early}", early).replace("{late}", late)


def test_every_way_to_a_pool_of_multiprocessing_leads_to_ours(tmp_path: Path) -> None:
    """A start method that the program has chosen stays; threads stay threads."""
    ended = run_patched(tmp_path, ways(), PYTHONWARNINGS="ignore")

    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert {name: told.pop(name) for name in CHOSEN} == CHOSEN
    assert len(told) == 5
    assert {*told.values()} == {"safepool"}


def test_so_does_every_way_to_one_of_multiprocess(tmp_path: Path) -> None:
    pytest.importorskip("multiprocess")
    late = """
    import multiprocess, multiprocess.pool
    from multiprocess.pool import Pool as third
    more = {"multiprocess.Pool": multiprocess.Pool, "multiprocess.pool.Pool": third,
            "chosen there": multiprocess.get_context("spawn").Pool}
    with multiprocess.Pool(1) as pool:
        assert isinstance(pool, multiprocess.pool.Pool)
        try: pool.apply_async(__import__("time").sleep, [60]).get(0)
        except multiprocess.TimeoutError: pass
"""
    ended = run_patched(tmp_path, ways("", late), PYTHONWARNINGS="ignore")

    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert [told[name] for name in ("multiprocess.Pool", "chosen there")] == ["safepool", "spawn"]


# What a fork shares with its program: a global of a kind each, used by tasks and read afterwards.
SHARED = """
import json, mmap, multiprocessing, os, sys
import numpy as np
import beside
m = multiprocessing
shared = None
in_module = m.Value("i", 0) if "guarded" in sys.argv else None

class Holder:
    value = None

def add(x):
    kind = type(shared).__name__
    if kind == "dict":
        with shared["lock"]: shared["value"].value += x
    elif kind in ("SynchronizedArray", "c_double_Array_2", "ndarray", "mmap"):
        shared[0] = 7
    elif kind == "Queue":
        shared.put(x)
    elif kind == "Synchronized":
        shared.value += x
    elif beside.shared is not None:
        beside.shared.value += x
    elif Holder.value is not None:
        Holder.value.value += x
    elif in_module is not None:
        in_module.value += x
    return os.getppid()

def read(value):
    kind = type(value).__name__
    if kind == "dict":
        return value["value"].value
    if kind == "Queue":
        return value.get()
    return value.value if kind == "Synchronized" else int(value[0])

if __name__ == "__main__":
    told = {}
    kinds = {
        "Value": lambda: m.Value("i", 0), "Array": lambda: m.Array("i", 2), "Queue": m.Queue,
        "RawArray": lambda: m.RawArray("d", 2), "mmap": lambda: mmap.mmap(-1, 8),
        "numpy": lambda: np.frombuffer(m.RawArray("d", 2)),
        "in a dict": lambda: {"lock": m.Lock(), "value": m.Value("i", 0)},
        "in a class": None, "in a module": None, "nothing": lambda: [1],
    }
    if in_module is not None:
        kinds = {"at the top level": None}
    for kind, make in kinds.items():
        shared, Holder.value, beside.shared = make and make(), None, None
        value = shared
        if kind == "in a class": value = Holder.value = m.Value("i", 0)
        if kind == "in a module": beside.shared = m.Value("i", 0)
        if kind == "at the top level": value = in_module
        with m.Pool(1, maxtasksperchild=9) as pool:
            forked = pool.map(add, [7]) == [os.getpid()]
            pool.close()
            pool.join()
        value = beside.shared or value
        told[kind] = [forked, None if kind == "nothing" else read(value)]
    print(json.dumps(told))
"""


@pytest.mark.skipif(not FORKS, reason="the standard pool does not fork here")
@pytest.mark.parametrize("guarded", [False, True])
def test_what_a_fork_shares_with_the_program_makes_workers_forks(
    guarded: bool, tmp_path: Path
) -> None:
    """Clean workers would have one of their own, and the program would see nothing in its own."""
    (tmp_path / "beside.py").write_text("shared = None\n")
    ended = run_patched(tmp_path, SHARED, *(["guarded"] if guarded else []))

    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told.pop("nothing", [False, None]) == [False, None]
    assert {kind: found for kind, found in told.items() if found != [True, 7]} == {}
    names = ["in_module of __main__"]
    if not guarded:
        names = ["shared of __main__", "Holder of __main__", "shared of beside"]
    said = "workers are forks of this process, because only forks inherit "
    assert [name for name in names if said + name in ended.stderr] == names
    assert ended.stderr.count(said) == len(names)


BESIDE = """
LEVEL, same, options, names, by_init = 1, int("5"), {"a": 1}, {"x", "y"}, 0
model = thing = None
cache, count, ready, unused = {}, 0, False, 0
def scaled(x): return x * LEVEL + same
def cached(x):
    if x not in cache: cache[x] = x * 2
    return cache[x]
def counted(x):
    global count
    count += 1
    return x
def made_ready(x):
    global ready
    ready = True
    return x
def of_initializer(x): return by_init + x
def set_it(value):
    global by_init
    by_init = value
"""
SETS = """
import functools, multiprocessing
import beside
from beside import cached, counted, made_ready, of_initializer, scaled
class Model:
    def __call__(self, x): return beside.options["a"] + x
def late(x): return getattr(beside, "late", None) or beside.late
def with_model(x): return 0 if beside.model is None else 1
def quiet(x): return beside.same + len(beside.names) + (beside.thing is None)
def sets(x): beside.unused = x
if __name__ == "__main__":
    beside.LEVEL, beside.late, beside.by_init, beside.unused = 7, 9, 3, 1
    beside.model, beside.options["a"] = Model(), 3
    beside.cache[5] = 1
    counted(0)
    made_ready(0)
    def run(function):
        try: pool.map(function, [1])
        except AttributeError: pass
    with multiprocessing.Pool(1, beside.set_it, [3]) as pool:
        for function in (quiet, cached, counted, made_ready, of_initializer, sets, abs):
            run(function)
        for function in (functools.partial(scaled), Model(), with_model, late, scaled):
            run(function)
        pool.close()
        pool.join()
"""


@pytest.mark.skipif(not FORKS, reason="the standard pool does not fork here")
def test_what_the_program_has_set_in_modules_is_told_by_its_name(tmp_path: Path) -> None:
    """A line for each, and none for what the call makes itself, nor for an initializer's."""
    (tmp_path / "beside.py").write_text(BESIDE)
    ended = run_patched(tmp_path, f"import sys; sys.stderr = sys.stdout\n{SETS}")

    assert ended.returncode == 0, ended.stdout
    said = "workers do not have the program's value of "
    lines = [line for line in ended.stdout.splitlines() if said in line]
    told = [line.partition(said)[2].partition(".")[0] for line in lines]
    names = sorted(text.partition(",")[0] for text in told)
    assert names == [f"{name} of beside" for name in ("LEVEL", "late", "model", "options")]


@pytest.mark.skipif(not FORKS, reason="the standard pool does not fork here")
def test_joblib_s_workers_stay_clean_beside_such_a_global(tmp_path: Path) -> None:
    """They are no forks without the patch, either."""
    text = """
import multiprocessing, os
from joblib import Parallel, delayed
lock = multiprocessing.Lock()
if __name__ == "__main__":
    print(os.getpid() in Parallel(n_jobs=2)(delayed(os.getppid)() for _ in range(4)))
"""
    ended = run_patched(tmp_path, text)

    assert (ended.stdout, ended.stderr) == ("False\n", "")


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

    # And one worker has its share.
    assert json.loads(out) == [cpus, cpus, cpus, 1]


def test_os_cpu_count_stays_where_the_user_has_said_a_number(tmp_path: Path) -> None:
    text = "import os; print(os.cpu_count())"

    assert run_patched(tmp_path, text, PYTHON_CPU_COUNT="7").stdout == "7\n"
    machine = f"{os.cpu_count()}\n"
    assert run_patched(tmp_path, text, PYTHON_CPU_COUNT="default").stdout == machine
