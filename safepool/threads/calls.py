"""The calls that cap a loaded runtime, one for each row of the table that names one.

Each call gets a module that the program has imported: this module imports no library.
threadpoolctl finds its own libraries itself (``cap``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple


class Call(NamedTuple):
    """Functions that read and set the number of threads of a loaded runtime.

    Attributes:
        read: Function of the module that returns the present number of threads, or ``None`` if
            unknown.
        write: Function of the module and a number of threads that sets it. It raises the library's
            exception if the library refuses.
        undone: Whether the number can be restored, so that a block may change it (``cap.capped``);
            otherwise only workers change it.
        default: Number of threads where nothing bounds the runtime; ``None`` is one for each CPU.
    """

    read: Callable[[Any], int | None] | None
    write: Callable[[Any, int], object]
    undone: bool = True
    default: int | None = None


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call that a library may refuse; return ``None`` if it does.

    A refused cap must not fail the task: the pool may be in use, or the release may lack the call.
    The table's ``fixed`` names such pools, and ``safepool.threads.inspect()`` the present sizes.
    """
    try:
        return call(*arguments)
    except Exception:  # noqa: BLE001 -- any library's own errors
        return None


def _set_torch_interop(torch: Any, threads: int) -> None:
    # A second call raises, also with the same number.
    if torch.get_num_interop_threads() != threads:
        torch.set_num_interop_threads(threads)


def _read_numba(numba: Any) -> int:
    launcher = _numba_launcher()
    count = numba.config.NUMBA_NUM_THREADS if launcher is not None else numba.get_num_threads()
    return int(count)


def _set_numba(numba: Any, threads: int) -> None:
    launcher = _numba_launcher()
    if launcher is None:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    elif threads != numba.config.NUMBA_NUM_THREADS:
        # numba.set_num_threads() would start all threads now.
        numba.config.NUMBA_NUM_THREADS = threads
        launcher.NUM_THREADS = threads


def _numba_launcher() -> Any:
    """Return Numba's module that will launch the threads; ``None`` if it has, or may have."""
    launcher: Any = sys.modules.get("numba.np.ufunc.parallel")
    if getattr(launcher, "_is_initialized", True) or not hasattr(launcher, "NUM_THREADS"):
        return None
    return launcher


def _set_opencv(cv2: Any, threads: int) -> None:
    now = cv2.getNumThreads()
    if now == threads:
        return
    # Lowered to another number than 0, OpenCV stops threads and waits for them, which a
    # forked process does not have. 0 leaves them alone and computes in the caller's thread.
    cv2.setNumThreads(0 if threads < now else threads)


def _set_duckdb(duckdb: Any, threads: int) -> None:
    """Replace ``duckdb.connect`` by one that opens databases with ``threads`` threads.

    Nothing less would do: a database starts five threads for each CPU when it is opened.
    """
    original = getattr(duckdb.connect, "__wrapped__", duckdb.connect)

    @functools.wraps(original)
    def connect(database: Any = ":memory:", read_only: bool = False, config: Any = None) -> object:
        if database == ":default:":  # takes no configuration
            return original(database)
        asked = dict(config or {})
        if "threads" in asked or "worker_threads" in asked:
            return original(database, read_only, asked)
        try:
            capped = {"threads": threads, "async_threads": threads, **asked}
            return original(database, read_only, capped)
        except duckdb.Error as error:
            if "async_threads" not in str(error):
                raise
        # A release that knows no asynchronous threads.
        return original(database, read_only, {"threads": threads, **asked})

    duckdb.connect = connect


def _setter(name: str) -> Callable[[Any, int], object]:
    return lambda module, threads: getattr(module, name)(threads)


CALLS: dict[str, Call] = {
    "torch": Call(read=methodcaller("get_num_threads"), write=_setter("set_num_threads")),
    "torch-interop": Call(
        read=methodcaller("get_num_interop_threads"), write=_set_torch_interop, undone=False
    ),
    "numba": Call(read=_read_numba, write=_set_numba),
    "numexpr": Call(read=methodcaller("get_num_threads"), write=_setter("set_num_threads")),
    "arrow": Call(read=methodcaller("cpu_count"), write=_setter("set_cpu_count")),
    "arrow-io": Call(
        read=methodcaller("io_thread_count"), write=_setter("set_io_thread_count"), default=8
    ),
    "opencv": Call(read=methodcaller("getNumThreads"), write=_set_opencv),
    "xgboost": Call(
        # 0 is what OpenMP says.
        read=lambda xgboost: xgboost.get_config().get("nthread"),
        write=lambda xgboost, threads: xgboost.set_config(nthread=threads),
    ),
    "duckdb": Call(read=None, write=_set_duckdb, undone=False),
    "blosc": Call(read=attrgetter("nthreads"), write=_setter("set_nthreads")),
    "blosc2": Call(read=attrgetter("nthreads"), write=_setter("set_nthreads")),
    "numcodecs": Call(read=methodcaller("get_nthreads"), write=_setter("set_nthreads")),
    "itk": Call(
        read=lambda itk: itk.ProcessObject.GetGlobalDefaultNumberOfThreads(),
        write=lambda itk, threads: itk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads),
    ),
}
