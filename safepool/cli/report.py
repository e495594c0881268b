"""Floor 7: ``safepool report run.json``: how a pool's workers spent their time.

The command reads the file that ``trace=`` of a pool writes, line by line, complete or torn.

Not covered:
    * A pause between short calls that share an event counts as idle, also if a call waited.

Source: Trace Event Format, "Event Descriptions"; ``safepool.pool.tracing.events`` describes the
events.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from safepool.cli.text import WIDTH, CommandError, as_ascii, counted, json_of, wrapped

_SLOWEST = 5
# Exceptions that a damaged line may cause.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
# Larger than any number in a trace: three centuries in microseconds.
_MOST = 1e16
# The command reads a longer line, of another file, in pieces.
_LONGEST_LINE = 16 << 20
# A shorter run is not judged: starting workers, with their imports, takes up to a second.
_LEAST_S = 2.0
# Rounding error of adding and dividing times.
_ROUNDING_S = 1e-5


class ReportError(CommandError):
    """A file cannot be reported on."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"cannot report on {as_ascii(path)}: {reason}. Pass a file that "
            "safepool.ProcessPool(trace=) or ClusterPool(trace=) has written"
        )


@dataclass(slots=True)
class Row:
    """Time of one worker, in seconds.

    Attributes:
        lived_s: Seconds between the worker's start and end.
        begin_s: Time at which the present process was started; ``None`` without one.
        end_s: Time at which the worker last had work.
        last: Times at which the calls of the last event were submitted, began and ended.
    """

    node: str = ""
    calls: int = 0
    busy_s: float = 0.0
    starved_s: float = 0.0
    lived_s: float = 0.0
    begin_s: float | None = None
    end_s: float = 0.0
    last: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def idle_s(self) -> float:
        """Seconds in which the worker was idle and no call waited."""
        return max(0.0, self.lived_s - self.busy_s - self.starved_s)

    def start(self, at_s: float) -> None:
        """Note the start of a process. The one before ended with its last event, if not before."""
        self.end(self.end_s)
        self.begin_s = self.end_s = max(at_s, self.end_s)

    def end(self, at_s: float) -> None:
        """Note the end of the process."""
        if self.begin_s is not None:
            self.lived_s += max(at_s, self.end_s) - self.begin_s
        self.begin_s = None

    def as_dict(self) -> dict[str, float | str]:
        """Return the report for programs."""
        node: dict[str, float | str] = {"node": self.node} if self.node else {}
        told: dict[str, float | str] = {
            "calls": self.calls,
            "busy_s": self.busy_s,
            "starved_s": self.starved_s,
            "idle_s": self.idle_s,
        }
        return told | node


