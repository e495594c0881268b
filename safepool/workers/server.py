"""Program of the fork server: import, run the script, check, fork, report.

The server runs no task.

The server has one thread, and one socket to the program that started it. On request the server
imports modules, runs the top level of the program's script (``script``) and forks workers, and it
reports the end of each worker. The server ends with the program: when the socket closes or, in the
middle of a long import, by the life-line.

    to the server     ("preload", details)        from it    ("importing", name) before each
                                                             ("preloaded", report), or
                                                             ("threads", names) at once
                      ("script", details) + files  from it    ("ran", report), or
                                                             ("threads", names)
                      ("prints", names) + pipe                 from a child of it, through the pipe
                      ("fork", details) + files   from it    ("forked", pid) + pidfd, or
                                                             ("threads", names), or
                                                             ("refused", errno), or
                                                             ("unforkable", error)
                      ("become", details) + files            nothing: it is the worker
                                                  and first  ("up", pid)

Each worker also has a pipe, into which the server writes the worker's exit code.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from safepool import linux, procfs
from safepool.threads.calls import attempt
from safepool.threads.cap import decide_ahead, find_ahead
from safepool.threads.counts import pretend
from safepool.transport import letters
from safepool.transport.descriptors import close_all
from safepool.transport.lazy import eager_imports, load_own
from safepool.workers import birth, identity, keeper, lifeline, main, script, traces
from safepool.workers.describe import get_ready
from safepool.workers.fence import has_barrier
from safepool.workers.preload import BACKGROUND_THREADS
from safepool.workers.settings import compile_ahead
from safepool.workers.start import EXIT_CODE

if TYPE_CHECKING:
    from collections.abc import Collection
    from contextlib import AbstractContextManager
    from typing import NoReturn

    from safepool.workers.start import WorkerStart

assert sys.platform == "linux"

# Modules that calls of any kind need, and that a worker would import with the first.
_NEEDED = ("safepool.decorator", "safepool.transport.by_value")


def serve(
    sock_descriptor: int, lifeline_descriptor: int, *, greets: bool, kept: bool = False
) -> None:
    """Serve the program at the other end of the socket until it is gone.

    Args:
        sock_descriptor: This end of an unnamed stream socket pair.
        lifeline_descriptor: The reading end of a pipe whose writing end is the program's alone.
        greets: Say that it is up. One that is to become a worker must not: a socket that is closed
            with something unread fails at its other end (unix(7)).
        kept: ``True`` if its parent is a keeper (``keeper``), with which it ends.
    """
    if kept:
        birth.end_with(os.getppid())
    main.be_taken_before_the_program(server=True)
    os.set_inheritable(sock_descriptor, False)
    os.set_inheritable(lifeline_descriptor, False)
    # Modules that are imported here ask for the number of CPUs, or keep the function that does.
    share = os.environ.get("PYTHON_CPU_COUNT", "")
    pretend(int(share) if share.isdecimal() else 1)
    # Each worker opens a separate description of this one; the server's is another.
    line = os.dup(lifeline_descriptor)
    try:
        lifeline.hold(lifeline_descriptor)
    except OSError:
        pass  # the socket still tells, as soon as the server looks
    load_own()
    get_ready()
    has_barrier()
    sock = socket.socket(fileno=sock_descriptor)
    try:
        if greets:
            # The program does not know them, and would keep them as zombies.
            keeper.adopt_orphans()
            letters.send(sock, ("up", os.getpid()))
        _Server(sock, line).run()
    except ConnectionError:
        pass
    script.finish()
    # Exit functions of imported modules must not run: they belong to the workers.
    os._exit(0)


class _Server:
    def __init__(self, sock: socket.socket, line: int) -> None:
        self._sock = sock
        self._line = line
        self._mask: Collection[int] = ()
        # For each process id the pipe for its exit code.
        self._workers: dict[int, int] = {}
        # Variables that imports have set.
        self._made: dict[str, str] = {}
        self._reaping = self._ending = False
        # Or it only reports the script's names.
        self._forks = True
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

    def run(self) -> None:
        self._mask = [int(one) for one in signal.pthread_sigmask(signal.SIG_UNBLOCK, ())]
        self._hear_of_endings()
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_receiver, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake_receiver.fileno() in ready:
                self._wake_receiver.recv(4096)
                self._reap()
                self._bury_orphans()
            if self._sock.fileno() in ready:
                received = letters.receive(self._sock)
                if received is None:
                    return
                (what, details), descriptors = received
                if what == "preload":
                    self._preload(details)
                elif what == "become":
                    self._become(details, descriptors)
                elif what == "script":
                    self._run_script(details, descriptors)
                elif what == "rights":
                    self._take_rights(details)
                elif what == "prints":
                    self._tell_prints(details, *descriptors)
                else:
                    self._fork(details, descriptors)

    def _hear_of_endings(self) -> None:
        signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        # Whatever the program, or what was imported, does with the signal: ignored, endings would
        # be lost.
        signal.signal(signal.SIGCHLD, lambda *_: self._reap())
        # And blocked, as by programs that wait for signals themselves.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        self._reap()

    def _preload(self, details: dict[str, Any]) -> None:
        if threads := _foreign_threads():  # before any import: it can never fork
            letters.send(self._sock, ("threads", threads))
            return
        strict: bool = details["strict"]
        failed: dict[str, str] = {}
        culprits: dict[str, str] = {}
        variables = dict(os.environ)
        # A collection finds almost nothing, as the objects of an import stay, and takes a good
        # part of a long import (benchmarks/joblib_backend.py, first calls).
        gc.disable()
        with script.silence(), eager_imports(), traces.recorded_environment() as read:
            before = traces.Traces.look()
            for name in details["names"]:
                if name in sys.modules and not strict:
                    continue
                letters.send(self._sock, ("importing", name))
                count = _thread_count()
                try:
                    importlib.import_module(name)
                except BaseException as error:  # noqa: BLE001 -- user code; a worker may do without
                    failed[name] = f"{type(error).__name__}: {error}"
                left = "" if strict else before.new()
                self._hear_of_endings()
                if _thread_count() > count and (threads := _foreign_threads()):
                    culprits[name] = f"starts {', '.join(threads)}"
                elif left:
                    culprits[name] = left
                    script.end_children(before.new_children())
                    before = traces.Traces.look()
        self._made |= {key: os.environ[key] for key in os.environ.keys() - variables.keys()}
        _get_forks_ready()
        report = {"failed": failed, "culprits": culprits, "read": read}
        letters.send(self._sock, ("preloaded", report))

    def _run_script(self, details: dict[str, Any], descriptors: list[int]) -> None:
        threads = _foreign_threads() if details["forks"] else []
        if threads:  # of whatever starts some in every interpreter: not the script's
            self._refuse(descriptors, "threads", threads)
            return
        gc.disable()
        report = birth.run_script(details, self._line, *descriptors)
        self._hear_of_endings()
        threads = _foreign_threads() if details["forks"] else []
        if threads and not report["problem"]:
            report["problem"] = f"it starts threads that do not end ({', '.join(threads)})"
        _get_forks_ready()
        self._forks = details["forks"]
        letters.send(self._sock, ("ran", report))

    def _take_rights(self, users: tuple[Any, ...]) -> None:
        """Give up the rights that the program has given up: its user can start no other server."""
        # Modules of this package for workers, as long as they may be read.
        for name in _NEEDED:
            importlib.import_module(name)
        try:
            identity.take(users)
        except OSError:
            pass  # the program compares
        letters.send(self._sock, ("rights", (identity.rights(), identity.place())))

    def _tell_prints(self, names: list[str], pipe: int) -> None:
        """Write prints of the script's globals, in a child: pickling runs the user's code."""
        if not self._forks:  # it has threads, and serves no other purpose
            script.tell_prints(names, pipe)
            return
        try:
            with _beside_threads():
                pid = os.fork()
        except Exception:  # noqa: BLE001 -- as for a worker; nothing is known of them then
            os.close(pipe)
            return
        if pid == 0:
            try:
                self._leave()
                script.tell_prints(names, pipe)
            finally:
                os._exit(0)
        # Nobody needs the child's exit code.
        self._workers[pid] = os.open(os.devnull, os.O_WRONLY)
        os.close(pipe)

    def _fork(self, details: dict[str, Any], descriptors: list[int]) -> None:
        if len(descriptors) < details["files"]:  # not all descriptors fitted
            self._refuse(descriptors, "refused", errno.EMFILE)
            return
        if threads := _foreign_threads():
            self._refuse(descriptors, "threads", threads)
            return
        told: WorkerStart = details["told"]
        decide_ahead(told.threads, told.variables)
        try:
            with _beside_threads():
                pid = os.fork()
        except Exception as error:  # noqa: BLE001 -- somebody else's functions run around a fork
            if isinstance(error, OSError):
                self._refuse(descriptors, "refused", error.errno)
            else:
                self._refuse(descriptors, "unforkable", repr(error))
            return
        if pid == 0:
            self._become_worker(details, descriptors)
        # Before it may be waited for: so long the number is this worker's.
        pidfd = linux.find_pidfd(pid)
        given = [] if pidfd is None else [pidfd]
        self._workers[pid] = descriptors[0]
        close_all(descriptors[1:])
        try:
            letters.send(self._sock, ("forked", pid), given)
        finally:
            close_all(given)

    def _refuse(self, descriptors: list[int], *why: object) -> None:
        close_all(descriptors)
        letters.send(self._sock, why)

    def _become(self, details: dict[str, Any], descriptors: list[int]) -> NoReturn:
        """Become the worker without a fork, which would lose threads, or is refused."""
        if len(descriptors) < details["files"]:
            os._exit(1)
        os.environ.update(details["told"].own)
        with script.silence():
            for name in details["modules"]:
                try:
                    importlib.import_module(name)
                except BaseException:  # noqa: BLE001 -- user code; a worker may do without
                    pass
        # This descriptor stays open until the process has ended: before Linux 5.3 nothing else
        # reports the end.
        os.dup(descriptors[0])
        self._become_worker(details, descriptors)

    def _reap(self) -> None:
        """Report ended workers. The signal's handler calls it too, even while it runs."""
        self._ending = True
        if self._reaping:
            return
        self._reaping = True
        try:
            while self._ending:
                self._ending = False
                for pid, status in [*self._workers.items()]:
                    self._report(pid, status)
        finally:
            self._reaping = False

    def _report(self, pid: int, status: int) -> None:
        ended = 0
        try:
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                os.write(status, EXIT_CODE.pack(os.waitstatus_to_exitcode(code)))
        except ChildProcessError:
            ended = pid  # reaped by an imported module: its exit code is unknown
        except OSError:
            pass  # no reader is left
        if ended:
            del self._workers[pid]
            os.close(status)

    def _leave(self) -> None:
        """Leave the role of the server, in its child."""
        signal.set_wakeup_fd(-1)
        main.set_handler(main.CHILD, main.DEFAULT)
        self._wake_receiver.close()
        self._wake_sender.close()
        self._sock.close()
        close_all(self._workers.values())

    def _bury_orphans(self) -> None:
        """Wait for processes of ended workers: this process is their parent now.

        Called only between two requests: an import waits for the programs that it runs.
        """
        try:
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in self._workers:
                    return
                os.waitpid(found.si_pid, os.WNOHANG)
        except OSError:
            pass  # there is none

    def _become_worker(self, details: dict[str, Any], descriptors: list[int]) -> NoReturn:
        code = 1
        try:
            self._leave()
            status, gate, *own = descriptors
            os.close(status)
            main.change_mask(main.SET_MASK, self._mask)
            if not os.read(gate, 1):
                os._exit(0)  # the program has not waited for the answer, or is gone
            try:
                # Only this worker's life-line has that other end: closing it ends the worker, even
                # one that the program may not signal any more.
                lifeline.hold(gate)
            except OSError:
                os.close(gate)
            details["environ"] = self._made | details["environ"] | details["told"].own
            code = birth.be_born(details, self._line, own)
        except BaseException as error:  # noqa: BLE001 -- whatever it is, this process is not a server
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)


def _get_forks_ready() -> None:
    """Do once, in the server, steps that each worker would do at its start.

    These objects stay for ever. A collection in a worker would write to every page of them, and so
    copy it.
    """
    find_ahead()
    attempt(compile_ahead)
    gc.freeze()
    gc.enable()


def _beside_threads() -> AbstractContextManager[object]:
    # A fork beside a background thread warns. Which threads may be there is checked here.
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def _thread_count() -> int:
    # proc(5): a directory's links are its entries and two more.
    return os.stat("/proc/self/task").st_nlink - 2


def _foreign_threads() -> list[str]:
    """Return the names of threads that a fork would lose."""
    foreign: list[str] = []
    for look in range(5):
        if _thread_count() == 1:
            return []
        foreign = [
            name
            for thread, name in procfs.named_threads()
            if thread != os.getpid() and name not in BACKGROUND_THREADS
        ]
        if not foreign:
            return []
        # A thread that an import has started and joined may still be on its way out.
        time.sleep(0.01 * look)
    return foreign
