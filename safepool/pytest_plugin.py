"""For pytest-xdist: as many workers as fit, and in each its share of the native threads.

    pytest -p safepool.pytest_plugin -n auto

``-n auto`` is :func:`safepool.cpu_count`, not the CPUs of the host, unless
``PYTEST_XDIST_AUTO_NUM_WORKERS`` is set. With N workers the native thread pools of each
have an N-th of :func:`safepool.cpu_limit`, at least 1 thread. The variables at a worker's start
set that, and :func:`safepool.limit_threads` for libraries that its conftest files have imported.
Without ``-n`` they have the whole limit. The environment is restored at the end.

Not covered:
    * Workers on other hosts, or of another Python (``--tx``): they follow the limit there, and
      only if this package is installed there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from safepool.machine import cpu_count, cpu_limit
from safepool.own_threads import ThreadLimit, limit_threads

_LIMIT: pytest.StashKey[ThreadLimit] = pytest.StashKey()


def share_of(cpus: float, workers: int) -> int:
    """Return the native threads for each of some workers, at least 1.

    Example:
        >>> share_of(4.5, 2), share_of(2, 4)
        (2, 1)
    """
    return max(1, int(cpus // workers))


# This hook runs first because xdist has a hook that answers, too.
@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return the number of workers for ``-n auto``."""
    return None if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") else cpu_count()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[object]) -> None:
    """Set the variables that the workers are about to be started with."""
    _hold(config, len(specs))


def pytest_configure(config: pytest.Config) -> None:
    """Hold the native threads of a worker, or of a run without workers."""
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        _hold(config, workerinput["workercount"])
    elif not getattr(config.option, "tx", None):
        _hold(config, 1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Restore the environment variables."""
    limit = config.stash.get(_LIMIT, None)
    if limit is not None:
        limit.__exit__(None, None, None)


def _hold(config: pytest.Config, workers: int) -> None:
    config.stash[_LIMIT] = limit_threads(share_of(cpu_limit(), workers))
