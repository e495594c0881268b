"""A task's exception on its way to the pool: as itself if it can travel, in words in any case."""

from __future__ import annotations

import functools
import importlib
import pickle
import traceback
from collections.abc import Callable
from reprlib import Repr
from types import TracebackType
from typing import Any

from safepool.errors import text_of, users_frames
from safepool.transport.blame import find_unpicklable
from safepool.transport.exceptions import Sendable
from safepool.transport.payloads import dumps, dumps_to_send, loads
from safepool.transport.reductions import Reductions

# Of a result that cannot be sent: its beginning, however large it is.
_SHORT = Repr()
_SHORT.maxother = _SHORT.maxstring = 200

# The pool puts the name of the call in the place of "the call".
UNSENT_RESULT = "while the result of the call was pickled"


def name_of(function: Callable[..., Any]) -> str:
    """Return what to call a function in a message.

    Example:
        >>> name_of(len)
        'builtins.len'
    """
    function = getattr(function, "func", function)  # the function of a functools.partial
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{module}.{name}"


@functools.cache
def get_ready() -> None:
    """Load the modules that a description needs, before a task runs.

    An import needs a descriptor, and a task may use up all descriptors. Done once: a forked worker
    has what its fork server has loaded.
    """
    for name in _LATE:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # of another version


# ``traceback`` imports these inside its functions or lazily (Python 3.11 to 3.15), for details of
# an error: columns of a line, a wrong name, a typing error in a keyword.
_LATE = "_colorize", "_suggestions", "ast", "codeop", "difflib", "inspect", "unicodedata"


def say_what(error: Exception, result: object, done: Reductions, *, look: bool) -> None:
    """Add to a pickling error that it was a result, and what in it if it is to ``look``."""
    done.is_search = True
    dumps = functools.partial(dumps_to_send, reductions=done)
    culprit = find_unpicklable(result, dumps) if look else ""
    try:
        error.add_note(f"{UNSENT_RESULT}. It is {culprit}" if culprit else UNSENT_RESULT)
        error.unsent_result = _SHORT.repr(result)  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001 -- an exception whose class allows no attributes
        pass


def describe(error: BaseException) -> list[bytes | memoryview]:
    """Return segments of (pickled exception or None, type, text, traceback, reason)."""
    trace = trace_of(error, users_frames(error.__traceback__))
    text = text_of(error)
    name = _name(type(error))
    # Frames hold the task's arguments; the other end could not use them anyway. By the base
    # class, since a frozen dataclass forbids to set an attribute.
    BaseException.with_traceback(error, None)
    done = Reductions()
    pickled, reason = _pickled(error, done)
    if pickled is None:
        left: list[str] = []
        parts = functools.partial(dumps, reductions=done)
        pickled, _ = _pickled(Sendable(error, parts, left), done)
        if pickled is not None:
            trace += "".join(f"(left in the worker: {part})\n" for part in dict.fromkeys(left))
    return [pickle.dumps((pickled, name, text, trace, reason), protocol=5)]


def _pickled(error: BaseException | Sendable, done: Reductions) -> tuple[list[bytes] | None, str]:
    """Return the pickle of an exception, or the reason why it cannot be pickled."""
    try:
        segments = [bytes(segment) for segment in dumps(error, reductions=done)]
        # A class's own way to be pickled may fail at the other end: found out here, where it
        # costs one task and not a pool.
        arrived = loads(segments)
        if isinstance(error, Sendable) and _speaks(error.error):
            str(arrived)  # it may need the attributes that were left out
    except BaseException as problem:  # noqa: BLE001 -- user code runs in both directions
        return None, f"{type(problem).__name__}: {text_of(problem)}"
    return segments, ""


def _speaks(error: BaseException) -> bool:
    try:
        str(error)
    except Exception:  # noqa: BLE001 -- user code
        return False
    return True


def trace_of(error: BaseException, frames: TracebackType | None) -> str:
    """Return the text of an exception with these frames, whatever its own code does."""
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as problem:  # noqa: BLE001 -- user code, a SyntaxError with odd details
        # By hand: the failed import may fail again.
        lines = []
        while frames is not None:
            code = frames.tb_frame.f_code
            lines.append(
                f'  File "{code.co_filename}", line {frames.tb_lineno}, in {code.co_name}\n'
            )
            frames = frames.tb_next
        return f"{''.join(lines)}{_name(type(error))} (not formatted: {text_of(problem)})\n"


def _name(kind: type) -> str:
    try:
        # The name that the program knows.
        return f"{kind.__module__}.{kind.__qualname__}".replace("__mp_main__.", "__main__.", 1)
    except BaseException:  # noqa: BLE001 -- a metaclass may do anything
        return "(an exception whose type has no name)"
