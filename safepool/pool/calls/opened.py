"""Maps whose items are not all taken yet, as their iterators do not say how many there are.

The standard pool takes all items when ``map`` is called. Here the rest of them is taken at the
latest when the pool is shut down, or when the iterator over the results is dropped unseen.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.calls.mapping import ResultIterator, Results

__all__ = ["OpenMaps"]


class OpenMaps:
    """The open maps of one pool."""

    def __init__(self) -> None:
        self._results: dict[weakref.ref[Any], Results] = {}

    def add(
        self,
        iterator: ResultIterator,
        results: Results,
        do: Callable[[Callable[[], None]], None],
    ) -> None:
        """Note a map. One that is dropped without a look is for the sake of what its calls do.

        Args:
            iterator: Over its results.
            results: Where these come from.
            do: Calls a function: elsewhere, if this is the thread that runs the pool. The
                collector may drop an iterator there.
        """
        self._results[weakref.ref(iterator, partial(self._finish_unseen, do))] = results

    def finish(self) -> None:
        """Take all items that are left."""
        for results in [*self._results.values()]:
            results.finish()

    def _finish_unseen(
        self, do: Callable[[Callable[[], None]], None], iterator: weakref.ref[Any]
    ) -> None:
        results = self._results.pop(iterator, None)
        # Weak references may be told of an iterator's end before the iterator itself.
        if results is not None and not results.seen:
            do(results.finish)
