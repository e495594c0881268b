"""What tests run in workers. On the path of every test, so importable in a worker."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any


def itself(value: Any) -> Any:
    return value


def a_third(of: int) -> Fraction:
    return Fraction(of, 3)


def do_or_return(value: Any) -> Any:
    return value() if callable(value) else value


def square(x: int) -> int:
    return x * x


def zeros(size_bytes: int) -> bytes:
    return bytes(size_bytes)


def add(*numbers: int, more: int = 0) -> int:
    return sum(numbers) + more


def pid(_: object = None) -> int:
    return os.getpid()


def sleep_and_return(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def value_and_pid(value: int) -> tuple[int, int]:
    time.sleep(0.002)
    return value, os.getpid()


def raise_value_error(text: str = "broken on purpose") -> None:
    raise ValueError(text)


def exit_with_3() -> None:
    sys.exit(3)


def end_without_cleanup() -> None:
    os._exit(7)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed_with(_: object) -> None:
    be_killed()


def ignore_sigterm_and_sleep(path: str, seconds: float) -> None:
    """Write the process id down when that is done, all of it at once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(f"{path}-new").write_text(str(os.getpid()))
    os.replace(f"{path}-new", path)
    time.sleep(seconds)


def leave_a_thread() -> None:
    threading.Thread(target=threading.Event().wait).start()


def write_at_exit(path: str, seconds: float) -> None:
    """Let the worker take this long to end, and write then."""

    def write() -> None:
        time.sleep(seconds)
        with open(path, "w", encoding="ascii") as file:
            file.write("at exit")

    atexit.register(write)


def segfault() -> None:
    import faulthandler

    faulthandler.disable()
    ctypes.string_at(0)


def be_killed_while_answering(size_bytes: int) -> bytes:
    """Return a result of which a part is written, into a file or a socket, when it is killed."""

    def watch(_frame: object, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ in ("pwrite", "send", "sendmsg"):
            be_killed()

    sys.setprofile(watch)
    return bytes(size_bytes)


class SlowToUnpickle:
    """Killed while it is read: unpickling it in a worker ends the worker."""

    def __init__(self, owner: int) -> None:
        self.owner = owner

    def __reduce__(self) -> tuple[Any, ...]:
        return _kill_unless_owner, (self.owner,)


def _kill_unless_owner(owner: int) -> None:
    if os.getpid() != owner:
        be_killed()


class TwoArguments(Exception):  # noqa: N818
    """Can be pickled, cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_two_arguments() -> None:
    raise TwoArguments(1, 2)


class FalseError(Exception):
    def __bool__(self) -> bool:
        return False


def raise_false_error() -> None:
    raise FalseError("still an error")


def return_lock() -> object:
    return threading.Lock()


class RaisesWhenUnpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return raise_value_error, ("raised by unpickling",)


def return_raiser() -> object:
    return RaisesWhenUnpickled()


def raise_locked() -> None:
    error = ValueError("holds a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    raise error


_marks: list[str] = []


def mark(text: str) -> None:
    _marks.append(text)


def marks(_: object = None) -> list[str]:
    return _marks


def fail_to_initialize() -> None:
    raise RuntimeError("no initializer today")


def native_pools(import_first: str | None = None) -> list[tuple[str, int]]:
    """Import a library in this process, and return (library, threads) of every native pool."""
    import importlib

    import threadpoolctl

    for name in (import_first or "").split():
        importlib.import_module(name)
    if "numpy" in sys.modules:
        import numpy as np

        _ = np.ones((200, 200)) @ np.ones((200, 200))
    found = threadpoolctl.threadpool_info()
    return [(pool["internal_api"], pool["num_threads"]) for pool in found]


def threads_of_this_process() -> int:
    """Count them, but for jemalloc's own: an allocator in some wheels, not a pool."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return len([name for name in names if name != "jemalloc_bg_thd"])


def cpus_after_a_while(seconds: float) -> list[int]:
    """Keep a worker busy, so that others are started too; return where it may run."""
    time.sleep(seconds)
    return sorted(os.sched_getaffinity(0))


def environment(_: object = None) -> dict[str, str]:
    return dict(os.environ)


def open_descriptors(_: object = None) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return found


def sleep_in_c(seconds: int) -> None:
    """Sleep in C with the interpreter lock held, so that no Python thread can run."""
    ctypes.PyDLL(None).sleep(seconds)


def append_line(path: str, text: object) -> object:
    """Leave a line in a file that several processes write to, whole or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{text}\n".encode())
    finally:
        os.close(descriptor)
    return text


def stop_after_answer() -> int:
    """Let this worker be stopped (SIGSTOP) as soon as its answer is sent."""

    def watch(frame: Any, event: str, _argument: object) -> None:
        if event == "return" and frame.f_code.co_qualname == "Answers.flush":
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.setprofile(watch)
    return os.getpid()


def do(what: Any) -> Any:
    """Call what it is given: one function, and so one pace, for different things."""
    return what()


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def touch_and_sleep(path: str, seconds: float) -> None:
    Path(path).touch()
    time.sleep(seconds)


def wait_for(path: str, value: Any = None) -> Any:
    """Return the value when the file is there: it is up to the test how long a call takes."""
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return value


def touch_or_wait(path: str) -> str:
    """Make a file; one whose name begins with an exclamation mark is waited for."""
    if path.startswith("!"):
        wait_for(path[1:])
    else:
        Path(path).touch()
    return path


def touch_and_wait_for(begun: str, path: str) -> None:
    Path(begun).touch()
    wait_for(path)


def log(path: str, value: int, seconds: float = 0.0) -> int:
    """Write down, in one write, that this ran."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{value}\n".encode())
    os.close(descriptor)
    time.sleep(seconds)
    return value


