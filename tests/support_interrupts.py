"""A trace function in the place of a signal's handler: before any instruction of a call."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import random
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safepool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

# Not what the interpreter calls in between.
OURS = (
    str(Path(safepool.__file__).parent),
    str(Path(concurrent.futures.__file__).parent),
    threading.__file__,
    socket.__file__,
)
# They only look at what modules hold, for thousands of instructions.
NOT_OURS = ("additions.py", "imports.py")


@contextlib.contextmanager
def others_uncollected() -> Iterator[None]:
    """Leave what other tests have left: what the collector calls there loses an exception."""
    gc.collect()
    gc.freeze()
    callbacks = [*gc.callbacks]
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.callbacks.extend(callbacks)


class Interrupt(BaseException):
    """What a handler raises."""


def interrupted_at(place: int, call: Callable[[], object], handler: Callable[[], object]) -> bool:
    """Call, and call the handler before this instruction; ``False`` if there are not so many."""
    return _reached(place, call, handler) == place


def instructions(call: Callable[[], object]) -> int:
    """Call, and return how many places there are in it for :func:`interrupted_at`."""
    return _reached(sys.maxsize, call, lambda: None)


def _reached(place: int, call: Callable[[], object], handler: Callable[[], object]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not name.startswith(OURS) or name.endswith(NOT_OURS):
            return None
        if event == "call" and is_in_a_finalizer(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event in ("opcode", "call") and count < place:
            count += 1
            if count == place:
                sys.settrace(None)
                handler()
        return trace if count < place else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return count


def is_in_a_finalizer(frame: FrameType | None) -> bool:
    """Tell whether what is raised here is lost: the collector may call it, at any time."""
    while frame is not None:
        name, caller = frame.f_code.co_qualname, frame.f_back
        if name in ("finalize.__call__", "ResultIterator.__del__"):
            return True
        # A generator that is freed, not closed.
        if name == "_closing" and caller and caller.f_code.co_qualname != "ResultIterator.close":
            return True
        frame = caller
    return False


# Otherwise a test tries some of them: all take a few minutes, with -o timeout=600.
EVERY_PLACE = bool(os.environ.get("SAFEPOOL_TEST_EVERY_PLACE"))


def places(step: int) -> Iterator[int]:
    """Yield numbers of instructions that are so far apart."""
    if EVERY_PLACE:
        step = 1
    # Not always the same ones where not all are tried.
    at = random.Random(os.getpid()).randint(1, step)
    while True:
        yield at
        at += step
