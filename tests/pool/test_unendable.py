"""A worker that the pool cannot end costs its place, and nobody waits for it for ever."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import support_tasks as tasks
from support_processes import has_ended, run_python, wait_until

import safepool
from safepool import PoolBrokenError, ProcessPool, TaskTimeoutError, WorkerDiedError
from safepool.pool.shell import staff
from safepool.workers.start import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

if sys.platform != "linux":
    pytest.skip("signals, rights and groups of Linux", allow_module_level=True)

FREEZER = Path("/sys/fs/cgroup/freezer")
NOBODY = 65534


@pytest.fixture
def _no_signal_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a system call that waits for a broken disk."""
    monkeypatch.setattr(staff, "_DYING_S", 0.1)
    monkeypatch.setattr(staff, "_STOPPING_S", 0.2)
    monkeypatch.setattr(WorkerProcess, "end", lambda *_: None)


@pytest.mark.usefixtures("_no_signal_has_an_effect")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_cannot_be_ended_costs_its_place(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "safepool")
    gate = tmp_path / "gate"
    with ProcessPool(workers) as pool:
        wait = safepool.worker(tasks.touch_and_wait_for, timeout=0.1)
        hanging = pool.submit(wait, str(tmp_path / "begun"), str(gate))
        assert isinstance(hanging.exception(timeout=60), TaskTimeoutError)
        assert list(pool.map(abs, range(-20, 0))) == [*range(20, 0, -1)]
        assert len(pool.workers()) == 1
        gate.touch()
        wait_until(lambda: ", which could not be ended, has ended" in caplog.text)
        list(pool.map(time.sleep, [0.05] * 20))
        assert len(pool.workers()) == workers

    lines = [r.getMessage() for r in caplog.records if "cannot be ended" in r.getMessage()]
    assert len(lines) == 1


