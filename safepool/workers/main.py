"""What runs in a worker process: initialize, then one task after the other.

It imports only the standard library and the floors below; threadpoolctl comes with the
first cap, cloudpickle with the first object that needs it.

Not covered:
    * A task that starts threads which outlive it: they go on beside the next task.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

from safepool.errors import text_of
from safepool.threads.cap import cap_worker
from safepool.threads.environment import change_environment
from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Kind, encode
from safepool.transport.payloads import dumps, loads
from safepool.workers.namespace import MainNamespace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.connection import Connection
    from types import TracebackType

    from safepool.threads.cap import WorkerCap

__all__ = ["worker_main"]


def worker_main(
    end: Connection | socket.socket,
    environment: Mapping[str, str | None],
    threads: int,
    foreign_descriptors: Sequence[int],
) -> None:
    """Serve one pool over one channel until it says stop or is gone.

    Args:
        end: This worker's end of the channel.
        environment: Variables that bound native threads, ``None`` for those to remove.
            Most start methods have set them before anything of ours runs; in a forked
            worker this is the earliest place.
        threads: Threads for each native pool.
        foreign_descriptors: The pool's own descriptors, which a forked worker inherits
            and must not keep: another worker's channel would never be seen closed.
    """
    for descriptor in foreign_descriptors:
        _close(descriptor)
    change_environment(environment)
    _pretend_cpus(threads)
    sock = _adopt(end)
    _end_with_the_parent(sock)
    cap = cap_worker(threads, environment)
    # Ctrl-C reaches every process of the terminal; what happens to the tasks is the pool's
    # decision. A handler that does nothing rather than SIG_IGN, which programs started by
    # a task would inherit. The pool starts workers with the signal blocked, so that it
    # cannot strike before this line.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _do_nothing)
    _unblock_interrupt()
    channel = Channel(sock)
    try:
        _serve(channel, cap)
    except ChannelClosedError:
        pass  # the pool is gone, so is the reason to be here
    finally:
        channel.close()


def _serve(channel: Channel, cap: WorkerCap) -> None:
    pid = os.getpid()
    main = MainNamespace()
    while True:
        for kind, number, received in channel.receive():
            match kind:
                case Kind.INITIALIZE:
                    reply, segments = _initialize(received, main)
                    cap.apply()  # what the initializer has loaded or changed
                case Kind.TASK:
                    cap.recheck()  # what the task before has loaded
                    reply, segments = _run(received, main)
                case Kind.STOP:
                    return
                case _:
                    raise RuntimeError(f"a pool does not send {kind!r}")
            if os.getpid() != pid:
                # The task has forked and this is its child: the answer is the worker's to
                # give, and so is the next task to take.
                os._exit(0)
            channel.send(encode(reply, number, segments))
            # Nothing of the task may live on in this frame while the worker waits.
            del segments


def _initialize(
    segments: Sequence[bytearray], main: MainNamespace
) -> tuple[Kind, list[bytes | memoryview]]:
    try:
        initializer, arguments = loads(segments)
        with main:
            if initializer is not None:
                initializer(*arguments)
    except BaseException as error:  # noqa: BLE001 -- the pool must learn of SystemExit as well
        return Kind.INITIALIZER_FAILED, _describe(error)
    return Kind.READY, []


def _run(segments: list[bytearray], main: MainNamespace) -> tuple[Kind, list[bytes | memoryview]]:
    try:
        function, arguments, keywords = loads(segments)
        segments.clear()  # the pickle; the buffers live on in the arrays made of them
        with main:
            result = function(*arguments, **keywords)
        return Kind.RESULT, dumps(result)
    except BaseException as error:  # noqa: BLE001 -- SystemExit is delivered, as by the standard pool
        return Kind.EXCEPTION, _describe(error)


def _describe(error: BaseException) -> list[bytes | memoryview]:
    """Return segments of (pickled exception or None, type, text, traceback, reason)."""
    # Without the frame of this module that made the call, if there is one below it.
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    trace = _trace(error, inner or error.__traceback__)
    text = text_of(error)
    name = _name(type(error))
    # Frames hold the task's arguments; the other end could not use them anyway. By the base
    # class, since a frozen dataclass forbids to set an attribute.
    BaseException.with_traceback(error, None)
    pickled, reason = None, ""
    try:
        segments = [bytes(segment) for segment in dumps(error)]
        # Many exceptions can be pickled and not unpickled (an ``__init__`` with another
        # signature): found out here, where it costs one task and not a pool.
        loads(segments)
        pickled = segments
    except BaseException as problem:  # noqa: BLE001 -- user code runs in both directions
        reason = f"{type(problem).__name__}: {text_of(problem)}"
    return [pickle.dumps((pickled, name, text, trace, reason), protocol=5)]


def _trace(error: BaseException, frames: TracebackType | None) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except BaseException as problem:  # noqa: BLE001 -- user code, a SyntaxError with odd details
        shown = "".join(traceback.format_tb(frames))
        return f"{shown}{_name(type(error))} (not formatted: {text_of(problem)})\n"


def _name(kind: type) -> str:
    try:
        return f"{kind.__module__}.{kind.__qualname__}"
    except BaseException:  # noqa: BLE001 -- a metaclass may do anything
        return "(an exception whose type has no name)"


def _pretend_cpus(count: int) -> None:
    """Let pools that a task makes see the worker's share of the machine, not all of it.

    Python 3.13 reads PYTHON_CPU_COUNT and does this itself where the interpreter was started
    with it; here it is done for older ones, and for workers that were forked.
    """
    os.cpu_count = lambda: count
    if sys.version_info >= (3, 13):
        os.process_cpu_count = lambda: count


def _adopt(end: Any) -> socket.socket:
    if isinstance(end, socket.socket):
        sock = end
    else:
        # A duplicate is closed on exec again, which what a start method hands over is not.
        sock = socket.socket(fileno=os.dup(end.fileno()))
        end.close()
    sock.setblocking(True)
    return sock


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        pass


def _do_nothing(_signal: int, _frame: object) -> None:
    pass


if sys.platform == "linux":

    def _end_with_the_parent(sock: socket.socket) -> None:
        import ctypes  # noqa: PLC0415
        import select  # noqa: PLC0415

        # Also in the middle of a task in C code, where no thread of ours could run
        # (prctl(2), PR_SET_PDEATHSIG = 1). The signal is tied to the thread that started
        # this process: the pool's own, which outlives its workers.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # The parent may have died before the call above.
        poll = select.poll()
        poll.register(sock, select.POLLRDHUP)
        if any(event & (select.POLLRDHUP | select.POLLHUP) for _, event in poll.poll(0)):
            os._exit(0)

else:

    def _end_with_the_parent(_sock: socket.socket) -> None:
        import time  # noqa: PLC0415

        parent = os.getppid()

        def watch() -> None:
            # Half a second: the promise is one second from the parent's death.
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(0)

        threading.Thread(target=watch, name="safepool-parent-watch", daemon=True).start()


if sys.platform == "win32":

    def _unblock_interrupt() -> None:
        pass

else:

    def _unblock_interrupt() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
