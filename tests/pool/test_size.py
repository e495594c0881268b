"""The number of workers under a real quota, on the own group and on a parent."""

from __future__ import annotations

import pytest
from support_cgroups import control_group

from safepool import ProcessPool

# Submits more tasks than there are CPUs, each long enough to need a worker of its own, and
# counts the processes from which results came.
COUNT = """
import os, sys, time, safepool
def who(_):
    time.sleep(0.1)
    return os.getpid()
with safepool.ProcessPool() as pool:
    pids, deadline = set(), time.monotonic() + 30
    while not pids or (len(pids) < pool.size and time.monotonic() < deadline):
        pids.update(pool.map(who, range(6)))
print(safepool.cpu_limit(), safepool.cpu_count(), len(pids), pool.size)
"""

# One row per quota in CPUs, on a machine with two: the limit and the workers.
QUOTAS = {0.5: "0.5 1 1 1", 1.0: "1.0 1 1 1", 1.5: "1.5 1 1 1"}


@pytest.mark.parametrize("cpus", QUOTAS)
def test_the_pool_fits_the_quota_of_its_own_group(cpus: float) -> None:
    with control_group(cpus=cpus) as group:
        assert group.run(COUNT) == QUOTAS[cpus]


@pytest.mark.parametrize("cpus", QUOTAS)
def test_the_pool_fits_the_quota_of_a_parent_group(cpus: float) -> None:
    """The own group sets no limit, which is where most libraries stop reading."""
    with control_group(cpus=cpus) as parent, control_group(inside=parent) as group:
        assert group.run(COUNT) == QUOTAS[cpus]


def test_without_a_quota_the_affinity_mask_decides() -> None:
    """The group is there and sets nothing: as many workers as CPUs in the mask."""
    import os

    cpus = len(os.sched_getaffinity(0))
    with control_group() as group:
        assert group.run(COUNT) == f"{float(cpus)} {cpus} {cpus} {cpus}"


def test_an_explicit_number_wins_under_a_quota() -> None:
    with control_group(cpus=0.5) as group:
        code = "import safepool; print(safepool.ProcessPool(3).size)"
        assert group.run(code) == "3"


def test_the_size_is_a_number_that_a_library_can_count_with() -> None:
    """And nothing that it can set: another number comes by resize()."""
    with ProcessPool(3) as pool:
        assert type(pool.size) is int
        assert pool.size == 3
        with pytest.raises(AttributeError):
            pool.size = 4  # type: ignore[misc]
        pool.resize(2)
        assert pool.size == pool._max_workers == 2
    assert pool.size == 2