@pytest.mark.usefixtures("_no_signal_has_an_effect")
@pytest.mark.parametrize("end", ["kill_workers", "terminate_workers"])
def test_the_end_of_a_pool_does_not_wait_for_it(end: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ProcessPool(1) as pool:
        future = pool.submit(tasks.touch_and_wait_for, str(tmp_path / "begun"), str(gate))
        wait_until((tmp_path / "begun").exists)
        (worker,) = pool.workers()
        getattr(pool, end)()
    error = future.exception(timeout=60)
    gate.touch()

    assert isinstance(error, WorkerDiedError)
    assert "cannot be ended: it was sent SIGKILL, and is still there" in str(error)
    wait_until(lambda: has_ended(worker.pid))


@pytest.mark.usefixtures("_no_signal_has_an_effect")
def test_a_pool_gives_up_when_ever_more_workers_cannot_be_ended(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    try:
        with ProcessPool(1, timeout=0.05) as pool:
            wait = [
                pool.submit(tasks.touch_and_wait_for, str(tmp_path / f"{n}"), str(gate))
                for n in range(9)
            ]
            errors = [future.exception(timeout=60) for future in wait]
    finally:
        gate.touch()

    assert [type(error) for error in errors] == [TaskTimeoutError] * 3 + [PoolBrokenError] * 6
    assert "3 workers did not end after SIGKILL" in str(errors[-1])


@pytest.fixture
def frozen_group() -> Iterator[Path]:
    """Yield a group whose processes do not run, nor end by a signal, before they are let go."""
    folder = FREEZER / f"safepool-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no freezer of control groups, version 1, that this user may use")
    state = folder / "freezer.state"
    state.write_text("FROZEN")
    try:
        yield folder
    finally:
        state.write_text("THAWED")
        wait_until(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def test_a_frozen_worker_is_told_of_and_left(
    frozen_group: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL ends it when the kernel lets go of it, and not before."""
    monkeypatch.setattr(staff, "_DYING_S", 0.5)
    with ProcessPool(2) as pool:
        future = pool.submit(safepool.worker(time.sleep, timeout=1), 60)
        wait_until(lambda: any(worker.task for worker in pool.workers()))
        (busy,) = [worker.pid for worker in pool.workers() if worker.task]
        (frozen_group / "cgroup.procs").write_text(str(busy))
        assert isinstance(future.exception(timeout=60), TaskTimeoutError)
        assert pool.submit(abs, -1).result(timeout=60) == 1

    assert f"worker {busy} cannot be ended: SIGKILL has no effect yet" in caplog.text


@pytest.fixture(scope="module")
def everybodys() -> Iterator[tuple[str, Path]]:
    """Yield an interpreter and a folder of this package that every user may use."""
    if os.getuid() != 0:
        pytest.skip("only root can give up root")
    folder = Path(tempfile.mkdtemp(prefix="safepool-everybody-", dir="/tmp"))
    try:
        import cloudpickle
        import joblib
        import loky
        import threadpoolctl

        for package in (safepool, cloudpickle, joblib, loky):
            source = Path(str(package.__file__)).parent
            shutil.copytree(
                source,
                folder / source.name,
                ignore=shutil.ignore_patterns("test", "tests", "__pycache__"),
            )
        shutil.copy(str(threadpoolctl.__file__), folder)
        folder.chmod(0o755)
        looks = "import sys; assert sys.version_info >= (3, 11); import safepool.workers.server"
        for python in (sys.executable, "/usr/bin/python3"):
            try:
                subprocess.run(
                    [python, "-c", looks],
                    user=NOBODY,
                    group=NOBODY,
                    cwd="/",
                    env={"PYTHONPATH": str(folder)},
                    check=True,
                    capture_output=True,
                )
            except (OSError, subprocess.CalledProcessError):
                continue
            yield python, folder
            return
        pytest.skip("no interpreter that every user may start")
    finally:
        shutil.rmtree(folder)


GIVE_UP = f"os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})"

# Programs that give up root with a pool: what they do, and what they print.
PROGRAMS: dict[str, tuple[str, str]] = {
    "a timeout of a call that began before": (
        """
        future = pool.submit(safepool.worker(wait, timeout=1), 60)
        while not any(worker.task for worker in pool.workers()):
            time.sleep(0.01)
        GIVE_UP
        print(type(future.exception(60)).__name__)
        """,
        "TaskTimeoutError",
    ),
    "a cancelled call that began before": (
        """
        future = pool.submit(wait, 60)
        while not any(worker.task for worker in pool.workers()):
            time.sleep(0.01)
        GIVE_UP
        print(pool.cancel(future, kill=True), pool.submit(os.getuid).result(60))
        """,
        f"True {NOBODY}",
    ),
    "the end of all workers": (
        """
        import logging
        begun = threading.Event()
        class Begun(logging.Handler):
            def emit(self, record):
                begun.set()
        def say_and_wait():  # one that has only claimed its call would be cancelled
            logging.warning("begun")
            time.sleep(60)
        logging.getLogger().addHandler(Begun())
        future = pool.submit(say_and_wait)
        begun.wait(60)
        GIVE_UP
        pool.kill_workers()
        pool.shutdown()
        print(type(future.exception(60)).__name__)
        """,
        "WorkerDiedError",
    ),
    "an interrupt": (
        """
        future = pool.submit(wait, 60)
        while not any(worker.task for worker in pool.workers()):
            time.sleep(0.01)
        GIVE_UP
        try:
            with pool:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print("ended")
        """,
        "ended",
    ),
    "calls of the new user": (
        """
        first = {pool.submit(users).result() for _ in range(3)}
        GIVE_UP
        print(*first, *{pool.submit(users).result(60) for _ in range(9)})
        print(*{*pool.map(users_of, range(99))})
        """,
        f"(0, 0) ({NOBODY}, {NOBODY})\n({NOBODY}, {NOBODY})",
    ),
    "calls of the new group alone": (
        """
        first = pool.submit(users).result()
        os.setresgid(1, 1, 1)
        print(first, pool.submit(users).result(60))
        """,
        "(0, 0) (0, 1)",
    ),
    "the end of the program": (
        """
        pool.submit(wait, 1)
        while not any(worker.task for worker in pool.workers()):
            time.sleep(0.01)
        GIVE_UP
        print("ends")
        """,
        "ends",
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_gives_up_root_is_rid_of_its_old_workers(
    program: str, everybodys: tuple[str, Path]
) -> None:
    """They can be signalled no more, end all the same, and get no call of the new user."""
    python, folder = everybodys
    text, printed = PROGRAMS[program]
    head = """
        import os, sys, threading, time
        import safepool
        def wait(seconds):
            time.sleep(seconds)
        def users():
            return os.getuid(), os.getgid()
        def users_of(_):
            return users()
        pool = safepool.ProcessPool(1)
        pool.submit(int).result()
    """
    script = textwrap.dedent(head) + textwrap.dedent(text).replace("GIVE_UP", GIVE_UP)
    done = subprocess.run(
        [python, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={"PYTHONPATH": str(folder)},
        check=False,
    )

    assert done.stdout.strip() == printed, done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


# What a program does when it gives up root and the new user may not start the interpreter, and
# what it prints.
UNREADABLE: dict[str, tuple[str, str]] = {
    "a server runs": (
        """
        print(pool.submit(os.getuid).result(60), servers())
        GIVE_UP
        print(pool.submit(os.getuid).result(60), servers())
        print(pool.submit(lambda: os.getgid()).result(60))
        slow = pool.submit(safepool.worker(time.sleep, timeout=1), 60)
        print(type(slow.exception(60)).__name__)
        """,
        f"0 [0]\n{NOBODY} [{NOBODY}]\n{NOBODY}\nTaskTimeoutError\n",
    ),
    "it cannot have all of the program's rights": (
        """
        print(pool.submit(os.getuid).result(60))
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        GIVE_UP
        error = str(pool.submit(os.getuid).exception(60))
        print(f"cannot be started by user {os.getuid()}" in error or error)
        """,
        "0\nTrue\n",
    ),
    "no server runs": (
        """
        GIVE_UP
        error = str(pool.submit(os.getuid).exception(60))
        print(f"cannot be started by user {os.getuid()}: [Errno 13]" in error or error)
        """,
        "True\n",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_new_user_who_may_not_start_the_interpreter_has_workers(
    case: str, tmp_path: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give up root")
    secret = tmp_path / "python"
    secret.symlink_to(sys.executable)
    head = f"""
        import ctypes, multiprocessing, os, time, safepool
        from safepool.workers import forkserver
        multiprocessing.set_executable({str(secret)!r})
        # What the program itself could not import any more, where the package is below /root.
        import safepool.transport.by_value
        safepool.worker
        os.chmod({str(tmp_path)!r}, 0o700)
        def servers():
            texts = [open(f"/proc/{{pid}}/status").read() for pid in forkserver.running()]
            return [int(text.partition("Uid:")[2].split()[0]) for text in texts]
        pool = safepool.ProcessPool(1)
    """
    text, printed = UNREADABLE[case]
    script = textwrap.dedent(head) + textwrap.dedent(text).replace("GIVE_UP", GIVE_UP)
    done = run_python("-c", script + "pool.shutdown()\n", cwd=tmp_path)

    assert done.stdout == printed, done.stderr


# What a task does when its time is over: it forks, in one way or another, again and again.
FORKING: dict[str, str] = {
    "a fork of a large process": "ballast = bytearray(1 << 20) * 300; fork_on()",
    "forks in a thread": "threading.Thread(target=fork_on).start(); time.sleep(60)",
    "forks in three threads": (
        "[threading.Thread(target=fork_on).start() for _ in range(3)]; time.sleep(60)"
    ),
    "programs": "while True: subprocess.run(['sleep', '0.01'])",
    "children that fork": "while True: fork_and_fork()",
    "a shell that starts programs": "os.system('while true; do sleep 0.01; done')",
}


_SLOW_FORKING = {"a fork of a large process", "forks in three threads"}


@pytest.mark.parametrize(
    "forking",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in _SLOW_FORKING)) for one in FORKING],
)
def test_a_timeout_in_the_middle_of_a_fork_leaves_nothing(forking: str, tmp_path: Path) -> None:
    script = f"""
        import os, subprocess, sys, threading, time
        import safepool
        from safepool.workers import forkserver

        def fork_on():
            while True:
                pid = os.fork()
                if pid == 0:
                    time.sleep(300)
                    os._exit(0)
                os.kill(pid, 9)
                os.waitpid(pid, 0)

        def fork_and_fork():
            pid = os.fork()
            if pid == 0:
                if os.fork() == 0:
                    time.sleep(0.02)
                else:
                    os.wait()
                os._exit(0)
            os.waitpid(pid, 0)

        def task():
            {FORKING[forking]}

        if __name__ == "__main__":
            with safepool.ProcessPool(1) as pool:
                for n in range(12):
                    future = pool.submit(safepool.worker(task, timeout=0.12 + 0.003 * n))
                    assert isinstance(future.exception(), safepool.TaskTimeoutError)
                time.sleep(0.1)
                workers = {{worker.pid for worker in pool.workers()}}
                (server,) = forkserver.running()
                with open(f"/proc/{{server}}/task/{{server}}/children") as file:
                    print(len({{*map(int, file.read().split())}} - workers))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = run_python("script.py", cwd=tmp_path)

    assert done.stdout == "0\n", done.stdout + done.stderr


FIRST_OF_A_CONTAINER = """
    import os, signal, subprocess, sys, time
    import safepool
    from safepool.workers import forkserver

    def hang():
        subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300 & wait"])
        time.sleep(300)

    def die_and_leave():
        subprocess.Popen(["sleep", "0.2"])
        os.kill(os.getpid(), signal.SIGKILL)

    def left_to(server):
        with open(f"/proc/{server}/task/{server}/children") as file:
            return {*map(int, file.read().split())}

    def ended_children():
        found = set()
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if (state, parent) == ("Z", "1"):
                found.add(int(name))
        return found

    if __name__ == "__main__":
        assert os.getpid() == 1
        own = subprocess.Popen(["true"])
        with safepool.ProcessPool(2) as pool:
            for _ in range(3):
                error = pool.submit(safepool.worker(hang, timeout=0.3)).exception()
                assert isinstance(error, safepool.TaskTimeoutError), error
                assert isinstance(pool.submit(die_and_leave).exception(), safepool.WorkerDiedError)
            for server in forkserver.running():
                while left_to(server) - {worker.pid for worker in pool.workers()}:
                    time.sleep(0.02)
                os.kill(server, signal.SIGKILL)  # its workers become children of this program
            assert isinstance(pool.submit(os._exit, 3).exception(), safepool.WorkerDiedError)
            assert pool.submit(abs, -1).result() == 1
        while ended_children() != {own.pid}:
            time.sleep(0.02)
        print("own", own.wait())
"""


# The same, where no server stands between the program and its workers.
FIRST_WITHOUT_SERVER = (
    FIRST_OF_A_CONTAINER.partition("    if __name__")[0]
    + """
    if __name__ == "__main__":
        own = subprocess.Popen(["true"])
        for method in sys.argv[1:]:
            with safepool.ProcessPool(1, mp_context=method) as pool:
                error = pool.submit(safepool.worker(hang, timeout=0.3)).exception()
                assert isinstance(error, safepool.TaskTimeoutError), error
                while ended_children() != {own.pid}:
                    time.sleep(0.02)
                assert pool.submit(abs, -1).result() == 1
                error = pool.submit(safepool.worker(hang, timeout=0.3)).exception()
            assert ended_children() == {own.pid}
        print("own", own.wait())
"""
)


@pytest.mark.parametrize(
    ("program", "methods"),
    [(FIRST_OF_A_CONTAINER, []), (FIRST_WITHOUT_SERVER, ["loky", "spawn"])],
    ids=["server", "without"],
)
def test_the_first_process_of_a_container_waits_for_nobody_elses_children(
    program: str, methods: list[str], tmp_path: Path
) -> None:
    """What tasks have left is waited for by the server, the program's own by the program."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], check=False).returncode:
        pytest.skip("only root can be the first process of a name space")
    (tmp_path / "script.py").write_text(textwrap.dedent(program))
    done = subprocess.run(
        [*apart, sys.executable, "script.py", *methods],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.stdout == "own 0\n", done.stderr
