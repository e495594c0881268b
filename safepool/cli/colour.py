"""Floor 7: colours for terminals. The text alone always says the same.

Decided by the environment and the stream; the first row that holds is taken:

    NO_COLOR is set, not empty       none        https://no-color.org
    FORCE_COLOR is set, not empty    colours     https://force-color.org
    the stream is no terminal        none
    TERM is "dumb", or Windows       none

Source of the codes: ECMA-48, 8.3.117, "SGR".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import IO, Literal, TypeAlias

Style: TypeAlias = Literal["good", "advice", "problem", "strong"]
Paint: TypeAlias = "Callable[[str, Style], str]"

_CODES: dict[Style, int] = {"strong": 1, "problem": 31, "good": 32, "advice": 33}


def plain(text: str, style: Style) -> str:  # noqa: ARG001 -- as `Paint`
    """Return the text unchanged."""
    return text


def paint_for(stream: IO[str] | None, environ: Mapping[str, str]) -> Paint:
    r"""Return a function that colours text for a stream, or returns it unchanged.

    Example:
        >>> import io
        >>> paint_for(io.StringIO(), {"FORCE_COLOR": "1"})("fine", "good")
        '\x1b[32mfine\x1b[0m'
        >>> paint_for(io.StringIO(), {})("fine", "good")
        'fine'
    """
    if environ.get("NO_COLOR"):
        return plain
    if environ.get("FORCE_COLOR"):
        return _coloured
    if stream is None or not stream.isatty():
        return plain
    if environ.get("TERM") == "dumb" or os.name == "nt":
        return plain
    return _coloured


def _coloured(text: str, style: Style) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if text else ""
