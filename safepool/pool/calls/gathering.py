"""A map whose results are wanted all at once: a list, or the first error, when all have ended.

Nobody iterates, so nothing waits for a reader: results are put into the list as they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safepool.pool.calls.mapping import MapRun
from safepool.pool.calls.tasks import OwnerRef, PoolFuture, fail, finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.core.policy import Policy


class GatheredRun(MapRun):
    """Run that ends a future with the list of results, or with the first exception that arrived.

    ``left`` is the number of calls that have not ended.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        policy: Policy,
        at_once: int | None,
        *,
        starred: bool,
        count: int,
        owner: OwnerRef,
    ) -> None:
        super().__init__(function, name, policy, at_once, starred=starred)
        self.future: PoolFuture = PoolFuture(owner)
        self.left: int = count
        self._total = count
        self._values: list[Any] = [None] * count
        self._error: BaseException | None = None

    @property
    def is_full(self) -> bool:
        """Never: results are not taken one by one."""
        return False

    def put(self, index: int, results: list[Any], size_bytes: int = 0) -> None:  # noqa: ARG002
        """Put results into the list."""
        self._values[index : index + len(results)] = results
        self._end(len(results))

    def put_error(self, index: int, error: BaseException) -> None:  # noqa: ARG002
        """Keep the exception of a call, if it is the first."""
        self._error = self._error or error
        self._end(1)

    def stop(self, error: Callable[[], BaseException]) -> None:
        """Give up the remaining calls: those that no worker has raise ``error()``."""
        missing = 0 if self.stopped else self._total - self._cut
        super().stop(error)
        if missing:
            self._error = self._error or error()
            self._end(missing)

    def _end(self, count: int) -> None:
        self.left -= count
        if self.left:
            return
        values, self._values = self._values, []
        if self._error is None:
            finish(self.future, values)
        else:
            fail(self.future, self._error)