@dataclass(slots=True)
class Report:
    """Content of a trace; ``schemas/report.json`` describes the fields."""

    seconds: float = 0.0
    pickling_s: float = 0.0
    throttled_s: float = 0.0
    deaths: int = 0
    broken: str | None = None
    damaged_lines: int = 0
    dropped_events: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    workers: dict[str, Row] = field(default_factory=dict)
    slowest: list[tuple[float, str, str]] = field(default_factory=list)
    # Processes of nodes, by the number that they have in the file.
    nodes: dict[int, str] = field(default_factory=dict)

    def row(self, event: dict[str, Any]) -> Row:
        """Return the row of an event."""
        name = f"worker {int(_number(event['tid']))}"
        return self.workers.setdefault(name, Row(self.nodes.get(event.get("pid", 0), "")))

    def total(self) -> Row:
        """Return the sum over the workers."""
        rows = self.workers.values()
        return Row(
            calls=sum(row.calls for row in rows),
            busy_s=sum(row.busy_s for row in rows),
            starved_s=sum(row.starved_s for row in rows),
            lived_s=sum(row.lived_s for row in rows),
        )

    def tail_s(self) -> float:
        """Return the seconds in which only the last call ran, all other workers being idle.

        0 if the call was submitted after the other workers had finished: an earlier start was
        impossible.
        """
        if len(self.workers) < 2:
            return 0.0
        *_, before, last = sorted(row.last[::-1] for row in self.workers.values())
        (others_s, *_), (end_s, begin_s, asked_s) = before, last
        return end_s - max(begin_s, others_s) if asked_s <= others_s else 0.0

    def conclusion(self) -> str:
        """Return the meaning of the figures in one sentence."""
        total = self.total()
        if not total.calls or not total.lived_s:
            return NOTHING
        return next(said for said, found in CONCLUSIONS.items() if found(self, total))

    def as_text(self) -> str:
        """Return the report for people."""
        total = self.total()
        calls, workers = counted(total.calls, "call"), counted(len(self.workers), "worker")
        lines = [f"{self.seconds:.2f} s, {calls}, {workers}", ""]
        lines.append(f"{'worker':12}{'calls':>10}{'busy s':>10}{'waiting s':>11}{'no work s':>11}")
        for name, row in [*self.workers.items(), ("all", total)]:
            lines.append(
                f"{as_ascii(name)[:12]:12}{row.calls:>10}{row.busy_s:>10.2f}"
                f"{row.starved_s:>11.2f}{row.idle_s:>11.2f}"
            )
        for node in dict.fromkeys(row.node for row in self.workers.values() if row.node):
            rows = [name for name, row in self.workers.items() if row.node == node]
            lines += wrapped(f"{as_ascii(node)}: {', '.join(rows)}", 0)
        lines.append("")
        lines.append(f"pickling {self.pickling_s:.2f} s, throttled {self.throttled_s:.2f} s")
        lines.append(f"deaths {self.deaths}, retries {self.outcomes.get('retried', 0)}")
        if self.broken is not None:
            lines += wrapped(f"the pool broke: {as_ascii(' '.join(self.broken.split()))}", 0)
        if self.damaged_lines:
            lines.append(f"lines that could not be read: {self.damaged_lines}")
        if self.dropped_events:
            lines.append(f"events left out, as the disk was too slow: {self.dropped_events}")
        if self.slowest:
            lines += ["", "longest calls"]
        lines += [
            f"{s:>10.3f} s  {as_ascii(name)[:50]}  {as_ascii(end)}"[:WIDTH]
            for s, name, end in self.slowest
        ]
        return "\n".join([*lines, "", *wrapped(self.conclusion(), 0)])

    def as_json(self) -> str:
        """Return the report for programs."""
        total = self.total()
        told = {
            "seconds": self.seconds,
            **total.as_dict(),
            "pickling_s": self.pickling_s,
            "throttled_s": self.throttled_s,
            "tail_s": self.tail_s(),
            "deaths": self.deaths,
            "retries": self.outcomes.get("retried", 0),
            "outcomes": self.outcomes,
            "workers": {name: row.as_dict() for name, row in self.workers.items()},
            "slowest": [
                {"seconds": seconds, "function": function, "outcome": outcome}
                for seconds, function, outcome in self.slowest
            ],
            "broken": self.broken,
            "damaged_lines": self.damaged_lines,
            "dropped_events": self.dropped_events,
            "conclusion": self.conclusion(),
        }
        return json_of(told)


# The conclusion is the first sentence whose condition, on the report and the sum over its workers,
# is true.
CONCLUSIONS: dict[str, Callable[[Report, Row], bool]] = {
    f"A run of less than {_LEAST_S:g} s is not judged: starting the workers takes much of it.": (
        lambda report, _: report.seconds < _LEAST_S
    ),
    "The kernel froze the group for a part of the time: use fewer workers.": (
        lambda report, _: report.throttled_s > 0.1 * report.seconds
    ),
    "One long call ran last, while other workers were idle: submit the longest calls first.": (
        lambda report, _: report.tail_s() > 0.2 * report.seconds
    ),
    "Calls are too short to keep the workers busy: give each call more work.": (
        lambda _, total: (
            total.starved_s > 0.2 * total.lived_s and total.busy_s < 0.001 * total.calls
        )
    ),
    "Pickling takes much of the time: send less data, or place it once (safepool.share).": (
        lambda report, _: report.pickling_s > 0.3 * report.seconds
    ),
    "The workers were busy: only more workers or faster calls would help.": (
        lambda _, total: total.busy_s >= 0.7 * total.lived_s
    ),
    "The workers had no calls for much of the time: the program submits them too slowly.": (
        lambda _, total: total.starved_s < 0.2 * total.lived_s
    ),
    "The workers were idle although calls were waiting.": lambda _report, _total: True,
}
NOTHING = "No call has ended in this trace."


