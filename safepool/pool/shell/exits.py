"""The pools that work, so that the interpreter's exit finds them, and a fork."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.pool.shell.worker import Worker


class Exiting(Protocol):
    """Pool that has work to finish before the interpreter ends."""

    def exit(self) -> None:
        """Finish it."""

    def descriptors(self) -> Iterable[int]:
        """Return the descriptors that a forked worker must close."""
        ...

    def workers(self) -> list[Worker]:
        """Return the live workers."""
        ...


_working: weakref.WeakSet[Exiting] = weakref.WeakSet()
_registered = False
_exited = False


def finish_at_exit(pool: Exiting) -> None:
    """Call ``pool.exit()`` before the interpreter ends, if the pool is still there.

    ``threading`` runs such functions before it joins other threads and before daemon threads
    are stopped; ``atexit`` runs after both. The call is private, and the standard pool's own
    from Python 3.9 to this day.

    Raises:
        RuntimeError: The interpreter is ending.
    """
    global _registered  # noqa: PLW0603 -- one registration per interpreter
    if not _registered:
        try:
            threading._register_atexit(_exit_all)  # type: ignore[attr-defined]
        except RuntimeError:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown") from None
        _registered = True
    _working.add(pool)


def has_exited() -> bool:
    """Tell whether the interpreter ends: a thread that is started now may never run."""
    return _exited


def working() -> list[Exiting]:
    """Return the pools of this process that have been used and are still there."""
    while True:
        try:
            return list(_working)
        except RuntimeError:  # changed meanwhile
            continue


def last_uncaught() -> BaseException | None:
    """Return the exception that ends the program; ``None`` also at a prompt, which goes on."""
    if hasattr(sys, "ps1"):
        return None
    error: BaseException | None = getattr(sys, "last_value", None)
    return error


def _exit_all() -> None:
    global _exited  # noqa: PLW0603 -- a fact about the interpreter
    _exited = True
    for pool in working():
        pool.exit()
