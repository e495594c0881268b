"""Maps whose items are not all taken yet, as their iterators do not say how many there are.

The standard pool takes all items when ``map`` is called. The pool takes the remaining items when
it is shut down, or when the unused iterator over the results is dropped.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.calls.results import ResultIterator, Results


class OpenMaps:
    """The open maps of one pool."""

    def __init__(self) -> None:
        self._results: dict[weakref.ref[Any], Results] = {}

    def add(
        self, iterator: ResultIterator, results: Results, do: Callable[[Callable[[], None]], None]
    ) -> None:
        """Note a map, which runs all its calls even without a request for results.

        Args:
            iterator: Iterator over the results.
            results: Source of the results.
            do: Function that calls a function, elsewhere if this is the thread that runs the pool:
                the collector may drop an iterator in that thread.
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
        # The callback of a weak reference may run before the iterator's own finalizer.
        if results is not None and not results.seen:
            do(results.finish)
