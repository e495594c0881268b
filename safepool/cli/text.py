"""Floor 7: what commands print: ASCII, 80 columns, one JSON object, or an error of one line."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from safepool.errors import SafepoolError
from safepool.shown import counted

__all__ = ["WIDTH", "CommandError", "as_ascii", "counted", "json_of", "wrapped"]

WIDTH = 80


class CommandError(SafepoolError):
    """A command cannot do its work.

    Args:
        reason: The event, its place and the remedy.
        code: The exit code.
    """

    def __init__(self, reason: str, code: int = 2) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return self.reason


_CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), 127)}


def as_ascii(text: str) -> str:
    r"""Return a part of a line with all characters but printable ASCII escaped.

    A path or a function's name may contain anything: characters that a terminal in the C locale
    cannot show, a newline, or a control sequence that clears the screen.

    Example:
        >>> print(as_ascii("a\nb\u2192"))
        a\x0ab\u2192
    """
    return text.translate(_CONTROL).encode("ascii", "backslashreplace").decode("ascii")


def json_of(told: Any, *, schema: int | None = 1, indent: int | None = 2) -> str:
    """Return the one object that a command prints for programs.

    Args:
        told: Mapping or dataclass of the keys and values. Dataclasses inside become objects.
        schema: Number of its schema, the first key. Keys are added within a schema, and none is
            renamed or removed. ``None`` where the keys are names from elsewhere, or each line is
            an object.
        indent: Columns by level; ``None`` prints one line.

    Example:
        >>> print(json_of({"pid": 7}))
        {
          "schema": 1,
          "pid": 7
        }
    """
    number = {} if schema is None else {"schema": schema}
    return json.dumps(number | _parts(told), indent=indent, default=_parts)


def _parts(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else dataclasses.asdict(value)


def wrapped(text: str, indent: int, *, label: str = "") -> list[str]:
    """Return the text in lines of the screen's width, a longer word in one piece."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
