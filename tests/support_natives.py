"""Real libraries with native thread pools, and a machine that seems to have many CPUs.

``LIBRARIES`` has a row for each library that the tests know how to use hard enough for its
threads to start. Programs are run in fresh interpreters (`run`), by default under a preloaded
shim that shows 48 CPUs (`safepool/cli/manycore.c`), so that a pool that escapes its cap is seen on
any machine.

Functions here are found by workers by name.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safepool.cli import demo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MANY = 48

# The ways to start a worker that each library is tried with; names, as ``mp_context=`` takes.
METHODS = ["safepool", "loky", "spawn", "forkserver", "fork"]

_TESTS = Path(__file__).resolve().parent
# What programs of the tests import from.
PATHS = [str(_TESTS), str(_TESTS.parent)]
_THREAD_WORDS = ("THREAD", "NPROC", "CPU_COUNT", "CONCURRENCY", "PARALLELISM", "NUM_WORKERS")


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library as a user uses it.

    Attributes:
        modules: What is imported; the library is installed if the first can be found.
        use: Computes something that its native threads take part in.
        runtimes: The rows of the table that must be seen in a process that has used it.
        helpers: Idle threads that it keeps beside the one that works, cap or no cap:
            jemalloc's, readers' and writers'.
        forked: Used in a parent, it works in a child that was forked and capped.
        inherited: Imported in a parent, its pools have the parent's size in a forked child.
        pinned: Nothing but the affinity mask bounds its threads: its workers are bound.
    """

    modules: tuple[str, ...]
    use: Callable[[], object]
    runtimes: tuple[str, ...]
    helpers: int = 0
    forked: bool = True
    inherited: tuple[str, ...] = ()
    pinned: bool = False


def _array(rows: int, columns: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).normal(size=(rows, columns))


def _numpy() -> None:
    a = _array(400, 400)
    _ = a @ a


def _scipy() -> None:
    # One call of its OpenBLAS: of a decomposition's many, each waits for 48 threads on few CPUs.
    from scipy.linalg import blas

    a = _array(400, 400)
    blas.dgemm(1.0, a, a)


def _scikit_learn() -> None:
    from sklearn.cluster import KMeans
    from sklearn.ensemble import HistGradientBoostingClassifier

    x = _array(4000, 10)
    HistGradientBoostingClassifier(max_iter=3).fit(x, x[:, 0] > 0)
    KMeans(4, n_init=1, max_iter=5).fit(x)


def _numexpr() -> None:
    import numexpr

    numexpr.evaluate("a * 2 + a", local_dict={"a": _array(1000, 1000)})


def _numba() -> None:
    import numba
    import numpy as np

    @numba.njit(parallel=True)
    def total(a: Any) -> float:
        s = 0.0
        for i in numba.prange(a.shape[0]):
            s += a[i]
        return s

    total(np.ones(1_000_000))


def _polars() -> None:
    import polars as pl

    frame = pl.DataFrame({"a": range(200_000), "b": [n % 100 for n in range(200_000)]})
    frame.lazy().group_by("b").agg(pl.col("a").sum()).sort("b").collect()


def _arrow() -> None:
    import io

    import pyarrow as pa
    from pyarrow import csv, parquet

    text = b"a,b,c\n" + b"1,2.5,x\n" * 400_000
    table = csv.read_csv(pa.py_buffer(text))
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    parquet.read_table(io.BytesIO(sink.getvalue()))


def _opencv() -> None:
    import cv2
    import numpy as np

    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)


# A database's threads end with it.
_open: list[object] = []


def _duckdb() -> None:
    import duckdb

    connection = duckdb.connect()
    connection.execute("select sum(i) from range(2000000) t(i)").fetchall()
    _open[:] = [connection]


def _lightgbm() -> None:
    import lightgbm

    x = _array(3000, 10)
    data = lightgbm.Dataset(x, label=x[:, 0])
    lightgbm.train({"objective": "regression", "verbose": -1}, data, 3)


def _xgboost() -> None:
    import xgboost

    x = _array(3000, 10)
    xgboost.train({}, xgboost.DMatrix(x, label=x[:, 0]), 3)


def _tokenizers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{n}": n for n in range(100)} | {"[UNK]": 100}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.encode_batch(["w1 w2 w3 w4 w5 " * 20] * 500)


def _torch() -> None:
    import torch

    a = torch.ones(1500, 1500)
    _ = a @ a
    _ = torch.exp(torch.ones(2_000_000))
    b = torch.ones(500, 500, requires_grad=True)
    (torch.exp(b) @ b).sum().backward()


def _torch_interop() -> None:
    import torch

    def double(x: Any) -> Any:
        return x + x

    scripted = torch.jit.trace(double, torch.ones(1000))
    waiting = [torch.jit._fork(scripted, torch.ones(1000)) for _ in range(60)]
    for future in waiting:
        torch.jit._wait(future)


