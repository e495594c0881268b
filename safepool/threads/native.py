"""Libraries that threadpoolctl caps: searched once, and again when a library was loaded.

The loader keeps its libraries in a list that only grows at its end (``dlinfo(3)``,
``RTLD_DI_LINKMAP``; ``struct link_map`` in ``<link.h>``), so one pointer in memory shows whether a
library is new: less than 0.1 microseconds (``benchmarks/caps.py``). The check sees a plain
``dlopen``, takes no lock and calls nothing back. ``dl_iterate_phdr``, which has a counter, takes
the loader's lock with the interpreter's lock held, and calls back.

Elsewhere the check is of the number of imported modules, and misses a ``dlopen`` without an
import.

Not covered:
    * Libraries in a separate name space (``dlmopen``).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from safepool.threads.registry import runtimes


class _ImportedModules:
    """Replacement where the loader's list of libraries is not available."""

    def __init__(self) -> None:
        self._seen = -1

    def changed(self) -> bool:
        return len(sys.modules) != self._seen

    def fresh(self) -> list[str] | None:
        self._seen = len(sys.modules)
        return None


if sys.platform == "linux":
    import ctypes

    _DLINFO_LINK_MAP = 2  # RTLD_DI_LINKMAP

    class _LinkMap(ctypes.Structure):
        """The public head of an entry."""

        # Addresses as numbers: ctypes makes of a pointer that is read from a structure a
        # view of the structure, which changes with it.
        _fields_ = (
            ("l_addr", ctypes.c_void_p),
            ("l_name", ctypes.c_char_p),
            ("l_ld", ctypes.c_void_p),
            ("l_next", ctypes.c_void_p),
            ("l_prev", ctypes.c_void_p),
        )

    class LoadedLibraries:
        """The loader's list, and how far it was read."""

        def __init__(self) -> None:
            """Start before the first library: all that is loaded counts as new."""
            self._instead: _ImportedModules | None = None
            self._first = True
            program = ctypes.CDLL(None)
            head = ctypes.c_void_p()
            try:
                program.dlinfo(
                    ctypes.c_void_p(program._handle), _DLINFO_LINK_MAP, ctypes.byref(head)
                )
            except AttributeError:
                pass
            if head.value is None:
                self._instead = _ImportedModules()
            else:
                self._watch(head.value)

        def changed(self) -> bool:
            """Return whether :meth:`fresh` has something to say."""
            if self._instead is not None:
                return self._instead.changed()
            return self._next.value is not None or self._first

        def fresh(self) -> list[str] | None:
            """Return the files loaded since the last call; ``None`` if unknown."""
            if self._instead is not None:
                return self._instead.fresh()
            self._first = False
            found = []
            address = self._next.value
            while address is not None:
                entry = _LinkMap.from_address(address)
                found.append(os.fsdecode(entry.l_name or b""))
                if entry.l_next is None:
                    self._pin(address, found[-1])
                    self._watch(address)
                address = entry.l_next
            return found

        def _watch(self, entry: int) -> None:
            self._next = ctypes.c_void_p.from_address(entry + _LinkMap.l_next.offset)

        def _pin(self, entry: int, path: str) -> None:
            """Hold on to the last library: were it unloaded, its pointer would dangle."""
            try:
                held = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
                pinned = held._handle == entry
            except OSError:
                pinned = False
            if not pinned:
                self._instead = _ImportedModules()

else:  # not Linux
    LoadedLibraries = _ImportedModules


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
