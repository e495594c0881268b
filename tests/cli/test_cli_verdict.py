"""The verdict: each finding from data, and the closed table of their codes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safepool.budget import fit
from safepool.cli.verdict import CODES, judge
from safepool.limits import Limit, Limits, MemoryLimit, PidsLimit, Skipped, Throttling

FOUR = Limits(
    affinity=Limit(name="affinity", cpus=4.0, source="sched_getaffinity", raw="0-3"), quotas=()
)
FULL = MemoryLimit(
    name="memory.max",
    bytes=1000,
    used_bytes=950,
    reclaimable_bytes=0,
    source="memory.max",
    raw="1000",
)


def frozen(throttled: int, periods: int) -> Throttling:
    return Throttling(
        periods=periods, throttled_periods=throttled, throttled_us=1, source="cpu.stat"
    )


# One row per case: the limits, the sample, the standard pool's workers and a native pool's
# threads in each, and what must be found.
CASES: dict[str, tuple[Limits, Throttling | None, int | None, int, list[str]]] = {
    "nothing": (FOUR, None, 4, 1, []),
    "a group that did not run": (FOUR, frozen(0, 0), 4, 1, []),
    "one burst": (FOUR, frozen(1, 30), 4, 1, []),
    "frozen": (FOUR, frozen(3, 30), 4, 1, ["throttled"]),
    "one burst in a short while": (FOUR, frozen(1, 3), 4, 1, []),
    "frozen twice in a few": (FOUR, frozen(2, 3), 4, 1, ["throttled"]),
    "memory": (replace(FOUR, memory=(FULL,)), None, 4, 1, ["memory-nearly-full"]),
    "memory to be had back": (
        replace(FOUR, memory=(replace(FULL, reclaimable_bytes=500),)), None, 4, 1, [],
    ),
    "no memory limit": (replace(FOUR, memory=(replace(FULL, bytes=None),)), None, 4, 1, []),
    "a bad variable": (
        replace(FOUR, skipped=(Skipped(source="NSLOTS", reason="x", was_set=True),)),
        None, 4, 1, ["variable-ignored"],
    ),
    "an unreadable file": (
        replace(FOUR, skipped=(Skipped(source="cpu.max", reason="x"),)), None, 4, 1, [],
    ),
    "processes": (
        replace(
            FOUR,
            pids=(PidsLimit(name="pids.max", tasks=20, used_tasks=8, source="p", raw="20"),),
        ),
        None, 4, 1, ["no-room"],
    ),
    "too many workers": (FOUR, None, 48, 1, ["oversubscribed"]),
    "too many threads": (FOUR, None, 4, 48, ["oversubscribed"]),
    "too many threads of another process": (FOUR, None, None, 48, ["oversubscribed"]),
    "both multiply": (FOUR, None, 4, 4, ["threads-multiply"]),
    "all at once": (
        replace(FOUR, memory=(FULL,)), frozen(9, 10), 48, 48,
        ["throttled", "memory-nearly-full", "oversubscribed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_found(case: str) -> None:
    limits, sample, workers, threads, expected = CASES[case]

    found = judge(
        limits, fit(limits), sample=sample, standard_workers=workers, native_threads=threads
    )

    assert [finding.code for finding in found] == expected
    for finding in found:
        assert finding.problem == (finding.code != "threads-multiply")
        assert finding.remedy


# One row per set of what exceeds four CPUs: standard workers, joblib's, native threads, and
# whether the standard pool reads a variable; what is said, and the remedy.
TOO_MANY: dict[str, tuple[int, int, int, bool, str, str]] = {
    "standard": (8, 4, 1, True, "ProcessPoolExecutor() starts 8 workers", "ProcessPool(), or"),
    "standard, without a variable": (
        8, 4, 1, False, "ProcessPoolExecutor() starts 8 workers", "run --patch -- COMMAND",
    ),
    "joblib": (4, 8, 1, True, "joblib (n_jobs=-1) starts 8 workers", "parallel_backend(), or"),
    "native": (4, 4, 8, False, "A native thread pool (NumPy's) has 8 threads", "run -- COMMAND"),
    "all": (
        8, 6, 5, True,
        "ProcessPoolExecutor() starts 8 workers, joblib (n_jobs=-1) 6 workers and a native",
        "ProcessPool(), or",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_MANY)
def test_what_exceeds_the_cpus_is_one_sentence(case: str) -> None:
    standard, joblib, native, reads, text, remedy = TOO_MANY[case]

    (found,) = judge(
        FOUR,
        fit(FOUR),
        sample=None,
        standard_workers=standard,
        joblib_workers=joblib,
        native_threads=native,
        standard_reads_variable=reads,
    )

    assert found.code == "oversubscribed"
    assert found.text.startswith(text)
    assert found.text.endswith(", for 4 CPUs (affinity)")
    assert remedy in found.remedy


def test_every_code_is_found_by_a_case_and_documented() -> None:
    assert {code for *_, codes in CASES.values() for code in codes} == set(CODES)
