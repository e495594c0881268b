"""Floor 7: measurements of the demo in a table, in one sentence, and as JSON.

The module starts and reads nothing. The measurements choose the sentence. If nothing was
oversubscribed, the sentence says that nothing can be gained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from safepool.cli.colour import Paint, plain
from safepool.cli.text import as_ascii, counted, json_of, wrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.limits import Limit, Throttling

POOLS = {"standard": "ProcessPoolExecutor()", "safepool": "safepool.ProcessPool()"}
"""The two halves of the demo, in their order: name for the child, and for people."""

WORTH_IT = 1.1
"""A smaller ratio is within what two runs of the same pool differ by."""

_COLUMNS = {
    "pool": "<22",
    "workers": ">7",
    "threads": ">7",
    "seconds": ">7",
    "tasks": ">7",
    "throttled": ">9",
    "ratio": ">8",
}


@dataclass(slots=True, kw_only=True)
class Half:
    """Measurements of one pool on the batch; ``schemas/demo.json`` describes the fields."""

    pool: str
    start_method: str | None = None
    workers: int | None = None
    threads: int | None = None
    seconds: float | None = None
    tasks_done: int = 0
    cut_off: bool = False
    error: str | None = None
    throttling: Throttling | None = None

    @property
    def crew(self) -> str:
        """The pool in words, with its counted numbers."""
        if self.workers is None:
            return self.pool
        threads = "" if self.threads is None else f"{counted(self.threads, 'thread')} in "
        return f"{self.pool} with {threads}{counted(self.workers, 'worker')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of the results of both halves; ``schemas/demo.json`` describes the fields."""

    compared: int = 0
    equal: bool = True
    largest_difference: float | None = None
    # Small enough to show any wrong result, and large enough for a sum in another order: with one
    # and with several BLAS threads these tasks differ by less than 1e-12 at up to 1,200 points.
    rtol: float = 1e-9
    atol: float = 1e-9


