"""Floor 3: limits and budget of this process now, with warnings of surprising values.

The module joins ``limits`` and ``budget``, and has no rule of its own. Nothing is cached: limits
change while a program runs.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

from safepool.budget import Budget, Request, fit, is_held_back
from safepool.limits import Limit, Limits, QuotaWatch, read_limits
from safepool.limits.waiting import WaitWatch
from safepool.shown import printable

_log = logging.getLogger("safepool")

# A smaller loss by rounding is expected and not logged.
_NOTABLE_CPUS = 0.25
# Samples in a row, a second apart, before the warning: one or two may be a burst of another
# program.
_SAMPLES_HELD_BACK = 3
# Error texts if the program, or the machine, has no descriptor left for reading a limit.
_NO_DESCRIPTOR = {os.strerror(errno.EMFILE), os.strerror(errno.ENFILE)}


def cpu_limit() -> float:
    """Return the CPUs that the kernel will give this process, not rounded.

    Returns:
        CPUs of run time per second of wall time, such as 2.5. The value is the smallest of the
        affinity mask, the quotas of all control groups from this process's own up to the mount
        point, and the upper bounds in the environment. Always above 0.

    Source:
        sched_getaffinity(2); Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max".

    Example:
        >>> cpu_limit() > 0
        True
    """
    return read_budget()[0].cpus


def cpu_count() -> int:
    """Return the number of workers that fit this process's limits.

    Returns:
        :func:`cpu_limit` rounded down, at least 1; fewer where the limits on processes or
        open files have no room for as many. ``SAFEPOOL_MAX_WORKERS`` is returned as it is.

    Source:
        As :func:`cpu_limit`; Linux, Documentation/admin-guide/cgroup-v1/pids.rst; getrlimit(2).

    Example:
        >>> cpu_count() >= 1
        True
    """
    return read_budget()[0].workers


def read_budget(request: Request | None = None) -> tuple[Budget, Limits]:
    """Read the limits and fit the request to them; log once all ignored and rounded values."""
    limits = read_limits()
    for skipped in limits.skipped:
        if skipped.was_set:
            tell_once(f"{skipped.source} is ignored: {skipped.reason}")
    budget = fit(limits, request)
    if not isinstance(budget.because, Limit):
        log_once(
            f"{budget.workers} workers: {budget.because.name} ({budget.because.raw} in "
            f"{budget.because.source}) has no room for more. Raise that limit to start more"
        )
    if budget.dropped_cpus > _NOTABLE_CPUS:
        log_once(
            f"{budget.cpus:g} CPUs ({budget.because.name} in {budget.because.source}) make "
            f"{budget.workers} workers: {budget.dropped_cpus:.2f} CPUs are left to this "
            'process. Pass rounding="ceil" to use them'
        )
    return budget, limits


class BudgetWatch:
    """The budget of a running pool, computed again as its limits change.

    Read in the thread that starts the workers: they start in that thread's control group.

    Args:
        request: The wishes of the pool.
        limits: The limits when the pool was made. Memory, processes and open files are not read
            again: their later use includes the workers.
    """

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request = request
        self._limits = limits
        self._budget = fit(limits, request)
        self._quotas = QuotaWatch()
        self._waiting = WaitWatch()
        self._held_back = 0

    def read(self) -> Budget:
        """Return the budget under the present limits; unchanged if they cannot be read."""
        now = self._quotas.read()
        if any(skipped.reason in _NO_DESCRIPTOR for skipped in now.skipped):
            return self._budget  # a limit that cannot be read is not gone
        self._budget = fit(
            replace(
                self._limits,
                affinity=now.affinity,
                quotas=now.quotas,
                bounds=now.bounds,
                exact_workers=now.exact_workers,
            ),
            self._request,
        )
        return self._budget

    def look_for_hidden_limit(self, pids: Iterable[int], budget: Budget) -> None:
        """Log once if the workers fit the visible limit, but are held back.

        Args:
            pids: The workers that have work.
            budget: The workers, and the limits that they were fitted to.
        """
        sample = self._waiting.sample(pids)
        # If there are more threads than CPUs (another rounding, or the minimum of one worker), the
        # visible limit itself freezes them.
        fits = budget.workers * budget.threads_per_worker <= budget.cpus
        if sample is None or not fits or not is_held_back(sample):
            self._held_back = 0
            return
        self._held_back += 1
        if self._held_back == _SAMPLES_HELD_BACK:
            wanted_s = sample.ran_s + sample.waited_s
            tell_once(
                f"{budget.workers} workers fit the visible limit of {budget.cpus:g} CPUs "
                f"({budget.because.name} in {budget.because.source}) and are still kept "
                f"waiting for {sample.waited_s / wanted_s:.0%} of the time, with idle CPUs "
                "beside them. Either a tighter limit holds that is not visible here, or others in "
                "the same group use up this one. Set max_workers= or SAFEPOOL_MAX_WORKERS to what "
                "they get",
                subject="held back",
            )


_told: set[str] = set()
_thread = threading.local()


def handlers_by(run: Callable[[Callable[[], None]], None]) -> None:
    """Let ``run`` call the handlers of this thread's warnings and log records.

    Handlers are code of the program, and may wait for this thread.
    """
    _thread.run = run


def has_handlers_elsewhere() -> bool:
    """Return whether :func:`handlers_by` was called in this thread."""
    return getattr(_thread, "run", None) is not None


def call_handlers(call: Callable[[], None]) -> None:
    """Make a call that runs handlers, by the function of :func:`handlers_by` if there is one."""
    run = getattr(_thread, "run", None)
    if run is None:
        call()
    else:
        run(call)


def tell_once(text: str, *, subject: str | None = None) -> None:
    """Warn once in this process; never raise, even if warnings are errors.

    Args:
        text: The warning.
        subject: Subject of warnings whose text varies: only the first one is shown.
    """
    subject = subject or text
    if subject in _told:
        return
    _told.add(subject)
    if has_handlers_elsewhere():
        call_handlers(lambda: _warn(text))
    else:
        _warn(text)


def _warn(text: str) -> None:
    try:
        warnings.warn(printable(text), RuntimeWarning, stacklevel=3)
    except RuntimeWarning:
        # A filter turns warnings into errors. A problem of the machine must not prevent a pool.
        _log.warning("%s", printable(text))


def log_once(text: str) -> None:
    """Log something once in this process."""
    if text not in _told:
        _told.add(text)
        _log.info("%s", printable(text))
