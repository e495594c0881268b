"""Each layer of the cap is needed: with it one thread, without it many.

Programs in fresh interpreters, on a machine that seems to have 48 CPUs where the shim can
be built. A forked worker inherits what the program has patched, so that is how a layer is
taken away.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads the loader's list"),
    pytest.mark.skipif(
        natives.missing("scipy") is not None, reason="NumPy and SciPy are not installed"
    ),
    pytest.mark.skipif(
        hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < 2,
        reason="on one CPU every native pool has one thread by itself",
    ),
]

START = """
import json, multiprocessing, sys
import safepool, support_natives as natives
from safepool.threads import cap
layer = sys.argv[1]

def no_environment(*_args, **_more):
    return {}

def nothing(*_args, **_more):
    return None

def pool(**more):
    return safepool.ProcessPool(1, mp_context=multiprocessing.get_context("fork"), **more)
"""


def threads(program: str, layer: str, folder: Path) -> Any:
    return natives.run(START + program, folder=folder, arguments=(layer,))


@pytest.mark.parametrize("layer", ["with", "without"])
def test_the_environment_at_birth(layer: str, tmp_path: Path) -> None:
    """It alone holds what a task imports while the task goes on."""
    program = """
import safepool.pool.executor as executor
if layer == "without":
    executor.worker_environment = no_environment
with safepool.ProcessPool(1) as p:
    found = p.submit(natives.use_and_look, "scipy").result(60)
print(json.dumps(max(n for runtime, n in found if runtime == "openblas")))
"""
    assert (threads(program, layer, tmp_path) == 1) == (layer == "with")


@pytest.mark.parametrize("layer", ["with", "without"])
def test_the_cap_before_the_initializer(layer: str, tmp_path: Path) -> None:
    """It alone holds what a forked worker has inherited, in the initializer already."""
    program = """
import numpy, support_tasks as tasks
if layer == "without":
    cap.WorkerCap.apply = nothing
    cap.WorkerCap.recheck = nothing
def look():
    tasks.mark(natives.openblas_threads())
with pool(initializer=look) as p:
    print(json.dumps(p.submit(tasks.marks).result(60)[0]))
"""
    assert (threads(program, layer, tmp_path) == 1) == (layer == "with")


@pytest.mark.parametrize("layer", ["with", "without"])
def test_the_cap_after_the_initializer(layer: str, tmp_path: Path) -> None:
    """It takes back what the initializer has raised, and no library was loaded for it."""
    program = """
import numpy
apply, calls = cap.WorkerCap.apply, []
def once(self):
    calls.append(self)
    if layer == "with" or len(calls) == 1:
        apply(self)
cap.WorkerCap.apply = once
def raise_it():
    import threadpoolctl
    threadpoolctl.threadpool_limits(2)
with pool(initializer=raise_it) as p:
    print(json.dumps(p.submit(natives.openblas_threads).result(60)))
"""
    assert (threads(program, layer, tmp_path) == 1) == (layer == "with")


@pytest.mark.parametrize("layer", ["with", "without"])
def test_the_check_before_each_task(layer: str, tmp_path: Path) -> None:
    """It alone meets a library that a task loads without an import, variables ignored."""
    program = """
import safepool.pool.executor as executor
executor.worker_environment = no_environment
if layer == "without":
    cap.WorkerCap.recheck = nothing
with pool() as p:
    first = p.submit(natives.load_openblas_without_an_import).result(60)
    second = p.submit(natives.openblas_threads).result(60)
print(json.dumps([first, second]))
"""
    first, second = threads(program, layer, tmp_path)

    assert first > 1
    assert (second == 1) == (layer == "with")


@pytest.mark.parametrize("layer", ["with", "without"])
def test_the_call_after_an_import(layer: str, tmp_path: Path) -> None:
    """It alone meets a pool without a variable, such as PyTorch's second, in the same task."""
    (tmp_path / "fakelib.py").write_text(
        "threads = 48\ndef set_threads(n):\n    global threads\n    threads = n\n"
    )
    program = """
from safepool.threads import NativeRuntime, imports, register
register(
    NativeRuntime(name="fakelib", used_by="a test", modules=("fakelib",), source="this test"),
    read=lambda module: module.threads, write=lambda module, n: module.set_threads(n),
)
if layer == "without":
    imports.AfterImport.start = nothing
def first_use():
    import fakelib
    return fakelib.threads
with pool() as p:
    print(json.dumps(p.submit(first_use).result(60)))
"""
    assert threads(program, layer, tmp_path) == (1 if layer == "with" else 48)


