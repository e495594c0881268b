"""What tasks have started does not outlive the program, if it asks for that; else it does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import support_leaving as leaving
from support_descriptors import count_descriptors
from support_processes import has_ended, kill, still_alive, wait_until

from safepool import ProcessPool

if sys.platform != "linux":
    pytest.skip("a keeper is Linux's", allow_module_level=True)

from safepool.workers import forkserver
from safepool.workers.launch import KeptServer

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent.parent

# How a program ends whose tasks have left something.
ENDS = {
    "with the pool": "",
    "by sys.exit()": "sys.exit(3)",
    "by os._exit()": "os._exit(3)",
    "by an error": "raise ValueError",
    "by SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "by SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "by SIGTERM for its group": "os.killpg(0, signal.SIGTERM)",
    "by SIGKILL in the middle of tasks": """
            hanging = pool.submit(time.sleep, 300)
            while not hanging.running():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "as another program": "os.execvp('true', ['true'])",
    "after the pool": """
            pool.shutdown()
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "after the worker": """
            assert pool.submit(os.kill, pid_of_worker, signal.SIGKILL).exception()
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "after the server": """
            (server,) = forkserver.running()
            os.kill(server, signal.SIGKILL)
            wait_until(lambda: has_ended(server))
            assert pool.submit(os._exit, 3).exception()
            print(*pool.submit(leave, ["a daemon"]).result(), *forkserver.keepers(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "while a fork of it goes on": """
            go_on_in(os.fork)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "while a fork that Python does not know goes on": """
            go_on_in(ctypes.PyDLL(None).fork)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "when signals have ended no keeper": """
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                os.kill(*forkserver.keepers(), number)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
}

PROGRAM = """
import ctypes, os, signal, sys, time
import safepool
from safepool.workers import forkserver
from support_leaving import LEFT, leave
from support_processes import has_ended, wait_until

def go_on_in(fork):
    sys.stdout.flush()
    if pid := fork():
        print("fork", pid, flush=True)
        return
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    time.sleep(300)
    os._exit(0)

if __name__ == "__main__":
    with safepool.ProcessPool(1, end_subprocesses={wanted}) as pool:
        pids = pool.submit(leave, [*LEFT]).result()
        pid_of_worker = pool.submit(os.getpid).result()
        print(*pids, pid_of_worker, *forkserver.running(), *forkserver.keepers(), flush=True)
{end}
"""


def start(
    folder: Path, end: str, *, wanted: bool, flags: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start a program that ends so, in a group of its own."""
    then = textwrap.indent(textwrap.dedent(end), " " * 8)
    (folder / "script.py").write_text(PROGRAM.format(end=then, wanted=wanted))
    with (folder / "errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, *flags, "script.py"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )


def left_by(program: subprocess.Popen[str]) -> tuple[list[int], list[int]]:
    """Wait until nobody has its output any more; return what it has told of, and its forks.

    If it has any, its own end is waited for: multiprocessing's resource tracker has its output for
    as long as a fork goes on.
    """
    lines = []
    assert program.stdout is not None
    while (line := program.stdout.readline().split()) and line[0] != "fork":
        lines.append(line)
    lines += [line] if line else []
    program.wait(timeout=60)
    forks = [int(line[1]) for line in lines if line[0] == "fork"]
    pids = [int(number) for line in lines if line[0] != "fork" for number in line]
    assert len(pids) >= 9, lines
    return pids, forks


@pytest.mark.parametrize("end", ENDS)
def test_nothing_that_tasks_have_started_outlives_the_program(end: str, tmp_path: Path) -> None:
    with start(tmp_path, ENDS[end], wanted=True) as program:
        pids, forks = left_by(program)
    alive = still_alive(pids, after_s=1)
    kill([*forks, *alive])

    assert alive == []


def test_without_that_what_tasks_have_started_goes_on(tmp_path: Path) -> None:
    with start(tmp_path, ENDS["by SIGKILL"], wanted=False) as program:
        assert program.stdout is not None
        *left, worker, server = map(int, program.stdout.readline().split())
        program.wait()
        wait_until(lambda: has_ended(worker) and has_ended(server))
        alive = still_alive(left, after_s=0)
        kill(alive)

    assert alive == left
    assert len(left) == 7


def test_bytes_are_not_mixed_up_with_text_on_the_way_to_it(tmp_path: Path) -> None:
    """``-bb`` makes an error of it, which its standard error would tell."""
    with start(tmp_path, "", wanted=True, flags=("-bb", "-W", "error")) as program:
        pids, _ = left_by(program)

    assert still_alive(pids, after_s=1) == []
    assert (program.returncode, (tmp_path / "errors").read_text()) == (0, "")


def test_one_that_is_dropped_at_the_programs_end_closes_its_socket() -> None:
    """Else a program that makes errors of warnings is told of it, now and then."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", ""])
    found = KeptServer(process, ours)
    os.waitpid(process.pid, 0)
    del found, ours
    with theirs:
        assert theirs.recv(1) == b""


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    """A pool whose server and keeper end with the test."""
    with ProcessPool(1, end_subprocesses=True) as pool:
        yield pool
    forkserver.stop_all()
    wait_until(lambda: not forkserver.keepers())


