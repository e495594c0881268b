"""``multiprocessing``'s fork server, for ``mp_context="forkserver"``: capped before it imports.

From Python 3.14 on that server imports the program's script, with all of its imports, before it
forks the first worker. Hence a pool has a server of its own. The program's server may have begun
without caps, and its other children must have none:

    settings    one server for each environment of workers, kept until the program ends
    start       the command that starts it sets the variables and watches imports, then preloads
    preloaded   what the program has asked for by ``multiprocessing.set_forkserver_preload()``

Not covered:
    * A program with more settings than ``_MOST``: the other settings use the program's own server,
      and the workers are capped after the fork.
"""

from __future__ import annotations

import multiprocessing.context
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from safepool.workers.begin import BEGIN, facts_for, popen_with

assert sys.platform != "win32"

_MOST = 8


class _Modules(list[str]):
    """Modules that a server preloads; their text in the server's command caps it before."""

    def __init__(
        self,
        names: list[str],
        environment: Mapping[str, str | None],
        threads: int,
        cpus: tuple[int, ...],
    ) -> None:
        super().__init__(names)
        self._facts = facts_for(environment, threads, cpus)

    def __repr__(self) -> str:
        return f"(exec({BEGIN!r}, {self._facts!r}), {list(self)!r})[1]"


_servers: dict[tuple[Any, ...], _Server] = {}
_lock = threading.Lock()


class CappedProcess(multiprocessing.context.ForkServerProcess):
    """A process of ``multiprocessing`` that the server of its environment forks.

    The server is bound to the CPUs of the first worker, so that a library starts as many threads
    as one worker has CPUs.
    """

    def __init__(
        self,
        environment: Mapping[str, str | None],
        threads: int,
        cpus: tuple[int, ...],
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self._setting = threads, tuple(sorted(environment.items())), cpus

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 -- the standard library's name
        from multiprocessing import popen_forkserver  # noqa: PLC0415 -- seldom

        server = _server_for(*process_obj._setting)
        if server is None:
            return popen_forkserver.Popen(process_obj)
        return popen_with(popen_forkserver.Popen, forkserver=server)(process_obj)


class _Server:
    """Parts of the module ``multiprocessing.forkserver`` that a start uses, by the same names."""

    def __init__(
        self, environment: Mapping[str, str | None], threads: int, cpus: tuple[int, ...]
    ) -> None:
        from multiprocessing import forkserver  # noqa: PLC0415 -- as above

        library: Any = forkserver
        self.own = library.ForkServer()
        names = library._forkserver._preload_modules
        self.own._preload_modules = _Modules(names, environment, threads, cpus)
        self.connect_to_new_process = self.own.connect_to_new_process
        self.read_signed = library.read_signed


def _server_for(
    threads: int, environment: tuple[tuple[str, str | None], ...], cpus: tuple[int, ...]
) -> _Server | None:
    key = threads, environment, bool(cpus)
    with _lock:
        server = _servers.get(key)
        if server is None and len(_servers) < _MOST:
            server = _servers[key] = _Server(dict(environment), threads, cpus)
    return server


def running() -> list[int]:
    """Return the process ids of the servers."""
    return [pid for server in [*_servers.values()] if (pid := server.own._forkserver_pid)]


def descriptors() -> list[int]:
    """Return the descriptors of this process that keep the servers alive."""
    found = (server.own._forkserver_alive_fd for server in [*_servers.values()])
    return [descriptor for descriptor in found if descriptor is not None]


def _after_fork() -> None:
    # A server is no child of this process, and lives no longer than its program does.
    global _lock  # noqa: PLW0603 -- a thread that the child has not may hold it
    for descriptor in descriptors():
        os.close(descriptor)
    _servers.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
