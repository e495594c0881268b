"""One running fork server: requests to it, and the meaning of its answers.

The letters are those of ``server``. A server that does not answer, or has something that makes it
useless, is for ``upkeep``, which starts another.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from concurrent.futures.process import _RemoteTraceback
from multiprocessing import process as known
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.errors import FROM_OUTSIDE, REFUSALS, describe_exit
from safepool.transport import letters
from safepool.workers import forked, identity, launch
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from safepool.workers.plan import MainPlan

assert sys.platform == "linux"

_log = ContainedLogger()

# Seconds for one fork: of a few hundred megabytes it takes milliseconds.
_FORK_S = 5.0
# Time limit for the script's top level. A script that computes longer there gets a message.
_RUN_S = 600.0
# The log names a top level that takes longer: each server waits for its end.
_LONG_RUN_S = 2.0
# A top level that has not ended by then may never end: it may wait for a lock that the program
# holds.
_WAITING_S = 10.0
# From the end of its socket to that of the process.
_ENDING_S = 1.0
LOOK_S = 0.1
"""Between two looks whether an import is still waited for: Ctrl-C must not have to."""

_HAD_THREADS = "it had threads from its start, usually those of an agent or a debugger: {}"

# Modules that cannot be preloaded in this program: the first part of the name, and whether it was
# requested by name. A request by name is refused only for threads.
_left_out: set[tuple[str, bool]] = set()
# The script's code as it was run first: its file may be changed while the program runs.
_codes: dict[tuple[str, str], bytes] = {}


class LostError(Exception):
    """The server has ended, or does not answer."""


class StartedThreadsError(Exception):
    """The server has threads that a fork would lose."""


class CannotForkError(Exception):
    """No server can be forked, even without any preloaded module."""


class HasReadError(Exception):
    """The server's imports have read a variable that has another value in this worker."""


class CannotRunError(Exception):
    """The script's top level cannot be run in a server. The cause is its exception, if any.

    Attributes:
        by_script: Whether the script's own code is the reason.
        ends: Whether the script's own code ends each process that runs it.
    """

    def __init__(self, problem: str, *, by_script: bool = True, ends: bool = False) -> None:
        super().__init__(problem)
        self.by_script = by_script
        self.ends = ends


class Wish(NamedTuple):
    """Modules that a pool wants a server to have imported; ``strict`` if it has named them."""

    modules: Sequence[str]
    strict: bool
    given_up: Callable[[], bool]