def test_it_goes_on_after_the_pool_and_the_keeper_ends_after_it(pool: ProcessPool) -> None:
    left = pool.submit(leaving.leave, [*leaving.LEFT]).result()
    (keeper,) = forkserver.keepers()
    pool.shutdown()
    forkserver.stop_all()
    try:
        assert forkserver.keepers() == [keeper]
        assert still_alive(left, after_s=0) == left
    finally:
        kill(left)
    wait_until(lambda: has_ended(keeper))
    assert forkserver.keepers() == []


def test_a_keeper_that_has_nothing_to_wait_for_ends_with_its_server(pool: ProcessPool) -> None:
    assert pool.submit(abs, -1).result() == 1
    (keeper,) = forkserver.keepers()
    pool.shutdown()
    forkserver.stop_all()

    assert has_ended(keeper)
    assert forkserver.keepers() == []


def test_a_keeper_holds_nothing_of_the_program(pool: ProcessPool) -> None:
    assert pool.submit(abs, -1).result() == 1
    folder = Path(f"/proc/{forkserver.keepers()[0]}")
    files = [os.readlink(link) for link in (folder / "fd").iterdir()]
    others = [name for name in files if not name.startswith(("socket:", "/dev/null"))]

    assert os.readlink(folder / "cwd") == "/"
    # From some version on libffi keeps itself open in whoever has imported ctypes.
    look = "import ctypes, os; print(*map(os.path.realpath, os.scandir('/dev/fd')), sep=chr(10))"
    argv = [sys.executable, "-c", look]
    fresh = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    libffi = {name for name in fresh if "/libffi" in name}
    assert [name for name in others if "pidfd" not in name and name not in libffi] == []
    assert len([name for name in files if name.startswith("socket:")]) == 3
    assert len(os.listdir(folder / "task")) == 1


def test_the_server_ends_with_a_keeper_that_is_killed_and_another_is_started(
    pool: ProcessPool,
) -> None:
    server = pool.submit(os.getppid).result()
    (keeper,) = forkserver.keepers()
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: has_ended(server))
    pool.submit(os._exit, 3).exception()

    assert pool.submit(os.getppid).result() not in (server, keeper)
    assert keeper not in forkserver.keepers()
    assert len(forkserver.keepers()) == 1


def test_how_a_server_below_a_keeper_ended_is_told(
    pool: ProcessPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="safepool"):
        os.kill(pool.submit(os.getppid).result(), signal.SIGSEGV)
        pool.submit(os._exit, 3).exception()
        assert pool.submit(abs, -1).result() == 1

    assert "a fork server was lost and is started again: it was killed by SIGSEGV" in caplog.text


def test_pools_with_it_have_a_server_of_their_own(pool: ProcessPool) -> None:
    with ProcessPool(1, end_subprocesses=True) as same, ProcessPool(1) as other:
        pids = [one.submit(os.getppid).result() for one in (pool, same, other)]

    assert pids[0] == pids[1] != pids[2]
    assert len(forkserver.keepers()) == 1


def test_no_file_stays_open_for_it(pool: ProcessPool) -> None:
    """Neither of the servers nor of the keepers, however often they are started again."""
    counts = set()
    for _ in range(4):
        pool.submit(os._exit, 3).exception()
        os.kill(pool.submit(os.getppid).result(), signal.SIGKILL)
        wait_until(lambda: pool.submit(os._exit, 3).exception())
        assert pool.submit(abs, -1).result() == 1
        wait_until(lambda: len(forkserver.keepers()) == 1)
        counts.add(count_descriptors())

    assert len(counts) == 1


@pytest.mark.parametrize("context", ["loky", "spawn", "fork", "forkserver"])
def test_other_ways_to_start_workers_say_that_it_does_not_hold(context: str) -> None:
    with pytest.raises(ValueError, match="end_subprocesses=True needs workers that safepool"):
        ProcessPool(1, mp_context=context, end_subprocesses=True)


@pytest.mark.parametrize("wanted", [1, "yes", None])
def test_it_is_true_or_false(wanted: Any) -> None:
    with pytest.raises(TypeError, match="end_subprocesses must be True or False, not"):
        ProcessPool(1, end_subprocesses=wanted)


# An agent that has a thread in every interpreter, so that no server can be forked.
AGENT = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
AFRESH = """
import logging, os
import safepool

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with safepool.ProcessPool(1, end_subprocesses=True) as pool:
        assert pool.submit(abs, -1).result() == 1
"""


def test_where_workers_are_started_afresh_it_is_said_that_it_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(AGENT)
    (tmp_path / "script.py").write_text(AFRESH)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("end_subprocesses=True has no effect if each worker is") == 1
