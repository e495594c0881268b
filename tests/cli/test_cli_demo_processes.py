"""Other processes seen from outside: counted as the kernel counts them, ended as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from safepool.cli.demo import _count, _end_all, undisturbed
from safepool.cli.demo_report import Half

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are another thing there")

FIVE_THREADS = """\
import threading, sys
for _ in range(4):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""

# A child, its child, and one more that leaves both its session and its parent.
FAMILY = """\
import os, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep)
apart = subprocess.Popen(sleep, start_new_session=True)
print(child.pid, apart.pid, flush=True)
sys.stdin.read()
"""


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@on_linux
def test_every_thread_of_a_process_is_counted() -> None:
    half = Half(pool="")
    process = start(FIVE_THREADS)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        _count([process.pid], half)
    finally:
        _end_all(process)
        close_pipes(process)

    assert (half.workers, half.threads) == (1, 5)
    gone = Half(pool="")
    _count([process.pid], gone)
    assert (gone.workers, gone.threads) == (None, None)


def test_elsewhere_threads_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer, in place of a wrong one."""
    monkeypatch.setattr("platform.system", lambda: "Darwin")

    half = Half(pool="")
    _count([os.getpid()], half)

    assert (half.workers, half.threads) == (1, None)


@on_linux
def test_a_tree_ends_as_a_whole() -> None:
    """Also what has left the process group."""
    process = start(FAMILY)
    try:
        assert process.stdout is not None
        family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    finally:
        _end_all(process)
        close_pipes(process)

    assert process.returncode == -signal.SIGKILL
    assert len(family) == 2
    assert [member.pid for member in family if is_alive(member)] == []


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@on_posix
def test_ending_what_has_ended_is_nothing() -> None:
    process = start("")
    process.wait(timeout=30)

    _end_all(process)
    _end_all(process)
    close_pipes(process)

    assert process.returncode == 0


@on_posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_clean_up_is_not_cut_short(number: int) -> None:
    """A signal that comes meanwhile does nothing, and what it did before is put back."""
    before = signal.getsignal(number)

    with undisturbed():
        signal.raise_signal(number)
        reached = True

    assert reached
    assert signal.getsignal(number) is before


def test_a_thread_has_nothing_to_hold_off() -> None:
    """Python delivers signals to the main thread only; setting a handler elsewhere raises."""
    errors: list[BaseException] = []

    def clean_up() -> None:
        try:
            with undisturbed():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=clean_up)
    thread.start()
    thread.join()

    assert errors == []
