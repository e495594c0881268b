"""Forks by code of the user: the child must not continue as a worker."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


class Fork:
    """Knows whether this process is a fork of the worker."""

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

        The answer is the worker's to give, and so is the next task to take.
        """
        if self.here:
            leave_fork(error)


def leave_fork(error: BaseException | None = None) -> NoReturn:
    """End this process, as a fork of any program ends."""
    code = 0
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            pass
    os._exit(code & 0xFF)
