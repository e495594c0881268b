"""Floor 0: the errors of the package and their messages. The module imports only ``shown``.

Every error keeps its facts as attributes and builds its message from them. Errors can be pickled:
the arguments go to ``super().__init__`` unchanged. Each class derives from the standard library's
error in existing ``except`` clauses:

    WorkerDiedError   a BrokenProcessPool: the task's worker died, or exceeded memory_limit=; other
                      tasks go on
    TaskTimeoutError  a TimeoutError: the task ran for more than its timeout=
    MemoryLimitError  a MemoryError: no room for a task's arguments or result
    PoolBrokenError   a BrokenProcessPool: the whole pool is broken, because its initializer raised
                      or no worker can be started
    RemoteTaskError   the class of the task's exception cannot be pickled; its text is sent
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool, _RemoteTraceback
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, TracebackType

from safepool.shown import printable

FROM_OUTSIDE = frozenset({-signal.SIGTERM, -getattr(signal, "SIGKILL", signal.SIGTERM)})
"""Exit codes that say nothing about the code that ran: the out-of-memory killer and service
managers send these signals to any process."""


class SafepoolError(Exception):
    """Base class of all errors of this package: ``except SafepoolError`` catches each of them.

    Example:
        >>> issubclass(WorkerDiedError, SafepoolError)
        True
    """


class UnreadableLimitError(SafepoolError, ValueError):
    """A limit's text has a shape that its documentation does not give it.

    :func:`safepool.read_limits` does not raise it: it goes on without that limit, and its
    ``skipped`` says why.

    Attributes:
        source: The file or variable that was read.
        found: Text of the source, word for word.
        expected: The documented shape.

    Example:
        >>> error = UnreadableLimitError("NSLOTS", "many", "a positive whole number")
        >>> str(error).partition(". ")[0]
        "cannot read a limit from NSLOTS: expected a positive whole number, found 'many'"
    """

    def __init__(self, source: str, found: str, expected: str) -> None:
        super().__init__(source, found, expected)
        self.source = source
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        found = self.found if len(self.found) <= 80 else self.found[:77] + "..."
        return (
            f"cannot read a limit from {printable(self.source)}: expected {self.expected}, "
            f"found {found!r}. Pass max_workers= to set the number of workers yourself."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """Counts of the kernel when its out-of-memory killer took a worker.

    Attributes:
        kills_before: Number of processes of the pool's group that the killer had taken before.
        kills: The same number afterwards, larger by one or more.
        source: File of the counts: ``oom_kill`` in ``memory.events`` (version 1:
            ``memory.oom_control``).
        limit_bytes: The ceiling that was used up. ``None`` if no visible group had reached its
            ceiling: the cause is then a group that is not visible, or the machine's memory.
        used_bytes: Peak use of the group with the ceiling, page cache included; ``None`` if
            unknown.
        group: Directory of the group with the ceiling. Without a ceiling, that of the pool's
            group.

    Example:
        >>> one = OutOfMemory(
        ...     kills_before=0, kills=1, source="/sys/fs/cgroup/job/memory.events",
        ...     limit_bytes=1 << 30, used_bytes=1 << 30, group="/sys/fs/cgroup/job",
        ... )
        >>> str(one).partition(". ")[0]  # doctest: +NORMALIZE_WHITESPACE
        'the limit of 1,024 MiB in /sys/fs/cgroup/job was used up (1,024 MiB used at the peak,
        oom_kill 0 -> 1)'
    """

    kills_before: int
    kills: int
    source: str
    limit_bytes: int | None
    used_bytes: int | None
    group: str

    def __str__(self) -> str:
        counted = f"oom_kill {self.kills_before} -> {self.kills}"
        group, source = printable(self.group), printable(self.source)
        if self.limit_bytes is None:
            return (
                "no visible limit was used up. The cause is the machine's memory or a limit above "
                f"{group} ({counted} in {source}). Run fewer workers: see max_workers="
            )
        used = (
            "" if self.used_bytes is None else f"{_mebibytes(self.used_bytes)} used at the peak, "
        )
        told = f"{used}{counted}"
        if not source.startswith(f"{group}/memory."):
            told += f" in {source}"
        return (
            f"the limit of {_mebibytes(self.limit_bytes)} in {group} was used up ({told}). "
            "Run fewer workers: see max_workers= and memory_per_worker="
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryExceeded:
    """Memory of a worker that the pool killed for ``memory_limit``.

    Attributes:
        limit_bytes: The value of ``memory_limit``.
        held_bytes: The worker's resident memory, without shared memory, mapped files and
            ``born_bytes``.
        born_bytes: Memory that the worker had at its birth, as a fork of the server or of the
            program.
        source: File of the figures.

    Example:
        >>> str(MemoryExceeded(
        ...     limit_bytes=2 << 30, held_bytes=2310 << 20, born_bytes=12 << 20,
        ...     source="/proc/4711/statm",
        ... ))  # doctest: +NORMALIZE_WHITESPACE
        'it held 2,310 MiB, and memory_limit= is 2,048 MiB (resident minus shared memory in
        /proc/4711/statm, minus the 12 MiB that it started with). Raise memory_limit=, or use less
        memory in each task'
    """

    limit_bytes: int
    held_bytes: int
    born_bytes: int
    source: str

    def __str__(self) -> str:
        return (
            f"it held {_mebibytes(self.held_bytes)}, and memory_limit= is "
            f"{_mebibytes(self.limit_bytes)} (resident minus shared memory in {self.source}, "
            f"minus the {_mebibytes(self.born_bytes)} that it started with). Raise memory_limit=, "
            "or use less memory in each task"
        )


class WorkerDiedError(SafepoolError, BrokenProcessPool):
    """The worker that ran this task ended before it gave a result.

    The pool goes on: it replaces the worker, and other tasks are not affected.

    Attributes:
        pid: Process id of the worker.
        exitcode: The same as ``multiprocessing.Process.exitcode``: negative for a signal, ``None``
            if the system does not report it.
        task: Name of the call that the worker ran, such as ``"package.module.function"``.
        stack: Python stack of the worker when native code crashed, or when it exceeded its
            ``memory_limit``, in the format of :mod:`faulthandler`. Otherwise empty.
        oom: Counts of the kernel's out-of-memory killer, if it killed the worker.
        by_pool: ``True`` if the pool itself sent the signal: for ``kill_workers()``,
            ``terminate_workers()`` or Ctrl-C, or because the connection to the worker had failed.
        begun: ``False`` if the worker died before it began the task: a second run is safe. The
            pool itself runs such a task again, unless its arguments were too large to keep.
        exceeded: Memory of the worker, if the pool killed it for its ``memory_limit``.

    Example:
        >>> import os
        >>> from safepool import ProcessPool, WorkerDiedError
        >>> with ProcessPool(1) as pool:
        ...     try:
        ...         pool.submit(os._exit, 3).result()
        ...     except WorkerDiedError as error:
        ...         print(error.exitcode, error.oom)
        ...     pool.submit(abs, -1).result()
        3 None
        1
    """

    def __init__(
        self,
        pid: int,
        exitcode: int | None,
        task: str,
        stack: str = "",
        oom: OutOfMemory | None = None,
        by_pool: bool = False,
        begun: bool = True,
        exceeded: MemoryExceeded | None = None,
    ) -> None:
        super().__init__(pid, exitcode, task, stack, oom, by_pool, begun, exceeded)
        # The text of the standard pool from Python 3.15 on.
        told = f"\n'''\nProcess {pid} terminated abruptly with exit code {exitcode}'''"
        cause = _RemoteTraceback(told)  # type: ignore[arg-type]
        BaseException.__setattr__(self, "__cause__", cause)
        self.pid = pid
        self.exitcode = exitcode
        self.task = task
        self.stack = stack
        self.oom = oom
        self.by_pool = by_pool
        self.begun = begun
        self.exceeded = exceeded

    def __str__(self) -> str:
        ending = describe_exit(
            self.exitcode, self.oom, by_pool=self.by_pool, exceeded=self.exceeded
        )
        when = "while it ran" if self.begun else "before it began"
        told = f"worker {self.pid} {ending} {when} {printable(self.task)}"
        why = self.oom or self.exceeded
        if why is not None:
            told += f": {why}"
        return f"{told}\n{self.stack.rstrip()}" if self.stack else told


class MemoryLimitError(SafepoolError, MemoryError):
    """The memory limits leave no room for data of a task, on their way between pool and worker.

    The error ends only the call that the data belongs to. Without it, the kernel's out-of-memory
    killer would have to end a process.

    Attributes:
        wanted_bytes: Size of the copy, or of its remaining part.
        left_bytes: Memory that could still be used, including page cache that can be freed.
        limit_bytes: The ceiling that leaves the least.
        source: File of the ceiling; ``/proc/meminfo`` is the machine's memory.

    Example:
        >>> str(MemoryLimitError(2 << 30, 400 << 20, 512 << 20, "/sys/fs/cgroup/memory.max"))
        ... # doctest: +NORMALIZE_WHITESPACE
        'a copy of 2,048 MiB on its way between pool and worker does not fit: 400 MiB are left of
        512 MiB (/sys/fs/cgroup/memory.max). Send less at once, drop results earlier, or run fewer
        workers (max_workers=, memory_per_worker=)'
    """

    def __init__(self, wanted_bytes: int, left_bytes: int, limit_bytes: int, source: str) -> None:
        super().__init__(wanted_bytes, left_bytes, limit_bytes, source)
        self.wanted_bytes = wanted_bytes
        self.left_bytes = left_bytes
        self.limit_bytes = limit_bytes
        self.source = source

    def __str__(self) -> str:
        return (
            f"a copy of {_mebibytes(self.wanted_bytes)} on its way between pool and worker does "
            f"not fit: {_mebibytes(self.left_bytes)} are left of {_mebibytes(self.limit_bytes)} "
            f"({printable(self.source)}). Send less at once, drop results earlier, or run fewer "
            "workers (max_workers=, memory_per_worker=)"
        )


class TaskTimeoutError(SafepoolError, TimeoutError):
    """A task ran for longer than its timeout and was ended, with its worker.

    Attributes:
        pid: Process id of the worker.
        timeout_s: Seconds that the task had, from its start.
        task: Name of the call, such as ``"package.module.function"``.
        stack: The task's Python stack at the timeout, in the format of :mod:`faulthandler`; empty
            if it is unknown.

    Example:
        >>> import time
        >>> from safepool import ProcessPool, TaskTimeoutError
        >>> with ProcessPool(1, timeout=0.2) as pool:
        ...     try:
        ...         pool.submit(time.sleep, 60).result()
        ...     except TaskTimeoutError as error:  # or the builtin TimeoutError
        ...         print(error.task, error.timeout_s)
        time.sleep 0.2
    """

    def __init__(self, pid: int, timeout_s: float, task: str, stack: str = "") -> None:
        super().__init__(pid, timeout_s, task, stack)
        self.pid = pid
        self.timeout_s = timeout_s
        self.task = task
        self.stack = stack

    def __str__(self) -> str:
        told = (
            f"{printable(self.task)} ran for more than {self.timeout_s:g} s (timeout=) in worker "
            f"{self.pid}; the pool killed the worker. Raise timeout= if the task may take longer"
        )
        return f"{told}\n{self.stack.rstrip()}" if self.stack else told


class PoolBrokenError(SafepoolError, BrokenProcessPool):
    """The whole pool is broken; every task of the pool ends with this error.

    Attributes:
        reason: The reason, in words. ``__cause__`` is the exception that caused it, if any.

    Example:
        >>> from safepool import PoolBrokenError, ProcessPool
        >>> with ProcessPool(1, initializer=int, initargs=("x",)) as pool:
        ...     try:
        ...         pool.submit(abs, -1).result()
        ...     except PoolBrokenError as error:
        ...         type(error.__cause__)
        <class 'ValueError'>
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RemoteTaskError(SafepoolError):
    """Description of a task's exception that could not be sent.

    The pool sends class, arguments and attributes of an exception. This error takes its place if
    the class itself cannot be pickled.

    Attributes:
        type_name: Qualified name of the exception's type.
        text: ``str()`` of the exception.
        reason: The reason why it could not be sent.

    Example:
        >>> from safepool import ProcessPool, RemoteTaskError
        >>> def reject(row):
        ...     class RejectedError(Exception):
        ...         rows = (number for number in range(row))
        ...     raise RejectedError(f"row {row}")
        >>> with ProcessPool(1) as pool:
        ...     try:
        ...         pool.submit(reject, 7).result()
        ...     except RemoteTaskError as error:
        ...         error.text
        'row 7'
    """

    def __init__(self, type_name: str, text: str, reason: str) -> None:
        super().__init__(type_name, text, reason)
        self.type_name = type_name
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.type_name}: {self.text} (sent as text, because its class cannot be pickled: "
            f"{self.reason})"
        )


