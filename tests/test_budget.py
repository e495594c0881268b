"""Limits in, workers out, with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.arguments import parse_bytes
from safepool.budget import Budget, Request, fit, is_held_back
from safepool.limits import Limit, Limits, MemoryLimit, OpenFilesLimit, PidsLimit
from safepool.limits.waiting import WaitSample

pytestmark = pytest.mark.unit

GIB = 2**30


def machine(*quotas: float | None, affinity: float | None = 8.0, **others: Any) -> Limits:
    return Limits(
        affinity=Limit(name="affinity", cpus=affinity, source="sched_getaffinity", raw="mask"),
        quotas=tuple(
            Limit(name="cpu.max", cpus=cpus, source=f"level {level}", raw="raw")
            for level, cpus in enumerate(quotas)
        ),
        **others,
    )


def memory(limit: int | None, used: int | None = 0, reclaimable: int | None = 0) -> MemoryLimit:
    return MemoryLimit(
        name="memory.max",
        bytes=limit,
        used_bytes=used,
        reclaimable_bytes=reclaimable,
        source="memory.max",
        raw=str(limit),
    )


def pids(limit: int | None, used: int | None = 0) -> PidsLimit:
    return PidsLimit(name="pids.max", tasks=limit, used_tasks=used, source="pids.max", raw="raw")


def files(limit: int | None, used: int | None = 0) -> OpenFilesLimit:
    return OpenFilesLimit(files=limit, used_files=used, source="RLIMIT_NOFILE", raw="raw")


exact_7 = Limit(name="SAFEPOOL_MAX_WORKERS", cpus=7.0, source="SAFEPOOL_MAX_WORKERS", raw="7")
slurm_3 = Limit(name="SLURM_CPUS_PER_TASK", cpus=3.0, source="SLURM_CPUS_PER_TASK", raw="3")

# One row per machine and request: the workers that fit, and the source that decides.
CASES: dict[str, tuple[Limits, Request, int, str]] = {
    "no quota": (machine(), Request(), 8, "sched_getaffinity"),
    "two and a half CPUs": (machine(2.5), Request(), 2, "level 0"),
    "half a CPU": (machine(0.5), Request(), 1, "level 0"),
    "a parent is tighter": (machine(4.0, 1.0), Request(), 1, "level 1"),
    "a leaf without a ceiling": (machine(None, 3.0), Request(), 3, "level 1"),
    "the mask is tighter": (machine(4.0, affinity=2.0), Request(), 2, "sched_getaffinity"),
    "just below an integer": (machine(1.99), Request(), 2, "level 0"),
    "an odd period": (machine(1.99999), Request(), 2, "level 0"),
    "just so near": (machine(1.98), Request(), 2, "level 0"),
    "not so near": (machine(1.97), Request(), 1, "level 0"),
    "near a large integer": (machine(63.5, affinity=64.0), Request(), 64, "level 0"),
    "nothing is known": (machine(affinity=None), Request(), 1, "sched_getaffinity"),
    "a scheduler's variable lowers": (
        machine(4.0, bounds=(slurm_3,)),
        Request(),
        3,
        "SLURM_CPUS_PER_TASK",
    ),
    "a scheduler's variable never raises": (
        machine(2.0, bounds=(slurm_3,)),
        Request(),
        2,
        "level 0",
    ),
    "our variable is exact": (
        machine(2.0, exact_workers=exact_7),
        Request(),
        7,
        "SAFEPOOL_MAX_WORKERS",
    ),
    "our variable may be one": (
        machine(2.0, exact_workers=replace(exact_7, cpus=1.0)),
        Request(),
        1,
        "SAFEPOOL_MAX_WORKERS",
    ),
    "the argument beats everything": (
        machine(2.0, exact_workers=exact_7, memory=(memory(1),)),
        Request(max_workers=5, memory_per_worker=GIB),
        5,
        "the max_workers= argument",
    ),
    "ceil": (machine(2.1), Request(rounding="ceil"), 3, "level 0"),
    "ceil, never above the mask": (
        machine(1.5, affinity=1.0),
        Request(rounding="ceil"),
        1,
        "sched_getaffinity",
    ),
    "nearest, down": (machine(2.4), Request(rounding="nearest"), 2, "level 0"),
    "nearest, up": (machine(2.5), Request(rounding="nearest"), 3, "level 0"),
    "nearest of less than half": (machine(0.2), Request(rounding="nearest"), 1, "level 0"),
    "a reserve": (machine(4.0), Request(reserve=0.5), 3, "level 0"),
    "a reserve of nearly nothing counts": (machine(4.0), Request(reserve=0.01), 3, "level 0"),
    "a reserve beyond the limit": (machine(4.0), Request(reserve=9.0), 1, "level 0"),
    "two threads each": (machine(6.0), Request(threads_per_worker=2), 3, "level 0"),
    "two threads each, and one CPU is left": (
        machine(7.0),
        Request(threads_per_worker=2),
        3,
        "level 0",
    ),
    "more threads than CPUs": (machine(1.0), Request(threads_per_worker=4), 1, "level 0"),
    "memory for three": (
        machine(memory=(memory(8 * GIB, used=2 * GIB, reclaimable=GIB),)),
        Request(memory_per_worker=2 * GIB),
        3,
        "memory.max",
    ),
    "memory that the kernel can take back is free": (
        machine(memory=(memory(8 * GIB, used=3 * GIB, reclaimable=2 * GIB),)),
        Request(memory_per_worker=GIB),
        7,
        "memory.max",
    ),
    "memory of which nothing is known to be used": (
        machine(memory=(memory(4 * GIB, None, None),)),
        Request(memory_per_worker=GIB),
        4,
        "memory.max",
    ),
    "memory of which one byte is used": (
        machine(memory=(memory(2 * GIB, used=1, reclaimable=None),)),
        Request(memory_per_worker=GIB),
        1,
        "memory.max",
    ),
    "memory for none": (
        machine(memory=(memory(GIB, used=GIB),)),
        Request(memory_per_worker=2 * GIB),
        1,
        "memory.max",
    ),
    "memory is not asked for": (machine(memory=(memory(1),)), Request(), 8, "sched_getaffinity"),
    "memory without a ceiling": (
        machine(memory=(memory(None, None, None),)),
        Request(memory_per_worker=GIB),
        8,
        "sched_getaffinity",
    ),
    "room for few processes": (machine(pids=(pids(40, 16),)), Request(), 4, "pids.max"),
    "room for few processes and some threads": (
        machine(pids=(pids(30, 0),)),
        Request(),
        5,
        "pids.max",
    ),
    "room for as many processes as CPUs": (
        machine(pids=(pids(40, None),)),
        Request(),
        8,
        "sched_getaffinity",
    ),
    "room for no process": (machine(pids=(pids(10, 10),)), Request(), 1, "pids.max"),
    "room for many processes": (
        machine(pids=(pids(10_000), pids(None))),
        Request(),
        8,
        "sched_getaffinity",
    ),
    "few descriptors": (machine(open_files=files(64, 12)), Request(), 5, "RLIMIT_NOFILE"),
    "descriptors that are no whole number of workers": (
        machine(open_files=files(66, 12)),
        Request(),
        5,
        "RLIMIT_NOFILE",
    ),
    "descriptors for as many as CPUs": (
        machine(open_files=files(64, None)),
        Request(),
        8,
        "sched_getaffinity",
    ),
    "descriptors without a ceiling": (
        machine(open_files=files(None, None)),
        Request(),
        8,
        "sched_getaffinity",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_workers_and_what_decided(case: str) -> None:
    limits, request, workers, source = CASES[case]
    budget = fit(limits, request)

    assert (budget.workers, budget.because.source) == (workers, source)


# One row per limit and rounding: what is left over, in CPUs.
DROPPED = {
    (2.5, "floor"): 0.5,
    (2.5, "ceil"): 0.0,
    (3.0, "floor"): 0.0,
    (1.5, "floor"): 0.5,
    (0.5, "floor"): 0.0,
}


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_what_rounding_drops_is_told(case: tuple[float, Any]) -> None:
    cpus, rounding = case
    assert fit(machine(cpus), Request(rounding=rounding)).dropped_cpus == DROPPED[case]


def test_auto_threads_share_the_limit_among_the_workers() -> None:
    budget = fit(machine(7.0), Request(max_workers=3, threads_per_worker="auto"))
    assert (budget.workers, budget.threads_per_worker) == (3, 2)

    budget = fit(machine(7.0), Request(max_workers=2, threads_per_worker="auto", reserve=2.0))
    assert (budget.workers, budget.threads_per_worker) == (2, 2)

    budget = fit(machine(7.0), Request(threads_per_worker="auto"))
    assert (budget.workers, budget.threads_per_worker) == (7, 1)

    budget = fit(machine(2.0), Request(max_workers=5, threads_per_worker="auto"))
    assert (budget.workers, budget.threads_per_worker) == (5, 1)


def test_the_callers_numbers_are_taken_as_they_are() -> None:
    budget = fit(machine(2.0), Request(max_workers=5, threads_per_worker=3))

    assert budget == Budget(
        workers=5,
        threads_per_worker=3,
        cpus=2.0,
        because=Limit(name="max_workers", cpus=5.0, source="the max_workers= argument", raw="5"),
    )


# One row per argument that makes no sense.
REFUSED: dict[str, dict[str, Any]] = {
    "max_workers": {"max_workers": 0},
    "threads_per_worker": {"threads_per_worker": 0},
    "threads_per_worker must be": {"threads_per_worker": "many"},
    'rounding must be "floor", "nearest" or "ceil"': {"rounding": "up"},
    "reserve": {"reserve": -0.1},
    "reserve must": {"reserve": float("nan")},
    "memory_per_worker": {"memory_per_worker": 0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_requests_without_sense_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Request(**REFUSED[words])


@given(
    st.lists(st.one_of(st.none(), st.floats(0.001, 512)), max_size=4),
    st.integers(1, 256),
    st.integers(1, 8),
    st.floats(0, 3),
    st.one_of(st.none(), st.integers(0, 10_000)),
)
def test_workers_times_threads_never_exceed_the_limit(
    quotas: list[float | None], affinity: int, threads: int, reserve: float, tasks: int | None
) -> None:
    """The product's promise, but for the minimum of one worker and the 1 % of the snap."""
    limits = machine(*quotas, affinity=float(affinity), pids=(pids(tasks),))
    budget = fit(limits, Request(threads_per_worker=threads, reserve=reserve))

    assert budget.workers >= 1
    assert budget.dropped_cpus >= 0
    if budget.workers > 1:
        assert budget.workers * threads * 0.99 <= budget.cpus
        assert budget.workers * threads <= affinity
        assert tasks is None or budget.workers * (threads + 1) < tasks


