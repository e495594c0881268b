"""A map whose calls are counted for a bar.

The scheduler stores results in any order. Each is counted once: a call that runs again because its
worker died is stored only at its end.
"""

from __future__ import annotations

import weakref
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from safepool.pool.calls.mapping import MapRun
from safepool.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.pool.calls.results import ResultIterator


class CountedRun(MapRun):
    """Run that counts in its bar the results that are put down."""

    _bar: Progress
    _shown: weakref.ref[ResultIterator] | None = None

    def put(self, index: int, results: list[Any], size_bytes: int = 0) -> None:
        """Put results down and count them."""
        self._bar.done += len(results)
        super().put(index, results, size_bytes)

    def put_error(self, index: int, error: BaseException) -> None:
        """Put an error down and count it."""
        self._bar.done += 1
        self._bar.failed += 1
        super().put_error(index, error)

    def take(self, index: int, deadline: float | None) -> list[Any]:
        """Return the next results; with an error it is seen how many calls had ended."""
        try:
            return super().take(index, deadline)
        except BaseException:
            self._bar.draw_now()
            raise

    def shown(
        self, label: str, total: int | None, start: Callable[[], ResultIterator]
    ) -> ResultIterator:
        """Return the results, with a bar until they end or are dropped."""
        # Before anything is queued: tqdm may be missing.
        bar = self._bar = Progress(label, total, look=self._look)
        try:
            results = start()
        except BaseException:
            bar.close()
            raise
        # The drawing thread must not keep results that the caller has dropped.
        self._shown = weakref.ref(results)
        assert results.results is not None
        results.results.at_end = bar.close
        return results

    def _look(self, progress: Progress) -> bool:
        if progress.total is None and self.fed:
            progress.total = self.count
        all_ended = progress.total is not None and progress.done >= progress.total
        dropped = self._shown is not None and self._shown() is None
        return not (dropped or all_ended)


def total_of(iterables: Sequence[Iterable[Any]]) -> int | None:
    """Return how many items there will be, if something says its length.

    Example:
        >>> total_of([[1, 2, 3], iter([1, 2])]), total_of([range(3), "ab"]), total_of([iter("a")])
        (None, 2, None)
    """
    if not iterables or not all(isinstance(items, Sized) for items in iterables):
        return None
    return min(len(items) for items in iterables if isinstance(items, Sized))
