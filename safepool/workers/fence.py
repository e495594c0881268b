"""A memory fence in every processor at once, so that workers need none for each task.

Source: membarrier(2), Linux 4.16.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

# membarrier(2): MEMBARRIER_CMD_GLOBAL_EXPEDITED and its registration, Linux 4.16.
_EXPEDITED, _REGISTER_EXPEDITED = 1 << 1, 1 << 2
# Linux, arch/*/entry/syscalls/*.tbl and include/uapi/asm-generic/unistd.h, by uname -m.
_SYSCALL_NUMBERS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "loongarch64": 283,
    "ppc64le": 365,
    "s390x": 356,
}

if sys.platform == "linux":

    @functools.cache
    def _membarrier() -> Callable[[int], int] | None:
        import ctypes  # noqa: PLC0415 -- 5 ms

        number = _SYSCALL_NUMBERS.get(os.uname().machine)
        if number is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            return None
        # PyDLL: it takes a few microseconds, and to give the lock away and get it again more.
        syscall = ctypes.PyDLL(None).syscall

        def call(command: int) -> int:
            result: int = syscall(number, command, 0, 0)
            return result

        return call

else:  # not Linux

    def _membarrier() -> Callable[[int], int] | None:
        return None


@functools.cache
def has_barrier() -> bool:
    """Tell whether the system has it."""
    call = _membarrier()
    if call is None:
        return False
    needed = _EXPEDITED | _REGISTER_EXPEDITED
    offered = call(0)  # MEMBARRIER_CMD_QUERY
    return offered >= 0 and offered & needed == needed


def register() -> bool:
    """Let barriers of other processes reach this one; ``False`` if the system refuses."""
    call = _membarrier()
    return call is not None and call(_REGISTER_EXPEDITED) == 0


def barrier() -> None:
    """Return when every running thread of a registered process has passed a memory fence."""
    call = _membarrier()
    assert call is not None  # there would be no board
    call(_EXPEDITED)