class RunningServer:
    """A fork server's process, with this end of the socket to it.

    Args:
        plan: The script that the server runs.
        forks: ``False`` if each worker is an interpreter of its own.

    Attributes:
        marks: Names that the script has made; ``None`` before the run of the script.
        answers: Whether the server has sent a message; until then it may still be starting.
    """

    def __init__(
        self,
        changes: Mapping[str, str | None],
        plan: MainPlan | None,
        *,
        forks: bool,
        is_kept: bool,
    ) -> None:
        self._changes = changes
        self._plan = plan
        self._forks = forks
        self._process, self._sock = launch.launch(changes, becomes=False, is_kept=is_kept)
        self.marks: Mapping[str, bytes] | None = None
        self.answers: bool = False
        # Whether the server has exit functions to run.
        self._exits = False
        self._asked: set[str] = set()
        # Answers to earlier requests are still to come.
        self._ahead = False
        # Variables that its imports have read, as they were in the program.
        self._read: dict[str, str | None] = {}
        _log.debug("a fork server was started")

    @property
    def pid(self) -> int | None:
        """Process id of the server; ``None`` if unknown."""
        return self._process.pid or None

    @property
    def was_ended_from_outside(self) -> bool:
        """Whether it was killed from outside."""
        return self._process.returncode in FROM_OUTSIDE

    def has_read_otherwise(self) -> bool:
        """Return whether its imports have read a variable that is another by now."""
        if self._plan is not None:  # its script has read its variables
            return False
        return any(value_of(name, self._changes) != value for name, value in [*self._read.items()])

    def _send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        # A server that still starts reads nothing, and a long path does not fit into the socket.
        self._sock.settimeout(_FORK_S if self.answers else launch.IMPORT_S)
        letters.send(self._sock, message, descriptors)

    def _receive(
        self, timeout_s: float, given_up: Callable[[], bool] | None = None
    ) -> tuple[Any, list[int]]:
        # The server's first message reports its start. Before that the server processes no
        # requests.
        limit_s = timeout_s if self.answers else max(timeout_s, launch.IMPORT_S)
        self._sock.settimeout(limit_s)
        deadline = time.monotonic() + limit_s
        while given_up is not None and not forked.is_readable(self._sock.fileno(), LOOK_S):
            check(given_up)
            if time.monotonic() > deadline:
                raise TimeoutError
        received = letters.receive(self._sock)
        if received is None:
            raise LostError
        if not self.answers:
            self.answers = True
            if isinstance(self._process, launch.KeptServer):
                self._process.pid = received[0][1]
            return self._receive(timeout_s, given_up)
        return received

    def take_rights(self, given_up: Callable[[], bool]) -> bool:
        """Give the server the program's present rights; return whether that succeeded."""
        self._hear_of_what_was_asked_ahead(given_up)
        self._send(("rights", identity.users()))
        (_, told), _ = self._receive(_FORK_S, given_up)
        return bool(told == (identity.rights(), identity.place()))

    def preload(self, wish: Wish) -> None:
        """Make the server import new modules.

        Raises:
            StartedThreadsError: The server is useless now. The cause is left out from now on.
            CannotForkError: The server has been useless from its start.
        """
        self._hear_of_what_was_asked_ahead(wish.given_up)
        before = bool(self._asked)
        if self._ask_for(wish.modules, strict=wish.strict):
            self._hear_of_imports(wish.given_up, strict=wish.strict, imported=before)

    def preload_ahead(self, modules: Sequence[str]) -> None:
        """Request the import of new modules, without waiting for it."""
        if not self._ahead and (self._plan is None or self.marks is not None):
            self._ahead = self._ask_for(modules, strict=False)

    def _hear_of_what_was_asked_ahead(self, given_up: Callable[[], bool]) -> None:
        if self._ahead:
            self._ahead = False
            self._hear_of_imports(given_up, strict=False, imported=True)

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
                (what, told), _ = self._receive(launch.IMPORT_S, given_up)
            except (LostError, ConnectionError, TimeoutError) as error:
                if importing:
                    if isinstance(error, TimeoutError):
                        why = "the fork server's import takes too long"
                    else:
                        why = f"while it was imported, the fork server {self.await_the_end()}"
                    _log.warning("%s is not preloaded: %s", importing, why)
                    _leave_out([importing])
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
            raise StartedThreadsError(", ".join(sorted(told["culprits"])))
        self._read |= {name: value_of(name, self._changes) for name in told["read"]}

    def run_script(self, given_up: Callable[[], bool], *, again: bool) -> Mapping[str, bytes]:
        """Run the script of the plan, and return its names, or raise `CannotRunError`."""
        plan = self._plan
        assert plan is not None
        details = {
            **launch.details_of(self._changes, script=True),
            **to_run(plan),
            "name": "safepool-server",
            "identity": (),
            "forks": self._forks,
        }
        folder = launch.open_directory()
        try:
            self._send(("script", details), [folder, launch.tracker()])
        finally:
            os.close(folder)
        try:
            (what, report), _ = self._report_of(plan, given_up)
        except TimeoutError:
            raise CannotRunError(f"its top level takes longer than {_RUN_S:.0f} s") from None
        except (LostError, ConnectionError):
            ending = self.await_the_end()
            own = not self.was_ended_from_outside
            if again and not own:
                raise  # no fault of the script's
            told = f"while it was run, the fork server {ending}"
            raise CannotRunError(told, by_script=own, ends=own) from None
        if what == "threads":
            raise self._useless(report, imported=bool(self._asked))
        if report["problem"]:
            trace = report["trace"]
            cause = _RemoteTraceback(trace) if trace else None
            raise CannotRunError(report["problem"], ends=bool(trace)) from cause
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
        self.marks = marks
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

    def ask_prints(self, names: list[str], tell: int) -> bool:
        """Request prints of the script's globals, through a pipe."""
        if self.marks is None:
            return False
        self._send(("prints", names), [tell])
        return True

    def fork(
        self, more: Mapping[str, Any], files: Sequence[int], wish: Wish
    ) -> forked.ForkedProcess:
        """Fork a worker.

        Raises:
            CannotForkError: The server will never be able to fork.
            CannotRunError: The script has left threads.
            StartedThreadsError: The script or another import has started threads.
            HasReadError: This worker needs another server, because an import has read variables
                that it changes.
        """
        own: Mapping[str, str] = more["told"].own
        if any(name in self._read and self._read[name] != own[name] for name in own):
            raise HasReadError
        details = {**launch.details_of(self._changes, script=self._plan is not None), **more}
        with launch.handing(details, files) as (told, given, ours):
            self._send(("fork", told), given)
            limit_s = _FORK_S if self.answers else launch.IMPORT_S
            (what, answer), descriptors = self._receive(limit_s, wish.given_up)
            if what == "forked":
                pidfd = descriptors[0] if descriptors else None
                return forked.ForkedProcess(told["name"], answer, pidfd, *launch.let_in(ours))
        if what == "refused":
            if answer in REFUSALS:
                raise CannotForkError(f"the system refuses its fork: {os.strerror(answer)}")
            raise OSError(answer, os.strerror(answer))
        if what == "unforkable":
            raise CannotForkError(f"its fork failed: {answer}")
        if self._plan is not None:
            raise CannotRunError(f"it starts threads that do not end ({', '.join(answer)})")
        raise self._useless(answer, imported=bool(self._asked))

    def _useless(self, threads: Sequence[str], *, imported: bool) -> Exception:
        """Leave out modules that may have started threads; return the reason to stop."""
        told = ", ".join(dict.fromkeys(threads))
        if not imported:
            return CannotForkError(_HAD_THREADS.format(told))
        _log.warning(
            "nothing is preloaded: an import started threads in the fork server: %s", told
        )
        _leave_out(self._asked)
        return StartedThreadsError(told)

    def await_the_end(self) -> str:
        """Wait for the end of a server that has closed its socket; return how it ended."""
        try:
            return describe_exit(self._process.wait(_ENDING_S))
        except subprocess.TimeoutExpired:
            return "closed its socket"

    def stop(self) -> str:
        """End the server, and return how it ended."""
        process = self._process
        self._sock.close()
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
                # The server has another user by now, and ends by itself because its socket was
                # closed. Or it is in a system call that nothing ends.
                process.returncode = 0
            return "did not answer and was ended"
        return describe_exit(process.returncode)

    def forget(self) -> None:
        """Give up the copies that a fork of the program has made."""
        self._process.returncode = 0  # not this process's child
        self._sock.close()


def to_run(plan: MainPlan) -> dict[str, Any]:
    """Return the details for a process that runs the script."""
    process: Any = known
    return {
        "argv": list(plan.argv),
        "module": plan.name,
        "file": plan.path,
        "original_dir": process.ORIGINAL_DIR,
        "code": _codes.get((plan.name, plan.path), b""),
    }


def value_of(name: str, changes: Mapping[str, str | None]) -> str | None:
    """Return the value of a variable in a server that would be started now."""
    return changes[name] if name in changes else os.environ.get(name)


def _leave_out(names: Iterable[str], wanted: Sequence[bool] = (True, False)) -> None:
    _left_out.update((name.partition(".")[0], strict) for name in names for strict in wanted)


def check(given_up: Callable[[], bool]) -> None:
    """Raise ``InterruptedError`` if the server is no longer needed."""
    if given_up():
        raise InterruptedError("the pool was shut down while the server imported")
