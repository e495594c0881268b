"""What tests of logging run in workers, and a handler that keeps what it is given."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from support_tasks import wait_for

log = logging.getLogger("support.logging")


class Kept(logging.Handler):
    """Keeps records, and who handled them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.threads.add(threading.current_thread().name)
        self.records.append(record)

    @property
    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


class Stubborn:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def __repr__(self) -> str:
        return "<stubborn>"


class Hostile(Stubborn):
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise ValueError("not shown")


class NotHere:
    """Can be pickled in a worker, and not be unpickled in the program."""

    def __init__(self, program: int) -> None:
        self.program = program

    def __reduce__(self) -> Any:
        return _unless_in, (self.program,)


def _unless_in(program: int) -> str:
    if os.getpid() == program:
        raise LookupError("not in the program")
    return "in the worker"


class Word(str):
    """A str that is not one."""

    __slots__ = ()


def say(message: object, *arguments: object, level: int = logging.WARNING, **extra: Any) -> int:
    log.log(level, message, *arguments, extra=extra)
    return os.getpid()


def say_numbers(count: int, width: int = 0) -> int:
    for number in range(count):
        log.warning("%d %s", number, "x" * width)
    return count


def say_number_and_return(number: int) -> int:
    if number % 3:
        log.warning("%d", number)
    return number


def say_in_a_thread(message: str) -> None:
    thread = threading.Thread(target=log.warning, args=(message,), name="a thread of the task")
    thread.start()
    thread.join()


def say_that_it_failed() -> None:
    try:
        {}["on purpose"]
    except LookupError:
        log.exception("it failed")


def say_where() -> None:
    log.warning("here", stack_info=True)


def say_by(name: str, message: str, *, propagate: bool = True, null: bool = False) -> None:
    logger = logging.getLogger(name)
    logger.propagate = propagate
    if null:
        logger.addHandler(logging.NullHandler())
    logger.warning(message)


def wanted(*names: str) -> list[int]:
    return [logging.getLogger(name).getEffectiveLevel() for name in names]


def is_debug_wanted(name: str) -> bool:
    return logging.getLogger(name).isEnabledFor(logging.DEBUG)


def say_and_end(message: str) -> None:
    log.warning(message)
    os._exit(3)


def say_until_there(path: str, count: int, width: int) -> int:
    """Log, then make the file: proof that nothing has waited for the program."""
    say_numbers(count, width)
    Path(path).touch()
    return count


def configure(path: str) -> None:
    logging.basicConfig(filename=path, level=logging.INFO, format="%(message)s")


def say_during_signals(count: int) -> int:
    """Log in the main thread and, in the middle of that, in a signal's handler."""
    said = 0

    def handler(_number: int, _frame: object) -> None:
        nonlocal said
        said += 1
        log.warning("signal")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        say_numbers(count, 300)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return said


def leave_threads_that_log(threads: int, count: int) -> None:
    for place in range(threads):
        thread = threading.Thread(target=say_numbers, args=(count, 100 + place), daemon=True)
        thread.start()


def fork_while_threads_log(path: str) -> int:
    """Fork again and again; each child logs as well, which must reach nobody."""
    threads = [threading.Thread(target=say_numbers, args=(100, 2000)) for _ in range(2)]
    for thread in threads:
        thread.start()
    failed = 0
    for _ in range(20):
        child = os.fork()
        if not child:
            null = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(null, 2)
            signal.alarm(20)  # one that hangs is ended, and seen
            log.warning("from a child")
            os._exit(0)
        failed += os.waitpid(child, 0)[1] != 0
    for thread in threads:
        thread.join()
    return failed


def crash() -> None:
    """Crash as native code does, with faulthandler as the worker has set it up."""
    import ctypes

    assert faulthandler.is_enabled()
    ctypes.string_at(0)


def crash_in_a_fork() -> int:
    """Return the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        crash()
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def sleep_here(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def sleep_in_thread(seconds: float) -> None:
    thread = threading.Thread(target=sleep_here, args=(seconds,))
    thread.start()
    thread.join()


def sum_here(size: int, times: int) -> None:
    import numpy as np

    numbers = np.ones(size)
    for _ in range(times):
        numbers.sum()


_held: list[bytes] = []


def hold(size_bytes: int, threads: int = 0) -> int:
    """Keep memory, and threads that wait, as long as this process lives."""
    _held.append(b"x" * size_bytes)
    for _ in range(threads):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def take_the_handler_away(number: int) -> None:
    faulthandler.unregister(number)


def leave_a_thread(path: str) -> int:
    """Start a thread that ends when the file is there, and for which this process waits."""
    threading.Thread(target=wait_for, args=(path,)).start()
    return os.getpid()


def hold_for_a_moment(size_bytes: int) -> int:
    """Hold memory, and give it back to the system before the end."""
    held = b"x" * size_bytes
    del held
    return os.getpid()


def say_by_the_module(message: str) -> list[logging.Handler]:
    """Log without a logger; return the handlers that the root logger has then."""
    logging.warning(message)  # noqa: LOG015 -- as people do
    return logging.getLogger().handlers
