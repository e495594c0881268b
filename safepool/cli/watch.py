"""Floor 7: ``--watch``: one line a second about a group's CPU time and how often it is frozen.

A line is ASCII of at most 80 columns, or with ``--json`` one object.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from safepool.cli.colour import Paint, Style, paint_for, plain
from safepool.cli.text import counted, json_of

if TYPE_CHECKING:
    from safepool.limits import Throttling
    from safepool.limits._types import CpuUsage

    if sys.platform == "linux":
        from safepool.limits.process import ProcessView

        View: TypeAlias = ProcessView
    else:
        View: TypeAlias = Any

_BAR = 20
_EVERY_S = 1.0
# Share that counts as used up, within the accuracy of a sample.
_ALL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Events since the line before; ``schemas/watch.json`` describes the fields."""

    seconds: float
    cpus: float
    used_cpus: float | None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled_us: int | None = None

    def as_text(self, paint: Paint = plain) -> str:
        """Return the line for people."""
        if self.used_cpus is None:
            used = f"used {'?':<{_BAR + 2}} ?"
        else:
            share = self.used_cpus / self.cpus
            style: Style = "advice" if share >= _ALL else "good"
            used = f"used {_bar(share, style=style, paint=paint)} {self.used_cpus:.2f}"
        used = f"{used} of {counted(self.cpus, 'CPU')}"
        if self.periods is None or self.throttled_periods is None:
            return used
        share = self.throttled_periods / self.periods if self.periods > 0 else 0.0
        bar = _bar(share, 10, style="problem", paint=paint)
        return f"{used}  frozen {bar} {self.throttled_periods}/{self.periods} periods"

    def as_json(self) -> str:
        """Return the line for programs."""
        return json_of(self, schema=None, indent=None)


def watch(view: View, cpus: float, *, as_json: bool, lines: int | None = None) -> None:
    """Print a line a second until the process has ended, or ``lines`` lines."""
    paint = paint_for(sys.stdout, os.environ)
    before, usage, throttling = time.monotonic(), view.read_usage(), view.read_throttling()
    while lines is None or lines > 0:
        time.sleep(_EVERY_S)
        if view.threads() == 0:
            return
        now, used, frozen = time.monotonic(), view.read_usage(), view.read_throttling()
        line = _between(now - before, cpus, (usage, used), (throttling, frozen))
        # Flushed: the reader of a pipe needs the line now.
        print(line.as_json() if as_json else line.as_text(paint), flush=True)
        before, usage, throttling = now, used, frozen
        lines = None if lines is None else lines - 1


def _between(
    seconds: float,
    cpus: float,
    usage: tuple[CpuUsage | None, CpuUsage | None],
    throttling: tuple[Throttling | None, Throttling | None],
) -> Line:
    earlier, later = usage
    used = None
    if earlier is not None and later is not None and earlier.source == later.source:
        used = round((later.used_us - earlier.used_us) / 1e6 / seconds, 3)
    counts = {}
    before, now = throttling
    if before is not None and now is not None and before.source == now.source:
        counts = asdict(now - before)
        del counts["source"]
    return Line(seconds=round(seconds, 3), cpus=cpus, used_cpus=used, **counts)


def _bar(share: float, width: int = _BAR, *, style: Style = "good", paint: Paint = plain) -> str:
    """Draw a share of 1.

    Example:
        >>> _bar(0.5, 10)
        '[#####.....]'
    """
    full = round(min(1.0, max(0.0, share)) * width)
    return f"[{paint('#' * full, style)}{'.' * (width - full)}]"
