"""Floor 7: what the demo measured, in a table, in one sentence, and as JSON.

It starts and reads nothing. The sentence is chosen by what was measured; where nothing was
oversubscribed, it says that there is nothing to win.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from safepool.cli.colour import plain
from safepool.cli.text import as_ascii, counted, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.cli.colour import Paint
    from safepool.cli.demo_measure import Half
    from safepool.cli.demo_options import Options
    from safepool.limits import Limit

__all__ = ["ATOL", "RTOL", "WORTH_IT", "Comparison", "Conditions", "Report"]

_SCHEMA = 1
# Tight enough that any wrong result shows, wide enough for a sum in another order: with one
# and with several BLAS threads these tasks differ by less than 1e-12 at up to 1,200 points.
RTOL = 1e-9
ATOL = 1e-9

WORTH_IT = 1.1
"""A smaller ratio is within what two runs of the same pool differ by."""

_COLUMNS = (
    ("pool", "<22"),
    ("workers", ">7"),
    ("threads", ">7"),
    ("seconds", ">7"),
    ("tasks", ">7"),
    ("throttled", ">9"),
    ("ratio", ">8"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions of both halves.

    Attributes:
        options: The parsed command line.
        limit: The ceiling that binds in both halves; its ``cpus`` is ``None`` where none is
            known.
        machine_cpus: CPUs of the machine, whoever may use them.
        no_group: Why there is no quota although one was asked for; ``None`` otherwise.
        versions: Versions of Python and of what the tasks use, by name.
    """

    options: Options
    limit: Limit
    machine_cpus: int
    no_group: str | None
    versions: Mapping[str, str]

    @property
    def cpus(self) -> float:
        """The CPUs that the kernel will give to one half."""
        return self.machine_cpus if self.limit.cpus is None else self.limit.cpus

    @property
    def where(self) -> str:
        """The CPUs in words, as in "on 1 CPU"."""
        pretended = self.options.pretend_host_cpus
        return _cpus(self.cpus) + ("" if pretended is None else f" of a pretended {pretended}")

    def lines(self) -> list[str]:
        """Say it, in lines of text; the table's head is the last one."""
        options, limit = self.options, self.limit
        seen = options.pretend_host_cpus or self.machine_cpus
        work = "SciPy interpolation and NumPy linear algebra"
        lines = [
            f"{options.tasks} tasks of {work}, {options.points} points each",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"limit: {_cpus(self.cpus)} of {seen}, {limit.name} says {limit.raw!a}",
            f"       {as_ascii(limit.source)}",
        ]
        if options.pretend_host_cpus is not None:
            lines.append(
                f"pretended: Python and native libraries see {_cpus(seen)}; this machine has "
                f"{self.machine_cpus}"
            )
        if self.no_group is not None:
            lines.append(f"--cpus {options.cpus:g} is left out: {as_ascii(self.no_group)}")
        head = "  ".join(f"{name:{width}}" for name, width in _COLUMNS)
        return [*lines, "", head.rstrip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The results of the two halves, side by side.

    Attributes:
        compared: Tasks that both halves had done.
        equal: ``numpy.allclose(rtol=RTOL, atol=ATOL)`` holds for all of them.
        largest_difference: The largest absolute difference of two numbers; ``None`` if
            nothing was compared.
    """

    compared: int
    equal: bool
    largest_difference: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the demo measured.

    Attributes:
        conditions: The conditions of both halves.
        standard: The half with the standard library's pool.
        safepool: The half with safepool's.
        comparison: Comparison of their results.
    """

    conditions: Conditions
    standard: Half
    safepool: Half
    comparison: Comparison

    @property
    def failed(self) -> bool:
        """Safepool's half did not end, or the results differ."""
        return self.safepool.seconds is None or self.safepool.cut_off or not self.comparison.equal

    @property
    def ratio(self) -> float | None:
        """The standard pool's seconds by safepool's: a lower bound if that was cut off."""
        if self.standard.seconds is None or not self.safepool.seconds or self.safepool.cut_off:
            return None
        return self.standard.seconds / self.safepool.seconds

    @property
    def oversubscribed(self) -> bool | None:
        """Whether the standard pool had more threads than CPUs; ``None`` if not counted."""
        threads = self.standard.threads
        return None if threads is None else threads > self.conditions.cpus

    @property
    def nothing_to_win(self) -> bool:
        """Nothing was oversubscribed, or it made no difference."""
        if self.failed or self.standard.cut_off or self.ratio is None:
            return False
        return self.oversubscribed is False or self.ratio < WORTH_IT

    def row(self, half: Half, paint: Paint = plain) -> str:
        """Return one half's line of the table."""
        ratio = self.ratio if half is self.safepool else None
        row = table_row(half, self.conditions.options.tasks, ratio, bound=self.standard.cut_off)
        if ratio is None or ratio < WORTH_IT:
            return row
        # The last column.
        before, blank, cell = row.rpartition("  ")
        return f"{before}{blank}{paint(cell, 'good')}"

    def verdict(self) -> str:
        """Say in one sentence, or two, what the numbers mean."""
        if self.safepool.error is not None:
            return f"The comparison failed: {self.safepool.pool} ended: {self.safepool.error}"
        if not self.comparison.equal:
            return (
                "The comparison failed: the results of the two pools differ by up to "
                f"{self.comparison.largest_difference:.1g}."
            )
        if self.safepool.cut_off:
            return (
                "Nothing is shown: safepool.ProcessPool() was cut off too. Give both more time "
                "with --bound, or less work with --tasks."
            )
        if self.standard.error is not None:
            return (
                f"{self.standard.pool} did not get through it: {self.standard.error}; "
                f"{_crew(self.safepool)} did."
            )
        if self.nothing_to_win:
            return f"{self._why_nothing()} {self._where_to_look()}".strip()
        return self._win()

    def closing_lines(self, paint: Paint = plain) -> list[str]:
        """Return what stands below the table."""
        tasks = self.conditions.options.tasks
        lines = [
            f"{half.pool}: cut off after {half.seconds:g} s, {half.tasks_done} of {tasks} tasks"
            for half in (self.standard, self.safepool)
            if half.cut_off
        ]
        if self.safepool.threads is None and self.safepool.workers is not None:
            lines.append("threads: not counted (only Linux lists them for other processes)")
        lines.append(f"results: {self._results()}")
        verdict = wrapped(as_ascii(self.verdict()), 0)
        if self.failed or not self.nothing_to_win:
            verdict = [paint(line, "problem" if self.failed else "good") for line in verdict]
        return ["", *lines, "", *verdict]

    def as_json(self) -> str:
        """Return the report as one JSON object; ``safepool.cli.demo`` lists its keys."""
        conditions = self.conditions
        return json.dumps(
            {
                "schema": _SCHEMA,
                "tasks": conditions.options.tasks,
                "points": conditions.options.points,
                "cpus_asked": conditions.options.cpus,
                "bound_s": conditions.options.bound_s,
                "versions": dict(conditions.versions),
                "pretend_host_cpus": conditions.options.pretend_host_cpus,
                "machine_cpus": conditions.machine_cpus,
                "limit": asdict(conditions.limit),
                "no_group": conditions.no_group,
                "standard": asdict(self.standard),
                "safepool": asdict(self.safepool),
                "ratio": self.ratio,
                "ratio_is_lower_bound": self.standard.cut_off,
                "oversubscribed": self.oversubscribed,
                "nothing_to_win": self.nothing_to_win,
                "comparison": {**asdict(self.comparison), "rtol": RTOL, "atol": ATOL},
                "failed": self.failed,
                "verdict": self.verdict(),
            },
            indent=2,
        )

    def _results(self) -> str:
        found = self.comparison
        if not found.compared:
            return "none to compare"
        equal = "equal" if found.equal else "DIFFERENT"
        return (
            f"{found.compared} compared, {equal} (difference "
            f"{found.largest_difference:.1g}, rtol {RTOL:g}, atol {ATOL:g})"
        )

    def _why_nothing(self) -> str:
        if self.oversubscribed is False:
            threads = counted(self.standard.threads or 0, "thread")
            cpus = _cpus(self.conditions.cpus)
            return f"Nothing to win here: the standard pool's {threads} fit {cpus}."
        return (
            f"Nothing to win here: {self.standard.pool} took {self.standard.seconds:.2f} s, "
            f"{self.safepool.pool} {self.safepool.seconds:.2f} s."
        )

    def _where_to_look(self) -> str:
        if self.conditions.cpus <= 1:
            return ""
        known = self.standard.workers  # None where nothing tells of processes
        workers = "workers" if known is None else counted(known, "worker")
        return (
            f"'safepool demo --cpus 1' shows what happens when the same {workers} of the standard "
            "pool may use one CPU, as in a container (it takes root on Linux)."
        )

    def _win(self) -> str:
        cpus = self.conditions.where
        if self.standard.cut_off:
            done = f"{self.standard.tasks_done} of {self.conditions.options.tasks} tasks"
            return (
                f"On {cpus}, {_crew(self.standard)} did {done} in {self.standard.seconds:g} s; "
                f"{_crew(self.safepool)} did all of them in {self.safepool.seconds:.2f} s."
            )
        return (
            f"On {cpus}, {_crew(self.standard)} took {self.ratio or 0.0:.1f} times as long as "
            f"{_crew(self.safepool)}."
        )


def table_row(half: Half, tasks: int, ratio: float | None, *, bound: bool) -> str:
    """Lay one half's numbers out under the head of the table.

    Args:
        half: The measured half.
        tasks: Number of tasks.
        ratio: Text of the last column, if any.
        bound: The ratio is a lower bound.
    """
    cells = (
        half.pool,
        "-" if half.workers is None else str(half.workers),
        "-" if half.threads is None else str(half.threads),
        "failed" if half.seconds is None else f"{half.seconds:.2f}",
        f"{half.tasks_done}/{tasks}",
        "-" if half.throttling is None else f"{half.throttling.throttled_us / 1e6:.2f} s",
        "" if ratio is None else f"{'> ' if bound else ''}{ratio:.1f} x",
    )
    widths = (width for _, width in _COLUMNS)
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _crew(half: Half) -> str:
    if half.workers is None:
        return half.pool
    workers = counted(half.workers, "worker")
    if half.threads is None:
        return f"{half.pool} with {workers}"
    return f"{half.pool} with {counted(half.threads, 'thread')} in {workers}"


def _cpus(cpus: float) -> str:
    return counted(cpus, "CPU")
