"""Draws a result as bars: the same text for the same result, on any machine.

Written by hand: what matplotlib writes depends on its version, and is ten times as large.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

__all__ = ["as_svg"]

_WIDTH, _LEFT, _RIGHT = 720, 190, 150
_LINE, _BAR = 16, 10
# A table has its title, its column's name, and some air.
_ABOVE, _BELOW = 24, 14
_OURS, _THEIRS, _SPREAD = "#1f77b4", "#bbbbbb", "#555555"


def as_svg(result: dict[str, Any]) -> str | None:
    """Return the picture of the first column of each table; ``None`` if there is none.

    Args:
        result: One of ``benchmarks/results``.
    """
    tables = [table for table in result["tables"] if "rows" in table]
    if not tables:
        return None
    lines: list[str] = []
    top = 30
    for table in tables:
        lines += _table(table, top)
        top += _ABOVE + _LINE * len(table["rows"]) + _BELOW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" '
        f'height="{top}" font-family="sans-serif" font-size="11">'
    )
    back = f'<rect width="{_WIDTH}" height="{top}" fill="#fff"/>'
    question = f'<text x="8" y="18" font-size="13">{escape(result["question"])}</text>'
    return "\n".join([head, back, question, *lines, "</svg>\n"])


def _table(table: dict[str, Any], top: int) -> list[str]:
    cells = {name: row[0] for name, row in table["rows"].items()}
    # The fastest first; those that are not done, and those that were not measured, last.
    names = sorted(cells, key=lambda name: _or_inf(cells[name]["median"]))
    highest = max((c["high"] for c in cells.values() if _is_number(c["high"])), default=0) or 1
    scale = (_WIDTH - _LEFT - _RIGHT) / highest
    title = f"{table['title']}: {table['columns'][0]}"
    lines = [f'<text x="8" y="{top + 14}" font-weight="bold">{escape(title)}</text>']
    for place, name in enumerate(names):
        cell, y = cells[name], top + _ABOVE + _LINE * place
        middle = y + _BAR / 2
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 9}" text-anchor="end">{escape(name)}</text>')
        end = float(_LEFT)
        if _is_number(cell["median"]):
            end += cell["median"] * scale
            colour = _OURS if name == table["base"] else _THEIRS
            lines.append(
                f'<rect x="{_LEFT}" y="{y}" width="{end - _LEFT:.1f}" height="{_BAR}" '
                f'fill="{colour}"/>'
            )
            if _is_number(cell["high"]):
                low, end = (_LEFT + cell[key] * scale for key in ("low", "high"))
                lines.append(f'<path d="M{low:.1f} {middle:g}H{end:.1f}" stroke="{_SPREAD}"/>')
        lines.append(f'<text x="{end + 6:.1f}" y="{y + 9}">{escape(_label(cell))}</text>')
    return lines


def _label(cell: dict[str, Any]) -> str:
    median, ratio = cell["median"], cell["ratio"]
    if not _is_number(median):
        return median or "-"
    shown = f"{median:,.0f}" if abs(median) >= 1000 else f"{median:.3g}"
    return f"{shown} ({ratio:.2f} x)" if _is_number(ratio) else shown


def _is_number(figure: object) -> bool:
    return isinstance(figure, float | int)


def _or_inf(figure: Any) -> float:
    return figure if _is_number(figure) else float("inf")
