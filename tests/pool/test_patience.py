"""Workers that are killed in a row, limits that are met, calls that are refused."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import support_tasks as tasks
from support_cgroups import control_group

from safepool import PoolBrokenError, ProcessPool, RefusedCallError
from safepool.limits import Limits, read_limits
from safepool.limits._types import OpenFilesLimit, PidsLimit
from safepool.pool.calls import mapping
from safepool.pool.core import starts
from safepool.pool.core.ending import Ending, Stage
from safepool.pool.core.starts import Starts
from safepool.pool.shell import refusals
from safepool.pool.shell.hiring import Hiring
from safepool.pool.shell.refusals import limit_met
from safepool.pool.shell.staff import Staff
from safepool.pool.shell.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# One row per series of endings, and how many of them a pool bears.
SERIES: dict[str, tuple[list[tuple[int | None, bool]], int]] = {
    "crashes": ([(-11, False)] * 5, 2),
    "exit codes": ([(3, False)] * 5, 2),
    "SIGKILL from outside": ([(-9, False)] * 40, 19),
    "SIGTERM from outside": ([(-15, False)] * 40, 19),
    "SIGKILL by the pool": ([(-9, True)] * 5, 2),
    "crashes among kills": ([(-9, False), (-9, False), (-11, False)] * 5, 8),
}


def pause_after(starts: Starts, exitcode: int | None, *, ours: bool) -> float | None:
    """Return the pause after a useless worker, in seconds; ``None`` if no start follows."""
    starts.not_before_ns = 0
    ending = Ending(
        pid=1,
        exitcode=exitcode,
        by_pool=ours,
        oom=None,
        stage=Stage.READY,
        reading="",
        dismissed=False,
        pool_ends=False,
        condemned=None,
        exceeded=None,
        fault=None,
        stack="",
        lost=(),
    )
    gives_up = [*starts.after(ending, 0)]
    return None if gives_up else starts.not_before_ns / 1e9


@pytest.mark.unit
@pytest.mark.parametrize("name", SERIES)
def test_how_many_workers_in_a_row_may_be_of_no_use(name: str) -> None:
    series, borne = SERIES[name]
    of_one = Starts(1, break_on_death=False)
    pauses = [pause_after(of_one, exitcode, ours=ours) for exitcode, ours in series]
    assert pauses.index(None) == borne
    assert all(pause is None or 0 <= pause <= 1 for pause in pauses)


@pytest.mark.unit
def test_pauses_grow_while_workers_are_killed_from_outside() -> None:
    of_one = Starts(1, break_on_death=False)
    pauses = [pause_after(of_one, -9, ours=False) for _ in range(7)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert pause_after(of_one, -11, ours=False) == 0.0
    of_one.was_of_use()
    assert [pause_after(of_one, one, ours=False) for one in (-15, -3, -3)] == [0.05, 0.0, 0.0]


@on_linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_newborn_workers_that_are_killed_from_outside_end_no_pool(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    start = Hiring.start

    def start_and_kill(hiring: Hiring, place: int) -> Worker:
        worker = start(hiring, place)
        if len(killed) < 6:
            killed.append(worker.pid)
            os.kill(worker.pid, number)
        return worker

    monkeypatch.setattr(Hiring, "start", start_and_kill)
    monkeypatch.setattr(starts, "_MOST_PAUSE_NS", 100_000_000)
    with ProcessPool(1) as pool:
        futures = [pool.submit(tasks.square, n) for n in range(200)]
        assert [future.result(timeout=60) for future in futures] == [n * n for n in range(200)]
    assert len(killed) == 6


@on_linux
def test_workers_that_take_long_to_be_freed_are_killed_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel frees a large one in hundreds of milliseconds: nothing spins meanwhile."""
    turns, signals = Counter[str](), Counter[int]()
    listen, end = Staff.listen, Worker.end

    def counted(staff: Staff, *arguments: Any) -> Iterator[Any]:
        turns["listen"] += 1
        return listen(staff, *arguments)

    timers: list[threading.Timer] = []

    def late(worker: Worker, number: int) -> None:
        signals[worker.pid] += 1
        timers.append(threading.Timer(0.5, end, (worker, number)))
        timers[-1].start()

    with caplog.at_level(logging.INFO, logger="safepool"):
        pool = ProcessPool(2)
        running = [pool.submit(time.sleep, 60) for _ in range(2)]
        while sum(worker.state == "busy" for worker in pool.workers()) < 2:
            time.sleep(0.005)
        monkeypatch.setattr(Staff, "listen", counted)
        monkeypatch.setattr(Worker, "end", late)
        pool.kill_workers()
        pool.shutdown()
    for timer in timers:
        timer.join()
    assert all(future.done() for future in running)
    assert turns["listen"] < 20
    assert max(signals.values()) <= 2
    assert max(Counter(caplog.messages).values(), default=0) <= 2