@dataclass(slots=True, kw_only=True)
class Report:
    """Conditions of both halves, and everything that the demo measured.

    ``schemas/demo.json`` describes the fields.
    """

    tasks: int
    points: int
    cpus_asked: float | None = None
    bound_s: float
    versions: Mapping[str, str]
    pretend_host_cpus: int | None = None
    machine_cpus: int
    limit: Limit
    no_group: str | None = None
    standard: Half = field(default_factory=lambda: Half(pool=POOLS["standard"]))
    safepool: Half = field(default_factory=lambda: Half(pool=POOLS["safepool"]))
    comparison: Comparison = field(default_factory=Comparison)

    @property
    def cpus(self) -> float:
        """The CPUs that the kernel will give to one half."""
        return self.machine_cpus if self.limit.cpus is None else self.limit.cpus

    @property
    def where(self) -> str:
        """The CPUs in words, as in "on 1 CPU"."""
        pretended = self.pretend_host_cpus
        of = "" if pretended is None else f" of a pretended {pretended}"
        return counted(self.cpus, "CPU") + of

    @property
    def failed(self) -> bool:
        """Safepool's half did not end, or the results differ."""
        return self.safepool.seconds is None or self.safepool.cut_off or not self.comparison.equal

    @property
    def ratio(self) -> float | None:
        """The standard pool's seconds divided by safepool's; a lower bound after a cut-off."""
        if self.standard.seconds is None or not self.safepool.seconds or self.safepool.cut_off:
            return None
        return self.standard.seconds / self.safepool.seconds

    @property
    def oversubscribed(self) -> bool | None:
        """Whether the standard pool had more threads than CPUs; ``None`` if not counted."""
        threads = self.standard.threads
        return None if threads is None else threads > self.cpus

    @property
    def nothing_to_win(self) -> bool:
        """Whether nothing was oversubscribed, or oversubscription made no difference."""
        if self.failed or self.standard.cut_off or self.ratio is None:
            return False
        return self.oversubscribed is False or self.ratio < WORTH_IT

    def opening_lines(self) -> list[str]:
        """Return the lines above the table, and its head."""
        limit, seen = self.limit, self.pretend_host_cpus or self.machine_cpus
        work = "SciPy interpolation and NumPy linear algebra"
        lines = [
            f"{self.tasks} tasks of {work}, {self.points} points each",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"limit: {counted(self.cpus, 'CPU')} of {seen}, {limit.name} says {limit.raw!a}",
            f"       {as_ascii(limit.source)}",
        ]
        if self.pretend_host_cpus is not None:
            lines.append(
                f"pretended: Python and native libraries see {counted(seen, 'CPU')}; this machine "
                f"has {self.machine_cpus}"
            )
        if self.no_group is not None:
            lines.append(f"--cpus {self.cpus_asked:g} has no effect: {as_ascii(self.no_group)}")
        head = "  ".join(f"{name:{width}}" for name, width in _COLUMNS.items())
        return [*lines, "", head.rstrip()]

    def row(self, half: Half, paint: Paint = plain) -> str:
        """Return one half's line of the table."""
        ratio = self.ratio if half is self.safepool else None
        cells = (
            half.pool,
            "-" if half.workers is None else str(half.workers),
            "-" if half.threads is None else str(half.threads),
            "failed" if half.seconds is None else f"{half.seconds:.2f}",
            f"{half.tasks_done}/{self.tasks}",
            "-" if half.throttling is None else f"{half.throttling.throttled_us / 1e6:.2f} s",
            "" if ratio is None else f"{'> ' if self.standard.cut_off else ''}{ratio:.1f} x",
        )
        columns = zip(cells, _COLUMNS.values(), strict=True)
        *others, last = (f"{cell:{width}}" for cell, width in columns)
        if ratio is not None and ratio >= WORTH_IT:
            last = last.replace(cells[-1], paint(cells[-1], "good"))
        return "  ".join([*others, last]).rstrip()

    def closing_lines(self, paint: Paint = plain) -> list[str]:
        """Return the lines below the table."""
        lines = [
            f"{half.pool}: cut off after {half.seconds:g} s, {half.tasks_done} of {self.tasks} "
            "tasks"
            for half in (self.standard, self.safepool)
            if half.cut_off
        ]
        if self.safepool.threads is None and self.safepool.workers is not None:
            lines.append("threads: not counted (only Linux lists them for other processes)")
        found, results = self.comparison, "none to compare"
        if found.compared:
            results = (
                f"{found.compared} compared, {'equal' if found.equal else 'DIFFERENT'} "
                f"(difference {found.largest_difference:.1g}, rtol {found.rtol:g}, "
                f"atol {found.atol:g})"
            )
        verdict = wrapped(as_ascii(self.verdict()), 0)
        if not self.nothing_to_win:
            verdict = [paint(line, "problem" if self.failed else "good") for line in verdict]
        return ["", *lines, f"results: {results}", "", *verdict]

    def verdict(self) -> str:  # noqa: PLR0911 -- a table
        """Return the meaning of the numbers in one or two sentences."""
        standard, ours, found = self.standard, self.safepool, self.comparison
        if ours.error is not None:
            return f"The comparison failed: {ours.pool} ended: {ours.error}"
        if not found.equal:
            return (
                "The comparison failed: the results of the two pools differ by up to "
                f"{found.largest_difference:.1g}."
            )
        if ours.cut_off:
            return (
                f"No comparison: {ours.pool} was cut off too. Give both more time with "
                "--bound, or less work with --tasks."
            )
        if standard.error is not None:
            return f"{standard.pool} failed: {standard.error}; {ours.crew} did all tasks."
        if self.nothing_to_win:
            return f"No gain here: {self._why_nothing()}"
        if standard.cut_off:
            return (
                f"On {self.where}, {standard.crew} did {standard.tasks_done} of {self.tasks} "
                f"tasks in {standard.seconds:g} s; {ours.crew} did all of them in "
                f"{ours.seconds:.2f} s."
            )
        times = f"{self.ratio or 0.0:.1f} times as long as"
        return f"On {self.where}, {standard.crew} took {times} {ours.crew}."

    def _why_nothing(self) -> str:
        standard, ours = self.standard, self.safepool
        if self.oversubscribed is False:
            threads = counted(standard.threads or 0, "thread")
            said = f"the standard pool's {threads} fit {counted(self.cpus, 'CPU')}."
        else:
            said = (
                f"{standard.pool} took {standard.seconds:.2f} s, {ours.pool} {ours.seconds:.2f} s."
            )
        if self.cpus <= 1:
            return said
        known = standard.workers  # None where the system shows no processes
        workers = "workers" if known is None else counted(known, "worker")
        return (
            f"{said} 'safepool demo --cpus 1' shows what happens when the same {workers} of the "
            "standard pool may use one CPU, as in a container (on Linux, as root)."
        )

    def as_json(self) -> str:
        """Return the report as one JSON object."""
        derived = ("ratio", "oversubscribed", "nothing_to_win", "failed")
        return json_of(
            {
                **asdict(self),
                **{name: getattr(self, name) for name in derived},
                "ratio_is_lower_bound": self.standard.cut_off,
                "verdict": self.verdict(),
            }
        )
