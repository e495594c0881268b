"""Floor 7: how what the commands print is laid out: ASCII, 80 columns."""

from __future__ import annotations

import textwrap

from safepool.shown import counted

__all__ = ["WIDTH", "as_ascii", "counted", "wrapped"]

WIDTH = 80


_CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), 127)}


def as_ascii(text: str) -> str:
    r"""Return a part of a line with all but printable ASCII escaped.

    A path or a function's name may hold anything: what a terminal in the C locale cannot show,
    the end of a line, or what clears the screen.

    Example:
        >>> print(as_ascii("a\nb\u2192"))
        a\x0ab\u2192
    """
    return text.translate(_CONTROL).encode("ascii", "backslashreplace").decode("ascii")


def wrapped(text: str, indent: int, *, label: str = "") -> list[str]:
    """Return the text in lines of the screen's width, a longer word in one piece.

    Args:
        text: The text to wrap.
        indent: Columns before it.
        label: Text of these columns in the first line.
    """
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
