"""System calls and constants of Linux that a build of Python may lack.

The kernel has them all the same.

A Python that was built with the C headers of an old system (manylinux2014 is CentOS 7, 2014) has
no ``os.memfd_create``, no ``os.pidfd_open`` and no ``fcntl.F_SEAL_*``, on any kernel. Many builds
that are made to run everywhere are of this kind. All other modules take these names from here.

Sources:
    Linux, include/uapi/linux/fcntl.h, memfd.h and asm-generic/{fcntl,poll,unistd}.h; the values
    hold for every architecture that Python's own list of supported platforms names.

Not covered:
    * ``memfd_create`` on a C library before glibc 2.27: it is refused, as by a kernel without it,
      and callers have another way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

assert sys.platform == "linux"

F_ADD_SEALS: int = getattr(fcntl, "F_ADD_SEALS", 1033)
F_GET_SEALS: int = getattr(fcntl, "F_GET_SEALS", 1034)
F_SEAL_SEAL: int = getattr(fcntl, "F_SEAL_SEAL", 1)
F_SEAL_SHRINK: int = getattr(fcntl, "F_SEAL_SHRINK", 2)
F_SEAL_GROW: int = getattr(fcntl, "F_SEAL_GROW", 4)
F_SEAL_WRITE: int = getattr(fcntl, "F_SEAL_WRITE", 8)
F_DUPFD_CLOEXEC: int = getattr(fcntl, "F_DUPFD_CLOEXEC", 1030)
F_SETSIG: int = getattr(fcntl, "F_SETSIG", 10)
MFD_CLOEXEC: int = getattr(os, "MFD_CLOEXEC", 1)
MFD_ALLOW_SEALING: int = getattr(os, "MFD_ALLOW_SEALING", 2)
MSG_CMSG_CLOEXEC: int = getattr(socket, "MSG_CMSG_CLOEXEC", 0x4000_0000)
POLLRDHUP: int = getattr(select, "POLLRDHUP", 0x2000)

# From number 424 on every architecture counts alike; C libraries have had these calls only
# since glibc 2.36.
_PIDFD_SEND_SIGNAL = 424
_PIDFD_OPEN = 434


def _memfd_create(name: str, flags: int) -> int:
    return _call("memfd_create", name.encode(), flags)


def _pidfd_open(pid: int, flags: int = 0) -> int:
    # The kernel always sets close-on-exec.
    return _call("syscall", _PIDFD_OPEN, pid, flags)


def _pidfd_send_signal(pidfd: int, number: int) -> None:
    _call("syscall", _PIDFD_SEND_SIGNAL, pidfd, number, None, 0)


def _preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read into the first buffer only, which counts as a short read of all."""
    read = os.pread(descriptor, len(buffers[0]), offset)
    buffers[0][: len(read)] = read
    return len(read)


def _call(name: str, *arguments: bytes | int | None) -> int:
    """Call a function of the C library that returns -1 and sets ``errno`` when it fails."""
    import ctypes  # noqa: PLC0415 -- 5 ms, and most Pythons have the calls

    function: Any = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    function.restype = ctypes.c_long
    # Numbers of the width of a register: an argument of a variadic function is no less.
    numbers = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(function(*numbers))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


memfd_create: Callable[[str, int], int] = getattr(os, "memfd_create", _memfd_create)
pidfd_open: Callable[[int], int] = getattr(os, "pidfd_open", _pidfd_open)
pidfd_send_signal: Callable[[int, int], None] = getattr(
    signal, "pidfd_send_signal", _pidfd_send_signal
)
preadv: Callable[[int, Sequence[memoryview], int], int] = getattr(os, "preadv", _preadv)


def find_pidfd(pid: int) -> int | None:
    """Return a descriptor of a process; ``None`` before Linux 5.3."""
    try:
        return pidfd_open(pid)
    except OSError:
        return None


def send_signal(pidfd: int | None, number: int) -> bool:
    """Send a signal by a pidfd, unless the process has ended; ``False`` if the system refuses."""
    if pidfd is None:
        return False
    try:
        pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    except OSError:
        return False  # a filter refuses this call, and not kill(2)
    return True


def asked(call: Callable[..., Any], *arguments: int) -> Any:
    """Return the system's answer; ``None`` if a filter refuses the call."""
    try:
        return call(*arguments)
    except (OSError, ValueError):  # getrlimit() makes a ValueError of some
        return None


def limit_of(name: str) -> tuple[int, int] | None:
    """Return a limit of ``resource``, soft and hard; ``None`` if a filter refuses the call."""
    found: tuple[int, int] | None = asked(resource.getrlimit, getattr(resource, name))
    return found
