"""Limits in, workers out, with the reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.budget import fit
from safepool.limits import Limit, Limits


def limits(*quotas: float | None, affinity: float | None = 8.0) -> Limits:
    return Limits(
        affinity=Limit(name="affinity", cpus=affinity, source="sched_getaffinity", raw="mask"),
        quotas=tuple(
            Limit(name="cpu.max", cpus=cpus, source=f"level {level}", raw="raw")
            for level, cpus in enumerate(quotas)
        ),
    )


# One row per machine: its limits, the workers that fit, the source that decides.
MACHINES = {
    "no quota": (limits(), 8, "sched_getaffinity"),
    "two and a half CPUs": (limits(2.5), 2, "level 0"),
    "half a CPU": (limits(0.5), 1, "level 0"),
    "a parent is tighter": (limits(4.0, 1.0), 1, "level 1"),
    "a leaf without a ceiling": (limits(None, 3.0), 3, "level 1"),
    "the mask is tighter": (limits(4.0, affinity=2.0), 2, "sched_getaffinity"),
    "just below an integer": (limits(1.99), 2, "level 0"),
    "an odd period": (limits(1.99999), 2, "level 0"),
    "not so near": (limits(1.97), 1, "level 0"),
    "near a large integer": (limits(63.5, affinity=64.0), 64, "level 0"),
    "nothing is known": (limits(affinity=None), 1, "sched_getaffinity"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_workers_of_a_machine(machine: str) -> None:
    found, workers, source = MACHINES[machine]
    budget = fit(found)

    assert (budget.workers, budget.because.source) == (workers, source)


def test_the_callers_number_wins() -> None:
    budget = fit(limits(1.0), max_workers=5)

    assert (budget.workers, budget.because.name, budget.because.raw) == (5, "max_workers", "5")


def test_threads_and_workers_share_the_limit() -> None:
    assert fit(limits(6.0), threads_per_worker=2).workers == 3
    assert fit(limits(1.0), threads_per_worker=2).workers == 1


@pytest.mark.parametrize("argument", ["max_workers", "threads_per_worker"])
def test_numbers_below_one_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        fit(limits(), **{argument: 0})


@given(
    st.lists(st.one_of(st.none(), st.floats(0.001, 512)), max_size=4),
    st.integers(1, 256),
    st.integers(1, 8),
)
def test_workers_times_threads_never_exceed_the_limit(
    quotas: list[float | None], affinity: int, threads: int
) -> None:
    """The product's promise, but for the minimum of one worker and the 1 % of the snap."""
    budget = fit(limits(*quotas, affinity=float(affinity)), threads_per_worker=threads)

    assert budget.workers >= 1
    if budget.workers > 1:
        assert budget.workers * threads * 0.99 <= budget.cpus
        assert budget.workers * threads <= affinity
