"""Floor 7: problems in the limits, in one sentence each. The module reads nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safepool.cli.text import counted
from safepool.limits import Limit, Limits, Throttling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.budget import Budget

# A single throttled period is no problem; one in ten slows the program down.
_FEWEST_THROTTLED = 2
_THROTTLED_SHARE = 0.1
_MEMORY_SHARE = 0.9

_USE_SAFEPOOL = "use safepool.ProcessPool(), or start the program with: safepool run -- COMMAND"
_USE_PATCH = (
    "use safepool.ProcessPool(), or start the program with: safepool run --patch -- COMMAND"
)
_USE_BACKEND = (
    "use safepool.parallel_backend(), or start the program with: safepool run -- COMMAND"
)

CODES = {
    "throttled": "the kernel freezes the group in a tenth of the sample's periods or more",
    "memory-nearly-full": "nine tenths of a memory limit are used and cannot be reclaimed",
    "variable-ignored": "a variable that should set a limit has no number in it",
    "no-room": "processes, memory or open files leave room for fewer workers than CPUs",
    "oversubscribed": "a pool that knows no limit, or one native thread pool, exceeds the CPUs",
    "threads-multiply": "no problem by itself: workers times native threads exceed the CPUs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem or advice; ``schemas/limits.json`` describes the fields."""

    code: str
    problem: bool
    text: str
    remedy: str


def judge(
    limits: Limits,
    budget: Budget,
    *,
    sample: Throttling | None,
    standard_workers: int | None,
    native_threads: int,
    standard_reads_variable: bool = True,
    joblib_workers: int | None = None,
) -> tuple[Finding, ...]:
    """Return the findings, the most pressing first; none if there is nothing to do.

    The arguments are those of ``limits_screen.Screen``. A number of workers that is ``None`` is
    left out.

    Example:
        >>> from safepool.budget import fit
        >>> from safepool.limits import Limits
        >>> cpus = Limit(name="affinity", cpus=1.0, source="sched_getaffinity", raw="0")
        >>> one = Limits(affinity=cpus, quotas=())
        >>> judge(one, fit(one), sample=None, standard_workers=1, native_threads=1)
        ()
        >>> judge(one, fit(one), sample=None, standard_workers=8, native_threads=1)[0].code
        'oversubscribed'
    """
    return (
        *_throttled(budget, sample),
        *_memory(limits),
        *_ignored(limits),
        *_no_room(budget),
        *_oversubscribed(
            limits,
            budget,
            standard_workers,
            native_threads,
            reads_variable=standard_reads_variable,
            joblib_workers=joblib_workers or 0,
        ),
    )


def _throttled(budget: Budget, sample: Throttling | None) -> Iterator[Finding]:
    if sample is None or sample.periods <= 0:
        return
    if sample.throttled_periods >= max(_FEWEST_THROTTLED, _THROTTLED_SHARE * sample.periods):
        yield Finding(
            code="throttled",
            problem=True,
            text=f"The kernel froze the group in {sample.throttled_periods} of "
            f"{counted(sample.periods, 'period')} just now: its threads need more than "
            f"{counted(budget.cpus, 'CPU')}",
            remedy=_USE_SAFEPOOL,
        )


def _memory(limits: Limits) -> Iterator[Finding]:
    for memory in limits.memory:
        if memory.bytes and memory.used_bytes is not None:
            share = (memory.used_bytes - (memory.reclaimable_bytes or 0)) / memory.bytes
            if share >= _MEMORY_SHARE:
                yield Finding(
                    code="memory-nearly-full",
                    problem=True,
                    text=f"{share:.0%} of {memory.name} are used ({memory.source}): the kernel "
                    "kills a process when it is full",
                    remedy="raise the limit, or start fewer workers: "
                    "ProcessPool(memory_per_worker=...)",
                )
                return


def _ignored(limits: Limits) -> Iterator[Finding]:
    for skipped in limits.skipped:
        if skipped.was_set:
            yield Finding(
                code="variable-ignored",
                problem=True,
                text=f"{skipped.source} is ignored: {skipped.reason}",
                remedy="set it to a whole number, or unset it",
            )


def _no_room(budget: Budget) -> Iterator[Finding]:
    why = budget.because
    if not isinstance(why, Limit):
        yield Finding(
            code="no-room",
            problem=True,
            text=f"{why.name} ({why.raw} in {why.source}) has room for "
            f"{counted(budget.workers, 'worker')} on {counted(budget.cpus, 'CPU')}",
            remedy="raise that limit, or end programs that use it up",
        )


def _oversubscribed(
    limits: Limits,
    budget: Budget,
    standard_workers: int | None,
    native_threads: int,
    *,
    reads_variable: bool,
    joblib_workers: int,
) -> Iterator[Finding]:
    most = math.ceil(budget.cpus)
    cpus = f"{counted(budget.cpus, 'CPU')} ({limits.binding.name})"
    # Subject, verb, and number. Only the first subject gets its verb.
    too_many: list[tuple[str, str, str]] = []
    remedy = _USE_SAFEPOOL
    if standard_workers is not None and standard_workers > most:
        too_many.append(("ProcessPoolExecutor()", "starts", counted(standard_workers, "worker")))
        remedy = _USE_SAFEPOOL if reads_variable else _USE_PATCH
    if joblib_workers > most:
        remedy = remedy if too_many else _USE_BACKEND
        too_many.append(("joblib (n_jobs=-1)", "starts", counted(joblib_workers, "worker")))
    if native_threads > most:
        threads = f"{counted(native_threads, 'thread')} in each process"
        article = "a" if too_many else "A"
        too_many.append((f"{article} native thread pool (NumPy's)", "has", threads))
    if too_many:
        (who, does, what), *others = too_many
        told = [f"{who} {does} {what}", *(f"{other} {many}" for other, _, many in others)]
        text = " and ".join([", ".join(told[:-1]), told[-1]] if others else told) + f", for {cpus}"
        yield Finding(code="oversubscribed", problem=True, text=text, remedy=remedy)
    elif standard_workers is not None and standard_workers * native_threads > most:
        yield Finding(
            code="threads-multiply",
            problem=False,
            text=f"Nothing to do, unless workers compute with native libraries: then "
            f"ProcessPoolExecutor() has {standard_workers} x {native_threads} threads for {cpus}",
            remedy=_USE_SAFEPOOL,
        )
