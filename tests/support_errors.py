"""Errors that a task raises when its process has no descriptor left."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_taken: list[int] = []


class OwnError(Exception):
    """Of a module that a worker finds by its name."""


def _open() -> None:
    with open(__file__):
        pass


def _misspell() -> Any:
    return sys.version_imfo  # type: ignore[attr-defined]


def _misspell_keyword() -> None:
    compile("whille True: pass\n", "nowhere", "exec")


def _import() -> None:
    importlib.import_module("support_jsom")


def _raise_group() -> None:
    raise ExceptionGroup("two", [OSError(1, "x"), OwnError()])


def _add_to_text() -> Any:
    return "ä" + 1  # type: ignore[operator]


def _raise_own() -> None:
    raise OwnError(3)


def _raise_unpicklable() -> None:
    raise OwnError(lambda: 3)


# One row per error: what raises it, and its type's name.
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no descriptor": (_open, "OSError"),
    "a wrong attribute": (_misspell, "AttributeError"),
    "a wrong keyword": (_misspell_keyword, "SyntaxError"),
    "a module that is not there": (_import, "ModuleNotFoundError"),
    "a group": (_raise_group, "ExceptionGroup"),
    "a line that is not ASCII": (_add_to_text, "TypeError"),
    "a class of a module": (_raise_own, "OwnError"),
    "what needs more than pickle": (_raise_unpicklable, "OwnError"),
}


def fail_without_descriptors(case: str) -> None:
    """Take every descriptor that this process may have, then raise."""
    low, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, low), most))
    with contextlib.suppress(OSError):
        while True:
            _taken.append(os.open(os.devnull, os.O_RDONLY))
    ERRORS[case][0]()


def break_formatting() -> None:
    """Let the standard library fail when it formats an error, as an import in there may."""
    import traceback

    def fail(*_: object, **_more: object) -> Any:
        raise ImportError("no descriptor")

    traceback.TracebackException.__init__ = fail  # type: ignore[method-assign]
    traceback.StackSummary._extract_from_extended_frame_gen = fail  # type: ignore[attr-defined]
