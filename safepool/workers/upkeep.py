"""One fork server for as long as pools want it: started when it is needed, and again when lost.

A running server is a `RunningServer` (``asking``). The table in ``forkserver`` lists failures and
their treatment.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from safepool.errors import FROM_OUTSIDE
from safepool.transport import letters
from safepool.workers import asking, forked, launch
from safepool.workers.contained import ContainedLogger
from safepool.workers.interpreter import no_interpreter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from safepool.workers.plan import MainPlan

assert sys.platform == "linux"

_log = ContainedLogger()

_T = TypeVar("_T")

# With offenders left out, then with nothing preloaded, then once more for bad luck.
_MOST_STARTS = 4
# From the end of its socket to that of a worker that is started afresh.
_ENDING_S = 1.0


class Server:
    """A fork server, started on demand.

    Attributes:
        takes_rights: Whether the server has the program's former rights, and must take over the
            present ones.
        users: Number of pools that use the server now; under the lock of the servers' table.
    """

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
        # Whether each worker is an interpreter of its own from now on.
        self._afresh = asked_only
        self._lock = threading.Lock()
        self.running: asking.RunningServer | None = None
        self._workers: list[forked.ForkedProcess] = []
        self.takes_rights: bool = False
        self.users = 0

    @property
    def pid(self) -> int | None:
        """Process id of the server; ``None`` if none runs."""
        running = self.running
        return None if running is None else running.pid

    @property
    def can_fork(self) -> bool:
        """Whether it runs, as far as is known, and forks workers."""
        return self.running is not None and not self._afresh

    def is_idle(self) -> bool:
        """Return whether no pool uses the server or has a worker of it."""
        # Not whether they live: their exit codes are read once, by the threads of their pools.
        return not self.users and all(worker.closed for worker in self._workers)

    def fork_worker(
        self, more: Mapping[str, Any], files: Sequence[int], wish: asking.Wish
    ) -> forked.ForkedProcess:
        """Preload new modules and fork a worker; start the server first, or again."""
        with self._alone(wish.given_up):
            process = None
            if not self._afresh:
                try:
                    process = self._in_a_server(lambda one: one.fork(more, files, wish), wish)
                except asking.CannotForkError as error:
                    self._be_afresh(error)
                    if self._plan is not None:  # for the names that workers have
                        self._in_a_server(lambda _: None, wish)
            if process is None:
                process = self._start_afresh(wish.modules if wish.strict else (), more, files)
            self._workers = [worker for worker in self._workers if not worker.closed]
            self._workers.append(process)
            return process

    def run_script(self, wish: asking.Wish) -> Mapping[str, bytes]:
        """Run the script of the plan, unless this server has run it, and return its names.

        After a `CannotRunError` the server has ended.
        """
        with self._alone(wish.given_up):
            if self.running is None or self.running.marks is None:
                try:
                    self._in_a_server(lambda _: None, wish)
                except asking.CannotForkError as error:
                    self._be_afresh(error)
                    self._in_a_server(lambda _: None, wish)
            assert self.running is not None
            assert self.running.marks is not None
            return self.running.marks

    def prints(self, names: list[str], given_up: Callable[[], bool]) -> Mapping[str, bytes | None]:
        """Return prints of the script's globals, as far as they are known."""
        found = b""
        told, tell = os.pipe()
        try:
            with self._alone(given_up):
                if self.running is None or not self.running.ask_prints(names, tell):
                    return {}  # it has ended
            os.close(tell)
            tell = -1
            while True:
                while not forked.is_readable(told, asking.LOOK_S):
                    if given_up():
                        return {}
                data = os.read(told, 1 << 16)
                if not data:
                    return _read_prints(found)
                found += data
        except OSError:
            return {}  # it is gone; the next worker's server is another
        finally:
            os.close(told)
            if tell >= 0:
                os.close(tell)

    def preload_ahead(self, modules: Sequence[str]) -> None:
        """Request the import of new modules, without waiting for it."""
        if not self._lock.acquire(blocking=False):
            return  # the pool that uses the server will request it
        try:
            if self.running is not None and not self._afresh:
                self.running.preload_ahead(modules)
        except OSError:
            pass  # it is gone: the next start of a worker notices that
        finally:
            self._lock.release()

    def start(self) -> bool:
        """Start it, if it does not run; return whether it forks the workers."""
        if self.running is None:  # or another thread starts it now, without being waited for
            with self._lock:
                if self.running is None and not self._afresh:
                    self._start()
        return not self._afresh

    def stop(self) -> None:
        """End it; its workers live on."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Give up the copies that a fork of the program has made."""
        self._lock = threading.Lock()
        if self.running is not None:
            self.running.forget()
        for worker in self._workers:
            worker.drop_line()
        self.running, self._workers = None, []

    @contextmanager
    def _alone(self, given_up: Callable[[], bool]) -> Iterator[None]:
        while not self._lock.acquire(timeout=asking.LOOK_S):  # another pool waits for an import
            asking.check(given_up)
        try:
            yield
        finally:
            self._lock.release()

    def _start(self) -> asking.RunningServer:
        self.running = asking.RunningServer(
            self._changes,
            self._plan,
            forks=not self._afresh,
            is_kept=self._kept and not self._afresh,
        )
        return self.running

    def _stop(self) -> str:
        running, self.running = self.running, None
        if running is None:
            return ""
        ending = running.stop()
        for worker in self._workers:
            worker.bury()
        # Another child of the program may get the process id of one that is waited for.
        self._workers = [worker for worker in self._workers if not worker.closed]
        return ending

    def _be_afresh(self, error: asking.CannotForkError) -> None:
        self._afresh = True
        _log_once(
            "no fork server can be used, so each worker is a fresh interpreter "
            f"(workers start more slowly and share no memory): {error}"
        )
        if self._kept:
            _log_once(
                "end_subprocesses=True has no effect if each worker is a fresh interpreter: "
                "processes that their tasks start may outlive this program. End them in the task"
            )

    def _in_a_server(self, deed: Callable[[asking.RunningServer], _T], wish: asking.Wish) -> _T:
        """Use a server that has preloaded new modules and run the script.

        One that forks no worker only runs the script, for the names that workers have.
        """
        why = ""
        for attempt in range(_MOST_STARTS):
            running = self.running or self._start()
            preloads = attempt < 2 and not self._afresh
            try:
                self._give_rights(running, wish.given_up)
                if wish.strict and preloads:
                    running.preload(wish)
                if self._plan is not None and running.marks is None:
                    running.run_script(wish.given_up, again=attempt < 2)
                # After the script, which imports in its own order, and may set something before.
                if not wish.strict and preloads:
                    running.preload(wish)
                return deed(running)
            except (asking.LostError, ConnectionError, TimeoutError) as error:
                why = self._lose(running, error, attempt)
            except asking.StartedThreadsError as error:
                self._stop()
                why = f"had threads: {error}"
            except (asking.CannotForkError, asking.CannotRunError, InterruptedError):
                self._stop()  # it may be in the middle of an import, or have run half a script
                raise
        failed = f"{_MOST_STARTS} fork servers in a row failed; the last {why}"
        if self._afresh:
            raise asking.CannotRunError(failed, by_script=False)
        raise asking.CannotForkError(failed)

    def _give_rights(self, running: asking.RunningServer, given_up: Callable[[], bool]) -> None:
        if self.takes_rights:
            self.takes_rights = False
            if not running.take_rights(given_up):
                self._stop()
                raise no_interpreter(
                    f"cannot be started by user {os.geteuid()}, and the running fork server "
                    "cannot take over the user and rights that this program now has"
                )

    def _lose(self, running: asking.RunningServer, error: Exception, attempt: int) -> str:
        """End a server that was lost, and say how it ended."""
        late = isinstance(error, TimeoutError)
        if not late:
            running.await_the_end()
        ending = self._stop()
        if not running.answers and (late or (attempt and not running.was_ended_from_outside)):
            raise no_interpreter(f"was started as an interpreter, and {ending}")
        _log.info("a fork server was lost and is started again: it %s", ending)
        return ending

    def _start_afresh(
        self, modules: Sequence[str], more: Mapping[str, Any], files: Sequence[int]
    ) -> forked.ForkedProcess:
        """Start a server that becomes a worker, by the pool's thread: it may end with that."""
        process, sock = launch.launch(self._changes, becomes=True, is_kept=False)
        assert isinstance(process, subprocess.Popen)
        details = {
            **launch.details_of(self._changes, script=self._plan is not None),
            **more,
            "modules": modules,
            "run": None if self._plan is None else asking.to_run(self._plan),
        }
        try:
            with launch.handing(details, files) as (told, given, ours):
                sock.settimeout(launch.IMPORT_S)
                try:
                    letters.send(sock, ("become", told), given)
                except ConnectionError:
                    worker = forked.ChildProcess(told["name"], process, *launch.let_in(ours))
                    if worker.wait(_ENDING_S) in FROM_OUTSIDE:
                        return worker  # its pool counts those that end before they begin
                    worker.kill()
                    worker.wait(_ENDING_S)
                    worker.close()
                    raise
                # Not waited for: several can start at the same time.
                return forked.ChildProcess(told["name"], process, *launch.let_in(ours))
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sock.close()


def _read_prints(data: bytes) -> dict[str, bytes | None]:
    """Return by name what ``script.tell_prints`` wrote."""
    found: dict[str, bytes | None] = {}
    file = io.BytesIO(data)
    try:
        while True:
            name, print_ = pickle.load(file)
            found[name] = print_
    except (EOFError, pickle.UnpicklingError):  # the end, or that of a process that was ended
        return found


_logged: set[str] = set()


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        _log.warning("%s", text)