def run(path: str, *, as_json: bool) -> int:
    """Print the report of a file; return the exit code."""
    report = read(path)
    print(report.as_json() if as_json else report.as_text())
    return 0


def read(path: str) -> Report:
    """Read a trace.

    Raises:
        ReportError: The file does not exist.
    """
    report, known = Report(), False
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(_LONGEST_LINE):
                text = line.strip().strip(",")
                if text in ("", "[", "]"):
                    continue
                try:
                    event = json.loads(text, parse_constant=_refuse)
                    known = known or event["name"] == "safepool"
                    if known:
                        _take(report, event)
                except _DAMAGED:
                    report.damaged_lines += 1
                if not known:
                    break
    except (OSError, ValueError) as error:
        raise ReportError(path, getattr(error, "strerror", None) or str(error)) from None
    if not known:
        raise ReportError(path, "the file is empty, or no trace of a safepool pool")
    report.slowest = sorted(report.slowest, reverse=True)[:_SLOWEST]
    for row in report.workers.values():
        row.end(report.seconds)
    return report


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _number(value: object) -> float:
    """Return a number that was read."""
    if not isinstance(value, (int, float)):
        raise TypeError(value)
    if not 0 <= value < _MOST:
        raise ValueError(value)
    return float(value)


def _take(report: Report, event: dict[str, Any]) -> None:
    """Count an event. A damaged line raises before anything is counted."""
    kind, args, at_s = event["ph"], event["args"], _number(event["ts"]) / 1e6
    took_s = _number(event.get("dur", 0)) / 1e6
    if kind == "C" and event["name"] == "throttled":
        report.throttled_s += _number(args["ms"]) / 1e3
    elif kind == "C" and event["name"] == "dropped events":
        report.dropped_events = max(report.dropped_events, int(_number(args["events"])))
    elif kind == "M":
        if event["name"] == "process_name" and str(args["name"]).startswith("node "):
            report.nodes[event["pid"]] = str(args["name"])
    elif kind == "i" and event["name"] == "break":
        report.broken = str(args["why"])
    elif kind == "i" and event["cat"] == "worker":
        row = report.row(event)
        if event["name"] == "start":
            row.start(at_s)
        else:
            report.deaths += event["name"] == "death"
            row.end(at_s)
    elif kind == "X" and event["cat"] == "task":
        _take_calls(report, event, at_s, took_s)
    elif kind == "X":
        row = report.row(event)
        row.end_s = max(row.end_s, at_s + took_s)
    report.seconds = max(report.seconds, at_s + took_s)


def _take_calls(report: Report, event: dict[str, Any], at_s: float, took_s: float) -> None:
    args, function = event["args"], str(event["name"])
    calls = int(_number(args.get("calls", 1)))
    busy_s = _number(args.get("busy_us", took_s * 1e6)) / 1e6
    waited_s = _number(args.get("waited_us", 0)) / 1e6
    pickling_us = [_number(args.get(f"{name}_us", 0)) for name in ("pickled", "loaded", "packed")]
    outcomes = args.get("outcomes") or {str(args["outcome"]): calls}
    outcomes = {str(name): int(_number(count)) for name, count in outcomes.items()}
    if busy_s > took_s + _ROUNDING_S:
        raise ValueError(event)
    row = report.row(event)
    if at_s < row.end_s - _ROUNDING_S:  # calls of one worker follow each other
        raise ValueError(event)
    if row.begin_s is None:  # the line of its start is lost
        row.start(at_s)
    row.starved_s += max(0.0, min(at_s - row.end_s, waited_s))
    row.calls, row.busy_s, row.end_s = row.calls + calls, row.busy_s + busy_s, at_s + took_s
    row.last = (at_s - waited_s, at_s, row.end_s)
    for name, count in outcomes.items():
        report.outcomes[name] = report.outcomes.get(name, 0) + count
    report.pickling_s += sum(pickling_us) / 1e6
    end = str(args.get("outcome", "several")) if calls == 1 else f"{calls} calls"
    report.slowest.append((took_s, function, end))
    if len(report.slowest) > 100:
        report.slowest = sorted(report.slowest, reverse=True)[:_SLOWEST]
