"""Workers forked from the program: without Python's warning, which may come too late to be one.

From Python 3.12 on ``os.fork()`` warns in a process that has threads. Where warnings are errors
(``-W error``), Python 3.15 raises it when there is a child already, which nobody knows of then.
A pool has told what to tell before (:class:`safepool.ProcessPool`, ``mp_context="fork"``).
"""

from __future__ import annotations

import multiprocessing.context
import os
import sys
import warnings
from typing import Any

from safepool.workers.begin import popen_with

assert sys.platform != "win32"

__all__ = ["QuietProcess"]


class QuietProcess(multiprocessing.context.ForkProcess):
    """A process of ``multiprocessing`` whose fork does not raise a warning."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 -- the standard library's name
        from multiprocessing import popen_fork  # noqa: PLC0415 -- seldom

        return popen_with(popen_fork.Popen, os=_QuietOs())(process_obj)


class _QuietOs:
    """The module ``os`` with another ``fork()``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fork(self) -> int:
        """Fork."""
        # Filters belong to the whole process: they are changed where that is needed alone.
        if not any(action == "error" for action, *_ in warnings.filters):
            return os.fork()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return os.fork()
