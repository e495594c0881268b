"""The pools of joblib's calls: kept from call to call, and shared by calls at the same time.

A backend takes a lease of a pool (``Pools.lease``), which ends with the backend at the latest.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from safepool.pool.executor import ProcessPool
from safepool.threads.environment import worker_environment
from safepool.threads.placement import own_cpus
from safepool.threads.registry import revision
from safepool.transport.payloads import dumps

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from safepool.pool.core.policy import Policy

# The text of joblib's own backend, which programs compare.
NOT_PICKLED = "Could not pickle the task to send to the workers."
# Time that a worker waits for the next call outside of a block, as loky's workers do.
IDLE_S = 300.0
# The most idle pools to keep.
_MOST_UNUSED = 4


def born_with(
    initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> tuple[object, ...]:
    """Return the present settings of this process that its workers have from their birth.

    They are compared, and not read: the environment without variables that are set for each
    worker, the working directory, ``sys.path``, the affinity mask, and a hash of the contents of
    the initializer, its arguments and globals. The hash is empty if they cannot be pickled, which
    the pool says when it is made.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it does not exist any more
        folder = ""
    ours = _variables_of_workers(revision())
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    contents = b"" if initializer is None else _digest((initializer, initargs))
    return environ, folder, [*sys.path], own_cpus(), contents


@functools.lru_cache(maxsize=1)
def _variables_of_workers(_revision: int) -> frozenset[str]:
    """Return the variables that each worker gets and that blocks of this process change."""
    return frozenset(worker_environment(1))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that tell pools apart.

    Attributes:
        threads: Native threads of each worker.
        preload: The same as for :class:`safepool.ProcessPool`.
        initializer: Called in each worker.
        initargs: Arguments of ``initializer``.
        idle_s: Seconds after which a worker ends that has nothing to do.
        end_subprocesses: The same as for :class:`safepool.ProcessPool`.
        memory_limit: In bytes.
        born_with: Result of :func:`born_with`.
    """

    threads: int
    preload: str | tuple[str, ...]
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...] = field(compare=False)
    idle_s: float
    end_subprocesses: bool
    memory_limit: int | None
    born_with: tuple[object, ...] = field(default=(), compare=False)

    def fit(self, other: Settings) -> bool:
        """Tell whether a pool of these settings serves for others."""
        return self.are_like(other) and self.born_with == other.born_with

    def are_like(self, other: Settings) -> bool:
        """Tell whether they were the same when they were given."""
        return self == other and _are_same(self.initargs, other.initargs)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of any pool."""
        return {
            "initializer": self.initializer,
            "initargs": self.initargs,
            "threads_per_worker": self.threads,
            "preload": self.preload,
            "end_subprocesses": self.end_subprocesses,
            "memory_limit": self.memory_limit,
        }

    def make(self, workers: int) -> TaskPool:
        """Make a pool."""
        return _Pool(workers, **self.options)


class TaskPool(Protocol):
    """The methods of a pool that joblib's calls use."""

    @property
    def is_broken(self) -> bool:
        """Whether it takes no more batches."""
        ...

    def begin(self, batch: Callable[[], Any], name: str, policy: Policy) -> Future[Any]:
        """Run a batch in a worker."""
        ...

    def cancel(self, future: Future[Any], *, kill: bool = False) -> bool:
        """Cancel a batch; ``kill`` ends one that runs."""
        ...

    def size_to(self, workers: int) -> None:
        """Run at most ``workers`` batches at a time."""
        ...

    def let_go_after(self, idle_s: float) -> None:
        """End workers that have been idle for ``idle_s``."""
        ...

    def end(self, *, wait: bool, at_once: bool = False) -> None:
        """End the workers; ``at_once`` ends batches that run as well."""
        ...


class _Pool(ProcessPool):
    # Workers of joblib's own backend are no forks.
    _inherits = False

    @property
    def is_broken(self) -> bool:
        return bool(self._broken)

    def begin(self, batch: Callable[[], Any], name: str, policy: Policy) -> Future[Any]:
        return self._scheduler.submit(batch, (), {}, name=name, policy=policy)

    def size_to(self, workers: int) -> None:
        # The program itself set n_jobs= in the call: no log line.
        self._scheduler.resize(workers, level=logging.DEBUG)

    def let_go_after(self, idle_s: float) -> None:
        self._scheduler.let_go_after(idle_s)

    def end(self, *, wait: bool, at_once: bool = False) -> None:
        self._scheduler.shut_down(wait=wait, end="terminate" if at_once else "")