def _faiss() -> None:
    import faiss
    import numpy as np

    x = _array(5000, 16).astype(np.float32)
    index = faiss.IndexFlatL2(16)
    index.add(x)
    index.search(x, 3)


def _blosc2() -> None:
    import blosc2
    import numpy as np

    blosc2.unpack_array2(blosc2.pack_array2(np.arange(3_000_000)))


def _numcodecs() -> None:
    import numpy as np
    from numcodecs import blosc

    blosc.compress(np.arange(3_000_000).tobytes(), b"lz4", 5, 1)


def _itk() -> None:
    import SimpleITK

    image = SimpleITK.Image(100, 100, 100, SimpleITK.sitkFloat32)
    SimpleITK.SmoothingRecursiveGaussian(image, 3.0)


def _onnxruntime() -> None:
    import numpy as np
    import onnx
    import onnxruntime

    shape = [500, 500]
    given, product = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy"
    )
    multiply = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([multiply], "square", [given], [product]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    session.run(None, {"x": np.ones(shape, np.float32)})
    _open[:] = [session]


def _jax() -> None:
    import jax.numpy as jnp

    a = jnp.ones((1000, 1000))
    float((jnp.exp(a * 1e-6) @ a).sum())


def _catboost() -> None:
    import catboost

    x = _array(3000, 10)
    model = catboost.CatBoostRegressor(iterations=3, verbose=0, allow_writing_files=False)
    model.fit(x, x[:, 0]).predict(x)


def _ffmpeg() -> None:
    import io

    import av
    import numpy as np

    film = io.BytesIO()
    with av.open(film, "w", format="mp4") as written:
        stream: Any = written.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 320
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            picture = np.full((320, 320, 3), number, np.uint8)
            written.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        written.mux(stream.encode())
    film.seek(0)
    read = av.open(film)
    read.streams.video[0].thread_type = "AUTO"
    assert sum(1 for _ in read.decode(video=0)) == 12
    _open[:] = [read]


# OpenMP's layer of Numba is checked; oneTBB's keeps idle threads, which the table says.
os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")

LIBRARIES: dict[str, Library] = {
    "numpy": Library(modules=("numpy",), use=_numpy, runtimes=("openblas",)),
    "scipy": Library(modules=("scipy.linalg",), use=_scipy, runtimes=("openblas",)),
    "scikit-learn": Library(
        modules=("sklearn.ensemble", "sklearn.cluster"),
        use=_scikit_learn,
        runtimes=("openblas", "openmp"),
        helpers=1,
    ),
    "numexpr": Library(
        modules=("numexpr", "numpy"), use=_numexpr, runtimes=("numexpr", "openblas")
    ),
    # A fork of a process that has used it is killed by libgomp.
    "numba": Library(
        modules=("numba", "numpy"), use=_numba, runtimes=("numba", "openmp"), forked=False
    ),
    "polars": Library(
        modules=("polars",),
        use=_polars,
        runtimes=("polars",),
        helpers=8,
        forked=False,
        inherited=("polars",),
    ),
    "pyarrow": Library(
        modules=("pyarrow.csv", "pyarrow.parquet"),
        use=_arrow,
        runtimes=("arrow", "arrow-io"),
        helpers=4,
    ),
    "opencv": Library(modules=("cv2",), use=_opencv, runtimes=("opencv",)),
    # Closing a connection of its parent's hangs in a forked child.
    "duckdb": Library(
        modules=("duckdb",), use=_duckdb, runtimes=("duckdb",), helpers=1, forked=False
    ),
    "lightgbm": Library(
        modules=("lightgbm",), use=_lightgbm, runtimes=("openmp", "openblas"), helpers=1
    ),
    "xgboost": Library(
        modules=("xgboost",), use=_xgboost, runtimes=("openmp", "openblas"), helpers=1
    ),
    "tokenizers": Library(modules=("tokenizers",), use=_tokenizers, runtimes=(), helpers=2),
    "torch": Library(
        modules=("torch",), use=_torch, runtimes=("torch", "torch-interop", "openmp")
    ),
    "torch inter-op": Library(
        modules=("torch",),
        use=_torch_interop,
        runtimes=("torch-interop", "openmp"),
        helpers=1,
        forked=False,
    ),
    "faiss": Library(modules=("faiss",), use=_faiss, runtimes=("openmp", "openblas")),
    "blosc2": Library(modules=("blosc2",), use=_blosc2, runtimes=("blosc2",), helpers=1),
    "numcodecs": Library(modules=("numcodecs.blosc",), use=_numcodecs, runtimes=("numcodecs",)),
    "simpleitk": Library(modules=("SimpleITK", "numpy"), use=_itk, runtimes=("itk",)),
    "onnxruntime": Library(
        modules=("onnxruntime", "onnx"),
        use=_onnxruntime,
        runtimes=("onnxruntime",),
        helpers=1,
        forked=False,
    ),
    "jax": Library(
        modules=("jax",), use=_jax, runtimes=("xla",), helpers=12, forked=False, pinned=True
    ),
    "catboost": Library(
        modules=("catboost",), use=_catboost, runtimes=("catboost",), forked=False, pinned=True
    ),
    "pyav": Library(
        modules=("av", "numpy"),
        use=_ffmpeg,
        runtimes=("ffmpeg",),
        helpers=3,
        forked=False,
        pinned=True,
    ),
}


def missing(name: str) -> str | None:
    """Return the module that is not installed for a library's row, ``None`` if all are."""
    for module in LIBRARIES[name].modules:
        root = module.partition(".")[0]
        if importlib.util.find_spec(root) is None:
            return root
    return None


# What workers run.


def load(name: str) -> None:
    """Import a library, as a program does at its top."""
    for module in LIBRARIES[name].modules:
        importlib.import_module(module)


def use(name: str) -> str:
    """Import a library and compute with it."""
    load(name)
    LIBRARIES[name].use()
    return name


def pools() -> list[tuple[str, int | None]]:
    """Return (runtime, threads) of every pool that is loaded in this process."""
    from safepool.threads import inspect

    return [(pool.runtime, pool.threads) for pool in inspect()]


def use_and_look(name: str) -> list[tuple[str, int | None]]:
    """Import a library, compute, and return the pools."""
    use(name)
    return pools()


def mask_with_numpy(seconds: float) -> list[int]:
    """Import NumPy, keep the worker busy, return where it may run."""
    load("numpy")
    time.sleep(seconds)
    return sorted(os.sched_getaffinity(0))


def threads_of(pid: int) -> int:
    """Return the number of threads of a process, seen from outside."""
    return len(os.listdir(f"/proc/{pid}/task"))


def openmp_threads_in_python_threads() -> list[int]:
    """Return what OpenMP would use in two Python threads that this task starts."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: F401 -- loads libgomp
    from threadpoolctl import threadpool_info

    path = next(p["filepath"] for p in threadpool_info() if p["user_api"] == "openmp")
    openmp = ctypes.CDLL(path)
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(openmp.omp_get_max_threads()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def openblas_file() -> str:
    """Return the file of NumPy's own OpenBLAS, without importing NumPy."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent.parent / "numpy.libs"
    return str(next(folder.glob("libscipy_openblas*")))


def load_openblas_without_an_import() -> int:
    """Load NumPy's OpenBLAS by dlopen alone, and return its threads."""
    # Its companions lie beside it, found by the path that is built into it.
    return openblas_threads(ctypes.CDLL(openblas_file()))


def openblas_threads(library: Any = None) -> int:
    """Return the threads of an OpenBLAS that is loaded."""
    library = library or ctypes.CDLL(openblas_file(), mode=os.RTLD_NOLOAD)
    return int(library.scipy_openblas_get_num_threads64_())


# What tests call.


@functools.cache
def shim(folder: Path) -> str | None:
    """Build the shim and return its path; ``None`` where there is no compiler or no glibc.

    Args:
        folder: For the file; once for each.
    """
    try:
        return str(demo.host().pretend.build(folder))
    except demo.host().PretendError:
        return None


def environment(preload: str | None = None, cpus: int = MANY) -> dict[str, str]:
    """Return an environment in which nobody has capped anything.

    Args:
        preload: The shim, if the machine is not to be seen as it is.
        cpus: How large it shows the machine.
    """
    clean = {
        key: value
        for key, value in os.environ.items()
        if not any(word in key for word in _THREAD_WORDS) or key == "NUMBA_THREADING_LAYER"
    }
    clean["PYTHONPATH"] = os.pathsep.join(PATHS)
    clean["PYTHONWARNINGS"] = "ignore"
    # 48 threads that spin for each other on 2 CPUs take minutes for a second's work.
    clean |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    if preload is not None:
        clean |= {"LD_PRELOAD": preload, "FAKE_NCPU": str(cpus)}
    return clean


def run(
    code: str,
    *,
    cpus: int | None = MANY,
    folder: Path,
    timeout_s: float = 100,
    arguments: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> Any:
    """Run a program in a fresh interpreter and return what it printed last, as JSON.

    Args:
        code: The program, saved in a file so that start methods can import it.
        cpus: The machine is to seem this large, where the shim can be built.
        folder: For the file.
        timeout_s: After this it is killed, and the test fails.
        arguments: Its ``sys.argv[1:]``.
        variables: Added to its environment.
    """
    preload = None if cpus is None else shim(folder.parent)
    script = folder / "script.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment(preload, cpus or MANY) | dict(variables or {}),
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
