"""The life-line: a pipe that tells the kernel to end a process when the program is gone.

Only the program holds the writing end. Each process that must not outlive it holds the reading
end in a description of its own and asks the kernel for ``SIGKILL`` when that turns readable,
which is when the last writer has gone (fcntl(2), ``F_SETOWN``, ``F_SETSIG``, ``O_ASYNC``). So a
worker ends in the middle of C code too, whatever ended the program, and lives on when the fork
server is killed. ``PR_SET_PDEATHSIG`` cannot give both: it tells of the server's end, not the
program's.

Not covered:
    * A task that closes every descriptor: the worker ends when it wants to answer.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys

assert sys.platform == "linux"

__all__ = ["hold"]


def hold(descriptor: int) -> int:
    """End this process by ``SIGKILL`` as soon as the program is gone; it may be already.

    Args:
        descriptor: The reading end, inherited. It is closed.

    Returns:
        The reading end in a description of its own, whose signal is this process's.

    Raises:
        OSError: The system has no such thing (some emulations of Linux do not).
    """
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    except BaseException:
        os.close(own)
        raise
    os.close(descriptor)
    try:
        gone = os.read(own, 1) == b""
    except BlockingIOError:
        gone = False
    if gone:  # before the signal was asked for
        os._exit(0)
    return own
