"""What tests of endings run in workers. On the path of every test, so importable in a worker."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from support_tasks import wait_for

# A program that ignores SIGTERM, says who it is, and waits.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(60)
"""


def note(path: str, text: object) -> None:
    """Add a line to a file; one write, so that several processes may."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


def lines(path: str | Path) -> list[str]:
    return Path(path).read_text().split() if os.path.exists(path) else []


def tell_results_late() -> None:
    """An initializer: results are sent with the last one of their message, as if all were fast."""
    from safepool.workers import runner

    runner._FLUSH_NS = 10**12


def note_and_wait(path: str, number: int, seconds: float) -> int:
    note(path, number)
    time.sleep(seconds)
    return number


def note_and_call(path: str, item: Any) -> Any:
    """Return a number, call anything else."""
    note(path, item if isinstance(item, int) else "call")
    return item() if callable(item) else item


def crash_in_native_code() -> None:
    """Read address 0; the interpreter's fault handler is as the worker has it."""
    ctypes.string_at(0)


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)


def exit_with_0() -> None:
    os._exit(0)


def wait_and_exit(gate: str, code: int) -> None:
    wait_for(gate)
    os._exit(code)


def note_and_end(path: str, how: str, gate: str) -> None:
    """An initializer that ends its worker when it may, having said that it was started."""
    note(path, os.getpid())
    wait_for(gate)
    if how == "sys.exit":
        sys.exit(3)
    if how == "raise":
        raise RuntimeError("no initializer today")
    if how == "slowly":  # the pool learns of the channel's end at once, and of the worker's later
        os.closerange(3, 100)
        time.sleep(0.3)
    if how in ("os._exit", "slowly"):
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


def note_and_end_before_the_first_task(path: str) -> None:
    """An initializer that ends well, and its worker ends when a task arrives."""
    from safepool.workers.runner import Runner

    note(path, os.getpid())
    Runner._claim = lambda *_: os._exit(3)  # type: ignore[assignment,method-assign,return-value]


def note_and_die(path: str) -> None:
    note(path, os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


def die_the_first_times(path: str, times: int) -> int:
    """Be killed in the first calls, and return how many there were."""
    note(path, os.getpid())
    count = len(lines(path))
    if count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


def note_and_raise(path: str) -> None:
    note(path, os.getpid())
    raise ValueError("an answer, not a loss")


def note_and_sleep(path: str, seconds: float) -> None:
    note(path, os.getpid())
    time.sleep(seconds)


def sleep_with_a_stubborn_family(path: str) -> None:
    """Start a child that starts another; all three wait, the children ignore SIGTERM."""
    inner = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {path!r}])"
    )
    subprocess.Popen([sys.executable, "-c", f"{inner}\n{STUBBORN}", path])
    here_it_sleeps()


def here_it_sleeps() -> None:
    time.sleep(60)


def spawn_a_holder(path: str) -> int:
    """Leave a program behind that holds every descriptor of this worker."""
    # Without a fork in Python: such a child belongs to the worker's own code.
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        pass_fds=[int(name) for name in os.listdir("/proc/self/fd") if _is_open(int(name))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    note(path, child.pid)
    return child.pid


def spawn_a_holder_and_die(path: str) -> None:
    spawn_a_holder(path)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def close_all_and_sleep(seconds: float) -> None:
    os.closerange(3, 100)
    time.sleep(seconds)


def close_all_and_return(size_bytes: int) -> bytes:
    os.closerange(3, 100)
    return bytes(size_bytes)


kept: list[int] = []


def fill() -> int:
    """Open files until the system refuses, keep them, and return its error's number."""
    try:
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno or 0


def use_up_descriptors() -> int:
    """Lower the limit and meet it."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    return fill()


def open_one_more() -> None:
    os.close(os.open(os.devnull, os.O_RDONLY))


def large_sum(data: bytes) -> int:
    return len(data)


class SlowToFail:
    """Unpickled, it raises after a while."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _fail_slowly, ()


def _fail_slowly() -> None:
    time.sleep(0.2)
    raise ValueError("slow to fail")


class SlowToRead:
    """Unpickling it takes a while, and gives a number."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_slowly, (self.seconds,)


def _read_slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


class KillsWhenPickled:
    """As a result: its worker is killed while it pickles the answer."""

    def __reduce__(self) -> tuple[Any, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        return int, ()


def return_killer() -> object:
    return KillsWhenPickled()


def ignore_sigterm_and_sleep(path: str, seconds: float) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(path, os.getpid())
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
