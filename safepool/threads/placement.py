"""The choice of a worker's CPUs, and the binding (Linux; elsewhere nothing is bound).

Nearly every native library asks the affinity mask how many threads to start, also those
that no variable reaches: JAX's pool that compiles, FFmpeg's, gRPC's, oneTBB's, CatBoost's.
A worker that may run on one CPU makes them start one.

Not covered:
    * Resources that CPUs share: caches, memory, the two threads of one core. They are taken by
      number, which on most machines counts every core before it counts the second thread of any.
    * Other programs on these CPUs. The kernel shows nothing that would stay true.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def choose_cpus(
    mask: Collection[int], threads: int, load: Mapping[int, int], first: int = 0
) -> tuple[int, ...]:
    """Choose the CPUs of one more worker: those that the fewest workers are bound to.

    Args:
        mask: The available CPUs, by the kernel's numbers; at least one.
        threads: Number of threads of the worker, at least 1. A larger number than the mask: all.
        load: Number of workers that are bound to each CPU; one that is missing has none.
        first: Place in the mask from which equals are taken, 0 or more; after the last CPU the
            first one follows.

    Returns:
        Their numbers, ascending.

    Raises:
        ValueError: ``mask`` is empty, or ``threads`` below 1.

    Example:
        >>> choose_cpus({0, 1, 2, 3}, 2, load={0: 1, 1: 1})
        (2, 3)
        >>> choose_cpus({0, 1, 2}, 2, load={0: 1, 1: 1})
        (0, 2)
    """
    if not mask or threads < 1:
        raise ValueError(f"no CPUs to choose for {threads} threads among {sorted(mask)}")
    cpus = sorted(mask)
    turned = cpus[first % len(cpus) :] + cpus[: first % len(cpus)]
    # A stable sort: among equals the order is the mask's, so neighbours stay together.
    return tuple(sorted(sorted(turned, key=lambda cpu: load.get(cpu, 0))[:threads]))


class Placement:
    """Chooses the CPUs of a pool's workers, each time among those that the pool has now.

    Args:
        threads: CPUs for each worker, at least 1.
        first: The same as for :func:`choose_cpus`. ``None`` draws it: the small pools of several
            containers on one machine must not all crowd on its first CPUs.
    """

    def __init__(self, threads: int, first: int | None = None) -> None:
        self._threads = threads
        self._first = int.from_bytes(os.urandom(2)) if first is None else first

    def choose(self, taken: Iterable[Iterable[int]]) -> tuple[int, ...]:
        """Return the CPUs of another worker; empty where binding is impossible.

        Args:
            taken: The CPUs of each worker that stays. The CPUs of an ended worker are free, so its
                replacement takes them.
        """
        mask = own_cpus()
        if not mask:
            return ()
        load = Counter(cpu for cpus in taken for cpu in cpus)
        return choose_cpus(mask, self._threads, load, self._first)


def own_cpus() -> set[int]:
    """Return the CPUs that this thread may run on; none if the system does not say."""
    ask: Any = getattr(os, "sched_getaffinity", None)
    try:
        return set(ask(0) if ask else ())
    except OSError:  # a filter refuses the call
        return set()


if sys.platform == "linux":

    def why_not_bound() -> str:
        """Return why no worker can be bound to CPUs here; empty if it can."""
        try:
            # This sets the present mask, so nothing changes.
            os.sched_setaffinity(0, os.sched_getaffinity(0))
        except OSError as error:
            return f"sched_setaffinity is refused here: {error.strerror}"
        return ""

    def bind(cpus: Collection[int]) -> None:
        """Restrict this thread, and those that it will start, to these CPUs."""
        if not cpus:
            return
        try:
            os.sched_setaffinity(0, cpus)
        except OSError:
            pass  # taken from the whole group since they were chosen; they are no loss

else:  # not Linux

    def why_not_bound() -> str:
        """Return why no worker can be bound to CPUs here; empty if it can."""
        return f"{sys.platform} has no call for it that this package uses"

    def bind(cpus: Collection[int]) -> None:
        """Do nothing: the system has no such call."""
