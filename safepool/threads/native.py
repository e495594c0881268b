"""Libraries that threadpoolctl caps: searched once, and again when a library was loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from safepool.threads.libraries import LoadedLibraries
from safepool.threads.registry import runtimes


class NativeLibraries:
    """Libraries that threadpoolctl finds in this process; nothing is loaded to find out."""

    def __init__(self) -> None:
        # An RLock: a finalizer that runs while it is held may end a block.
        self._lock = threading.RLock()
        self._libraries: LoadedLibraries | None = None
        self._controller: Any = None

    def changed(self) -> bool:
        """Return whether something was loaded since :meth:`found`. 0.1 microseconds."""
        return self._libraries is None or self._libraries.changed()

    def found(self) -> list[Any]:
        """Return threadpoolctl's controller of each library."""
        with self._lock:
            if self._libraries is None:
                self._libraries = LoadedLibraries()
            if self._libraries.changed():
                fresh = self._libraries.fresh()
                # threadpoolctl reads the whole map of the process, which takes milliseconds:
                # not for a library that it would pass over.
                if fresh is None or any(map(_is_capped_by_threadpoolctl, fresh)):
                    # Imported here: it is the worker's, and importing safepool must stay
                    # free of third-party packages.
                    from threadpoolctl import ThreadpoolController  # noqa: PLC0415

                    self._controller = ThreadpoolController()
            return [] if self._controller is None else list(self._controller.lib_controllers)

    def set(self, threads_of: Callable[[str], int]) -> None:
        """Set each library to the threads of its runtime, for good."""
        for library in self.found():
            set_threads(library, threads_of(runtime_of(library)))

    def forked(self) -> None:
        """Be usable in a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.RLock()


def runtime_of(library: Any) -> str:
    """Return the row of the table that a library's number is the one of."""
    # An OpenBLAS that uses OpenMP's threads has no separate number.
    on_openmp = getattr(library, "threading_layer", None) == "openmp"
    return "openmp" if on_openmp else str(library.internal_api)


def is_of_the_process(library: Any) -> bool:
    """Return whether a library has one number for the process, and not one for each thread."""
    # OpenMP's and MKL's numbers are the calling thread's own, and so is that of a BLAS which
    # computes with OpenMP's threads.
    return runtime_of(library) in ("openblas", "blis")


def set_threads(library: Any, threads: int) -> None:
    """Set a library's number, even if another thread has set it before."""
    # threadpoolctl 3.8 and later keeps OpenBLAS for the thread that set it first, and passes
    # over what other threads set.
    release = getattr(library, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)
    library.set_num_threads(threads)
    if release is not None:
        release(force=True)


def _is_capped_by_threadpoolctl(path: str) -> bool:
    prefixes = tuple(
        prefix for row in runtimes() if row.call == "threadpoolctl" for prefix in row.libraries
    )
    names = [path]
    # A distribution's name for its default BLAS is a link to the one that was chosen.
    if os.path.islink(path):
        names.append(os.path.realpath(path))
    return any(os.path.basename(name).lower().startswith(prefixes) for name in names)
