"""The fork servers of this process: started by exec, asked for workers, started again.

    program  --- unnamed socket pair --->  server  --- fork --->  worker, worker, ...
             --- life-line (a pipe) ---->          ----------->

A server is born with the caps in its environment and imports the modules that its workers will
need (``server``, ``preload``). If the plan says so it runs the program's script (``plan``,
``script``). Then it forks a worker in milliseconds. Each distinct setting has one server, which
the pools of this process share and keep for later pools; the server ends with the program.

Failures and their treatment:
    a server is killed      Its workers live on. The next worker starts another server, which runs
                            the script again; only the third death in a row is the script's fault.
                            A pool that has had workers tries on: its calls refer to their names.
    the script cannot be    The pool uses another server without the script, and its functions
    run there               travel by value. The log says so once.
    it cannot be run again  A pool whose calls refer to its names tries on. Without workers the
                            pool breaks after the third error of the script in a row.
    an import crashes or    Another server is started without that library: threads make every
    starts threads          fork unsafe.
    a server does not       The server is killed, and another is started.
    answer
    a server cannot fork    Each worker is started afresh: a server that becomes the worker itself,
                            and runs the script as the server has run it. An agent or a debugger
                            has threads in every interpreter, or the system refuses the fork. The
                            log has the reason once.
    a server never answers  An error names the executable: it is no Python interpreter.
    tasks leave programs    The programs go on, as with any pool. With ``end_subprocesses=True``
                            the server has a parent that ends them with the program (``keeper``).
    the program gives up    Another server is started with the new rights. If the new user cannot
    root                    start one (an interpreter below /root), the running server gives up
                            root too; it is useless if its rights then differ from the program's.
    the program forks       The child closes its copies, which would keep the server alive. The
                            modules of a start are imported here, in the thread that makes the
                            pool: a child could never import a module that another thread was
                            importing at the fork.

Not covered:
    * A worker that ends while the server is inside one long call of an import: its exit code stays
      unknown.
    * A preloaded library that reads a variable at its import has the value that the server had
      then, unless the variable bounds threads.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.workers import asking, launch, upkeep
from safepool.workers.identity import can_start, place, rights
from safepool.workers.interpreter import executable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from safepool.workers.plan import MainPlan

assert sys.platform == "linux"

# Servers without workers beyond this number are ended: a program may make pools of ever new
# settings.
_MOST_IDLE = 3


class _Setting(NamedTuple):
    """Settings that a server has for good: pools with others need another server."""

    changes: tuple[tuple[str, str | None], ...]
    # User, groups, capabilities, control group, name spaces, root directory: a program that
    # has given up rights must not get workers that still have them.
    identity: tuple[str, ...]
    # The script that the server has run. Workers of another pool must not have anything of that
    # script.
    script: tuple[str, ...]
    # Whether the server is below a keeper.
    kept: bool
    # Whether the server forks no worker.
    asked_only: bool
    # Of a server whose imports have read another environment: it has no new workers.
    outdated: int = 0


_servers: dict[_Setting, upkeep.Server] = {}
# By attempt, why a script cannot be run in a server.
not_runnable: dict[tuple[str | None, ...], asking.CannotRunError] = {}
_servers_lock = threading.Lock()


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
) -> Iterator[upkeep.Server]:
    """Lend the server of a setting, which is not ended meanwhile."""
    key = () if plan is None else plan.key
    identity = (*rights(), *place())
    setting = _Setting(tuple(sorted(changes.items())), identity, key, kept, asked_only)
    with _servers_lock:
        launch.keepers()  # lets go of those that have ended
        found = _servers.get(setting)
        running = None if found is None else found.running
        if running is not None and running.has_read_otherwise():
            _servers[setting._replace(outdated=id(running))] = _servers.pop(setting)
            found = None
        if found is None:
            found = _with_rights_of_before(setting)
        if found is None:
            idle = [one for one, other in _servers.items() if other.is_idle()]
            for one in idle[: max(0, len(idle) - _MOST_IDLE + 1)]:
                _servers.pop(one).stop()
            found = _servers[setting] = upkeep.Server(
                changes, plan, is_kept=kept, asked_only=asked_only
            )
        found.users += 1
        if not launch.line:
            launch.line[:] = os.pipe()
    try:
        yield found
    finally:
        with _servers_lock:
            found.users -= 1


def _with_rights_of_before(setting: _Setting) -> upkeep.Server | None:
    """Return a server that can take the rights of now, where this user can start no other."""
    if can_start(executable(), os.__file__, __file__):
        return None
    for one, server in _servers.items():
        if one._replace(identity=setting.identity) == setting and server.can_fork:
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
        return [one.keeper for one in launch.keepers()]


def stop_all() -> None:
    """End the servers of this process; the next pool starts another."""
    with _servers_lock:
        for one in _servers.values():
            one.stop()
        _servers.clear()
        launch.keepers()


def _forget_all() -> None:
    global _servers_lock  # noqa: PLW0603 -- a thread that the child has not may hold it
    _servers_lock = threading.Lock()
    # multiprocessing does not do so itself.
    tracker: Any = resource_tracker
    tracker._resource_tracker._lock._at_fork_reinit()
    for one in _servers.values():
        one.forget()
    _servers.clear()
    launch.forget()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(stop_all)