class TraceFileError(SafepoolError, OSError):
    """The file for a trace cannot be written.

    Attributes:
        errno: The system's error number.
        strerror: The system's error text, or the package's.
        filename: The path of the file.

    Example:
        >>> from safepool import ProcessPool, TraceFileError
        >>> try:
        ...     ProcessPool(1, trace="/no/such/folder/run.json")
        ... except TraceFileError as error:
        ...     error.strerror
        'No such file or directory'
    """

    def __str__(self) -> str:
        return (
            f"cannot write a trace to {printable(str(self.filename))}: {self.strerror}. "
            "Pass trace= a file that can be written and that no other running pool writes, in a "
            "folder that exists"
        )


class RefusedCallError(SafepoolError, OSError):
    """The system refuses a call that a pool needs.

    Attributes:
        errno: The system's error number.
        strerror: The system's error text.
        filename: The call, such as ``"socketpair()"``, or several.

    Example:
        >>> error = RefusedCallError(1, "Operation not permitted", "socketpair()")
        >>> str(error).partition(".")[0]
        'the system refuses socketpair(): Operation not permitted'
    """

    def __str__(self) -> str:
        return (
            f"the system refuses {self.filename}: {self.strerror}. A pool needs this call. Often "
            "a seccomp filter of the container or the service forbids it: allow it there"
        )


REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""Error numbers of a system call that is not allowed, mostly by a seccomp filter."""


@contextmanager
def naming(call: str) -> Iterator[None]:
    """Raise :class:`RefusedCallError` where the system refuses ``call``."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise RefusedCallError(error.errno, error.strerror, call) from error


class MissingExtraError(SafepoolError, ImportError):
    """An optional package is needed and is not installed.

    Attributes:
        package: Name of the missing package.
        remedy: The command that installs it.

    Example:
        >>> str(MissingExtraError("tqdm", "pip install 'safepool[progress]'"))
        "tqdm is not installed. Install it with: pip install 'safepool[progress]'"
    """

    def __init__(self, package: str, remedy: str) -> None:
        super().__init__(package, remedy)
        self.package = package
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.package} is not installed. Install it with: {self.remedy}"


def describe_exit(
    exitcode: int | None,
    oom: OutOfMemory | None = None,
    *,
    by_pool: bool = False,
    exceeded: MemoryExceeded | None = None,
) -> str:
    """Say how a process ended, as the second half of a sentence.

    Args:
        exitcode: The same as ``multiprocessing.Process.exitcode``.
        oom: Counts of the kernel's out-of-memory killer, if that killed the process.
        by_pool: The pool has sent the signal.
        exceeded: Memory of the process, if the pool killed the process for its memory.

    Returns:
        ``"was killed by SIGKILL (often the kernel's out-of-memory killer: ...)"``,
        ``"ended with exit code 3"`` and the like.

    Example:
        >>> describe_exit(-11)
        'was killed by SIGSEGV (a crash in native code)'
        >>> describe_exit(7)
        'ended with exit code 7'
        >>> describe_exit(-9, by_pool=True)
        'was killed by SIGKILL (sent by the pool)'
    """
    if oom is not None:
        return "was killed by the kernel's out-of-memory killer"
    if exceeded is not None:
        return "was killed by the pool for its memory"
    if exitcode is None:
        if by_pool:
            return "cannot be ended: it was sent SIGKILL, and is still there"
        return "ended (the system kept no exit code)"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    hint = " (sent by the pool)" if by_pool else _SIGNAL_HINTS.get(-exitcode, "")
    return f"was killed by {_signal_name(-exitcode)}{hint}"


