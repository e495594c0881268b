"""Floor 0: values as people read them: numbers with their unit, and tables for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["counted", "html_table", "size"]


def counted(number: float, noun: str) -> str:
    """Return ``"1 thread"``, ``"2.5 CPUs"``; a whole number with all its digits."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Return a number of bytes with its unit.

    Example:
        >>> size(17), size(3 << 29)
        ('17 bytes', '1.5 GiB')
    """
    if number < 1024:
        return f"{number} bytes"
    shown = float(number)
    for unit in ("KiB", "MiB", "GiB"):
        shown /= 1024
        if shown < 1024:
            return f"{shown:.1f} {unit}"
    return f"{shown / 1024:.1f} TiB"


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in HTML; ``None`` is an empty cell.

    Args:
        caption: Text above the table.
        head: Names of the columns.
        rows: The cells of each row.

    Example:
        >>> html_table("a < b", ["n"], [[None]])
        '<table><caption>a &lt; b</caption><tr><th>n</th></tr><tr><td></td></tr></table>'
    """
    from html import escape  # noqa: PLC0415 -- only for a notebook

    def line(tag: str, cells: Iterable[object]) -> str:
        texts = ("" if cell is None else escape(str(cell)) for cell in cells)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in rows)]
    return f"<table><caption>{escape(caption)}</caption>{''.join(lines)}</table>"
