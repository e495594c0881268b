"""Floor 7: what this process may use, who says so, and what follows: text, or JSON.

It reads through ``safepool.limits``, decides through ``safepool.budget``, and shows every
value with its source and raw text. It has no opinion of its own on a limit.

``--json`` prints one object:

    version             of safepool
    limits              every field of ``safepool.Limits``, by name
    because             the limit that decides, with its name, source and raw text
    budget              workers, threads_per_worker, and the other numbers of ``safepool.Budget``
    throttling          periods, throttled_periods, throttled_us, source; null without a quota
    standard_workers    what ``ProcessPoolExecutor()`` starts here
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

import safepool
from safepool.budget import fit
from safepool.cli.text import WIDTH, as_ascii, counted, wrapped
from safepool.limits import read_limits, read_throttling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from safepool.budget import Budget
    from safepool.limits import (
        Limit,
        Limits,
        MemoryLimit,
        OpenFilesLimit,
        PidsLimit,
        SharedMemory,
        Throttling,
    )

    _NamedLimit: TypeAlias = Limit | MemoryLimit | PidsLimit | OpenFilesLimit

__all__ = ["Screen", "read_screen", "run"]

_NAME_WIDTH = 26

# As concurrent/futures/process.py: os.cpu_count() until 3.12, and since 3.13 what the
# affinity mask and PYTHON_CPU_COUNT leave of it.
_standard_count = getattr(os, "process_cpu_count", os.cpu_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """What is shown. Built from a captured machine as well as from this one.

    Attributes:
        limits: Every limit that was read.
        budget: What ``safepool.ProcessPool()`` makes of them.
        throttling: How often the kernel has frozen the group whose quota binds.
        standard_workers: Workers that ``ProcessPoolExecutor()`` starts.
    """

    limits: Limits
    budget: Budget
    throttling: Throttling | None
    standard_workers: int

    def as_text(self) -> str:
        """Return the screen for people: ASCII, one arrow, at the limit that decides."""
        sections = self._sections()
        pointed = self._decisive_row(sections)
        lines = [f"safepool {safepool.__version__}: what this process may use", ""]
        for title, rows in sections.items():
            lines.append(title)
            for row in rows:
                lines += row.lines(arrow=row is pointed)
            if not rows:
                lines.append("   not limited, or not told")
        if self.limits.skipped:
            lines.append("Skipped")
            for skipped in self.limits.skipped:
                lines += [f"   {as_ascii(skipped.source)}", *wrapped(as_ascii(skipped.reason), 6)]
        lines += ["Throttled so far", *self._throttling_lines()]
        lines += ["Budget", *self._budget_lines(pointed)]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return the screen for programs; the module lists the keys."""
        budget = asdict(self.budget)
        because = budget.pop("because")
        return json.dumps(
            {
                "version": safepool.__version__,
                "limits": asdict(self.limits),
                "because": because,
                "budget": budget,
                "throttling": None if self.throttling is None else asdict(self.throttling),
                "standard_workers": self.standard_workers,
            },
            indent=2,
        )

    def _sections(self) -> dict[str, list[_Row]]:
        limits = self.limits
        cpus = (limits.affinity, *limits.quotas, *limits.bounds)
        exact = () if limits.exact_workers is None else (limits.exact_workers,)
        files = () if limits.open_files is None else (limits.open_files,)
        shared = () if limits.shared_memory is None else (limits.shared_memory,)
        return {
            "CPUs": [*(_cpu_row(limit, "CPU") for limit in cpus)]
            + [_cpu_row(limit, "worker") for limit in exact],
            "Memory": [_memory_row(limit) for limit in limits.memory],
            "Processes and threads": [_pids_row(limit) for limit in limits.pids],
            "Open files": [_files_row(limit) for limit in files],
            "Shared memory": [_shared_memory_row(limit) for limit in shared],
        }

    def _decisive_row(self, sections: Mapping[str, list[_Row]]) -> _Row:
        # Two groups may say the same; the first of equals is the one that decides.
        rows = (row for rows in sections.values() for row in rows)
        return next(row for row in rows if row.limit == self.budget.because)

    def _throttling_lines(self) -> list[str]:
        throttling = self.throttling
        if throttling is None:
            return ["   never: no quota, or the kernel does not tell"]
        periods = f"{throttling.throttled_periods} of {throttling.periods} periods"
        return [
            f"   {periods}, {throttling.throttled_us / 1e6:.2f} s in all",
            f"   {as_ascii(throttling.source)}",
        ]

    def _budget_lines(self, because: _Row) -> list[str]:
        budget = self.budget
        decided = (
            f"{counted(budget.workers, 'worker')} x "
            f"{counted(budget.threads_per_worker, 'thread')} "
            f"in safepool.ProcessPool(), because of {because.name}."
        )
        standard = f"ProcessPoolExecutor() starts {counted(self.standard_workers, 'worker')} here."
        return wrapped(f"{decided} {standard}", 3)