def text_of(error: BaseException) -> str:
    """Return ``str(error)``, or a substitute if the class raises in ``__str__``.

    Example:
        >>> text_of(ValueError("as it is"))
        'as it is'
    """
    try:
        return str.__str__(str(error))  # a plain one: a subclass of str may not travel
    except BaseException:  # noqa: BLE001 -- user code
        return "(its text is not available)"


def users_frames(
    trace: TracebackType | None, *, at_least_one: bool = True
) -> TracebackType | None:
    """Return a traceback from the first frame on that is the program's own.

    Args:
        trace: Traceback of an exception that has come through this package.
        at_least_one: If all frames are of this package and of its pickler, return the last.
    """
    while trace is not None and _is_ours(trace.tb_frame.f_code):
        if trace.tb_next is None and at_least_one:
            break
        trace = trace.tb_next
    return trace


def without_our_frames(error: BaseException) -> BaseException:
    """Return an error without our frames, and without what there was no memory for."""
    frames = None if isinstance(error, MemoryError) else users_frames(error.__traceback__)
    # By the base class: a frozen dataclass forbids to set an attribute.
    return BaseException.with_traceback(error, frames)


_OURS = (f"{os.path.dirname(__file__)}{os.sep}", f"{os.sep}cloudpickle{os.sep}cloudpickle.py")


