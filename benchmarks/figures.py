"""How every benchmark runs its contenders in turns, and says what it found.

A table has a row for each contender and a column for each figure: median, lowest and highest of
the rounds, and before them the ratio to the median of one row. A ratio is above 1 where the
contender's figure is the larger one. `python -m benchmarks` collects the tables of a run: it names
a file in the variable ``SAFEPOOL_FIGURES``, which gets a line of JSON for each of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = [
    "OURS",
    "VARIABLE",
    "TurnEndedError",
    "at_most",
    "compare",
    "show",
    "show_outcomes",
    "show_screen",
]

OURS = "safepool"
VARIABLE = "SAFEPOOL_FIGURES"
# Seconds for one turn of one contender, and for all of its turns in one table.
TURN_S, SHARE_S = 10.0, 6.0
# Seconds for what a turn has started, and ends itself.
MORE_S = 5.0


class TurnEndedError(BaseException):
    """A contender's time was up. No `Exception`: pools catch those."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TurnEndedError` in the block when its time is up. For the main thread.

    It is raised again each second: an event loop, and a pool that closes, may swallow it.
    """
    if sys.platform == "win32":
        yield
        return

    def end(*_: object) -> None:
        raise TurnEndedError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(
    title: str,
    columns: Sequence[str],
    runs: Mapping[str, Callable[[], Sequence[float]]],
    rounds: int,
    *,
    base: str = OURS,
    turn_s: float = TURN_S,
    share_s: float = SHARE_S,
) -> dict[str, list[Sequence[float]]]:
    """Let contenders take turns, and show a table.

    Args:
        title: Question that the table answers.
        columns: Name and unit of each figure.
        runs: One turn of each contender, which returns its figures: the first is infinite if it
            has not ended. One that raises has none in this round, but ours may not.
        rounds: Turns of each, as long as it has time.
        base: Contender whose medians the ratios are to.
        turn_s: Seconds for a turn. A contender that needs more has no further turn.
        share_s: Seconds for the turns of one contender. It has no further turn after them.

    Returns:
        Figures of every round, by contender.
    """
    rows: dict[str, list[Sequence[float]]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for name, run in runs.items():
            if spent[name] > share_s or (rows[name] and rows[name][-1][0] == math.inf):
                continue
            begun = time.monotonic()
            try:
                with at_most(turn_s + MORE_S):
                    rows[name].append(run())
            except TurnEndedError:
                rows[name].append([math.inf, *[math.nan] * (len(columns) - 1)])
            except Exception as error:
                if name == OURS:
                    raise
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                rows[name].append([math.nan] * len(columns))
            spent[name] += time.monotonic() - begun
    if any(rows.values()):
        show(title, columns, rows, base=base, limit_s=turn_s)
    return rows


def show(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Sequence[float]]],
    *,
    base: str = OURS,
    limit_s: float = TURN_S,
) -> None:
    """Print and keep a table of figures.

    Args:
        title: Question that the table answers.
        columns: Name and unit of each figure.
        rows: Figures of every round, by contender. NaN is one that was not measured, infinity one
            of a run that has not ended.
        base: Contender whose medians the ratios are to.
        limit_s: Seconds that a run had.
    """
    not_done = f"not done after {limit_s:g} s"
    cells = {
        name: [_cell(column) for column in zip(*rounds, strict=True)]
        for name, rounds in rows.items()
    }
    for row in cells.values():
        for place, cell in enumerate(row):
            ours = cells[base][place]["median"] if base in cells else math.nan
            cell["ratio"] = _ratio(cell["median"], ours)
    width = max(22, *(len(name) + 2 for name in rows))
    print(f"\n{title}\n{'':{width}}" + "".join(f"{column:>20}{'':11}" for column in columns))
    for name, row in sorted(cells.items(), key=lambda item: _order(item[1][0]["median"])):
        print(f"{name:{width}}" + "".join(_shown(cell, not_done) for cell in row), flush=True)
    _keep(
        {
            "title": title,
            "base": base,
            "columns": list(columns),
            "rounds": {name: len(rounds) for name, rounds in rows.items()},
            "rows": {
                name: [
                    {key: _for_json(value, not_done) for key, value in cell.items()}
                    for cell in row
                ]
                for name, row in cells.items()
            },
        }
    )


def show_outcomes(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print and keep what became of each contender, in words.

    Args:
        title: Question that the table answers.
        columns: Case of each outcome.
        rows: Outcomes by contender.
    """
    width = max(22, *(len(name) + 2 for name in rows))
    widths = [
        max(len(column), *(len(row[place]) for row in rows.values())) + 2
        for place, column in enumerate(columns)
    ]

    def line(first: str, others: Sequence[str]) -> str:
        cells = (f"{text:<{wide}}" for text, wide in zip(others, widths, strict=True))
        return f"{first:{width}}{''.join(cells)}".rstrip()

    print(f"\n{title}\n{line('', columns)}")
    for name, row in rows.items():
        print(line(name, row), flush=True)
    _keep({"title": title, "columns": list(columns), "outcomes": dict(rows)})


def show_screen(command: str, text: str) -> None:
    """Print and keep what a command has printed.

    Args:
        command: As it is shown to a reader.
        text: What it printed.
    """
    print(f"\n$ {command}\n{text}", flush=True)
    _keep({"title": command, "screen": text})


def _cell(figures: Sequence[float]) -> dict[str, float]:
    known = [figure for figure in figures if not math.isnan(figure)]
    if not known:
        return dict.fromkeys(("median", "low", "high"), math.nan)
    return {"median": statistics.median(known), "low": min(known), "high": max(known)}


def _ratio(figure: float, base: float) -> float:
    return figure / base if base and math.isfinite(figure) and math.isfinite(base) else math.nan


def _order(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure


def _shown(cell: Mapping[str, float], not_done: str) -> str:
    if not math.isfinite(cell["median"]):
        return f"{'-' if math.isnan(cell['median']) else not_done:>20}{'':11}"
    spread = f"({_short(cell['low'])}-{_short(cell['high'])})"
    ratio = "-" if math.isnan(cell["ratio"]) else f"{cell['ratio']:.2f} x"
    return f"{ratio:>10}{_short(cell['median']):>8} {spread:<12}"


def _short(figure: float) -> str:
    if math.isinf(figure):
        return "never"
    digits = 0 if abs(figure) >= 100 else 1 if abs(figure) >= 10 else 2 if abs(figure) >= 1 else 3
    return f"{figure:.{digits}f}"


def _for_json(figure: float, not_done: str) -> float | str | None:
    """Return what JSON has for it: RFC 8259 has neither NaN nor infinity."""
    if math.isnan(figure):
        return None
    return not_done if math.isinf(figure) else float(f"{figure:.6g}")


def _keep(found: dict[str, Any]) -> None:
    sys.stdout.flush()
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
