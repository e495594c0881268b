"""Floor 7: how what the commands print is laid out: ASCII, 80 columns."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from safepool.shown import counted

__all__ = ["WIDTH", "as_ascii", "counted", "json_of", "wrapped"]

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


def json_of(told: Mapping[str, object], *, schema: int = 1) -> str:
    """Return what a command prints for programs: one object, with the number of its schema.

    Args:
        told: Its keys and values; dataclasses are objects too.
        schema: Keys are added within a schema, and none is renamed or removed.

    Example:
        >>> print(json_of({"pid": 7}))
        {
          "schema": 1,
          "pid": 7
        }
    """
    return json.dumps({"schema": schema, **told}, indent=2, default=_parts)


def _parts(value: Any) -> object:
    return dict(value) if isinstance(value, Mapping) else dataclasses.asdict(value)


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
