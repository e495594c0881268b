"""Other processes, seen from a test. Linux: ``/proc`` is the source."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support_programs import run_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TESTS = Path(__file__).parent


def cpus() -> int:
    """Return the CPUs that this process may run on: no more than there are (``taskset``)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_python(
    *arguments: str, cwd: Path, stdin: str = "", timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, with the tests' own modules on its path."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return run_program(*arguments, cwd=cwd, stdin=stdin, timeout_s=timeout_s, env=environment)


def run_script(
    script: str, *, cwd: Path, timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """Run a program from a file, in a directory of its own."""
    (cwd / "script.py").write_text(textwrap.dedent(script))
    return run_python("script.py", cwd=cwd, timeout_s=timeout_s)


def kill(pids: Iterable[int]) -> None:
    """Kill those that are left: one that died before may not have been noticed yet."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(is_so: Callable[[], object], *, within_s: float = 60) -> None:
    """Return when it is so.

    Raises:
        AssertionError: It never was.
    """
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


def still_alive(pids: list[int], *, after_s: float) -> list[int]:
    """Return the processes that live on after so many seconds; a zombie does not live.

    The seconds are those of a machine with nothing else to do. Only the time counts for which this
    process has slept: one that was kept from running, with the whole machine or for others' sake,
    says nothing of those that it looks at. And of that only the part which each process gets that
    wants to run.
    """
    left_s = after_s
    while (alive := [pid for pid in pids if _is_alive(pid)]) and left_s > 0:
        time.sleep(0.01)
        left_s -= 0.01 * _share_of_a_cpu()
    return alive


def ends(program: subprocess.Popen[Any], *, within_s: float) -> bool:
    """Wait for the end of a program, so many seconds as in `still_alive`."""
    left_s = within_s
    while program.poll() is None and left_s > 0:
        time.sleep(0.01)
        left_s -= 0.01 * _share_of_a_cpu()
    return program.poll() is not None


def _share_of_a_cpu() -> float:
    """Return the part of a CPU for each thread of the machine that wants to run: 0.1 to 1."""
    try:
        running, _, _ = Path("/proc/loadavg").read_text().split()[3].partition("/")
    except OSError:
        return 1.0
    return max(0.1, min(1.0, cpus() / max(1, int(running))))


def has_ended(pid: int) -> bool:
    """Tell whether a process has ended; a zombie has."""
    return not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Screen:
    """The other end of a program's terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._shown = b""

    def press(self, keys: bytes) -> None:
        r"""Type something; ``b"\x03"`` is Ctrl-C."""
        os.write(self._descriptor, keys)

    def until(self, words: str) -> list[str]:
        """Wait for a whole line that begins so, and return the lines up to it.

        Raises:
            AssertionError: The program ended, or said nothing for half a minute.
        """
        while not any(line.startswith(words) for line in self._lines()[:-1]):
            assert self._read(30.0), self._shown
        return self._lines()[:-1]

    def rest(self) -> list[str]:
        """Return all lines, when the program has ended."""
        while self._read(1.0):
            pass
        return self._lines()

    def _lines(self) -> list[str]:
        return self._shown.decode(errors="replace").replace("\r\n", "\n").split("\n")

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._descriptor, 4096)
        except OSError:  # nobody has the terminal any more
            return False
        self._shown += data
        return bool(data)


@contextlib.contextmanager
def terminal(code: str, *, cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    """Run a script at a terminal of its own, in the foreground."""
    import fcntl
    import termios

    (cwd / "script.py").write_text(textwrap.dedent(code))
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a function run between fork and exec.
            warnings.simplefilter("ignore", DeprecationWarning)
            script = subprocess.Popen(
                [sys.executable, "script.py"],
                cwd=cwd,
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                preexec_fn=take_terminal,  # noqa: PLW1509 -- one system call, no lock
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
        os.close(theirs)
        theirs = -1
        try:
            yield script, Screen(ours)
        finally:
            script.kill()
            script.wait()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def in_a_fork(ask: Callable[[], object]) -> str:
    """Return the ``repr`` of what ``ask`` returns in a fork of this process, or its error's text.

    A fork that waits is ended by a signal.
    """
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                told = repr(ask())
            except BaseException as error:
                told = f"{type(error).__name__}: {error}"
            os.write(sender, told.encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as stream:
        told = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the fork has waited"
    return told
