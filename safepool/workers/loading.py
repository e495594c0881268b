"""Protection of workers against modules that start a pool when a worker imports them for a call.

That pool's worker would import the module again, and so on: a chain of processes without an end.
The standard library's ``spawn`` raises an error in this case; ``fork`` does not have it.

The program's own script is such a module if the fork server runs it and its top level requests a
pool.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import NoReturn

from safepool.transport import payloads

script_is_run = False
"""Whether this process is a fork server that runs the script's top level at this moment."""

asked_for: str = ""
"""Name of what the top level tried to start, in any thread, even if it caught the error."""


class AskedForPoolError(BaseException):
    """The script's top level asks for a pool or a process while the fork server runs it.

    It is no ``Exception``: it ends the run, even if the script catches exceptions.
    """


def refuse(what: str) -> NoReturn:
    """End the run of the script."""
    global asked_for  # noqa: PLW0603 -- a fact about this process
    asked_for = what
    raise AskedForPoolError(what)


def check_no_import() -> None:
    """Refuse to start a pool while a worker imports a module in order to read a call.

    Raises:
        RuntimeError: This process is a worker that is importing such a module.
        AskedForPoolError: This process is the fork server, which runs the script.
    """
    if script_is_run:
        refuse("it asks for a pool")
    frame: FrameType | None = sys._getframe(1)
    module = ""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>":
            module = str(frame.f_globals.get("__name__", code.co_filename))
        elif code is payloads.loads.__code__ and module and _in_a_worker(frame):
            raise RuntimeError(
                f"module {module} starts a process pool when it is imported, and this worker "
                f"imports {module} to find one of its functions: the new pool's workers would "
                f"import {module} too, and start pools without end. Start the pool in a function "
                f"of {module}, or below if __name__ == '__main__':"
            )
        frame = frame.f_back


def _in_a_worker(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "safepool.workers.runner":
            return True
        frame = frame.f_back
    return False