def test_no_library_is_imported_in_order_to_cap_it(tmp_path: Path) -> None:
    """What the caller's modules bring is all that a worker has, threadpoolctl left out too."""
    program = """
def modules():
    return sorted({name.partition(".")[0] for name in sys.modules})
with safepool.ProcessPool(1) as p:
    print(json.dumps(p.submit(modules).result(60)))
"""
    found = set(threads(program, "with", tmp_path))

    assert found.isdisjoint({"numpy", "scipy", "torch", "numba", "threadpoolctl", "joblib"})


def test_other_threads_of_a_task_may_use_threadpoolctl(tmp_path: Path) -> None:
    """It keeps OpenBLAS for the thread that limits it first, which a cap must not be."""
    program = """
import threading
def limit_in_a_thread():
    import numpy, threadpoolctl
    seen = []
    def limited():
        with threadpoolctl.threadpool_limits(2):
            seen.append(natives.openblas_threads())
    thread = threading.Thread(target=limited)
    thread.start()
    thread.join()
    return seen
with safepool.ProcessPool(1, initializer=natives.load, initargs=("numpy",)) as p:
    print(json.dumps(p.submit(limit_in_a_thread).result(60)))
"""
    assert threads(program, "with", tmp_path) in ([1], [2])
    # At birth OpenBLAS was given room for one thread; a worker with room shows the rest.
    program = program.replace("ProcessPool(1,", "ProcessPool(1, threads_per_worker=2,")
    assert threads(program, "with", tmp_path) == [2]


def test_python_threads_of_a_task_are_capped(tmp_path: Path) -> None:
    """OpenMP's run-time cap is the calling thread's; what new threads take is the variable."""
    program = """
with safepool.ProcessPool(1) as p:
    print(json.dumps(p.submit(natives.openmp_threads_in_python_threads).result(60)))
"""
    if natives.missing("scikit-learn"):
        pytest.skip("scikit-learn is not installed")
    assert threads(program, "with", tmp_path) == [1, 1]


@pytest.mark.parametrize(
    "method",
    [
        "loky",
        "fork",
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("forkserver", marks=pytest.mark.slow),
    ],
)
def test_two_threads_per_worker(method: str, tmp_path: Path) -> None:
    """Not one, and not all: imported before the pool, in the initializer or in the task."""
    program = """
import os
if os.environ.get("BEFORE"):
    natives.load("scipy")
def blas():
    return sorted({n for runtime, n in natives.use_and_look("scipy") if runtime == "openblas"})
def look(**more):
    context = None if layer == "loky" else multiprocessing.get_context(layer)
    with safepool.ProcessPool(1, mp_context=context, threads_per_worker=2, **more) as p:
        return p.submit(blas).result(60)
if __name__ == "__main__":
    found = [look(), look(initializer=natives.load, initargs=("scipy",))]
    os.environ["BEFORE"] = "1"
    natives.load("scipy")
    print(json.dumps([*found, look()]))
"""
    assert threads(program, method, tmp_path) == [[2]] * 3


def test_the_users_variable_wins_over_the_cap(tmp_path: Path) -> None:
    """What is set for workers counts at load and is not taken back at run time."""
    program = """
env = {"OPENBLAS_NUM_THREADS": "2"}
def blas():
    return sorted({n for runtime, n in natives.use_and_look("scipy") if runtime == "openblas"})
with safepool.ProcessPool(1, env=env) as p:
    found = [p.submit(blas).result(60) for _ in range(2)]
with safepool.ProcessPool(1, env=env, initializer=natives.load, initargs=("scipy",)) as p:
    print(json.dumps([*found, p.submit(blas).result(60)]))
"""
    assert threads(program, "with", tmp_path) == [[2]] * 3
