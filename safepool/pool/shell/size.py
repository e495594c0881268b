"""Number of workers that a pool may have: set by hand, or by the present limits."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from safepool.arguments import MOST_WORKERS
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.machine import BudgetWatch
    from safepool.pool.shell.listener import Listener
    from safepool.pool.shell.worker import Worker

_log = ContainedLogger()

# Between two readings of the limits.
_FOLLOW_S = 1.0


class Size:
    """The most workers of one pool.

    Args:
        workers: Number of workers that fit at first.
        free_to_move: No worker is bound to CPUs.
        listener: Hears of each change.
    """

    def __init__(
        self, workers: int, watch: BudgetWatch | None, *, free_to_move: bool, listener: Listener
    ) -> None:
        self._fitting = workers
        self._by_hand: int | None = None
        self._watch = watch
        self._free_to_move = free_to_move
        self._look_at = 0.0
        self._resized = listener.resized

    @property
    def now(self) -> int:
        """The most workers at a time."""
        return self._by_hand or self._fitting

    @property
    def next_look(self) -> float | None:
        """When to :meth:`follow`, by the monotonic clock; ``None`` if the number is kept."""
        return None if self._watch is None or self._by_hand else self._look_at

    def keep(self, workers: int, *, level: int = logging.INFO) -> None:
        """Set a fixed number of workers, and stop following the limits. From any thread.

        Args:
            workers: At least 1.
            level: Level of the line in the log.
        """
        before, self._by_hand = self.now, workers
        if before != workers:
            _log.log(level, "resize(): %d workers instead of %d", workers, before)
            self._resized(before, workers, "by hand")

    def follow(self, workers: Iterable[Worker], worked: set[int], *, more: bool) -> None:
        """Read the limits again, at most once a second while there is work.

        Args:
            workers: All present workers. Called in the thread that starts workers.
            worked: Ids of those that have worked since the last call, and owe nothing.
            more: Calls wait.
        """
        watch, now = self._watch, time.monotonic()
        if watch is None or self._by_hand or now < self._look_at:
            return
        busy = [worker.pid for worker in workers if worker.ledger.owed or worker.pid in worked]
        if not (busy or more):
            return
        self._look_at = now + _FOLLOW_S
        try:
            budget = watch.read()
            # A worker that is bound may wait for its own CPU beside idle ones, without any limit.
            if self._free_to_move:
                watch.look_for_hidden_limit(busy, budget)
        except Exception:  # noqa: BLE001 -- a limit that cannot be read must not cost a pool
            _log.exception("cannot read the limits again: the pool keeps its size")
            self._watch = None
            return
        before, self._fitting = self._fitting, min(budget.workers, MOST_WORKERS)
        if before != self._fitting and not self._by_hand:
            told = "the limits have changed: %d workers instead of %d"
            _log.info(told, self._fitting, before)
            self._resized(before, self._fitting, "limits")
