"""Real libraries in real workers: one thread, whenever and wherever they were imported.

Each test is a program in a fresh interpreter on a machine that seems to have 48 CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import support_natives as natives
from support_natives import LIBRARIES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.natives

METHODS = ["loky", "spawn", "forkserver", "fork"]

# A worker that meets the library in its task, one in its initializer, and one whose program
# has imported it: with spawn and forkserver the worker imports the program.
SCRIPT = """
import json, os, sys
import support_natives as natives
name, method = sys.argv[1:]
if os.environ.get("IMPORTED_BEFORE"):
    natives.load(name)
import multiprocessing
import safepool

def look(initializer=None):
    context = None if method == "loky" else multiprocessing.get_context(method)
    arguments = (name,) if initializer else ()
    with safepool.ProcessPool(
        1, mp_context=context, initializer=initializer, initargs=arguments
    ) as pool:
        pools = pool.submit(natives.use_and_look, name).result(90)
        again = pool.submit(natives.use_and_look, name).result(90)
        (pid,) = pool._processes
        return pools, again, natives.threads_of(pid)

if __name__ == "__main__":
    found = {"in the task": look(), "in the initializer": look(natives.load)}
    natives.load(name)
    os.environ["IMPORTED_BEFORE"] = "1"
    found["before the pool"] = look()
    print(json.dumps(found))
"""


def skip_if_missing(name: str) -> None:
    module = natives.missing(name)
    if module is not None:
        pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_has_one_thread_in_a_worker(name: str, method: str, tmp_path: Path) -> None:
    """By its own account, by threadpoolctl's, and by the kernel's list of threads."""
    skip_if_missing(name)
    library = LIBRARIES[name]

    found = natives.run(SCRIPT, folder=tmp_path, arguments=(name, method))

    for when, (pools, again, threads) in found.items():
        seen = {runtime for runtime, _ in pools}
        assert seen.issuperset(library.runtimes), (when, pools)
        assert [p for p in pools + again if p[1] not in {1, None}] == [], when
        if (when, method) == ("before the pool", "fork"):
            continue  # an inherited OpenBLAS starts all its threads again, and then caps them
        assert threads <= 1 + library.helpers, when


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_cap_it_has_many(name: str, tmp_path: Path) -> None:
    """The test above could not fail for a library for which this one does."""
    skip_if_missing(name)
    if natives.shim(tmp_path.parent) is None:
        pytest.skip("no compiler to build the shim with: this machine's CPUs may be one")
    code = (
        "import json, os, support_natives as n, sys; n.use(sys.argv[1]); "
        "print(json.dumps(n.threads_of(os.getpid())))"
    )

    threads = natives.run(code, folder=tmp_path, arguments=(name,))

    assert threads > 1 + LIBRARIES[name].helpers


@pytest.mark.parametrize("name", LIBRARIES)
def test_it_finishes_after_the_program_has_used_it(name: str, tmp_path: Path) -> None:
    """Under fork most of these hang or crash; a worker of ours is a fresh interpreter."""
    skip_if_missing(name)
    code = (
        "import json, sys, safepool, support_natives as n\n"
        "n.use(sys.argv[1])\n"
        "with safepool.ProcessPool(2) as pool:\n"
        "    print(json.dumps(list(pool.map(n.use, sys.argv[1:] * 3, timeout=80))))\n"
    )

    assert natives.run(code, folder=tmp_path, cpus=8, arguments=(name,)) == [name] * 3


FORKED = [name for name, library in LIBRARIES.items() if library.forked]


@pytest.mark.parametrize("name", FORKED)
def test_a_forked_worker_is_capped_before_it_computes(name: str, tmp_path: Path) -> None:
    """The first parallel region of a forked process hangs, unless it has one thread."""
    skip_if_missing(name)
    code = (
        "import json, multiprocessing, sys, safepool, support_natives as n\n"
        "n.use(sys.argv[1])\n"
        "context = multiprocessing.get_context('fork')\n"
        "with safepool.ProcessPool(1, mp_context=context) as pool:\n"
        "    print(json.dumps(pool.submit(n.use_and_look, sys.argv[1]).result(80)))\n"
    )

    pools = natives.run(code, folder=tmp_path, cpus=8, arguments=(name,))

    assert {threads for _, threads in pools} <= {1, None}


def test_openblas_in_another_thread_does_not_freeze_the_program(tmp_path: Path) -> None:
    """A fork meanwhile waits for OpenBLAS's threads for ever, with the interpreter's lock."""
    skip_if_missing("numpy")
    code = (
        "import json, threading, safepool, numpy as np, support_natives as n\n"
        "stop = threading.Event()\n"
        "def compute():\n"
        "    a = np.ones((800, 800))\n"
        "    while not stop.is_set(): a @ a\n"
        "thread = threading.Thread(target=compute)\n"
        "thread.start()\n"
        "try:\n"
        "    for _ in range(5):\n"
        "        with safepool.ProcessPool(1) as pool:\n"
        "            pool.submit(n.use, 'numpy').result(60)\n"
        "finally:\n"
        "    stop.set()\n"
        "    thread.join()\n"
        "print(json.dumps('finished'))\n"
    )

    assert natives.run(code, folder=tmp_path, cpus=None) == "finished"


def test_importing_blosc2_does_not_raise_numexpr(tmp_path: Path) -> None:
    """It sets NumExpr to all CPUs; a forked worker has no ceiling from its environment."""
    skip_if_missing("numexpr")
    skip_if_missing("blosc2")
    code = (
        "import json, multiprocessing, numexpr, safepool, support_natives as n\n"
        "context = multiprocessing.get_context('fork')\n"
        "with safepool.ProcessPool(1, mp_context=context) as pool:\n"
        "    found = dict(pool.submit(n.use_and_look, 'blosc2').result(60))\n"
        "print(json.dumps([numexpr.get_num_threads(), found['numexpr']]))\n"
    )

    assert natives.run(code, folder=tmp_path) == [16, 1]


def test_every_library_of_the_list_is_told() -> None:
    """What was skipped is printed by name, so that a run that checks nothing is seen."""
    absent = [name for name in LIBRARIES if natives.missing(name)]
    if absent:
        pytest.skip(f"not installed, so not checked: {', '.join(absent)}")
