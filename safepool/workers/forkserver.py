"""The fork servers of this process: started by exec, asked for workers, started again.

    program  --- unnamed socket pair --->  server  --- fork --->  worker, worker, ...
             --- life-line (a pipe) ---->          ----------->

A server is born with the caps in its environment, imports what its workers will need
(``server``, ``preload``), runs the program's script if that is the plan (``plan``, ``script``),
and forks a worker in milliseconds. There is one for each distinct setting,
shared by the pools of this process and kept for the next ones; it ends with the program.

What goes wrong, and what is done:
    It is killed            its workers live on; another is started when one is needed. The script
                            is run again; it is not to blame before the third in a row.
    The script cannot be    the pool has another server, which has not run it, and its functions
    run there               travel by value; told once.
    An import crashes or    another is started without that library; one that started threads
    starts threads          would make every fork unsafe.
    It does not answer      it is killed, and another is started.
    It cannot fork          each worker is started afresh: a server that becomes the worker
                            itself, and runs the script as the server has run it. An agent or a
                            debugger has threads in every interpreter, or something refuses the
                            fork. The reason is logged once.
    It never says a word    an error names the executable: it is no Python interpreter.
    Tasks leave programs    they go on, as with any pool; if the pool asks for it, its server is
                            below a keeper, which ends them with the program (``keeper``).
    The program gives up    another is started with its new rights. Where the new user cannot start
    root                    one (an interpreter below /root), the one that runs gives up the same,
                            and has no use if it then has other rights than the program.
    The program forks       the child gives up its copies: it would keep the server alive. What
                            a start needs is imported here, in the thread that makes the pool: a
                            child could never import what another thread was importing.

Not covered:
    * A worker that ends while the server is inside one long call of an import: its exit code
      is asked for in vain.
    * A preloaded library that reads a variable when it is imported has read it as it was when
      the server imported it, unless it is one of those that bound threads.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import marshal
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import multiprocessing.spawn  # the tracker's start imports it: see below
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, TypeVar

from safepool import linux
from safepool.errors import FROM_OUTSIDE, REFUSALS, describe_exit, naming
from safepool.transport import letters
from safepool.workers import birth, forked, identity, kept, script
from safepool.workers.contained import ContainedLogger
from safepool.workers.identity import can_start, place, rights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from safepool.workers.plan import MainPlan

assert sys.platform == "linux"

__all__ = [
    "CannotRunError",
    "Server",
    "attempt_of",
    "descriptors",
    "keepers",
    "not_runnable",
    "running",
    "server_for",
    "stop_all",
]

_log = ContainedLogger()

_T = TypeVar("_T")

# Seconds for one import, and for one fork. Imports of large libraries take ten seconds under a
# small quota; a fork of a few hundred megabytes takes milliseconds.
_IMPORT_S = 60.0
_FORK_S = 5.0
# For the script's top level: whoever computes there for longer has a reason to be told.
_RUN_S = 600.0
# A top level that takes longer is worth a word: each server waits for it.
_LONG_RUN_S = 2.0
# One that has not ended by then may never: it may wait for what the program holds.
_WAITING_S = 10.0
# From the end of its socket to that of the process.
_ENDING_S = 1.0
# Between two looks whether an import is still waited for: Ctrl-C must not have to.
_LOOK_S = 0.1
# A variable that is always in the server's own environment, in characters.
_SMALL_VARIABLE = 4096
# execve(2): there is none, it is not for this user, or no program at all.
_NOT_EXECUTABLE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ENOEXEC,
    errno.ELOOP,
    errno.EISDIR,
}
# How a server begins. The path comes over the socket: one argument has 128 KiB at most
# (execve(2), MAX_ARG_STRLEN). Nothing is imported before it is set but what is built in: of "-c"
# the current directory is the first on the path.
_BOOTSTRAP = """
import marshal, posix, sys
def take(count):
    taken = b""
    while len(taken) < count:
        part = posix.read({0}, count - len(taken))
        if not part:
            posix._exit(0)
        taken += part
    return taken
