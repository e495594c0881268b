"""Floor 0: values as people read them: numbers with their unit, and tables for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def counted(number: float, noun: str) -> str:
    """Return ``"1 thread"``, ``"2.5 CPUs"``; a whole number with all its digits."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Return a name or a path for a line of text, with unprintable characters escaped.

    A group's path, or the name of a function or library, may contain a newline, a control sequence
    that clears a terminal, or a character that reverses the writing direction.

    Example:
        >>> print(printable("größe\x1b[2J\n\u202e"))
        größe\x1b[2J\n\u202e
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )


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

    Example:
        >>> html_table("a < b", ["n"], [[None]])
        '<table><caption>a &lt; b</caption><tr><th>n</th></tr><tr><td></td></tr></table>'
    """
    from html import escape  # noqa: PLC0415 -- only for a notebook

    def line(tag: str, cells: Iterable[object]) -> str:
        texts = ("" if cell is None else escape(printable(str(cell))) for cell in cells)
        return f"<tr>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    lines = [line("th", head), *(line("td", row) for row in rows)]
    return f"<table><caption>{escape(printable(caption))}</caption>{''.join(lines)}</table>"
