"""Why the system gives no process, thread or descriptor: a limit is met, or a call is refused."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safepool.errors import REFUSALS, text_of
from safepool.limits import read_limits
from safepool.pool.shell.refused_calls import refused_call
from safepool.procfs import fields

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safepool.limits import Limits
    from safepool.limits._types import PidsLimit

# A part of the use may have ended since.
_NEARLY = 0.9
# Memory that a thread's stack, or the first pages of a process, may need.
_LITTLE_BYTES = 64 << 20
_LIMITED = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_REMEDY = "Raise it, or use fewer workers"


def explain(error: BaseException) -> BaseException:
    """Return an error that names the limit or the refused call, otherwise the same error.

    Args:
        error: The exception of a start. The type stays: an ``OSError`` with the same number, or a
            ``RuntimeError`` if no thread was started.
    """
    try:
        return _explain(error) or error
    except Exception:  # noqa: BLE001 -- what cannot be read must not hide the error
        return error


def _explain(error: BaseException) -> BaseException | None:
    number = error.errno if isinstance(error, OSError) else None
    thread = isinstance(error, RuntimeError) and "start new thread" in text_of(error)
    # A process that dies at its start breaks the pipe with its instructions.
    if thread or number is None or number in REFUSALS or number == errno.EPIPE:
        refused = refused_call()
        if refused is not None:
            refused.__cause__ = error
            return refused
    met = limit_met(errno.EAGAIN if thread else number or 0)
    if not met:
        return None
    found: BaseException
    if thread:
        found = RuntimeError(f"{text_of(error)} ({met})")
    else:
        assert isinstance(error, OSError)
        found = OSError(number, f"{error.strerror} ({met})")
    found.__cause__ = error
    return found


@contextmanager
def explained() -> Iterator[None]:
    """Raise exceptions of the block as :func:`explain` returns them."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = explain(error)
        if told is error:
            raise
        raise told from error


def limit_met(number: int, limits: Limits | None = None) -> str:
    """Return the limit behind an error number, in words; empty if unknown.

    Args:
        number: ``EAGAIN`` of fork(2) and clone(2), ``EMFILE``, ``ENFILE`` or ``ENOMEM``.
        limits: ``None`` reads them.
    """
    if number == errno.ENFILE:
        return "limit met: /proc/sys/fs/file-max, the open files of the whole machine"
    if number not in _LIMITED:
        return ""
    limits = limits or read_limits()
    if number == errno.EMFILE:
        return _files_met(limits)
    memory = _memory_met()
    tasks = [limit for limit in limits.pids if limit.tasks is not None]
    counted = [(limit, _used(limit)) for limit in tasks]
    tight = [
        _of_tasks(limit, used)
        for limit, used in counted
        if limit.tasks is not None and used is not None and used >= _NEARLY * limit.tasks
    ]
    # A thread's stack that does not fit is EAGAIN as well (pthread_create(3)).
    met = memory if number == errno.ENOMEM else tight or memory
    if met:
        return f"limit met: {'; '.join(met)}. {_REMEDY}"
    if number == errno.ENOMEM or not counted:
        return ""
    return f"possible limits: {'; '.join(_of_tasks(*one) for one in counted)}. {_REMEDY}"


def _files_met(limits: Limits) -> str:
    files = limits.open_files
    if files is None or files.files is None:
        return ""
    used = "all" if files.used_files is None else str(files.used_files)
    allowed = f"{files.name} allows this process {files.files} open files"
    return f"limit met: {allowed}, {used} are open. Raise it (ulimit -n), or use fewer workers"


def _of_tasks(limit: PidsLimit, used: int | None) -> str:
    told = "" if used is None else f", {used} exist"
    return f"{limit.name} allows {limit.tasks} processes and threads{told} ({limit.source})"


if sys.platform == "linux":
    import resource

    from safepool.limits.left import MemoryWatch
    from safepool.limits.process import tasks_of_user

    # Ceiling, and its field in /proc/self/status (getrlimit(2)).
    _ADDRESSES = (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData"))


def _used(limit: PidsLimit) -> int | None:
    if sys.platform == "linux" and limit.name == "RLIMIT_NPROC" and limit.used_tasks is None:
        return tasks_of_user(os.getuid())
    return limit.used_tasks


def _memory_met() -> list[str]:
    met: list[str] = []
    if sys.platform == "linux":
        status = fields()
        for name, field in _ADDRESSES:
            limit, _ = resource.getrlimit(getattr(resource, name))
            used = int(status.get(field, "0").split()[0]) << 10
            if limit != resource.RLIM_INFINITY and used + _LITTLE_BYTES > limit:
                met.append(
                    f"{name} allows this process {limit >> 20:,} MiB of addresses, "
                    f"{used >> 20:,} MiB are in use"
                )
        left = MemoryWatch().read()
        if left is not None and left.bytes < _LITTLE_BYTES:
            told = f"{left.bytes >> 20:,} MiB are left of {left.limit_bytes >> 20:,} MiB"
            met.append(f"memory: {told} ({left.source})")
    return met