def users_stack(text: str) -> str:
    """Return Python stacks, as :mod:`faulthandler` writes them, without the worker's own frames.

    If a stack has only such frames, its innermost line stays.
    """
    ours = re.escape(_OURS[0].encode("ascii", "backslashreplace").decode())  # as it writes paths
    called_by = rf'(?:  File "{ours}.*\n)*  File "{ours}.* in be_worker\n(?:  File .*\n)*'
    return re.sub(rf'(  File ".*\n){called_by}', r"\1", text)


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_OURS[0]) or code.co_filename.endswith(_OURS[1])


def let_handlers_pass(error: Exception) -> None:
    """Raise an exception again if it comes from a signal handler of the program.

    Code that goes on after any exception calls this function if it may run in a thread of the
    program: the exception of a signal handler is no error of that code, and the program expects
    it.

    Args:
        error: The exception that was caught.

    Raises:
        Exception: The exception, if a signal handler raised it.
    """
    trace = error.__traceback__
    if trace is None or threading.current_thread() is not threading.main_thread():
        return  # handlers run in the main thread (Python, signal, "Execution of handlers")
    others: set[object] = set()
    while trace is not None:
        if not _is_ours(trace.tb_frame.f_code):
            others.add(trace.tb_frame.f_code)
        trace = trace.tb_next
    # To ask for all of them takes a quarter of a millisecond.
    if others and not others.isdisjoint(
        _code_of(signal.getsignal(number)) for number in signal.valid_signals()
    ):
        raise error


def _code_of(handler: object) -> object:
    """Return the code that a call of this runs first; ``None`` if that is no Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = getattr(handler, "__func__", handler)
    if not hasattr(function, "__code__"):
        function = vars(type(handler)).get("__call__")
    return getattr(function, "__code__", None)


def _signal_name(number: int) -> str:
    # signal.Signals raises for the unnamed real-time signals.
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _mebibytes(number: int) -> str:
    return f"{number / (1 << 20):,.0f} MiB"


_SIGNAL_HINTS = {
    9: " (often the kernel's out-of-memory killer: see memory.events)",
    11: " (a crash in native code)",
    getattr(signal, "SIGSYS", -1): " (a seccomp filter forbids a system call that it made)",
}
