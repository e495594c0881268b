"""Forks by code of the user: the child must not continue as a worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Fork:
    """Tells whether this process is a fork of the worker."""

    def __init__(self, forked: Callable[[], object]) -> None:
        self.here: bool = False
        self._told = forked
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.here = True
        self._told()

    def leave(self, error: BaseException | None = None) -> None:
        """End the process if it is one, as a fork of any program ends.

        Only the worker itself sends the answer and takes the next task.
        """
        if self.here:
            leave_fork(error)


def leave_fork(error: BaseException | None = None) -> NoReturn:
    """End this process, as a fork of any program ends."""
    code = 1
    try:
        code = code_of(error)
        flush(sys.stdout, sys.stderr)
    finally:
        os._exit(code)  # also if standard error is closed, or a hook of the program raises


def code_of(error: BaseException | None) -> int:
    """Return the exit code of a process that ends with this, and print what its end prints."""
    if error is None:
        return 0
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    sys.stderr.write(f"{error.code}\n")
    return 1


def flush(*streams: Any) -> None:
    """Flush standard output and standard error, if possible."""
    for stream in streams:
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass  # closed, or without a reader
