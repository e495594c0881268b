"""The interpreter that workers are started with, and what is told if there is none."""

from __future__ import annotations

import multiprocessing.spawn
import os
import sys


class NoInterpreterError(RuntimeError):
    """The interpreter for workers is no Python, or this user may not start it."""


def executable() -> str:
    """Return the interpreter, as multiprocessing's own start methods find it."""
    found = multiprocessing.spawn.get_executable()
    if not found:
        if not sys.executable:
            raise no_interpreter("is empty, as in a program that embeds Python")
        # Set after multiprocessing was imported, whose resource tracker needs it as well.
        multiprocessing.spawn.set_executable(sys.executable)
        found = sys.executable
    return os.fsdecode(found)


def check_executable() -> None:
    """Refuse a missing interpreter: a process by "spawn" would end with code 255 and no word."""
    if not os.path.exists(executable()):
        raise no_interpreter(
            "does not exist. After os.chroot() a path begins at the new root: put Python and "
            "safepool there, or make the pool's first call before (its workers keep the old root)"
        )


def no_interpreter(what: str) -> NoInterpreterError:
    """Return the error that describes the problem with the interpreter."""
    name = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable or "")
    return NoInterpreterError(
        f"the interpreter for workers, {name!r} (sys.executable, or what "
        f"multiprocessing.set_executable() was given), {what}. Give "
        "multiprocessing.set_executable() the path of a Python interpreter that can import "
        'safepool, or pass mp_context="fork" if this program has no threads'
    )