sys.path[:] = marshal.loads(take(int.from_bytes(take(8), "little")))
"""
_SERVE = """
from safepool.workers.server import serve
serve({}, {}, greets={}, kept={})
"""
_KEEP = """
from safepool.workers.keeper import keep
keep({}, {}, {!r}, {})
"""
_HAD_THREADS = "it had threads from its start, as an agent or a debugger brings them: {}"
# With offenders left out, then with nothing preloaded, then once more for bad luck.
_MOST_STARTS = 4
# Servers without workers beyond this number are ended: a program may make pools of ever new
# settings.
_MOST_IDLE = 3


class _LostError(Exception):
    """The server has ended, or does not answer."""


class _StartedThreadsError(Exception):
    """The server has threads that a fork would lose."""


class _NoInterpreterError(RuntimeError):
    """What is to be started as one is none, or not for this user: to try again is of no use."""


class _CannotForkError(Exception):
    """No server can be forked, whatever is left out."""


class CannotRunError(Exception):
    """The script's top level cannot be run in a server, for a reason of its own."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a server has for good: pools with another need another server."""

    changes: tuple[tuple[str, str | None], ...]
    # User, groups, capabilities, control group, name spaces, root directory: a program that
    # has given up rights must not get workers that still have them.
    identity: tuple[str, ...]
    # Of the script that it has run: nothing of it may be in another pool's workers.
    script: tuple[str, ...]
    # It is below a keeper.
    kept: bool
    # It forks nothing.
    asked_only: bool
    # Of a server whose imports have read another environment: it has no new workers.
    outdated: int = 0


