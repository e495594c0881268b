"""Functions of ``signal`` without its enumerations, for the start of a forked worker.

``signal.signal()`` turns numbers into members of an enumeration; for a handler that is a function
it raises and catches an error inside. Five such calls in a worker write to some eighty pages that
it shares with its fork server, each of which the kernel copies (benchmarks/startup.py, warm).
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_bare: Any = importlib.import_module("_signal")

set_handler: Callable[[int, Callable[..., object] | int], object] = _bare.signal
"""``signal.signal()``; the default is the number of ``signal.SIG_DFL``."""

DEFAULT = int(signal.SIG_DFL)
INTERRUPT = int(signal.SIGINT)

if sys.platform != "win32":
    change_mask: Callable[[int, Iterable[int]], object] = _bare.pthread_sigmask
    """``signal.pthread_sigmask()``."""

    CHILD = int(signal.SIGCHLD)
    UNBLOCK, SET_MASK = int(signal.SIG_UNBLOCK), int(signal.SIG_SETMASK)
