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
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from safepool.cli.text import json_of

if TYPE_CHECKING:
    from safepool.cli.run import Plan

# Characters without meaning as a quote, an escape, a comment or a variable for every reader of
# such a file.
_PLAIN = re.compile(r"[\w./:,@%+=-]+", re.ASCII)
_PLAIN_IN_FILES = re.compile(r"[\w./:,@%+=\\-]*", re.ASCII)


def _quoted(plain: re.Pattern[str], value: str) -> str:
    if plain.fullmatch(value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


# For each form: how a variable is set, how it is removed, and how a value is quoted.
_FORMS: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "sh": ("export {}={};\n", "unset {};\n", shlex.quote),
    "fish": ("set -gx {} {};\n", "set -e {};\n", partial(_quoted, _PLAIN)),
    "dotenv": ("{}={}\n", "# unset {}\n", partial(_quoted, _PLAIN_IN_FILES)),
}


def written(changes: Mapping[str, str | None], form: str) -> str:
    r"""Return the changes in a form.

    Statements for ``sh`` also hold where ``eval`` has no quotes. A ``.env`` file cannot remove a
    variable: a comment stands for that. It has quotes only where they are needed, because docker's
    ``--env-file`` takes them literally; a value that needs them and ends with a backslash cannot
    be written.

    Source:
        python-dotenv, README, "File format".

    Example:
        >>> print(written({"A": "it's", "B": None}, "sh"), end="")
        export A='it'"'"'s';
        unset B;
        >>> print(written({"A": "it's", "B": None}, "fish"), end="")
        set -gx A 'it\'s';
        set -e B;
        >>> print(written({"A": "2", "B": "two words", "C": None}, "dotenv"), end="")
        A=2
        B='two words'
        # unset C
    """
    if form == "json":
        return json_of(changes, schema=None) + "\n"
    put, removed, quoted = _FORMS[form]
    return "".join(
        removed.format(name) if value is None else put.format(name, quoted(value))
        for name, value in changes.items()
    )


def run(plan: Plan, form: str) -> int:
    """Print a plan in a form; return the exit code."""
    if sys.stdout is not None:
        sys.stdout.flush()
        # A path may be of any bytes.
        sys.stdout.buffer.write(os.fsencode(written(plan.changes, form)))
    return 0
