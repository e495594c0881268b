"""Cluster pools for joblib's calls: those of one block, ended with it.

    joblib_backend    one backend per `Parallel` object
      ClusterPools    one pool for each setting in the block
        _Pool         holds back batches beyond ``n_jobs``  ->  ClusterPool

Not covered:
    * ``idle_worker_timeout``: a node's workers end when no program has used them for 10 seconds.
    * Environment, directory and ``sys.path`` of the program: a node has its own.
"""

from __future__ import annotations

import operator
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, cast

from safepool.cluster import ClusterPool
from safepool.joblib_pools import NOT_PICKLED, Lease, Pools, Settings
from safepool.pool.calls.tasks import PoolFuture

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.budget import Rounding
    from safepool.pool.core.policy import Policy

# A slow node counts, and is used, from its answer on.
_ANSWERS_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(Settings):
    """Settings that tell cluster pools apart.

    Attributes:
        engine: The user's client or executor.
        rounding: The same as for :class:`safepool.ClusterPool`.
        memory_per_worker: In bytes.
    """

    engine: Any = field(compare=False)
    rounding: Rounding
    memory_per_worker: int | None

    def make(self, workers: int) -> _Pool:
        """Make a pool."""
        pool = ClusterPool(
            self.engine,
            rounding=self.rounding,
            memory_per_worker=self.memory_per_worker,
            **self.options,
        )
        return _Pool(pool, workers)


class ClusterPools(Pools):
    """The pools of one block."""

    def __init__(self) -> None:
        super().__init__(idle_s=None)

    def open(self, settings: ClusterSettings) -> _Pool:
        """Return the pool that the next call of such settings takes.

        Raises:
            TypeError: The engine is of another type than a cluster pool takes.
        """
        with self._lock:
            for lease in self._leases:
                if settings.fit(lease.settings) and not lease.pool.is_broken:
                    break
            else:
                lease = Lease(settings, settings.make(0), 0)
                self._leases.append(lease)
        return cast("_Pool", lease.pool)

    def close(self, *, end: bool, which: Callable[[Lease], bool] = lambda _: True) -> None:  # noqa: ARG002
        """End all pools: only this block uses them."""
        super().close(end=end)


class _Pool:
    """A cluster pool that runs at most ``most`` batches at a time."""

    def __init__(self, pool: ClusterPool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any], str, Policy]] = deque()
        self._running: dict[Future[Any], Future[Any]] = {}

    @property
    def is_broken(self) -> bool:
        return self._pool._scheduler.is_broken

    def workers(self) -> int:
        """Return the workers of all present nodes; wait for the first node.

        Raises:
            NoNodesError: None can be used.
        """
        if not self._pool.size:
            self._pool.submit(int).result()
            self._pool._scheduler.wait_for_answers(_ANSWERS_S)
        # At least 1: the nodes may be lost by now.
        return max(1, self._pool.size)

    def begin(self, batch: Callable[[], Any], name: str, policy: Policy) -> Future[Any]:
        if self._most >= self._pool.size:
            return self._submit(batch, name, policy)
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append((future, batch, name, policy))
        self._go_on()
        return future

    def _submit(self, batch: Callable[[], Any], name: str, policy: Policy) -> Future[Any]:
        # The batch is an argument, because workers keep functions.
        future = self._pool._scheduler.submit(
            operator.call, (batch,), {}, name=name, policy=policy
        )
        error = future.exception() if future.done() and not future.cancelled() else None
        if error is not None:
            raise PicklingError(NOT_PICKLED) from error
        return future

    def _go_on(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or len(self._running) >= self._most:
                    return
                future, batch, name, policy = self._waiting.popleft()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    inner = self._running[future] = self._submit(batch, name, policy)
                except Exception as error:  # noqa: BLE001 -- the batch's
                    future.set_exception(error)
                    continue
            inner.add_done_callback(partial(self._ended, future))

    def _ended(self, future: Future[Any], inner: Future[Any]) -> None:
        with self._lock:
            self._running.pop(future, None)
        try:
            future.set_result(inner.result())
        except BaseException as error:  # noqa: BLE001 -- the batch's, CancelledError as well
            future.set_exception(error)
        self._go_on()

    def cancel(self, future: Future[Any], *, kill: bool = False) -> bool:
        with self._lock:
            sent = self._running.get(future, future)
        return (
            self._pool.cancel(sent, kill=kill) if isinstance(sent, PoolFuture) else sent.cancel()
        )

    def size_to(self, workers: int) -> None:
        self._most = workers

    def let_go_after(self, idle_s: float) -> None:
        pass

    def end(self, *, wait: bool, at_once: bool = False) -> None:
        self._pool._scheduler.shut_down(
            wait=wait, end="joblib's block has ended" if at_once else ""
        )
