"""Floor 7: ``safepool report run.json``: what a pool's workers did with their time.

It reads the file that ``ProcessPool(trace=)`` writes, line by line, whole or torn off anywhere.
``--json`` prints one object: seconds, calls, busy_s, starved_s (idle while a call waited), idle_s,
pickling_s, throttled_s, deaths, retries, damaged_lines, workers, slowest, conclusion.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from safepool.cli.text import as_ascii, wrapped
from safepool.errors import SafepoolError

__all__ = ["Report", "ReportError", "Row", "read", "run"]

_SLOWEST = 5


class ReportError(SafepoolError):
    """A file cannot be reported on.

    Attributes:
        path: Which.
        reason: Why.
        code: The exit code.
    """

    code = 2

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"cannot report on {as_ascii(self.path)}: {self.reason}. Pass a file that "
            "safepool.ProcessPool(trace=) has written"
        )


@dataclass(slots=True)
class Row:
    """One worker's time, in seconds."""

    calls: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0
    lived_s: float = 0.0
    begin_s: float = 0.0
    end_s: float = 0.0


@dataclass(slots=True)
class Report:
    """What a trace says; the module documents the fields."""

    seconds: float = 0.0
    pickling_s: float = 0.0
    throttled_s: float = 0.0
    deaths: int = 0
    damaged_lines: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    workers: dict[str, Row] = field(default_factory=dict)
    slowest: list[tuple[float, str, str]] = field(default_factory=list)

    def total(self) -> Row:
        """Return the sum over the workers."""
        rows = self.workers.values()
        return Row(
            calls=sum(row.calls for row in rows),
            busy_s=sum(row.busy_s for row in rows),
            starved_s=sum(row.starved_s for row in rows),
            lived_s=sum(row.lived_s for row in rows),
        )

    def conclusion(self) -> str:
        """Say in one sentence what follows."""
        total = self.total()
        if not total.calls or not total.lived_s:
            return "No call has ended in this trace."
        busy, starved = total.busy_s / total.lived_s, total.starved_s / total.lived_s
        for found, said in (
            (
                self.throttled_s > 0.1 * self.seconds,
                "The kernel froze the group for a part of the time: fewer workers fit better.",
            ),
            (
                starved > 0.2 and total.busy_s / total.calls < 0.001,
                "Calls are too short to keep the workers busy: let each do more.",
            ),
            (
                self.pickling_s > 0.3 * self.seconds,
                "Pickling takes much of the time: send less, or share it (safepool.share).",
            ),
            (
                busy < 0.7 and starved < 0.2,
                "The workers had nothing to do for much of the time: the program is slower.",
            ),
            (
                busy >= 0.7,
                "The workers were busy: only more of them, or faster calls, would help.",
            ),
        ):
            if found:
                return said
        return "The workers waited for calls that were there already."

    def as_text(self) -> str:
        """Return it for people."""
        total = self.total()
        lines = [f"{self.seconds:.2f} s, {total.calls} calls, {len(self.workers)} workers", ""]
        lines.append(f"{'worker':12}{'calls':>10}{'busy s':>10}{'waiting s':>11}{'no work s':>11}")
        for name, row in [*self.workers.items(), ("all", total)]:
            idle = max(0.0, row.lived_s - row.busy_s - row.starved_s)
            lines.append(
                f"{as_ascii(name)[:12]:12}{row.calls:>10}{row.busy_s:>10.2f}"
                f"{row.starved_s:>11.2f}{idle:>11.2f}"
            )
        lines.append("")
        lines.append(f"pickling {self.pickling_s:.2f} s, throttled {self.throttled_s:.2f} s")
        lines.append(f"deaths {self.deaths}, retries {self.outcomes.get('retried', 0)}")
        if self.damaged_lines:
            lines.append(f"lines that could not be read: {self.damaged_lines}")
        lines += [f"{s:>10.3f} s  {as_ascii(name)[:50]}  {end}" for s, name, end in self.slowest]
        return "\n".join([*lines, "", *wrapped(self.conclusion(), 0)])

    def as_json(self) -> str:
        """Return it for programs."""
        total = self.total()
        told = asdict(self) | {
            "calls": total.calls,
            "busy_s": total.busy_s,
            "starved_s": total.starved_s,
            "idle_s": max(0.0, total.lived_s - total.busy_s - total.starved_s),
            "retries": self.outcomes.get("retried", 0),
            "conclusion": self.conclusion(),
        }
        return json.dumps(told)


def run(path: str, *, as_json: bool) -> int:
    """Print the report of a file; return the exit code."""
    report = read(path)
    print(report.as_json() if as_json else report.as_text())
    return 0


def read(path: str) -> Report:
    """Read a trace.

    Raises:
        ReportError: There is none.
    """
    report, known = Report(), False
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = line.strip().strip(",")
                if text in ("", "[", "]"):
                    continue
                try:
                    event = json.loads(text)
                    known = known or event["name"] == "safepool"
                    if known:
                        _take(report, event)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    report.damaged_lines += 1
                if not known:
                    break
    except (OSError, ValueError) as error:
        raise ReportError(path, getattr(error, "strerror", None) or str(error)) from None
    if not known:
        raise ReportError(path, "it is empty, or no trace of a safepool pool")
    report.slowest = sorted(report.slowest, reverse=True)[:_SLOWEST]
    for row in report.workers.values():
        row.lived_s += max(0.0, report.seconds - row.begin_s) if row.begin_s >= 0 else 0.0
    return report


def _take(report: Report, event: dict[str, Any]) -> None:
    kind, args, at_s = event["ph"], event["args"], float(event["ts"]) / 1e6
    took_s = float(event.get("dur", 0)) / 1e6
    report.seconds = max(report.seconds, at_s + took_s)
    if kind == "C" and event["name"] == "throttled":
        report.throttled_s += float(args["ms"]) / 1e3
    elif kind == "i" and event["cat"] == "worker":
        row = report.workers.setdefault(f"worker {int(event['tid'])}", Row())
        if event["name"] == "start":
            row.begin_s = row.end_s = at_s
        else:
            report.deaths += event["name"] == "death"
            row.lived_s += max(0.0, at_s - row.begin_s)
            row.begin_s = -1.0
    elif kind == "X" and event["cat"] == "task":
        row = report.workers.setdefault(f"worker {int(event['tid'])}", Row())
        calls, busy_s = int(args.get("calls", 1)), float(args.get("busy_us", took_s * 1e6)) / 1e6
        waited_s = float(args.get("waited_us", 0)) / 1e6
        row.starved_s += max(0.0, min(at_s - row.end_s, waited_s))
        row.calls, row.busy_s, row.end_s = row.calls + calls, row.busy_s + busy_s, at_s + took_s
        outcomes = args.get("outcomes") or {str(args["outcome"]): calls}
        for name, count in outcomes.items():
            report.outcomes[name] = report.outcomes.get(name, 0) + int(count)
        for name in ("pickled_us", "loaded_us", "packed_us"):
            report.pickling_s += float(args.get(name, 0)) / 1e6
        end = str(args.get("outcome", "several")) if calls == 1 else f"{calls} calls"
        report.slowest.append((took_s, str(event["name"]), end))
        if len(report.slowest) > 100:
            report.slowest = sorted(report.slowest, reverse=True)[:_SLOWEST]
    elif kind == "X":
        row = report.workers.setdefault(f"worker {int(event['tid'])}", Row())
        row.end_s = at_s + took_s