def test_a_map_takes_no_more_bytes_ahead_than_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a generator; a few large items, as many small ones as ever."""
    monkeypatch.setattr(mapping, "MOST_HELD_BYTES", 16 << 20)
    taken: list[int] = []

    def items(count: int, size: int) -> Iterator[bytes]:
        for number in range(count):
            taken.append(number)
            yield bytes(size)

    with ProcessPool(1) as pool:
        results = pool.map(len, items(40, 4 << 20))
        assert len(taken) <= 8
        assert [*results] == [4 << 20] * 40
        assert len(taken) == 40
        taken.clear()
        small = pool.map(len, items(20_000, 1))
        assert len(taken) >= 16_384
        assert [*small] == [1] * 20_000
        taken.clear()
        chunked = pool.map(len, items(10, 4 << 20), chunksize=3)
        assert len(taken) <= 9
        assert [*chunked] == [4 << 20] * 10


EAGAIN, EMFILE, ENFILE, ENOENT = 11, 24, 23, 2
GROUP = PidsLimit(name="pids.max", tasks=20, used_tasks=20, source="/g/pids.max", raw="20")
WIDE = PidsLimit(name="pids.max", tasks=900, used_tasks=20, source="/pids.max", raw="900")
USER = PidsLimit(name="RLIMIT_NPROC", tasks=50, used_tasks=None, source="getrlimit", raw="50")
FILES = OpenFilesLimit(
    name="RLIMIT_NOFILE", files=64, used_files=63, source="/proc/self/limits", raw="64"
)


def limits(*pids: PidsLimit, files: OpenFilesLimit | None = None) -> Limits:
    return replace(read_limits(), pids=pids, open_files=files)


# One row per error and machine: what is said of the limit.
MET: dict[str, tuple[int, Limits, str]] = {
    "a full group": (
        EAGAIN,
        limits(WIDE, GROUP, replace(USER, tasks=500)),
        (
            "limit met: pids.max allows 20 processes and threads, 20 exist (/g/pids.max). "
            "Raise it, or use fewer workers"
        ),
    ),
    "a user's": (
        EAGAIN,
        limits(WIDE, USER),
        (
            "limit met: RLIMIT_NPROC allows 50 processes and threads, 49 exist (getrlimit). "
            "Raise it, or use fewer workers"
        ),
    ),
    "a user's that is wide": (
        EAGAIN,
        limits(replace(USER, tasks=500)),
        (
            "possible limits: RLIMIT_NPROC allows 500 processes and threads, 49 exist (getrlimit)"
            ". Raise it, or use fewer workers"
        ),
    ),
    "no ceiling": (EAGAIN, limits(), ""),
    "files": (
        EMFILE,
        limits(files=FILES),
        (
            "limit met: RLIMIT_NOFILE allows this process 64 open files, 63 are open. "
            "Raise it (ulimit -n), or use fewer workers"
        ),
    ),
    "files that nobody can count": (
        EMFILE,
        limits(files=replace(FILES, used_files=None)),
        (
            "limit met: RLIMIT_NOFILE allows this process 64 open files, all are open. "
            "Raise it (ulimit -n), or use fewer workers"
        ),
    ),
    "files of the machine": (
        ENFILE,
        limits(),
        "limit met: /proc/sys/fs/file-max, the open files of the whole machine",
    ),
    "something else": (ENOENT, limits(GROUP), ""),
}


@pytest.mark.parametrize("name", MET)
def test_the_limit_that_was_met_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setattr(refusals, "tasks_of_user", {os.getuid(): 49}.get)
    number, limits, expected = MET[name]
    assert limit_met(number, limits) == expected


def run(program: str, *, prepare: Any, folder: Path) -> str:
    """Run a program after ``prepare`` in its process; return what it prints."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(program))
    done = subprocess.run(
        [sys.executable, str(script)],
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )
    return done.stdout + done.stderr