def _digest(value: object) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        for segment in dumps(value):
            digest.update(segment)
    except Exception:  # noqa: BLE001 -- user code
        return b""
    return digest.digest()


def _are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    # Compared by identity: arguments of an initializer may not support comparison.
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


@dataclass(eq=False)
class Lease:
    """A pool, and the backends of the ``Parallel`` calls that use it now."""

    settings: Settings
    pool: TaskPool
    workers: int
    # The lease of a call that was interrupted before joblib would end it goes with its object.
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def is_outdated(self, settings: Settings) -> bool:
        """Tell whether it was made for such settings, and something has changed since."""
        like = not self.users and settings.are_like(self.settings)
        return like and not settings.fit(self.settings)


class Pools:
    """Pools that are kept from call to call.

    Args:
        idle_s: Let workers go that have done nothing for so long; ``None`` keeps them.
    """

    def __init__(self, idle_s: float | None) -> None:
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._leases: list[Lease] = []
        self._lock_here = threading.RLock()
        self._initialized_here: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        _made.add(self)

    def lease(self, settings: Settings, workers: int, user: object) -> Lease:
        """Return a pool with that many workers, an earlier one if possible."""
        with self._lock:
            self._leases = [lease for lease in self._leases if not lease.pool.is_broken]
            self._end([lease for lease in self._leases if lease.is_outdated(settings)])
            fitting = [lease for lease in self._leases if settings.fit(lease.settings)]
            # A pool of this size, which calls in several threads share, or a free one.
            fitting.sort(key=lambda lease: lease.workers != workers)
            for lease in fitting:
                if lease.workers == workers or not lease.users:
                    break
            else:
                self._end_unused()
                lease = Lease(settings, settings.make(workers), workers)
                if self._idle_s is not None:
                    lease.pool.let_go_after(settings.idle_s)
                self._leases.append(lease)
            if lease.workers != workers:
                lease.workers = workers
                lease.pool.size_to(workers)
            lease.users.add(user)
            return lease

    def initialize_here(
        self, initializer: Callable[..., object], initargs: tuple[Any, ...]
    ) -> None:
        """Call an initializer in this process, where calls run instead of in workers; once."""
        with self._lock_here:
            last = self._initialized_here
            if last is not None and last[0] == initializer and _are_same(last[1], initargs):
                return
            self._initialized_here = initializer, initargs
            try:
                initializer(*initargs)
            except BaseException:
                self._initialized_here = None
                raise

    def close(self, *, end: bool, which: Callable[[Lease], bool] = lambda _: True) -> None:
        """End workers.

        Args:
            end: Do not wait for running tasks.
            which: Function that returns whether to close a lease.
        """
        with self._lock:
            leases = [lease for lease in self._leases if which(lease)]
            self._leases = [lease for lease in self._leases if lease not in leases]
        for lease in leases:
            lease.pool.end(wait=True, at_once=end)

    def _end_unused(self) -> None:
        """End idle pools: a new initializer for each call would add a pool each time."""
        unused = [lease for lease in self._leases if not lease.users]
        self._end(unused[: max(0, len(unused) - _MOST_UNUSED + 1)])

    def _end(self, leases: list[Lease]) -> None:
        for lease in leases:
            self._leases.remove(lease)
            lease.pool.end(wait=False)

    def forget(self) -> None:
        """Drop all pools after a fork: they are the parent's, whose threads may hold the lock."""
        self._lock = threading.Lock()
        self._lock_here = threading.RLock()
        self._leases = []

    def drop(self) -> None:
        """Drop all pools and functions when the program ends."""
        self.forget()
        self._initialized_here = None


def _forget_all() -> None:
    for pools in [*_made]:
        for lease in pools._leases:
            for user in [*lease.users]:
                user.leave()
        pools.forget()


_made: weakref.WeakSet[Pools] = weakref.WeakSet()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_all)


# The interpreter keeps functions for a fork to its very end, and with them, by way of the pools,
# the script's functions and their globals, which would not be finalized.
@atexit.register
def _drop_all() -> None:
    for pools in [*_made]:
        pools.drop()


SHARED = Pools(IDLE_S)
