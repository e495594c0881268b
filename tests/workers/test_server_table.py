"""The servers of a program: one for each setting, few in all, none given up in use."""

from __future__ import annotations

import errno
import os
import resource
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
import support_tasks as tasks

from safepool import ProcessPool, WorkerDiedError

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

from safepool.workers import forked, forkserver, identity, launch
from safepool.workers.context import ServerContext
from safepool.workers.start import WorkerStart

# More settings than idle servers are kept.
MANY = 6


def start_server(name: str, value: str) -> None:
    """Start the server of a setting, that of one variable."""
    ServerContext().prepare(WorkerStart(environment={name: value}, threads=1))


def make_others() -> None:
    """Ask for servers of ever new settings."""
    for number in range(MANY):
        start_server("SAFEPOOL_TEST_OTHER", str(number))


@pytest.fixture(autouse=True)
def _end_servers() -> Any:
    """Leave the next test no more servers than it finds."""
    yield
    forkserver.stop_all()


def test_a_server_that_a_pool_uses_is_not_given_up() -> None:
    """The pool may be in the middle of a long import, its first worker yet to come."""
    with forkserver.server_for({"SAFEPOOL_TEST": "used"}) as used:
        used.start()
        make_others()
        assert used.pid in forkserver.running()
        make_others()
        assert used.pid in forkserver.running()
    make_others()
    start_server("SAFEPOOL_TEST", "last")
    assert used.pid not in forkserver.running()


def test_a_server_whose_worker_lives_is_not_given_up() -> None:
    """Nobody else can tell how the worker ends."""
    with ProcessPool(1, env={"SAFEPOOL_TEST": "with a worker"}) as pool:
        server = pool.submit(os.getppid).result(timeout=60)
        make_others()
        assert server in forkserver.running()
        with pytest.raises(WorkerDiedError) as caught:
            pool.submit(tasks.end_without_cleanup).result(timeout=60)
        assert caught.value.exitcode == 7


def test_servers_that_nobody_uses_do_not_pile_up() -> None:
    for number in range(3 * MANY):
        start_server("SAFEPOOL_TEST", str(number))
        assert len(forkserver.running()) <= forkserver._MOST_IDLE + 1


def test_threads_that_prepare_one_setting_at_once_get_one_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[int] = []
    start = subprocess.Popen

    def count(*arguments: Any, **keywords: Any) -> Any:
        process: Any = start(*arguments, **keywords)
        started.append(process.pid)
        return process

    monkeypatch.setattr(subprocess, "Popen", count)
    at_once = threading.Barrier(8)
    seen: list[int | None] = []

    def prepare() -> None:
        at_once.wait()
        with forkserver.server_for({"SAFEPOOL_TEST": "at once"}) as server:
            server.start()
            seen.append(server.pid)

    threads = [threading.Thread(target=prepare) for _ in range(at_once.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(started) == 1
    assert seen == started * 8
    assert not [server for server in forkserver._servers.values() if server.users]


def test_the_table_takes_no_exit_code_from_the_pool_that_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code is read once, and the descriptor may be another's in the middle of a look."""
    asked: list[int] = []
    exitcode: Any = forked.ForkedProcess.exitcode

    def note(process: forked.ForkedProcess) -> int | None:
        asked.append(threading.get_ident())
        told: int | None = exitcode.fget(process)
        return told

    with ProcessPool(1, env={"SAFEPOOL_TEST": "ends"}) as pool:
        pool.submit(abs, -1).result(timeout=60)
        monkeypatch.setattr(forked.ForkedProcess, "exitcode", property(note))
        make_others()
    assert asked
    assert threading.get_ident() not in asked


def test_a_start_that_is_refused_keeps_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever descriptor is the one too many."""
    copy = launch._above_streams
    start_server("SAFEPOOL_TEST", "before")  # the life-line is kept
    open_before = os.listdir("/proc/self/fd")
    for given in range(2):
        left = [copy] * given

        def refuse(number: int, left: list[Any] = left) -> int:
            if not left:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            copied: int = left.pop()(number)
            return copied

        monkeypatch.setattr(launch, "_above_streams", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            start_server("SAFEPOOL_TEST", "refused")

        assert os.listdir("/proc/self/fd") == open_before


def test_what_a_server_is_given_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads its path before that is sent, and sockets of the program may have a time limit."""
    found: list[bool] = []
    execute = launch._execute

    def look(command: Any, handed: Any, environment: Any) -> Any:
        found.extend(map(os.get_blocking, handed))
        return execute(command, handed, environment)

    monkeypatch.setattr(launch, "_execute", look)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.01)
    try:
        start_server("SAFEPOOL_TEST", "blocks")
    finally:
        socket.setdefaulttimeout(before)

    assert len(found) >= 2
    assert all(found)


def test_without_descriptors_nothing_that_cannot_be_read_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pool would part with its workers, which have the very rights of the program."""
    monkeypatch.setattr(identity, "_LOOK_S", 0.0)
    watch = identity.RightsWatch()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        blind = identity.RightsWatch()
        changed = [watch.have_changed(), blind.have_changed()]
        with pytest.raises(OSError, match="Too many open files"):
            identity.rights()
        with pytest.raises(OSError, match="Too many open files"):
            identity.place()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert [*changed, watch.have_changed(), blind.have_changed()] == [False] * 4