def log_with(path: str, value: int, _: object) -> int:
    return log(path, value)


def log_and_die_once(path: str, value: int) -> int:
    log(path, value)
    if Path(path).read_text().split().count(str(value)) == 1:
        be_killed()
    return value


def start_a_child_and_sleep(path: str, seconds: float) -> None:
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    Path(path).write_text(f"{os.getpid()} {child.pid}\n")
    time.sleep(seconds)


def clean_up_on_sigterm(started: str, cleaned: str, seconds: float) -> None:
    def clean_up(_number: int, _frame: object) -> None:
        time.sleep(seconds)
        Path(cleaned).write_text("done")
        sys.exit()

    signal.signal(signal.SIGTERM, clean_up)
    Path(started).touch()
    time.sleep(60)


_queue: Any = None


def keep_queue(queue: Any) -> None:
    global _queue  # noqa: PLW0603 -- what initializers are for
    _queue = queue


def put_into_queue(value: object) -> None:
    _queue.put(value)


class Remembered:
    pass


_remembered: list[weakref.ref[Remembered]] = []


def remember(argument: Remembered, fail: bool) -> Remembered:
    """Return the argument, or raise an exception whose traceback refers to it."""
    _remembered.append(weakref.ref(argument))
    if fail:
        raise ValueError(argument)
    return argument


def remembered() -> int:
    """Tell how many of them still live in this process."""
    gc.collect()
    return sum(reference() is not None for reference in _remembered)


def append_somewhere(value: Any, *_more: Any) -> int:
    """Append to the first list that is found in a value; return its length."""
    while not isinstance(value, list) or (value and not isinstance(value[0], int)):
        if isinstance(value, dict):
            value = next(iter(value.values()))
        elif isinstance(value, (list, tuple)):
            value = value[0]
        else:
            value = next(iter(vars(value).values()))
    value.append(len(value))
    return len(value)


_order: list[int] = []


def remember_order() -> None:
    _order.clear()


def note_order(number: int) -> int:
    _order.append(number)
    return number


def order() -> list[int]:
    return _order


class Returned:
    """Arrives where it was asked for as what a function makes of a value."""

    def __init__(self, make: Any, value: Any) -> None:
        self.make, self.value = make, value

    def __reduce__(self) -> Any:
        return self.make, (self.value,)


class ReturnedError(Exception):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def __reduce__(self) -> Any:
        return _returned_error, (Returned(self.make, 1),)


def _returned_error(_: Any) -> Exception:
    return ValueError("arrived")


def raise_returned(make: Any) -> None:
    raise ReturnedError(make)


def log_warning(logger: str, text: str) -> None:
    import logging

    logging.getLogger(logger).warning(text)


def fail_at_three(number: int) -> int:
    if number == 3:
        raise KeyError(number)
    return number