@on_linux
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("tasks_allowed", [1, 2])
def test_a_users_limit_on_processes_is_named(tasks_allowed: int, tmp_path: Path) -> None:
    """The first thread, or the first process, is refused."""
    told = run(
        f"""
        import os, resource, safepool
        from safepool.workers import forkserver
        pool = safepool.ProcessPool(1)
        resource.setrlimit(resource.RLIMIT_NPROC, ({tasks_allowed}, {tasks_allowed}))
        os.setgroups([])
        os.setgid(61234)
        os.setuid(61234)
        try:
            print(pool.submit(abs, -1).result())
        except Exception as error:
            print(type(error).__name__, error)
        pool.shutdown()
        """,
        prepare=None,
        folder=tmp_path,
    )
    used = f"{tasks_allowed} processes and threads, {tasks_allowed} exist"
    assert f"limit met: RLIMIT_NPROC allows {used}" in told, told


@on_linux
@pytest.mark.parametrize("tasks_allowed", [1, 2])
def test_a_groups_limit_on_processes_is_named(tasks_allowed: int) -> None:
    with control_group(tasks=tasks_allowed) as group:
        told = group.run(
            textwrap.dedent(
                """
                import safepool
                pool = safepool.ProcessPool(1)
                try:
                    print(pool.submit(abs, -1).result())
                except Exception as error:
                    print(type(error).__name__, error)
                pool.shutdown()
                """
            )
        )
    count = f"{tasks_allowed} processes and threads, {tasks_allowed} exist"
    assert f"limit met: pids.max allows {count}" in told, told


def test_what_is_refused_survives_a_pipe() -> None:
    import pickle

    error = RefusedCallError(1, "Operation not permitted", "socketpair()")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.errno) == (str(error), 1)
    assert isinstance(again, OSError)


def test_an_initializer_that_crashes_ends_the_pool_soon() -> None:
    with (
        contextlib.suppress(PoolBrokenError),
        ProcessPool(1, initializer=os.abort) as pool,
        pytest.raises(PoolBrokenError, match="3 workers in a row"),
    ):
        pool.submit(abs, -1).result(timeout=60)


@on_linux
@pytest.mark.parametrize("way", ["safepool", "loky"])
def test_a_program_without_descriptors_is_told_the_limit(way: str, tmp_path: Path) -> None:
    """Whichever call of a start meets it; nothing that was opened before is left open."""
    told = run(
        f"""
        import gc, os, resource, warnings, safepool
        warnings.simplefilter("error", ResourceWarning)
        if __name__ == "__main__":
            with safepool.ProcessPool(1, mp_context={way!r}) as pool:
                pool.submit(abs, -1).result()
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            for left in range(10):
                try:
                    with safepool.ProcessPool(1, mp_context={way!r}) as pool:
                        pool.submit(abs, -1).result()
                    print(left, "started")
                except Exception as error:
                    if "RLIMIT_NOFILE allows this process 128 open files, " not in str(error):
                        print(left, repr(error))
                del pool
                gc.collect()
                free = 0
                try:
                    while True:
                        held.append(os.open("/dev/null", os.O_RDONLY))
                        free += 1
                except OSError:
                    pass
                if free != left:
                    print(left, "before,", free, "afterwards")
                for _ in range(free + 1):
                    os.close(held.pop())
            print("done")
        """,
        prepare=None,
        folder=tmp_path,
    )
    assert told == "done\n"
