"""Programs of the user's, as the tests run them in hundreds: each is a process of its own.

    subprocess.run([sys.executable, "script.py"], cwd=folder, ...)       0.30 s of a processor
    run_program("script.py", cwd=folder)                                 0.15 s

A program is forked from a process that has imported the package (``support_zygote.py``). A test
of what happens at the import, of the interpreter's options or of its streams starts an
interpreter itself.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

TESTS = Path(__file__).parent


class Zygote:
    """The process that programs are forked from: one, until this process ends.

    Attributes:
        pid: Its process id; ``None`` before the first program.
        fd: Descriptor of this end of its socket.
    """

    def __init__(self) -> None:
        self.pid: int | None = None
        self.fd: int | None = None
        # One program at a time.
        self.turn = threading.Lock()

    def connect(self) -> socket.socket:
        """Start it, if it does not run, and return its socket."""
        if self.pid is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            number = theirs.fileno()
            code = f"import support_zygote; exec(*support_zygote.serve({number}))"
            path = filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    cwd="/",
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                    pass_fds=[number],
                    stdin=subprocess.DEVNULL,
                )
            self.pid, self.fd = self._process.pid, self._socket.fileno()
            atexit.register(self._end, os.getpid())
        return self._socket

    def _end(self, owner: int) -> None:
        if owner == os.getpid():
            self._socket.close()
            self._process.wait()


ZYGOTE = Zygote()


def run_program(
    *arguments: str | Path,
    cwd: Path,
    stdin: str = "",
    timeout_s: float = 90,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program as ``python ARGUMENTS`` does, until it and its output have ended.

    Args:
        arguments: A script's path, or ``-c`` and a text, or ``-``; then what is for the program.
            For anything else an interpreter is started.
        cwd: Its working directory.
        stdin: Text of its standard input.
        timeout_s: Seconds until it is killed.
        env: Its environment; this process's if not given.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = dict(os.environ if env is None else env)
    if _needs_an_interpreter(command[1:], environment):
        return subprocess.run(
            command, input=stdin, cwd=cwd, env=environment, timeout=timeout_s,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    message = json.dumps([command[1:], str(cwd), environment]).encode()
    pipes = [os.pipe() for _ in range(3)]
    (theirs_in, to_stdin), (output, theirs_out), (errors, theirs_err) = pipes
    os.write(to_stdin, stdin.encode())
    os.close(to_stdin)
    with ZYGOTE.turn, open(output, "rb") as out, open(errors, "rb") as err:
        zygote = ZYGOTE.connect()
        socket.send_fds(zygote, [message], [theirs_in, theirs_out, theirs_err])
        for stream in (theirs_in, theirs_out, theirs_err):
            os.close(stream)
        pid = int(zygote.recv(100))
        said = _read([out.fileno(), err.fileno()], until=time.monotonic() + timeout_s)
        if said is None:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(int(zygote.recv(100)))
    if said is None:
        raise subprocess.TimeoutExpired(command, timeout_s)
    return subprocess.CompletedProcess(command, code, *said)


def _needs_an_interpreter(arguments: list[str], environment: Mapping[str, str]) -> bool:
    """Tell whether something is asked for that is read when an interpreter starts."""
    plain = arguments and (arguments[0] in ("-c", "-") or arguments[0].endswith(".py"))
    here, there = (
        {name: value for name, value in one.items() if name.startswith("PYTHON")}
        for one in (os.environ, environment)
    )
    there.pop("PYTHONPATH", None)
    here.pop("PYTHONPATH", None)
    return not plain or here != there or sys.platform != "linux"


def _read(pipes: list[int], *, until: float) -> list[str] | None:
    """Read pipes to their ends; return nothing if those do not come in time."""
    said = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, until - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                more = os.read(key.fd, 1 << 16)
                said[key.fd] += more
                if not more:
                    selector.unregister(key.fd)
    return [text.decode() for text in said.values()]