# One row per way to write a size.
SIZES: dict[int | str, int] = {
    1: 1,
    "1": 1,
    "512B": 512,
    "2GiB": 2 * GIB,
    " 2 GiB ": 2 * GIB,
    "2Gi": 2 * GIB,
    "1.5GB": 1_500_000_000,
    "10kB": 10_000,
    "10KB": 10_000,
    "4KiB": 4096,
    "1T": 10**12,
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int | str) -> None:
    assert parse_bytes(size) == SIZES[size]


@pytest.mark.parametrize("size", ["", "GiB", "-1", "2 GiBs", "1e9", "two", 0, -5, "0.1", "2 gib"])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_bytes(size)


# One row per second in a pool's life: ran, waited, idle; and whether something holds it back.
SECONDS = {
    "busy": ((2.0, 0.0, 0.0), False),
    "an ordinary delay": ((1.9, 0.1, 0.1), False),
    "others use the CPUs": ((1.0, 1.0, 0.0), False),
    "a delay of just below a quarter": ((1.0, 0.3, 1.0), False),
    "just half of the waiting was needless": ((1.0, 1.0, 0.5), True),
    "less than half of it": ((2.0, 2.0, 0.5), False),
    "idle tasks": ((0.0, 0.0, 2.0), False),
    "half a CPU each, others idle": ((1.0, 1.0, 1.0), True),
    "a tenth of a CPU": ((0.1, 0.9, 1.9), True),
}


@pytest.mark.parametrize("second", SECONDS)
def test_what_counts_as_held_back(second: str) -> None:
    (ran, waited, idle), expected = SECONDS[second]
    assert is_held_back(WaitSample(ran_s=ran, waited_s=waited, idle_s=idle)) is expected
