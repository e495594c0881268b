"""How every benchmark says what it found: medians, their spread, and ratios first.

A table has a row for each contender and a column for each figure. A ratio is that of two medians
and above 1 where the contender's figure is the larger one. `python -m benchmarks` collects the
tables of a run: it names a file in the variable ``SAFEPOOL_FIGURES``, which gets a line of JSON
for each of them.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["OURS", "VARIABLE", "show", "show_outcomes"]

OURS = "safepool"
VARIABLE = "SAFEPOOL_FIGURES"


def show(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Sequence[float]]],
    *,
    base: str = OURS,
) -> None:
    """Print and keep a table of figures.

    Args:
        title: Question that the table answers.
        columns: Name and unit of each figure.
        rows: Figures of every round, by contender. NaN is one that was not measured.
        base: Contender whose medians the ratios are to.
    """
    cells = {
        name: [_cell(column) for column in zip(*rounds, strict=True)]
        for name, rounds in rows.items()
    }
    for row in cells.values():
        for cell, ours in zip(row, cells[base], strict=True):
            cell["ratio"] = _ratio(cell["median"], ours["median"])
    width = max(22, *(len(name) + 2 for name in rows))
    print(f"\n{title}\n{'':{width}}" + "".join(f"{column:>20}{'':11}" for column in columns))
    for name, row in sorted(cells.items(), key=lambda item: _order(item[1][0]["median"])):
        print(f"{name:{width}}" + "".join(map(_shown, row)), flush=True)
    _keep(
        {
            "title": title,
            "base": base,
            "columns": list(columns),
            "rows": {
                name: [{key: _finite(value) for key, value in cell.items()} for cell in row]
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


def _cell(figures: Sequence[float]) -> dict[str, float]:
    known = [figure for figure in figures if not math.isnan(figure)]
    if not known:
        return dict.fromkeys(("median", "low", "high"), math.nan)
    return {"median": statistics.median(known), "low": min(known), "high": max(known)}


def _ratio(figure: float, base: float) -> float:
    return figure / base if base else math.nan


def _order(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure


def _shown(cell: Mapping[str, float]) -> str:
    if math.isnan(cell["median"]):
        return f"{'-':>20}{'':11}"
    spread = f"({_short(cell['low'])}-{_short(cell['high'])})"
    return f"{cell['ratio']:>8.2f} x{_short(cell['median']):>8} {spread:<12}"


def _short(figure: float) -> str:
    if math.isinf(figure):
        return "never"
    digits = 0 if abs(figure) >= 100 else 1 if abs(figure) >= 10 else 2 if abs(figure) >= 1 else 3
    return f"{figure:.{digits}f}"


def _finite(figure: float) -> float | str | None:
    """Return what JSON has for it: RFC 8259 has neither NaN nor infinity."""
    if math.isnan(figure):
        return None
    return "never" if math.isinf(figure) else figure


def _keep(found: dict[str, Any]) -> None:
    sys.stdout.flush()
    if path := os.environ.get(VARIABLE):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