class Server:
    """One fork server, started when it is needed."""

    def __init__(
        self,
        changes: Mapping[str, str | None],
        plan: MainPlan | None = None,
        *,
        is_kept: bool = False,
        asked_only: bool = False,
    ) -> None:
        self._changes = dict(changes)
        self._plan = plan
        self._kept = is_kept
        # What the script has made in the server that runs; ``None`` before it was run.
        self._marks: Mapping[str, bytes] | None = None
        # It has something to do at its end.
        self._exits = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | kept.KeptServer | None = None
        self._sock: socket.socket | None = None
        self._asked: set[str] = set()
        self._answers = False  # until then it may still be starting
        # Each worker is an interpreter of its own from now on.
        self._afresh = asked_only
        # Answers to what was asked for ahead are still to come.
        self._ahead = False
        # Variables that its imports have read, as they were in the program.
        self._read: dict[str, str | None] = {}
        self._workers: list[forked.ForkedProcess] = []
        # It has the rights that the program had before, and is to take those of now.
        self.takes_rights = False
        # Pools that use it at the moment; under the lock of the servers' table.
        self.users = 0

    @property
    def pid(self) -> int | None:
        """Its process id; ``None`` while none runs."""
        process = self._process
        return None if process is None else process.pid or None

    @property
    def can_fork(self) -> bool:
        """Whether it runs, as far as is known, and forks workers."""
        return self._process is not None and not self._afresh

    def descriptors(self) -> list[int]:
        """Return what it holds in this process."""
        sock = self._sock
        return [] if sock is None else [sock.fileno()]

    def is_idle(self) -> bool:
        """Return whether nobody uses it and no pool has a worker of it."""
        # Not whether they live: their exit codes are read once, by the threads of their pools.
        return not self.users and all(worker.closed for worker in self._workers)

    def fork_worker(
        self,
        modules: Sequence[str],
        details: Mapping[str, Any],
        files: Sequence[int],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> forked.ForkedProcess:
        """Preload what is new and fork a worker; start the server first, or again."""

        def start() -> forked.ForkedProcess:
            process = self._start_one(modules, details, files, given_up, strict=strict)
            self._workers = [worker for worker in self._workers if not worker.closed]
            self._workers.append(process)
            return process

        return self._alone(start, given_up)

    def run_script(
        self, modules: Sequence[str], given_up: Callable[[], bool], *, strict: bool
    ) -> Mapping[str, bytes]:
        """Run the script of the plan, unless this server has run it, and return what it has made.

        Raises:
            CannotRunError: It cannot be run here. The server has ended.
        """

        def run() -> Mapping[str, bytes]:
            if self._process is None or self._marks is None:
                try:
                    if not self._afresh:
                        self._in_a_server(lambda: None, modules, given_up, strict=strict)
                except _CannotForkError as error:
                    self._be_afresh(error)
                if self._afresh:
                    self._run_script_for_all(given_up)
            marks = self._marks
            assert marks is not None
            return marks

        return self._alone(run, given_up)

    def prints(self, names: list[str], given_up: Callable[[], bool]) -> Mapping[str, bytes | None]:
        """Return what globals of the script are like, as far as that can be told."""
        found = b""
        told, tell = os.pipe()
        try:
            if not self._alone(lambda: self._ask_prints(names, tell), given_up):
                return {}
            os.close(tell)
            tell = -1
            while True:
                while not forked.is_readable(told, _LOOK_S):
                    if given_up():
                        return {}
                data = os.read(told, 1 << 16)
                if not data:
                    return script.read_prints(found)
                found += data
        except (OSError, _LostError):
            return {}  # it is gone; the next worker's server is another
        finally:
            os.close(told)
            if tell >= 0:
                os.close(tell)

    def _ask_prints(self, names: list[str], tell: int) -> bool:
        if self._marks is None:
            return False  # it has ended
        self._send(("prints", names), [tell])
        return True

    def _alone(self, deed: Callable[[], _T], given_up: Callable[[], bool]) -> _T:
        while not self._lock.acquire(timeout=_LOOK_S):  # another pool waits for an import
            _check(given_up)
        try:
            return deed()
        finally:
            self._lock.release()

    def _start_one(
        self,
        modules: Sequence[str],
        details: Mapping[str, Any],
        files: Sequence[int],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> forked.ForkedProcess:
        if not self._afresh:
            try:
                return self._in_a_server(
                    lambda: self._fork(details, files, given_up), modules, given_up, strict=strict
                )
            except _CannotForkError as error:
                self._be_afresh(error)
                self._run_script_for_all(given_up)
        return self._start_afresh(modules if strict else (), details, files)

    def _be_afresh(self, error: _CannotForkError) -> None:
        self._afresh = True
        _log_once(
            "each worker is started afresh, as no fork server can be used "
            f"(a start takes longer, and no memory is shared): {error}"
        )
        if self._kept:
            _log_once(
                "end_subprocesses=True does not hold for workers that are started "
                "afresh: what their tasks start may outlive this program"
            )

    def _run_script_for_all(self, given_up: Callable[[], bool]) -> None:
        """Run the script in a server that forks no worker: it tells what each of them has.

        Raises:
            CannotRunError: It cannot be run.
        """
        if self._plan is None:
            return
        try:
            self._start()
            self._marks = self._run_script(self._plan, given_up, again=False)
        except BaseException:
            if self._process is not None:
                self._stop()
            raise

    def _in_a_server(
        self,
        deed: Callable[[], _T],
        modules: Sequence[str],
        given_up: Callable[[], bool],
        *,
        strict: bool,
    ) -> _T:
        """Do something with a server that has preloaded what is new and run the script."""
        why = ""
        for attempt in range(_MOST_STARTS):
            if self._process is None:
                self._start()
            try:
                if self.takes_rights:
                    self._take_rights(given_up)
                if strict and attempt < 2:
                    self._preload(modules, given_up, strict=strict)
                if self._plan is not None and self._marks is None:
                    self._marks = self._run_script(self._plan, given_up, again=attempt < 2)
                # After the script, which imports in its own order and sets before what it wants.
                if not strict and attempt < 2:
                    self._preload(modules, given_up, strict=strict)
                return deed()
            except (_LostError, ConnectionError, TimeoutError) as error:
                why = self._lose(error, attempt)
            except _StartedThreadsError as error:
                self._stop()
                why = f"had threads: {error}"
            except (_CannotForkError, CannotRunError, InterruptedError):
                self._stop()  # it may be in the middle of an import, or have run half a script
                raise
        raise _CannotForkError(f"{_MOST_STARTS} in a row were of no use; the last {why}")

    def _take_rights(self, given_up: Callable[[], bool]) -> None:
        self.takes_rights = False
        self._hear_of_what_was_asked_ahead(given_up)
        self._send(("rights", identity.users()))
        (_, told), _ = self._receive(_FORK_S, given_up)
        if told != (rights(), place()):
            self._stop()
            raise _no_interpreter(
                f"cannot be started by user {os.geteuid()}, and the fork server that runs cannot "
                "get the rights that this program has now"
            )

    def _lose(self, error: Exception, attempt: int) -> str:
        """End a server that was lost, and say how it ended.

        Raises:
            _NoInterpreterError: None has ever said a word.
        """
        silent, late, process = not self._answers, isinstance(error, TimeoutError), self._process
        assert process is not None
        if not late:
            self._await_the_end()
        ending = self._stop()
        if silent and (late or (attempt and process.returncode not in FROM_OUTSIDE)):
            raise _no_interpreter(f"was started as an interpreter, and {ending}")
        _log.info("a fork server was lost and is started again: it %s", ending)
        return ending

    def start(self) -> bool:
        """Start it, if it does not run; return whether it forks the workers."""
        if self._process is None:  # or somebody starts it now, who would not be waited for
            with self._lock:
                if self._process is None and not self._afresh:
                    self._start()
        return not self._afresh

    def _start(self) -> None:
        self._process, self._sock = self._launch(becomes=False)
        self._marks = None
        self._exits = False
        self._asked = set()
        self._ahead = False
        self._read = {}
        self._answers = False
        _log.debug("a fork server was started")

    def _launch(
        self, *, becomes: bool
    ) -> tuple[subprocess.Popen[bytes] | kept.KeptServer, socket.socket]:
        """Start an interpreter that serves, or becomes a worker itself."""
        with naming("socketpair()"):
            ours, theirs = socket.socketpair()
        # Above the standard streams, which the child gets others for; a program may have closed
        # its own.
        handed: list[int] = []
        # Blocked, so that Ctrl-C ends neither the server nor a worker before it has a handler.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            handed.append(_above_streams(theirs.fileno()))
            handed.append(_above_streams(_line[0]))
            process = self._begin(handed, becomes=becomes)
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            for descriptor in handed:
                os.close(descriptor)
        _send_path(ours)
        return process, ours

    def _begin(
        self, handed: Sequence[int], *, becomes: bool
    ) -> subprocess.Popen[bytes] | kept.KeptServer:
        is_kept = self._kept and not self._afresh
        serve = _SERVE.format(*handed, not becomes, is_kept)
        command = [_executable(), *_interpreter_flags(), "-c"]
        server = [*command, _BOOTSTRAP.format(handed[0]) + serve]
        if not is_kept:
            return self._execute(server, handed)
        with naming("socketpair()"):
            ours, theirs = socket.socketpair()
        number = -1
        try:
            number = _above_streams(theirs.fileno())
            code = _BOOTSTRAP.format(number) + _KEEP.format(number, os.getpid(), server, handed)
            # Nothing that a site brings along: it may be threads.
            keeper = self._execute([*command[:-1], "-S", "-P", "-c", code], [*handed, number])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if number >= 0:
                os.close(number)
        found = kept.KeptServer(keeper, ours)
        _kept.append(found)
        _send_path(ours)
        return found

    def _execute(self, command: Sequence[str], handed: Sequence[int]) -> subprocess.Popen[bytes]:
        environment = self._environment()
        while True:
            try:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if _is_stream(2) else subprocess.DEVNULL,
                    pass_fds=handed,
                    env=environment,
                    # In a directory that is gone, Python 3.13 cannot import socket (by "-c").
                    # Workers go where the program is when they are born.
                    cwd=None if _has_directory() else "/",
                )
            except OSError as error:
                if error.errno in _NOT_EXECUTABLE:
                    who = f"cannot be started by user {os.geteuid()}"
                    raise _no_interpreter(f"{who}: {error}") from error
                if error.errno != errno.E2BIG:
                    raise
                # execve(2): 128 KiB for a variable, a quarter of the stack for all. Workers get
                # it over the socket.
                largest = max(environment, key=lambda name: len(environment[name]))
                if len(environment.pop(largest)) < _SMALL_VARIABLE:
                    raise

    def _environment(self) -> dict[str, str]:
        wanted = dict.fromkeys(os.environ) | self._changes
        for name in wanted.keys() - self._changes.keys():
            wanted[name] = os.environ.get(name)  # another thread may have removed it
        return {name: value for name, value in wanted.items() if value is not None}

    def _preload(
        self, modules: Sequence[str], given_up: Callable[[], bool], *, strict: bool
    ) -> None:
        self._hear_of_what_was_asked_ahead(given_up)
        before = bool(self._asked)
        if self._ask_for(modules, strict=strict):
            self._hear_of_imports(given_up, strict=strict, imported=before)

    def _hear_of_what_was_asked_ahead(self, given_up: Callable[[], bool]) -> None:
        if self._ahead:
            self._ahead = False
            self._hear_of_imports(given_up, strict=False, imported=True)

    def preload_ahead(self, modules: Sequence[str]) -> None:
        """Ask for what is new, and do not wait for it."""
        if not self._lock.acquire(blocking=False):
            return  # whoever uses it asks by himself
        try:
            runs = self._plan is None or self._marks is not None
            if self._process is not None and runs and not (self._afresh or self._ahead):
                self._ahead = self._ask_for(modules, strict=False)
        except OSError:
            pass  # it is gone: found out by whoever wants a worker
        finally:
            self._lock.release()

    def _ask_for(self, modules: Sequence[str], *, strict: bool) -> bool:
        new = [
            name
            for name in modules
            if name not in self._asked and (name.partition(".")[0], strict) not in _left_out
        ]
        if not new:
            return False
        self._asked.update(new)
        self._send(("preload", {"names": new, "strict": strict}))
        return True

    def _hear_of_imports(
        self, given_up: Callable[[], bool], *, strict: bool, imported: bool
    ) -> None:
        importing = ""
        while True:
            try:
                (what, told), _ = self._receive(_IMPORT_S, given_up)
            except (_LostError, ConnectionError, TimeoutError) as error:
                if importing:
                    self._leave_out(importing, error)
                raise
            if what == "preloaded":
                break
            if what == "threads":
                raise self._useless(told, imported=imported)
            importing = told
        for name, reason in told["failed"].items():
            level = logging.WARNING if strict else logging.DEBUG
            _log.log(level, "%s could not be preloaded: %s", name, reason)
        for name, why in told["culprits"].items():
            _log.info("%s is not preloaded: its import %s", name, why)
            _leave_out([name], [strict])
        if told["culprits"]:
            raise _StartedThreadsError(", ".join(sorted(told["culprits"])))
        self._read |= {name: self._value(name) for name in told["read"]}

    def _value(self, name: str) -> str | None:
        return self._changes[name] if name in self._changes else os.environ.get(name)

    def has_read_otherwise(self) -> bool:
        """Return whether its imports have read a variable that is another by now."""
        if self._plan is not None:  # the script has read what it wanted, when it was run
            return False
        return any(self._value(name) != value for name, value in [*self._read.items()])

    def _leave_out(self, importing: str, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            why = "the fork server's import takes too long"
        else:
            why = f"while it was imported, the fork server {self._await_the_end()}"
        _log.warning("%s is not preloaded: %s", importing, why)
        _leave_out([importing])

    def _run_script(
        self, plan: MainPlan, given_up: Callable[[], bool], *, again: bool
    ) -> Mapping[str, bytes]:
        details = {
            **self._details(),
            **_to_run(plan),
            "name": "safepool-server",
            "identity": (),
            "forks": not self._afresh,
        }
        folder = _open_directory()
        try:
            tracker = resource_tracker.getfd()
            assert tracker is not None
            self._send(("script", details), [folder, tracker])
        finally:
            os.close(folder)
        try:
            (what, report), _ = self._report_of(plan, given_up)
        except TimeoutError:
            raise CannotRunError(f"its top level takes longer than {_RUN_S:.0f} s") from None
        except (_LostError, ConnectionError):
            ending = self._await_the_end()
            if again and self._process is not None and self._process.returncode in FROM_OUTSIDE:
                raise  # no fault of the script's
            raise CannotRunError(f"while it was run, the fork server {ending}") from None
        if what == "threads":
            raise self._useless(report, imported=bool(self._asked))
        if report["problem"]:
            raise CannotRunError(report["problem"])
        if report["seconds"] > _LONG_RUN_S:
            _log.warning(
                "the top level of %s took %.1f s in the fork server, imports included, before "
                "the first worker was forked. Move work that workers do not need below "
                'if __name__ == "__main__":',
                plan.name or plan.path,
                report["seconds"],
            )
        self._exits = report["exits"]
        _codes.setdefault((plan.name, plan.path), report["code"])
        marks: Mapping[str, bytes] = report["marks"]
        return marks

    def _report_of(self, plan: MainPlan, given_up: Callable[[], bool]) -> tuple[Any, list[int]]:
        try:
            return self._receive(_WAITING_S, given_up)
        except TimeoutError:
            _log.warning(
                "the top level of %s has been running in the fork server for %.0f s, and tasks "
                "wait for its end. If it waits for something that the program holds, such as a "
                'lock or a terminal, move that below if __name__ == "__main__":, or pass '
                'main="value"',
                plan.name or plan.path,
                _WAITING_S,
            )
        return self._receive(_RUN_S - _WAITING_S, given_up)

    def _fork(
        self, more: Mapping[str, Any], files: Sequence[int], given_up: Callable[[], bool]
    ) -> forked.ForkedProcess:
        with self._handing(more, files) as (details, given, ours):
            self._send(("fork", details), given)
            limit_s = _FORK_S if self._answers else _IMPORT_S
            (what, answer), descriptors = self._receive(limit_s, given_up)
            if what == "forked":
                pidfd = descriptors[0] if descriptors else None
                return forked.ForkedProcess(details["name"], answer, pidfd, *_let_in(ours))
        if what == "refused":
            if answer in REFUSALS:
                raise _CannotForkError(f"the system refuses its fork: {os.strerror(answer)}")
            raise OSError(answer, os.strerror(answer))
        if what == "unforkable":
            raise _CannotForkError(f"its fork raised {answer}")
        if self._plan is not None:
            raise CannotRunError(f"it starts threads that stay ({', '.join(answer)})")
        raise self._useless(answer, imported=bool(self._asked))

    def _useless(self, threads: Sequence[str], *, imported: bool) -> Exception:
        """Leave out what may have started threads, and return what the server is given up for."""
        told = ", ".join(dict.fromkeys(threads))
        if not imported:
            return _CannotForkError(_HAD_THREADS.format(told))
        _log.warning("nothing is preloaded: the fork server has threads: %s", told)
        _leave_out(self._asked)
        return _StartedThreadsError(told)

    def _start_afresh(
        self, modules: Sequence[str], more: Mapping[str, Any], files: Sequence[int]
    ) -> forked.ForkedProcess:
        """Start a server that becomes a worker, by the pool's thread: it may end with that."""
        process, sock = self._launch(becomes=True)
        assert isinstance(process, subprocess.Popen)
        run = None if self._plan is None else _to_run(self._plan)
        try:
            with self._handing(more, files) as (details, given, ours):
                sock.settimeout(_IMPORT_S)
                letters.send(sock, ("become", {**details, "modules": modules, "run": run}), given)
                # Not waited for: several can start at the same time.
                return forked.ChildProcess(details["name"], process, *_let_in(ours))
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sock.close()

    def _details(self) -> dict[str, Any]:
        """Return what a child of this process has, besides descriptors."""
        me = multiprocessing.current_process()
        return {
            **birth.circumstances(),
            "environ": self._environment(),
            "changes": self._changes,
            "parent": os.getpid(),
            "parent_name": me.name,
            "authkey": bytes(me.authkey),
            "script": self._plan is not None,
        }

    @contextmanager
    def _handing(
        self, more: Mapping[str, Any], files: Sequence[int]
    ) -> Iterator[tuple[dict[str, Any], list[int], list[int]]]:
        """Open what a worker is given, for as long as it is handed over.

        Yields:
            What it is told, what it is given, and this side of it: for :func:`_let_in`.
        """
        me: Any = multiprocessing.current_process()
        # As multiprocessing numbers the children of a process, all its pools together: nobody
        # gets the number of one that has ended.
        number = next(multiprocessing.process._process_counter)  # type: ignore[attr-defined]
        identity = (*me._identity, number)
        name = f"safepool-{':'.join(map(str, identity))}"
        details = {**self._details(), **more, "name": name, "identity": identity}
        opened: list[int] = []
        ours: list[int] = []
        try:
            status, told = os.pipe()
            ours.append(status)
            opened.append(told)
            os.set_blocking(status, False)
            # The worker waits here until it is known: a server that answers too late, or
            # never, may have forked one all the same, and another would share its channel.
            gate, key = os.pipe()
            ours.append(key)
            opened.append(gate)
            folder = _open_directory()
            opened.append(folder)
            streams = [_stream(number, opened) for number in (1, 2)]
            # Shared, so that shared memory is not unlinked by the worker's own at its end.
            tracker = resource_tracker.getfd()
            assert tracker is not None
            given = [told, gate, folder, *streams, tracker, *files]
            yield {**details, "files": len(given)}, given, ours
        finally:
            for descriptor in (*opened, *ours):
                os.close(descriptor)

    def _send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        assert self._sock is not None
        # One that still starts reads nothing, and a long path does not fit into the socket.
        self._sock.settimeout(_FORK_S if self._answers else _IMPORT_S)
        letters.send(self._sock, message, descriptors)

    def _receive(
        self, timeout_s: float, given_up: Callable[[], bool] | None = None
    ) -> tuple[Any, list[int]]:
        assert self._sock is not None
        # What it says first is that it is there: until then it does not do what it was asked for.
        limit_s = timeout_s if self._answers else max(timeout_s, _IMPORT_S)
        self._sock.settimeout(limit_s)
        deadline = time.monotonic() + limit_s
        while given_up is not None and not forked.is_readable(self._sock.fileno(), _LOOK_S):
            _check(given_up)
            if time.monotonic() > deadline:
                raise TimeoutError
        received = letters.receive(self._sock)
        if received is None:
            raise _LostError
        if not self._answers:
            self._answers = True
            if isinstance(self._process, kept.KeptServer):
                self._process.pid = received[0][1]
            return self._receive(timeout_s, given_up)
        return received

    def stop(self) -> None:
        """End it; its workers live on."""
        with self._lock:
            if self._process is not None:
                self._stop()

    def _await_the_end(self) -> str:
        """Say how it ended, whose end of the socket is closed: that is a moment before."""
        assert self._process is not None
        try:
            return describe_exit(self._process.wait(_ENDING_S))
        except subprocess.TimeoutExpired:
            return "closed its socket"

    def _stop(self) -> str:
        """End what is left of it, and say how it ended."""
        process, self._process = self._process, None
        assert process is not None
        assert self._sock is not None
        self._sock.close()
        self._sock = None
        if self._exits and process.poll() is None:
            try:
                process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                pass
        if process.poll() is None:
            try:
                process.kill()
                process.wait(_ENDING_S)
            except (PermissionError, subprocess.TimeoutExpired):
                # Another user's by now: it ends by itself, as its socket was closed. Or it is in a
                # system call that nothing ends.
                process.returncode = 0
            return "did not answer and was ended"
        return describe_exit(process.returncode)

    def forget(self) -> None:
        """Give up the copies that a fork of the program has made."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # not this process's child
        if self._sock is not None:
            self._sock.close()
        for worker in self._workers:
            worker.drop_line()
        self._process, self._sock, self._workers = None, None, []


_servers: dict[_Setting, Server] = {}
# What cannot be preloaded in this program: the first part of its name, and whether it was asked
# for by name, which overrules what else than threads an import leaves.
_left_out: set[tuple[str, bool]] = set()
# The script's code as it was run first: its file may be changed while the program runs.
_codes: dict[tuple[str, str], bytes] = {}
# By attempt, why a script cannot be run in a server.
not_runnable: dict[tuple[str | None, ...], str] = {}
_servers_lock = threading.Lock()
# The life-line: reading and writing end. One for the process, never closed: the workers of a
# server that was killed still hold it.
_line: list[int] = []
# Those below a keeper, until that has ended: after the server, if tasks have left something.
_kept: list[kept.KeptServer] = []


def _to_run(plan: MainPlan) -> dict[str, Any]:
    """Return what a process is told that runs the script."""
    known: Any = multiprocessing.process
    return {
        "argv": list(plan.argv),
        "module": plan.name,
        "file": plan.path,
        "original_dir": known.ORIGINAL_DIR,
        "code": _codes.get((plan.name, plan.path), b""),
    }


def attempt_of(plan: MainPlan, changes: Mapping[str, str | None]) -> tuple[str | None, ...]:
    """Return what tells attempts to run a script apart: with more threads it may start some."""
    return (*plan.key, changes.get("OMP_NUM_THREADS"))


@contextmanager
def server_for(
    changes: Mapping[str, str | None],
    plan: MainPlan | None = None,
    *,
    kept: bool = False,
    asked_only: bool = False,
) -> Iterator[Server]:
    """Give the server of a setting, which nobody ends meanwhile."""
    key = () if plan is None else plan.key
    identity = (*rights(), *place())
    setting = _Setting(tuple(sorted(changes.items())), identity, key, kept, asked_only)
    with _servers_lock:
        _forget_ended()
        found = _servers.get(setting)
        if found is not None and found.has_read_otherwise():
            _servers[replace(setting, outdated=id(found))] = _servers.pop(setting)
            found = None
        if found is None:
            found = _with_rights_of_before(setting)
        if found is None:
            idle = [one for one, other in _servers.items() if other.is_idle()]
            for one in idle[: max(0, len(idle) - _MOST_IDLE + 1)]:
                _servers.pop(one).stop()
            found = _servers[setting] = Server(changes, plan, is_kept=kept, asked_only=asked_only)
        found.users += 1
        if not _line:
            _line[:] = os.pipe()
    try:
        yield found
    finally:
        with _servers_lock:
            found.users -= 1


def _with_rights_of_before(setting: _Setting) -> Server | None:
    """Return a server that can take the rights of now, where this user can start no other."""
    if can_start(_executable(), os.__file__, __file__):
        return None
    for one, server in _servers.items():
        if replace(one, identity=setting.identity) == setting and server.can_fork:
            # Under its new name alone: it has no way back.
            _servers[setting] = _servers.pop(one)
            server.takes_rights = True
            return server
    return None


def running() -> list[int]:
    """Return the process id of each server that this process has started."""
    return [pid for one in [*_servers.values()] if (pid := one.pid) is not None]


def keepers() -> list[int]:
    """Return the process id of each keeper that this process has started."""
    with _servers_lock:
        _forget_ended()
        return [one.keeper for one in _kept]


def descriptors() -> list[int]:
    """Return what this process keeps open for its servers and their workers."""
    socks = [one.fileno() for one in [*_kept]]
    of_servers = (number for one in [*_servers.values()] for number in one.descriptors())
    return [*_line, *socks, *of_servers]


def stop_all() -> None:
    """End the servers of this process; the next pool starts another."""
    with _servers_lock:
        for one in _servers.values():
            one.stop()
        _servers.clear()
        _forget_ended()


def _forget_ended() -> None:
    for one in [*_kept]:
        if one.has_ended():
            _kept.remove(one)
            one.close()


def _forget_all() -> None:
    global _servers_lock  # noqa: PLW0603 -- a thread that the child has not may hold it
    _servers_lock = threading.Lock()
    # multiprocessing does not do so itself.
    tracker: Any = resource_tracker
    tracker._resource_tracker._lock._at_fork_reinit()
    for one in _servers.values():
        one.forget()
    _servers.clear()
    for one_kept in _kept:
        one_kept.close()
    _kept.clear()
    while _line:
        os.close(_line.pop())


os.register_at_fork(after_in_child=_forget_all)
atexit.register(stop_all)


def _send_path(sock: socket.socket) -> None:
    path = marshal.dumps([entry for entry in sys.path if isinstance(entry, str)], 2)
    try:
        sock.settimeout(_IMPORT_S)
        sock.sendall(len(path).to_bytes(8, "little") + path)
    except OSError:
        pass  # it has ended, which is found out by whoever asks it for something


def _leave_out(names: Iterable[str], wanted: Sequence[bool] = (True, False)) -> None:
    _left_out.update((name.partition(".")[0], strict) for name in names for strict in wanted)


def _let_in(ours: list[int]) -> tuple[int, int]:
    """Let a worker begin that is known now, and take over where its end is told, and its line."""
    status, key = ours
    os.write(key, b"\0")
    ours.clear()
    return status, key


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        _log.warning("%s", text)


_logged: set[str] = set()


def _executable() -> str:
    """Return the interpreter, as multiprocessing's own start methods find it.

    Raises:
        _NoInterpreterError: Nothing says where it is: Python is embedded in another program.
    """
    found = multiprocessing.spawn.get_executable()
    if not found:
        if not sys.executable:
            raise _no_interpreter("is empty, as in a program that embeds Python")
        # Set after multiprocessing was imported, whose resource tracker needs it as well.
        multiprocessing.spawn.set_executable(sys.executable)
        found = sys.executable
    return os.fsdecode(found)


def _no_interpreter(what: str) -> _NoInterpreterError:
    name = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable or "")
    return _NoInterpreterError(
        f"the interpreter for workers, {name!r} (sys.executable, or what "
        f"multiprocessing.set_executable() was given), {what}. Give "
        "multiprocessing.set_executable() the path of a Python interpreter that can import "
        'safepool, or pass mp_context="fork" if this program has no threads'
    )


def _interpreter_flags() -> list[str]:
    flags: Any = subprocess
    found: list[str] = flags._args_from_interpreter_flags()  # as multiprocessing's spawn does
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        if option not in found:
            found += ["-X", option]
    return found


def _stream(number: int, opened: list[int]) -> int:
    """Return the standard stream of that number, or a substitute where the program has none."""
    if not _is_stream(number):
        number = os.open(os.devnull, os.O_WRONLY)
        opened.append(number)
    return number


def _is_stream(number: int) -> bool:
    """Return whether a child of the program would have it.

    What Python opens where a stream was closed has its number and is none: a socket of a pool,
    a file that somebody reads. No child inherits it (PEP 446), and nothing is to be printed
    into it.
    """
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def _open_directory() -> int:
    flags = os.O_RDONLY | getattr(os, "O_PATH", 0)
    try:
        return os.open(".", flags)
    except PermissionError:  # a program that has given up root in a directory of root's
        return os.open("/", flags)


def _has_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _above_streams(number: int) -> int:
    return fcntl.fcntl(number, linux.F_DUPFD_CLOEXEC, 3)


def _check(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise InterruptedError("the pool was shut down while the server imported")
