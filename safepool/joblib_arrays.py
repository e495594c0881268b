"""Large arrays in joblib's calls: what several batches of a call are given is placed once.

Not covered:
    * An array inside of another argument: it travels with its batch.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from safepool.transport.sharing import share

__all__ = ["Arrays"]


class Arrays:
    """The large arrays of one call, to be placed once instead of sent with each batch.

    Args:
        more_than_bytes: Of what size an array is large; ``None`` is never.
    """

    def __init__(self, more_than_bytes: float | None) -> None:
        self._more_than_bytes = more_than_bytes
        # By id(), which is another array's once this one is gone. A handle is kept as long.
        self._met: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def place(self, batch: Any) -> None:
        """Let what an earlier batch was given too travel as a handle."""
        items = getattr(batch, "items", None)
        numpy = sys.modules.get("numpy")
        if not items or numpy is None or self._more_than_bytes is None:
            return
        large = {
            id(value): value
            for _, args, keywords in items
            for value in (*args, *keywords.values())
            # A subclass may hold more than its buffer; a memory-mapped one travels by its name.
            if type(value) is numpy.ndarray and value.nbytes > self._more_than_bytes
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
        """Return the handle of an array that was met before; ``None`` the first time."""
        name, known = id(array), self._met
        reference, handle = known.get(name, (None, None))
        if reference is None:
            known[name] = weakref.ref(array, lambda _: known.pop(name, None)), None
        elif handle is None and not array.dtype.hasobject:
            try:
                handle = share(array, writable=True)
            except MemoryError:
                return None  # it travels by itself, or says so there
            known[name] = reference, handle
        return handle


def _or_same(handle: Any, value: Any) -> Any:
    return value if handle is None else handle
