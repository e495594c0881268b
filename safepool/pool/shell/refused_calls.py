"""Find system calls that every worker needs and that a filter refuses (seccomp(2)).

A worker dies before it can report a refused call, and Python's exception does not name the call.
Hence each call of the table is made with arguments that no kernel accepts: -1 everywhere. A filter
answers before the kernel reads the arguments, and the call has no effect in either case. Child
processes inherit filters: a call that is refused here is refused in workers.

Sources: seccomp(2), proc_pid_status(5); the numbers are those of Linux,
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.

Not covered:
    * Calls that a pool can do without (``pidfd_open``, ``memfd_create``, ``membarrier``, ...).
    * A filter in workers only; a filter that reads arguments; other processors.
    * ``futex`` and other calls without which no Python runs.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NamedTuple

from safepool.errors import REFUSALS, RefusedCallError
from safepool.procfs import fields


class _Call(NamedTuple):
    """A system call: its name there, and its number on each processor; -1 if it has none."""

    name: str
    x86_64: int
    aarch64: int


_CALLS = (
    _Call("socketpair", 53, 199),
    _Call("sendmsg", 46, 211),
    _Call("recvmsg", 47, 212),
    _Call("sendto", 44, 206),
    _Call("recvfrom", 45, 207),
    _Call("getsockname", 51, 204),
    _Call("getsockopt", 55, 209),
    _Call("poll", 7, -1),
    _Call("ppoll", -1, 73),
    _Call("epoll_create1", 291, 20),
    _Call("epoll_ctl", 233, 21),
    _Call("epoll_wait", 232, -1),
    _Call("epoll_pwait", -1, 22),
    _Call("pipe2", 293, 59),
    _Call("fcntl", 72, 25),
    _Call("ioctl", 16, 29),
    _Call("dup", 32, 23),
    _Call("dup2", 33, -1),
    _Call("dup3", -1, 24),
    _Call("getcwd", 79, 17),
    _Call("chdir", 80, 49),
    _Call("openat", 257, 56),
    _Call("newfstatat", 262, 79),
    _Call("getdents64", 217, 61),
    _Call("read", 0, 63),
    _Call("write", 1, 64),
    _Call("close", 3, 57),
    _Call("lseek", 8, 62),
    _Call("pread64", 17, 67),
    _Call("mmap", 9, 222),
    _Call("mprotect", 10, 226),
    _Call("rt_sigaction", 13, 134),
    _Call("rt_sigprocmask", 14, 135),
    _Call("sigaltstack", 131, 132),
    _Call("arch_prctl", 158, -1),
    _Call("clone3", 435, 435),
    _Call("clone", 56, 220),
    _Call("execve", 59, 221),
    _Call("wait4", 61, 260),
)
# The C library does without it where the kernel does not know it, and only there.
_NEW = frozenset({"clone3"})
# Numbers of the processors that they are known of.
_COLUMNS = {"x86_64": 1, "aarch64": 2}


def _refused(ctypes: Any, syscall: Any, column: int) -> list[tuple[str, int]]:
    found = []
    nothing = ctypes.c_long(-1)
    for call in _CALLS:
        number: int = call[column]  # type: ignore[assignment]
        if number < 0:
            continue
        ctypes.set_errno(0)
        syscall(ctypes.c_long(number), *[nothing] * 6)
        error = ctypes.get_errno()
        if error in REFUSALS and not (call.name in _NEW and error == errno.ENOSYS):
            found.append((call.name, error))
    return found


def refused_call() -> RefusedCallError | None:
    """Return the calls of the table that the system refuses, as an error; ``None`` if none.

    Without a filter nothing is tried.
    """
    if sys.platform == "linux":
        try:
            column, found = _COLUMNS.get(os.uname().machine), fields()
            # No fields: they are hidden, or refused as well.
            if column is None or (found and found.get("Seccomp") != "2"):
                return None
            import ctypes  # noqa: PLC0415 -- seldom

            refused = _refused(ctypes, ctypes.CDLL(None, use_errno=True).syscall, column)
            names = ", ".join(f"{name}()" for name, _ in refused)
            number = refused[0][1] if refused else 0
            return RefusedCallError(number, os.strerror(number), names) if refused else None
        except (ImportError, OSError):  # the filter keeps even that
            pass
    return None
