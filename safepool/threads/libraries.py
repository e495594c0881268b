"""Shared libraries that were loaded since the last check, which is nearly free if none was.

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
