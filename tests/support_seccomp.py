"""A filter that refuses system calls, as container runtimes and sandboxes install them.

Source: seccomp(2); Linux, include/uapi/linux/filter.h, seccomp.h; the numbers are those of
``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# The name of a call: its number on x86_64, and on aarch64. A pool can do without these.
OPTIONAL = {
    "getpriority": (140, 141),
    "setpriority": (141, 140),
    "prctl": (157, 167),
    "getrlimit": (97, 163),
    "sched_setaffinity": (203, 122),
    "sched_getaffinity": (204, 123),
    "prlimit64": (302, 261),
    "memfd_create": (319, 279),
    "membarrier": (324, 283),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "umask": (95, 166),
}
# And not without these; the fork server's way or the others can do without some.
NEEDED = {
    "socketpair": (53, 199),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "poll": (7, 73),  # ppoll
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, 22),  # epoll_pwait
    "pipe2": (293, 59),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "dup": (32, 23),
    "dup2": (33, 24),  # dup3
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "ftruncate": (77, 46),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "sigaltstack": (131, 132),
    "getdents64": (217, 61),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "clone3": (435, 435),
    "clone": (56, 220),
    "execve": (59, 221),
    "wait4": (61, 260),
}
NUMBERS = OPTIONAL | NEEDED

_MACHINES = {"x86_64": 0, "aarch64": 1}
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
# BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF_0000, 0x0005_0000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def can_refuse() -> bool:
    """Tell whether the numbers of this machine are known."""
    return os.uname().machine in _MACHINES


def refuse(*names: str, error: int = errno.EPERM) -> None:
    """Let these calls fail, for good, in this process and in all that it starts.

    Args:
        names: From :data:`NUMBERS`.
        error: With which error.
    """
    column = _MACHINES[os.uname().machine]
    refuse_number(*(NUMBERS[name][column] for name in names), error=error)


def refuse_number(*numbers: int, error: int = errno.EPERM) -> None:
    """Do the same by the numbers of the calls."""
    lines = [(_LOAD, 0, 0, 0)]  # seccomp_data.nr
    lines += [(_JUMP_IF_EQUAL, len(numbers) - at, 0, n) for at, n in enumerate(numbers)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE | error)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    program = _Program(len(lines), code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for arguments in (
        (_NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0),
    ):
        if prctl(*arguments):
            raise OSError(ctypes.get_errno(), "this system takes no filter")
