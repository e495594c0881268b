"""Start of interpreters that do not import from the working directory (``python -P``).

``python -c`` and ``python -m`` search the working directory before the standard library. The
program itself does so only if it is a prompt, ``-c`` or ``-m``, or if its script is there. In any
other program a ``json.py`` of that directory (a download, another user's file) would be imported
into workers and resource trackers alone.

    what is started                            how
    fork servers, spawn's workers, trackers    ``-P``
    loky's workers, which get no options       ``PYTHONSAFEPATH=1``, removed again in the worker
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util
from typing import Any

SAFE_PATH = "PYTHONSAFEPATH"

_util: Any = util
_original: Callable[[], list[str]] = _util._args_from_interpreter_flags
_here = threading.local()


@contextmanager
def safe_path() -> Iterator[None]:
    """Let ``multiprocessing`` and loky start interpreters with ``-P`` in this thread."""
    global _original  # noqa: PLW0603 -- whatever was there: a debugger may have set another
    if _util._args_from_interpreter_flags is not _flags:
        _original = _util._args_from_interpreter_flags
        _util._args_from_interpreter_flags = _flags
    _here.is_safe = True
    try:
        yield
    finally:
        _here.is_safe = False


def _flags() -> list[str]:
    return [*_original(), *(["-P"] if getattr(_here, "is_safe", False) and is_safe() else [])]


def is_safe(module: str = "os") -> bool:
    """Return whether the program does not import from the working directory itself.

    Always false for a frozen program, which takes no options of Python. ``module`` is the name of
    the one that the new interpreter has to import: directories on ``sys.path`` behind its own do
    not count.
    """
    if hasattr(sys, "frozen"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    package = os.path.dirname(file) if os.path.basename(file) == "__init__.py" else file
    home = os.path.dirname(package)
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was removed
        return True
    entries = [entry for entry in sys.path if isinstance(entry, str)]
    ahead = itertools.takewhile(lambda entry: entry != home, entries)
    return here not in {os.path.realpath(entry) for entry in (*ahead, home)}
