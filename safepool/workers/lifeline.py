"""The life-line: a pipe by which the kernel ends a process when the program has ended.

Only the program holds the writing end. Each process that must not outlive the program holds the
reading end in a separate file description. The process asks the kernel for ``SIGKILL`` when that
end becomes readable, which is when the last writer has gone (fcntl(2), ``F_SETOWN``, ``F_SETSIG``,
``O_ASYNC``). Hence a worker ends even in the middle of C code, however the program ends, and
survives the end of the fork server. ``PR_SET_PDEATHSIG`` cannot give both: it reports the server's
end, not the program's.

Each worker has a second life-line, whose writing end only the program holds: closing that end ends
this worker alone. The kernel asks whether the *worker* may signal itself, not whether the program
may: so it also ends a worker of a program that has given up root.

Not covered:
    * A task that closes every descriptor: the worker ends when it wants to answer.
    * Linux before 5.6, which sends the signal when any description is closed, so that each
      worker's end would end all others. There, workers end with the fork server, which ends with
      the program (``birth``).

Source: Linux, fs/pipe.c, ``pipe_release``, before and after 6551d5c56eb0 ("pipe: make sure to
wake up everybody when the last reader/writer closes").
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import signal
import sys

from safepool import linux

assert sys.platform == "linux"

_SINCE_LINUX = (5, 6)


def hold(descriptor: int) -> int:
    """End this process by ``SIGKILL`` as soon as the program is gone. Returns the new reading end.

    Raises ``OSError`` on some emulations of Linux, and old versions.
    """
    if not _is_there():
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, linux.F_SETSIG, signal.SIGKILL)
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


@functools.cache  # a worker's fork server has asked
def _is_there() -> bool:
    return _tells_of_the_last_writer(os.uname().release)


def _tells_of_the_last_writer(release: str) -> bool:
    """Return whether, by the kernel's release, only the program's end sends the signal.

    Example:
        >>> [_tells_of_the_last_writer(one) for one in ("4.18.0-553.el8.x86_64", "5.6.0", "6.1")]
        [False, True, True]
    """
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _SINCE_LINUX
