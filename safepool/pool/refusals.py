"""Which limit was met when the system gives no process, thread or descriptor: with its figures."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from safepool.errors import text_of
from safepool.limits import read_limits

if TYPE_CHECKING:
    from safepool.limits import Limits

__all__ = ["describe", "limit_met"]

# Of what is in use a part may have ended since.
_NEARLY = 0.9


def describe(error: BaseException) -> str:
    """Return what was raised when a worker was to be started, with the limit that was met."""
    text = text_of(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, RuntimeError) and "start new thread" in text:
        number = errno.EAGAIN
    if number not in (errno.EAGAIN, errno.EMFILE):
        return text
    try:
        met = limit_met(number, read_limits())
    except Exception:  # noqa: BLE001 -- what cannot be read must not hide the error
        met = ""
    return f"{text} ({met})" if met else text


def limit_met(number: int, limits: Limits) -> str:
    """Return which limit an error number stands for, as words; empty if none that is known.

    Args:
        number: ``EAGAIN`` of fork(2) and clone(2), or ``EMFILE``.
        limits: As they are now.
    """
    if number == errno.EMFILE:
        files = limits.open_files
        if files is None or files.files is None:
            return ""
        used = "" if files.used_files is None else f", {files.used_files} are open"
        return f"limit met: {files.name} allows this process {files.files} open files{used}"
    tight = [
        limit
        for limit in limits.pids
        if limit.tasks is not None
        and limit.used_tasks is not None
        and limit.used_tasks >= _NEARLY * limit.tasks
    ]
    known = tight or [limit for limit in limits.pids if limit.tasks is not None]
    if not known:
        return ""
    words = [
        f"{limit.name} allows {limit.tasks} processes and threads, "
        f"{'?' if limit.used_tasks is None else limit.used_tasks} exist "
        f"({limit.source})"
        for limit in known
    ]
    return f"{'limit met' if tight else 'possible limits'}: {'; '.join(words)}"
