"""A process that has imported the package, and forks into a program when it is told to.

Half of the time of a small program is the import; here it is imported once for all of them.
``support_programs.py`` starts the process, and says what is run.

Not covered: what an interpreter reads only when it starts, as its options. And the package is
there before the program's first line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from multiprocessing import process
from typing import TYPE_CHECKING

import safepool

if TYPE_CHECKING:
    import types

# The names are looked up when they are first used. Nothing is imported that starts a thread.
_ = [getattr(safepool, name) for name in safepool.__all__ if name != "parallel_backend"]


def serve(number: int) -> tuple[types.CodeType, dict[str, object]]:
    """Fork for each message until the socket ends; in the child, return what is to be run.

    Args:
        number: Descriptor of a socket (``SOCK_SEQPACKET``). A message is the arguments of
            :func:`_become`, as JSON, and brings standard input, output and error. It is answered
            by the process id, and by the status of :func:`os.waitpid` at the end.
    """
    with socket.socket(fileno=number) as ours:
        while True:
            message, streams, _, _ = socket.recv_fds(ours, 1 << 20, 3)
            if not message:
                sys.exit()
            child = os.fork()
            if child == 0:
                break
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(OSError):  # whoever asked no longer waits
                ours.send(str(child).encode())
                ours.send(str(os.waitpid(child, 0)[1]).encode())
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    return _become(*json.loads(message))


def _become(
    arguments: list[str], cwd: str, environment: dict[str, str]
) -> tuple[types.CodeType, dict[str, object]]:
    """Look like an interpreter that was started with these arguments."""
    os.chdir(cwd)
    process.ORIGINAL_DIR = cwd  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(environment)
    # Nothing of this module stays: it is not the program's.
    del sys.modules[__name__]
    sys.path.remove(os.path.dirname(__file__))
    asked = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [entry for entry in asked if entry and entry not in sys.path]
    sys.orig_argv[1:] = arguments
    space = vars(sys.modules["__main__"])
    kept = {"__builtins__": space["__builtins__"], "__name__": "__main__"}
    space.clear()
    space.update(kept, __doc__=None, __package__=None, __loader__=None, __spec__=None)
    if arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        return compile(arguments[1], "<string>", "exec", dont_inherit=True), space
    sys.argv[:] = arguments
    if arguments[0] == "-":
        return compile(sys.stdin.read(), "<stdin>", "exec", dont_inherit=True), space
    path = os.path.join(cwd, arguments[0])
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    space.update(__file__=path, __cached__=None)
    with open(path, "rb") as file:
        return compile(file.read(), path, "exec", dont_inherit=True), space
