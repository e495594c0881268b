"""Large arrays in joblib's calls: an array among the arguments of several tasks is placed once.

    mmap_mode       a task gets                             joblib's own backend
    "c"             an array that it can write, alone       the same
    "r"             a read-only array                       the same; the default
    "r+", "w+"      the same as "c"; the log says so        an array that all tasks write
    None            the same as "c", sent with each batch   a copy

Not covered:
    * Placing an array that is inside of another argument: the array travels with its batch.
    * Writes that all tasks see: pass a ``numpy.memmap`` as an argument.
"""

from __future__ import annotations

import pickle
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from joblib import parallel

from safepool.machine import log_once
from safepool.transport.memmaps import read_only_reducers
from safepool.transport.payloads import dumps, loads
from safepool.transport.room import require_to_pickle
from safepool.transport.sharing import share

MmapMode = Literal["r", "r+", "w+", "c"] | None

_MODES = ("r", "r+", "w+", "c", None)
_UNSET = parallel.default_parallel_config["mmap_mode"]


def mode_of_block(mmap_mode: str | None) -> str | None:
    """Return the default mode of a block for calls without one.

    Args:
        mmap_mode: ``"auto"`` is the mode of the surrounding joblib context, or else ``"c"``.
    """
    if mmap_mode == "auto":
        around = _mode_of_context()
        return "c" if around is _UNSET else around
    return mmap_mode


def mode_asked_for(mmap_mode: str | None) -> str | None:
    """Return the mode that the program chose for a call.

    ``"r"`` is also joblib's default, so it counts only if the call's context sets it.

    Raises:
        ValueError: joblib has no such mode.
    """
    if mmap_mode not in _MODES:
        raise ValueError(
            f"mmap_mode must be one of {', '.join(map(repr, _MODES))}, not {mmap_mode!r}"
        )
    if mmap_mode == "r" and _mode_of_context() is _UNSET:
        return "c"
    if mmap_mode in ("r+", "w+"):
        log_once(
            f"mmap_mode={mmap_mode!r}: each task writes into its own copy of an array. Pass a "
            "numpy.memmap for writes that all tasks see"
        )
    return mmap_mode


def _mode_of_context() -> Any:
    config = getattr(parallel._backend, "config", parallel.default_parallel_config)
    return config["mmap_mode"]


# Calls of a batch whose arguments may be large.
_FEW = 16
# An array of this size is placed for its first batch. A smaller array is placed for its second
# batch: if there is none, it costs less inside of its batch (benchmarks/joblib_backend.py).
_AT_ONCE_BYTES = 8 * 1024**2


@dataclass
class _Met:
    """An array of a call, with its handle if the array was placed.

    A handle that only one batch was given lives as long as that batch; a second batch keeps it.
    """

    gone: weakref.ref[Any]
    handle: Callable[[], Any]


class Arrays:
    """The large arrays of one call, to be placed once instead of sent with each batch.

    Args:
        more_than_bytes: Size from which an array is large; ``None`` is never.
        read_only: Whether large arrays are read-only, anywhere in the arguments.
    """

    def __init__(self, more_than_bytes: float | None, *, read_only: bool = False) -> None:
        self._more_than_bytes = more_than_bytes
        self._read_only = read_only
        # By id(). After the end of an array, another one may have its id.
        self._met: dict[int, _Met] = {}

    def place(self, batch: Any) -> Any:
        """Return a batch whose large arrays travel as handles.

        Raises:
            MemoryLimitError: The memory limits leave no room for the pickle of another large
                object.
        """
        items = getattr(batch, "items", None)
        numpy = sys.modules.get("numpy")
        if items and len(items) <= _FEW:
            for _, args, keywords in items:
                require_to_pickle((*args, *keywords.values()))
        if not items or numpy is None or self._more_than_bytes is None:
            return batch
        self._hand_out(batch, items, numpy)
        return _ReadOnly(batch, self._more_than_bytes) if self._read_only else batch

    def _hand_out(self, batch: Any, items: list[Any], numpy: Any) -> None:
        large = {
            id(value): value
            for _, args, keywords in items
            for value in (*args, *keywords.values())
            # A subclass may hold more than its buffer; a memory-mapped one travels by its name.
            if type(value) is numpy.ndarray and value.nbytes > (self._more_than_bytes or 0)
        }
        if not large:
            return
        handles = {name: self._handle(value) for name, value in large.items()}
        batch.items = [
            (
                function,
                tuple(_or_same(handles.get(id(value)), value) for value in args),
                {key: _or_same(handles.get(id(value)), value) for key, value in keywords.items()},
            )
            for function, args, keywords in items
        ]

    def _handle(self, array: Any) -> Any:
        """Return the handle of an array; ``None`` if it travels with the call."""
        name = id(array)
        met = self._met.get(name)
        handle = None if met is None else met.handle()
        wanted = met is not None or array.nbytes >= _AT_ONCE_BYTES
        if handle is None and wanted and not array.dtype.hasobject:
            try:
                # The copy is contiguous: pickle would copy an array with gaps, and each task would
                # copy it again.
                whole = array if array.flags.forc else array.copy()
                handle = share(whole, writable=not self._read_only)
            except MemoryError:
                pass  # it travels with the call, or raises there
        if met is None:
            gone = weakref.ref(array, lambda _: self._met.pop(name, None))
            self._met[name] = _Met(gone, (lambda: None) if handle is None else weakref.ref(handle))
        elif handle is not None:
            met.handle = lambda: handle
        return handle


def _or_same(handle: Any, value: Any) -> Any:
    return value if handle is None else handle


class _ReadOnly:
    """A batch whose large arrays arrive read-only."""

    def __init__(self, batch: Any, more_than_bytes: float) -> None:
        self._batch = batch
        self._more_than_bytes = more_than_bytes
        self.items = batch.items

    def __call__(self) -> Any:
        return self._batch()

    def __reduce__(self) -> tuple[Any, ...]:
        # In a separate pickle: a pickler's rule for a type applies to everything that it pickles.
        reducers = read_only_reducers(self._more_than_bytes)
        pickled, *buffers = dumps(self._batch, into_main=True, reducers=reducers)
        return _received, (pickled, [pickle.PickleBuffer(buffer) for buffer in buffers])


def _received(pickled: bytes, buffers: Sequence[bytes | memoryview]) -> Any:
    return loads([pickled, *buffers])