def read_screen() -> Screen:
    """Read this process's limits."""
    limits = read_limits()
    return Screen(
        limits=limits,
        budget=fit(limits),
        throttling=read_throttling(),
        standard_workers=_standard_count() or 1,
    )


def run(*, as_json: bool) -> int:
    """Print the limits of this process; always exit code 0."""
    screen = read_screen()
    print(screen.as_json() if as_json else screen.as_text())
    return 0


# eq=False: two groups may have equal limits, and each is a row of its own.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One limit on the screen: its value, then where that was read and what it said."""

    limit: object
    name: str
    value: str
    source: str
    raw: str | None

    def lines(self, *, arrow: bool) -> Iterator[str]:
        yield f"{'->' if arrow else '  '} {self.name:<{_NAME_WIDTH}} {self.value}"
        # The whole source and the whole text, however long: they are what can be looked up.
        parts = [as_ascii(self.source)]
        if self.raw is not None:
            parts.append(f"says {self.raw!a}")
        indent = " " * (_NAME_WIDTH + 4)
        if len(indent) + len(" ".join(parts)) <= WIDTH:
            parts = [" ".join(parts)]
        for part in parts:
            # A long path is worth more in one piece than in its column.
            yield f"{indent if len(indent) + len(part) <= WIDTH else '      '}{part}"


def _row(limit: _NamedLimit, value: str, *notes: str) -> _Row:
    return _Row(
        limit=limit,
        name=limit.name,
        value=_noted(value, notes),
        source=limit.source,
        raw=limit.raw,
    )


def _cpu_row(limit: Limit, noun: str) -> _Row:
    return _row(limit, "no limit" if limit.cpus is None else counted(limit.cpus, noun))


def _memory_row(limit: MemoryLimit) -> _Row:
    notes = []
    if limit.used_bytes is not None:
        notes.append(f"{_size(limit.used_bytes)} used")
    if limit.reclaimable_bytes is not None:
        notes.append(f"{_size(limit.reclaimable_bytes)} reclaimable")
    return _row(limit, "no limit" if limit.bytes is None else _size(limit.bytes), *notes)


def _pids_row(limit: PidsLimit) -> _Row:
    notes = [] if limit.used_tasks is None else [f"{limit.used_tasks} used"]
    return _row(limit, "no limit" if limit.tasks is None else str(limit.tasks), *notes)


def _files_row(limit: OpenFilesLimit) -> _Row:
    notes = [] if limit.used_files is None else [f"{limit.used_files} used"]
    return _row(limit, "no limit" if limit.files is None else str(limit.files), *notes)


def _shared_memory_row(limit: SharedMemory) -> _Row:
    value = _noted(_size(limit.bytes), [f"{_size(limit.free_bytes)} free"])
    return _Row(limit=limit, name="size", value=value, source=limit.source, raw=None)


def _noted(value: str, notes: Sequence[str]) -> str:
    return f"{value} ({', '.join(notes)})" if notes else value


def _size(number: int) -> str:
    size = float(number)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
