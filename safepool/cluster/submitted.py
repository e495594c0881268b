"""Calls of a cluster pool, from the program to its nodes: how each is pickled, and how it ends.

Not covered:
    * Code of the program that pickles the items of a map runs in the pool's thread, when the call
      is sent.
"""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Protocol

from safepool.cluster.messages import Buffers, PickledArguments, PickledFunction, pickle_arguments
from safepool.pool.calls.tasks import PoolFuture, fail, finish
from safepool.pool.core.work import Call
from safepool.pool.tracing.costs import note_pickled

if TYPE_CHECKING:
    from safepool.cluster.tracing import ClusterTrace
    from safepool.pool.calls.mapping import MapRun
    from safepool.pool.core.policy import Policy


class Owner(Protocol):
    """The pool of calls, as they know it.

    Attributes:
        trace: Trace of calls and nodes; ``None`` for none.
        told: Maps whose readers must check for new results.
        buffers: Copies of large buffers of arguments.
    """

    trace: ClusterTrace | None
    told: set[MapRun]
    buffers: Buffers

    def check_may_wait(self) -> None:
        """Refuse that a thread waits for a result that it has to bring itself."""
        ...


class ClusterFuture(PoolFuture):
    """A future that refuses to be waited for by the thread that carries its call."""

    def _wait(self, timeout_s: float | None) -> Any:
        pool: Owner | None = None if self.owner is None else self.owner()
        if pool is not None and timeout_s != 0 and not self.done():
            pool.check_may_wait()
        return super()._wait(timeout_s)


class Submitted(Call):
    """A call of ``submit()``."""

    __slots__ = ("args", "function", "future")

    def __init__(self, future: PoolFuture, name: str, policy: Policy) -> None:
        super().__init__(name, policy)
        self.future: PoolFuture = future
        self.function: PickledFunction | None = None
        self.args: PickledArguments | None = None

    def is_wanted(self) -> bool:
        """Whether it was not cancelled."""
        return not self.future.cancelled()

    def packed(self) -> tuple[PickledFunction, PickledArguments]:
        """Return function and arguments as they travel."""
        assert self.function is not None
        assert self.args is not None
        return self.function, self.args

    def begin(self) -> bool:
        """Become running; ``False`` if it was cancelled."""
        return self.future.running() or self.future.begin()

    def succeed(self, value: Any, nbytes: int) -> None:  # noqa: ARG002
        """End with a result."""
        finish(self.future, value)

    def fail(self, error: BaseException) -> None:
        """End with an exception."""
        fail(self.future, error)

    def cancel(self) -> None:
        """End without having run."""
        self.future.cancel_running()
        self.future.tell()


class Mapped(Call):
    """A call of ``map()``."""

    __slots__ = ("args", "index", "item", "pool", "run")

    def __init__(self, pool: Owner, run: MapRun, index: int, item: Any) -> None:
        super().__init__(run.name, run.policy)
        self.pool: Owner = pool
        self.run: MapRun = run
        self.index: int = index
        self.item: Any = item
        self.args: PickledArguments | None = None

    def is_wanted(self) -> bool:
        """Whether a reader takes further results."""
        if not self.run.stopped:
            return True
        self._settled()
        return False

    def packed(self) -> tuple[PickledFunction, PickledArguments]:
        """Return function and arguments as they travel."""
        function: Any = self.run.sent
        if self.args is None:
            before_ns = time.monotonic_ns()
            self.args = pickle_arguments(self.run.arguments_of(self.item), {}, self.pool.buffers)
            self.item = None
            if self.pool.trace is not None:
                note_pickled(self, before_ns)
        return function, self.args

    def begin(self) -> bool:
        """Become running."""
        return True

    def succeed(self, value: Any, nbytes: int) -> None:
        """End with a result."""
        self.run.put(self.index, [value], nbytes)
        self._settled()

    def fail(self, error: BaseException) -> None:
        """End with an exception."""
        self.run.put_error(self.index, error)
        self._settled()

    def cancel(self) -> None:
        """End without having run."""
        self.fail(CancelledError())

    def _settled(self) -> None:
        self.run.unsettled -= 1
        self.pool.told.add(self.run)
