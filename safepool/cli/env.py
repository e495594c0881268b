"""Floor 7: print what ``safepool run`` would set, for a shell or a file to take over.

    sh, fish    statements: ``eval "$(safepool env)"``, ``safepool env --shell fish | source``
    dotenv      lines for ``docker run --env-file`` and libraries that read a ``.env`` file
    json        one object: a variable's value, or ``null`` where it is to be removed

What the user has set is left out: it stays.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING

from safepool.cli.text import json_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from safepool.cli.run import Plan

# Characters without meaning as a quote, an escape, a comment or a variable for every reader of
# such a file.
_PLAIN = re.compile(r"[\w./:,@%+=-]+", re.ASCII)
_PLAIN_IN_FILES = re.compile(r"[\w./:,@%+=\\-]*", re.ASCII)


def as_sh(changes: Mapping[str, str | None]) -> str:
    """Return statements for a POSIX shell. They also hold where ``eval`` has no quotes.

    Example:
        >>> print(as_sh({"A": "it's", "B": None}), end="")
        export A='it'"'"'s';
        unset B;
    """
    return "".join(
        f"unset {name};\n" if value is None else f"export {name}={shlex.quote(value)};\n"
        for name, value in changes.items()
    )


def as_fish(changes: Mapping[str, str | None]) -> str:
    r"""Return statements for fish, whose single quotes know two escapes.

    Example:
        >>> print(as_fish({"A": "it's", "B": None}), end="")
        set -gx A 'it\'s';
        set -e B;
    """
    return "".join(
        f"set -e {name};\n" if value is None else f"set -gx {name} {_quoted(value)};\n"
        for name, value in changes.items()
    )


def as_dotenv(changes: Mapping[str, str | None]) -> str:
    """Return lines of a ``.env`` file, which can set and not remove: that is a comment.

    Quotes are only where they are needed: docker's ``--env-file`` would take them literally. A
    value that needs them and ends with a backslash cannot be written.

    Source:
        python-dotenv, README, "File format".

    Example:
        >>> print(as_dotenv({"A": "2", "B": "two words", "C": None}), end="")
        A=2
        B='two words'
        # unset C
    """
    return "".join(
        f"# unset {name}\n" if value is None else f"{name}={_quoted(value, _PLAIN_IN_FILES)}\n"
        for name, value in changes.items()
    )


def as_json(changes: Mapping[str, str | None]) -> str:
    """Return one JSON object.

    Example:
        >>> print(as_json({"A": "2", "B": None}), end="")
        {
          "A": "2",
          "B": null
        }
    """
    return json_of(changes, schema=None) + "\n"


FORMATS: dict[str, Callable[[Mapping[str, str | None]], str]] = {
    "sh": as_sh,
    "fish": as_fish,
    "dotenv": as_dotenv,
    "json": as_json,
}


def run(plan: Plan, form: str) -> int:
    """Print a plan in a form of `FORMATS`; return the exit code."""
    if sys.stdout is not None:
        sys.stdout.flush()
        # A path may be of any bytes.
        sys.stdout.buffer.write(os.fsencode(FORMATS[form](plan.changes)))
    return 0


def _quoted(value: str, plain: re.Pattern[str] = _PLAIN) -> str:
    if plain.fullmatch(value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
