"""Real libraries in real workers: one thread, whenever and wherever they were imported.

Each test is a program in a fresh interpreter on a machine that seems to have 48 CPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import support_natives as natives
from support_natives import LIBRARIES

from safepool.threads.table import RUNTIMES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.natives

# A worker that meets the library in its task, one of two threads that meets it in its
# initializer, and one whose program has used it: with spawn and forkserver the worker imports
# the program too. How many threads the program itself has then is told as well.
SCRIPT = """
import json, os, sys
import support_natives as natives
name, method = sys.argv[1:]
if os.environ.get("IMPORTED_BEFORE"):
    natives.load(name)
import safepool

def look(threads=1, initializer=None):
    with safepool.ProcessPool(
        1,
        method,
        initializer=initializer,
        initargs=(name,) if initializer else (),
        threads_per_worker=threads,
        pin_workers=natives.LIBRARIES[name].pinned,
    ) as pool:
        pools = pool.submit(natives.use_and_look, name).result(90)
        again = pool.submit(natives.use_and_look, name).result(90)
        (pid,) = pool._processes
        return threads, pools, again, natives.threads_of(pid)

if __name__ == "__main__":
    found = {"in the task": look(), "in the initializer": look(2, natives.load)}
    if method == natives.METHODS[0] or (method == "fork" and natives.LIBRARIES[name].forked):
        natives.use(name)  # at length: 48 threads for this machine's CPUs
    else:
        natives.load(name)
    uncapped = natives.threads_of(os.getpid())
    os.environ["IMPORTED_BEFORE"] = "1"
    found["before the pool"] = look()
    print(json.dumps([found, uncapped]))
"""


def skip_if_missing(name: str) -> None:
    module = natives.missing(name)
    if module is not None:
        pytest.skip(f"{module} is not installed")


# scikit-learn takes a second to import, four times each. Where a worker is started afresh, NumPy
# shows the same in every run, and SciPy has the same library.
ROWS = [
    pytest.param(
        name,
        method,
        marks=[pytest.mark.slow]
        if name in {"scikit-learn", "scipy"} and method != "safepool"
        else [],
    )
    for name in LIBRARIES
    for method in natives.METHODS
]


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_a_library_has_the_workers_threads(name: str, method: str, tmp_path: Path) -> None:
    """By its own account, by threadpoolctl's, and by the kernel's list of threads.

    A worker finishes, too, after the program has used the library: under a plain fork most of
    them hang or crash.
    """
    skip_if_missing(name)
    library = LIBRARIES[name]

    found, uncapped = natives.run(SCRIPT, folder=tmp_path, arguments=(name, method))

    for when, (threads, pools, again, counted) in found.items():
        seen = {runtime for runtime, _ in pools}
        assert seen.issuperset(library.runtimes), (when, pools)
        forked = (when, method) == ("before the pool", "fork")
        exempt = library.inherited if forked else ()
        capped = [pool for pool in pools + again if pool[0] not in exempt]
        assert [pool for pool in capped if pool[1] not in {threads, None}] == [], when
        if forked:
            continue  # an inherited OpenBLAS starts all its threads again, and then caps them
        # A pool of one computes in the caller's thread. Of several, some have that one too, and
        # others, such as NumExpr's, start as many beside it.
        sizes = [threads if size is None else size for _, size in again]
        others = sum(size for size in sizes if size > 1)
        assert counted <= 1 + library.helpers * threads + others, when
    if method == natives.METHODS[0] and natives.shim(tmp_path.parent) is not None:
        # All the above could not fail for a library of which this does not hold.
        assert uncapped > 1 + library.helpers


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


# One row per runtime that no library above brings into a list of pools, and why.
ELSEWHERE = {
    "mkl": "Intel's OpenMP refuses to run on 48 CPUs that the processor does not have",
    "blis": "no wheel brings it",
    "flexiblas": "no wheel brings it",
    "accelerate": "macOS only",
    "lightgbm": "a guest of openmp, used above",
    "xgboost": "a guest of openmp, used above",
    "faiss": "a guest of openmp, used above",
    "tokenizers": "a guest of rayon, used above",
    "rayon": "its threads have no name; counted from outside for tokenizers",
    "tbb": "no variable and no call; under MKL it has as many threads as the mask has CPUs",
    "tokio": "used above with Polars, which starts it or not",
    "tensorflow": "three imports of it take longer than a test may",
    "tensorflow-interop": "three imports of it take longer than a test may",
    "blosc": "the same library as blosc2 and numcodecs, with a module of its own",
    "libvips": "its workers come and go with each picture",
    "scipy.fft": "one thread unless asked for more",
    "tensorstore": "no variable and no call",
    "grpc": "its threads wait for the network",
    "dask": "a number that Python code reads",
    "zarr": "a number that Python code reads",
    "loky": "a number that Python code reads, in test_caps",
    "python": "a number that the interpreter reads",
}


def test_every_row_of_the_table_is_used_or_says_why_not() -> None:
    used = {runtime for library in LIBRARIES.values() for runtime in library.runtimes}

    assert used.isdisjoint(ELSEWHERE)
    assert used | set(ELSEWHERE) == {row.name for row in RUNTIMES}


def test_every_library_of_the_list_is_told() -> None:
    """What was skipped is printed by name, so that a run that checks nothing is seen."""
    absent = [name for name in LIBRARIES if natives.missing(name)]
    if absent:
        pytest.skip(f"not installed, so not checked: {', '.join(absent)}")
