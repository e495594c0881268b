"""Steps of a worker process before its first task: environment, caps, signals, channel.

The module imports only the standard library and the floors below. The first cap imports
threadpoolctl, the first object that needs it cloudpickle.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from safepool.threads.cap import cap_worker
from safepool.threads.counts import pretend
from safepool.threads.environment import change_environment
from safepool.threads.placement import bind
from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.descriptors import close_all
from safepool.transport.files import accept
from safepool.transport.lazy import load_own
from safepool.transport.names import be_fork
from safepool.workers import inheritance
from safepool.workers.board import NO_BOARD, STACK_SIGNAL, Board
from safepool.workers.describe import get_ready
from safepool.workers.fence import register
from safepool.workers.index import be_index
from safepool.workers.plan import find_space
from safepool.workers.preload import Imports
from safepool.workers.runner import Runner

# In a fork server, which unpickles it when its user may not be able to read files any more.
from safepool.workers.start import WorkerStart  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from multiprocessing.connection import Connection

# ``signal.signal()`` turns numbers into members of an enumeration; for a handler that is a
# function it raises and catches an error inside. Five such calls in a worker write to some eighty
# pages shared with its fork server, which the kernel then copies (benchmarks/startup.py, warm).
_bare: Any = importlib.import_module("_signal")

set_handler: Callable[[int, Callable[..., object] | int], object] = _bare.signal
"""``signal.signal()`` without enumerations; the default is :data:`DEFAULT`."""

DEFAULT, INTERRUPT = int(signal.SIG_DFL), int(signal.SIGINT)

if sys.platform != "win32":
    change_mask: Callable[[int, Iterable[int]], object] = _bare.pthread_sigmask
    """``signal.pthread_sigmask()`` without enumerations."""

    CHILD = int(signal.SIGCHLD)
    UNBLOCK, SET_MASK = int(signal.SIG_UNBLOCK), int(signal.SIG_SETMASK)


def worker_main(
    end: Connection | socket.socket,
    board: Connection | None,
    told: WorkerStart,
    inherited: Sequence[Connection] = (),
) -> None:
    """Be a worker that a ``multiprocessing`` context has started."""
    close_all(told.foreign)
    bind(told.cpus)
    if told.by_name:
        find_space()
    if told.forked:
        be_fork()
    sock = end if isinstance(end, socket.socket) else socket.socket(fileno=_take(end))
    _end_with_the_parent(sock)
    be_worker(sock, board, told, [_take(handle) for handle in inherited])


def be_worker(
    sock: socket.socket,
    board: Connection | int | None,
    told: WorkerStart,
    inherited: Sequence[int] = (),
) -> None:
    """Serve one pool over one channel until it says stop or is gone.

    Most start methods have set the variables earlier; in a forked worker this is the earliest
    place.
    """
    be_taken_before_the_program()
    be_index(told.index)
    # A forked worker has nearly all of them.
    wanted = told.variables
    change_environment(
        {name: wanted[name] for name in wanted if os.environ.get(name) != wanted[name]}
    )
    pretend(told.threads)
    shared = _open_board(board)
    cap = cap_worker(told.threads, wanted)
    # Ctrl-C reaches every process of the terminal; what happens to the tasks is the pool's
    # decision. A handler that does nothing rather than SIG_IGN, which programs started by
    # a task would inherit. The pool starts workers with the signal blocked, so that it
    # cannot strike before this line.
    if threading.current_thread() is threading.main_thread():
        set_handler(INTERRUPT, _do_nothing)
    if sys.platform != "win32":
        change_mask(UNBLOCK, (INTERRUPT,))
    sock.setblocking(True)  # independent of socket.setdefaulttimeout()
    try:
        channel = Channel(sock, accept(sock))
    except OSError:
        return  # the pool is gone
    inheritance.receive(inherited)
    load_own()
    get_ready()
    try:
        Runner(channel, shared, cap, told.initializer, Imports() if told.learns else None).serve()
    except ChannelClosedError:
        pass  # the pool is gone, so is the reason to be here
    finally:
        channel.close()


def be_taken_before_the_program(*, server: bool = False) -> None:
    """Let the kernel's out-of-memory killer take this process and its children, not the program.

    The killer takes the process with the highest sum of its memory, in thousandths of the
    machine's, and this number. A process with 1000 more than the program is always first, whatever
    the program holds: that loses one task, with an error. Every process may raise its own number;
    1000 is the maximum. If the program is born with 1000 (a pod of Kubernetes without requests),
    the size decides.

    Args:
        server: Whether this process is a fork server, whose end frees almost no memory. The
            server's number is the middle between those of the program and its workers.

    Source:
        proc_pid_oom_score_adj(5); Linux, mm/oom_kill.c, ``oom_badness``.
    """
    global _programs_score  # noqa: PLW0603 -- inherited by the workers of a server
    try:
        # As bytes: a codec may have to be imported, which this user may not be able to read.
        with open(_OOM_SCORE, "rb") as file:
            score = int(file.read())
        programs = score if _programs_score is None else _programs_score
        wanted = min(programs + 1000, 1000)
        if server:
            wanted = (programs + wanted) // 2
        # A process that is forked from here on belongs to a server, or has this one as its
        # program.
        _programs_score = programs if server else None
        if wanted > score:  # otherwise it was raised before
            with open(_OOM_SCORE, "wb") as file:
                file.write(b"%d" % wanted)
    except (OSError, ValueError):
        pass  # another system, or no /proc; or it may not be written here


_OOM_SCORE = "/proc/self/oom_score_adj"
# In a fork server and its forks, until they are workers: the program's value.
_programs_score: int | None = None


def _open_board(handle: Any) -> Board:
    if handle is None:
        return NO_BOARD
    descriptor = handle if isinstance(handle, int) else _take(handle)
    os.set_inheritable(descriptor, False)
    board = Board(descriptor)
    board.sign(os.getpid())
    # A crash in native code leaves the Python stack on the board, and so does the signal.
    faulthandler.enable(file=descriptor, all_threads=True)
    if STACK_SIGNAL and sys.platform != "win32":
        faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True)
    if not register():
        board.close()
        return NO_BOARD
    return board


def _take(handle: Connection) -> int:
    # A duplicate is closed on exec, unlike the descriptor of a start method.
    descriptor = os.dup(handle.fileno())
    handle.close()
    return descriptor


def _do_nothing(_signal: int, _frame: object) -> None:
    pass


if sys.platform == "linux":

    def _end_with_the_parent(sock: socket.socket) -> None:
        import ctypes  # noqa: PLC0415
        import select  # noqa: PLC0415

        from safepool import linux  # noqa: PLC0415 -- for this platform alone

        # Works even in the middle of C code, where no thread of this package could run (prctl(2),
        # PR_SET_PDEATHSIG = 1). The signal is tied to the thread that started this process: the
        # pool's own, which outlives its workers.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # The parent may have died before the call above.
        poll = select.poll()
        poll.register(sock, linux.POLLRDHUP)
        if any(event & (linux.POLLRDHUP | select.POLLHUP) for _, event in poll.poll(0)):
            os._exit(0)

else:  # not Linux

    def _end_with_the_parent(_sock: socket.socket) -> None:
        import time  # noqa: PLC0415

        parent = os.getppid()

        def watch() -> None:
            # Half a second: the promise is one second from the parent's death.
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(0)

        threading.Thread(target=watch, name="safepool-parent-watch", daemon=True).start()
