"""Workers come from a fork server: clean, cheap, and independent of what happens to it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import support_tasks as tasks
from support_processes import run_script, still_alive, wait_until

from safepool import ProcessPool, WorkerDiedError

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

from safepool.workers import asking, forkserver, upkeep

TESTS = Path(__file__).parent.parent


def run(script: str, folder: Path, *, status: int = 0) -> str:
    """Run a script as a user would, and return what it printed."""
    done = run_script(script, cwd=folder)
    assert done.returncode == status, done.stderr
    return done.stdout.strip()


def server_of(worker: int) -> int:
    stat = Path(f"/proc/{worker}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def test_workers_are_forked_from_a_server_that_has_one_thread() -> None:
    """The server is the workers' parent, and nothing of it runs beside the loop."""
    with ProcessPool(2) as pool:
        list(pool.map(tasks.value_and_pid, range(20)))
        servers = {server_of(pid) for pid in pool._processes}
        assert servers == set(forkserver.running()) & servers
        assert len(servers) == 1
        assert len(os.listdir(f"/proc/{servers.pop()}/task")) == 1


def test_pools_of_one_setting_share_a_server_and_others_do_not() -> None:
    with ProcessPool(1) as one, ProcessPool(1) as two, ProcessPool(1, env={"A": "1"}) as other:
        pids = [pool.submit(os.getppid).result() for pool in (one, two, other)]

    assert pids[0] == pids[1] != pids[2]


def test_servers_of_ever_new_settings_do_not_pile_up() -> None:
    before = len(forkserver.running())
    for number in range(6):
        with ProcessPool(1, env={"SAFEPOOL_TEST_SETTING": str(number)}) as pool:
            assert pool.submit(os.getenv, "SAFEPOOL_TEST_SETTING").result() == str(number)

    assert len(forkserver.running()) <= max(before, 4)


def test_a_killed_server_costs_nobody_and_is_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Running tasks return, and so do those of workers that are started later."""
    caplog.set_level(logging.INFO, "safepool")
    with ProcessPool(2) as pool:
        running = [pool.submit(tasks.sleep_and_return, 0.4, n) for n in range(2)]
        while len(pool._processes) < 2:
            time.sleep(0.01)
        first = server_of(next(iter(pool._processes)))
        os.kill(first, signal.SIGKILL)
        assert [future.result(timeout=30) for future in running] == [0, 1]
        with pytest.raises(WorkerDiedError):
            pool.submit(tasks.be_killed).result(timeout=30)
        pids = {pool.submit(tasks.pid).result(timeout=30) for _ in range(20)}
        pool.resize(4)
        list(pool.map(tasks.value_and_pid, range(200)))
        assert server_of(max(pool._processes)) != first
        assert pids
    assert "a fork server was lost" in caplog.text


def test_newborn_servers_that_are_killed_say_nothing_about_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a busy host; the pool has its workers from a server all the same."""
    start = upkeep.Server._start
    killed: list[int | None] = []

    def start_and_kill(server: Any) -> Any:
        started = start(server)
        if len(killed) < 3:
            killed.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)
        return started

    monkeypatch.setattr(upkeep.Server, "_start", start_and_kill)
    with ProcessPool(1, env={"SAFEPOOL_TEST_SETTING": "killed"}) as pool:
        assert pool.submit(os.getppid).result(timeout=60) in forkserver.running()
    assert len(killed) == 3


def test_how_a_server_ended_is_told_also_if_its_socket_ended_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a moment the process is still there; it was not us who ended it."""
    with ProcessPool(1) as pool, caplog.at_level(logging.INFO, logger="safepool"):
        server = server_of(pool.submit(tasks.pid).result())
        os.kill(server, signal.SIGSEGV)
        assert not still_alive([server], after_s=5)
        monkeypatch.setattr(subprocess.Popen, "poll", lambda self: self.returncode)
        pool.resize(2)
        list(pool.map(time.sleep, [0.3] * 4))
        monkeypatch.undo()

    assert "it was killed by SIGSEGV" in caplog.text
    assert "did not answer" not in caplog.text


def test_the_exit_code_of_a_worker_that_outlived_its_server_is_not_invented() -> None:
    with ProcessPool(1) as pool:
        worker = pool.submit(tasks.pid).result()
        os.kill(server_of(worker), signal.SIGKILL)
        future = pool.submit(tasks.end_without_cleanup)
        with pytest.raises(WorkerDiedError, match="kept no exit code") as caught:
            future.result(timeout=30)
        assert caught.value.exitcode is None
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9


def test_a_worker_that_ended_before_its_killed_server_is_no_zombie(tmp_path: Path) -> None:
    """The first process of a container becomes its parent, and only when the server has ended."""
    script = """
        import os, signal
        from safepool import ProcessPool
        from safepool.workers import forkserver, keeper

        if __name__ == "__main__":
            keeper.adopt_orphans()  # as the first process of a container does
            with ProcessPool(1) as pool:
                worker = pool.submit(os.getpid).result(60)
                (server,) = forkserver.running()
                os.kill(server, signal.SIGSTOP)  # it waits for no worker
                error = pool.submit(os._exit, 3).exception(60)
                os.kill(server, signal.SIGKILL)
                print(type(error).__name__, pool.submit(abs, -4).result(60))
                print(os.path.exists(f"/proc/{worker}"))
    """
    assert run(textwrap.dedent(script), tmp_path) == "WorkerDiedError 4\nFalse"


def test_a_stopped_server_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nothing; the pool waits for a while, and then starts another."""
    receive = asking.RunningServer._receive
    with ProcessPool(1) as pool:
        stopped = server_of(pool.submit(tasks.pid).result())

        def give_up_soon(server: Any, timeout_s: float, given_up: Any = None) -> Any:
            return receive(server, 0.3 if server.pid == stopped else timeout_s, given_up)

        monkeypatch.setattr(asking.RunningServer, "_receive", give_up_soon)
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(WorkerDiedError):
            pool.submit(tasks.be_killed).result(timeout=30)
        assert pool.submit(tasks.square, 3).result(timeout=30) == 9
    assert stopped not in forkserver.running()


# One row per way in which a preload goes wrong: the module's text, and what the log says.
BAD_PRELOADS = {
    "starts a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        "bad_preload is not preloaded: its import starts",
    ),
    "crashes": (
        "import os, sys\nif 'safepool.workers.server' in sys.modules: os.abort()",
        "not preloaded: while it was imported, the fork server was killed by SIGABRT",
    ),
    "raises": ("raise RuntimeError('not today')", "could not be preloaded: RuntimeError: not"),
    "exits": ("raise SystemExit(3)", "could not be preloaded: SystemExit: 3"),
    "has nothing of that name": (
        "import bad_preload.part",
        "could not be preloaded: ModuleNotFoundError",
    ),
}


@pytest.mark.parametrize("name", ["no_such_module", "no_such_module.part", ""])
def test_a_preload_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="preload names"):
        ProcessPool(1, preload=["colorsys", name])


@pytest.mark.parametrize("case", BAD_PRELOADS)
def test_a_preload_that_goes_wrong_is_left_out_and_said(case: str, tmp_path: Path) -> None:
    text, said = BAD_PRELOADS[case]
    (tmp_path / "bad_preload.py").write_text(text)
    out = run(
        """
        import logging, sys
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        import safepool
        with safepool.ProcessPool(1, preload=["bad_preload", "colorsys"]) as pool:
            names = {"bad_preload", "colorsys"}
            print(pool.submit(lambda: sorted(names & set(sys.modules))).result())
        """,
        tmp_path,
    )

    assert said in out
    assert "['colorsys']" in out


@pytest.mark.parametrize(
    "deed",
    [
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL); signal.set_wakeup_fd(-1)",
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])",
    ],
)
def test_a_preload_that_takes_the_signal_of_endings_takes_no_exit_code(
    deed: str, tmp_path: Path
) -> None:
    """The server alone waits for workers, so it alone decides about SIGCHLD."""
    (tmp_path / "takes_signal.py").write_text(f"import signal\n{deed}\n")
    out = run(
        """
        import os, safepool
        with safepool.ProcessPool(1, preload=["takes_signal"]) as pool:
            print(pool.submit(os._exit, 3).exception().exitcode)
        """,
        tmp_path,
    )

    assert out == "3"


def test_what_the_program_has_imported_of_known_libraries_is_preloaded(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    script = """
        import sys, safepool
        {imports}
        def loaded():
            return [name in sys.modules for name in ("numpy", "numpy.linalg", "own_module")]
        with safepool.ProcessPool(1) as pool:
            print(*pool.submit(loaded).result())
        """
    (tmp_path / "own_module.py").write_text("")

    # By a function of the script the worker has what the script imports of its own.
    assert run(script.format(imports="import numpy, own_module"), tmp_path) == "True True True"
    assert run(script.format(imports=""), tmp_path) == "False False False"


def test_more_threads_than_one_preload_nothing_by_themselves(tmp_path: Path) -> None:
    """OpenBLAS would start its threads in the server, which then could not be forked."""
    pytest.importorskip("numpy")
    out = run(
        """
        import os, pathlib, numpy, safepool
        def is_preloaded():  # the script's imports are made in the worker itself
            return "numpy" in pathlib.Path(f"/proc/{os.getppid()}/maps").read_text()
        with safepool.ProcessPool(1, threads_per_worker=2) as pool:
            print(pool.submit(is_preloaded).result())
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(is_preloaded).result())
        """,
        tmp_path,
    )

    assert out.split() == ["False", "True"]


# One row per thing that a child inherits: how the program changes it after its server was
# started, and how a worker sees it.

CIRCUMSTANCES: dict[str, tuple[str, str]] = {
    "directory": ("os.chdir('/')", "os.getcwd()"),
    "environment": ("os.environ['NEW'] = '1'", "os.environ.get('NEW')"),
    "removed variable": ("del os.environ['OLD']", "os.environ.get('OLD')"),
    "path": ("sys.path.insert(0, '/nowhere')", "sys.path"),
    "arguments": ("sys.argv[:] = ['x', 'y']", "sys.argv"),
    "mask": ("os.umask(0o027)", "(os.umask(0o022), os.umask(0o027))[0] if WORKER else 0o027"),
    "priority": ("os.nice(3)", "os.getpriority(os.PRIO_PROCESS, 0)"),
    "open files": (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))",
        "resource.getrlimit(resource.RLIMIT_NOFILE)",
    ),
    "CPUs": ("os.sched_setaffinity(0, {0})", "os.sched_getaffinity(0)"),
    "recursion": ("sys.setrecursionlimit(1234)", "sys.getrecursionlimit()"),
    "output": ("os.dup2(os.open('out.txt', os.O_CREAT | os.O_WRONLY), 1)", "os.fstat(1).st_ino"),
}


@pytest.mark.parametrize("case", CIRCUMSTANCES)
def test_a_worker_has_what_a_child_of_the_program_would_have(case: str, tmp_path: Path) -> None:
    """As it is when the worker is started, not when the server was."""
    change, look = CIRCUMSTANCES[case]
    out = run(
        f"""
        import os, sys, resource
        os.environ["OLD"] = "1"
        import safepool
        with safepool.ProcessPool(1) as pool:
            pool.submit(int).result()
        {change}
        def seen(WORKER):
            return {look}
        with safepool.ProcessPool(1) as pool:
            theirs = pool.submit(seen, True).result()
        print(theirs == seen(False) or (theirs, seen(False)), file=sys.stderr)
        assert theirs == seen(False), (theirs, seen(False))
        """,
        tmp_path,
    )

    assert out == ""


def test_a_program_that_gives_up_rights_gets_workers_without_them(tmp_path: Path) -> None:
    """The server that was started before still has them, so another one is."""
    if os.getuid() != 0:
        pytest.skip("only root can leave its group")
    out = run(
        """
        import os, safepool
        with safepool.ProcessPool(1) as pool:
            first = pool.submit(os.getgid).result()
        os.setresgid(65534, 65534, 65534)
        with safepool.ProcessPool(1) as pool:
            print(first, pool.submit(os.getgid).result())
        """,
        tmp_path,
    )

    assert out == "0 65534"


def test_workers_draw_different_random_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert numpy.random.random() >= 0

    def draw(_: int) -> tuple[int, float, float]:
        import random

        time.sleep(0.05)
        return os.getpid(), random.random(), float(numpy.random.random())

    drawn: list[tuple[int, float, float]] = []

    def have_several_drawn() -> bool:
        drawn.extend(pool.map(draw, range(12)))
        return len({pid for pid, *_ in drawn}) > 1

    with ProcessPool(3) as pool:
        wait_until(have_several_drawn)
    assert len({number for _, number, _ in drawn}) == len(drawn)
    assert len({number for *_, number in drawn}) == len(drawn)


def _relations() -> tuple[Any, ...]:
    parent = multiprocessing.parent_process()
    assert parent is not None
    me = multiprocessing.current_process()
    return parent.pid, parent.is_alive(), me.daemon, me.pid == os.getpid(), bytes(me.authkey)


def test_a_worker_is_a_child_in_the_eyes_of_multiprocessing() -> None:
    key = bytes(multiprocessing.current_process().authkey)
    with ProcessPool(1) as pool:
        assert pool.submit(_relations).result() == (os.getpid(), True, False, True, key)


def _read(name: str) -> bytes:
    from multiprocessing.shared_memory import SharedMemory

    block = SharedMemory(name)
    try:
        return bytes(block.buf[:3])
    finally:
        block.close()


def test_shared_memory_survives_the_worker_that_looked_at_it() -> None:
    """A worker with a resource tracker of its own would remove it at its end."""
    from multiprocessing.shared_memory import SharedMemory

    block = SharedMemory(create=True, size=3)
    try:
        block.buf[:3] = b"abc"
        for _ in range(2):
            with ProcessPool(1) as pool:
                assert pool.submit(_read, block.name).result() == b"abc"
    finally:
        block.close()
        block.unlink()


def test_a_worker_ends_as_an_interpreter_does(tmp_path: Path) -> None:
    """Its exit functions run, its threads are waited for, what it printed is written."""
    out = run(
        """
        import atexit, safepool, sys, threading, time
        def leave_things_to_do():
            atexit.register(print, "exit function")
            threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
            print("task")
        with safepool.ProcessPool(1) as pool:
            pool.submit(leave_things_to_do).result()
        """,
        tmp_path,
    )

    assert out.split("\n") == ["task", "thread", "exit function"]


@pytest.mark.parametrize("during", ["import", "start of the tracker"])
def test_a_fork_during_the_first_start_has_pools_of_its_own(during: str, tmp_path: Path) -> None:
    """Another thread holds locks at that moment, of modules or of multiprocessing's tracker."""
    script = f"""
        import os, sys, threading, time, warnings
        warnings.simplefilter("ignore")
        from multiprocessing import util
        import safepool
        begun, spawn = threading.Event(), util.spawnv_passfds
        def slowly(*arguments):
            begun.set()
            time.sleep(0.5)
            return spawn(*arguments)
        class Slow:
            def find_spec(self, name, *_):
                if threading.current_thread() is not threading.main_thread():
                    begun.set()
                    time.sleep(0.2)
        if {during!r} == "import":
            sys.meta_path.insert(0, Slow())
        else:
            util.spawnv_passfds = slowly
        pool = safepool.ProcessPool(1)
        thread = threading.Thread(target=lambda: pool.submit(abs, -1).result())
        thread.start()
        begun.wait(1)
        pid = os.fork()
        if pid == 0:
            sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder) is not Slow]
            util.spawnv_passfds = spawn
            with safepool.ProcessPool(1) as own:
                print(own.submit(abs, -3).result(timeout=20), flush=True)
            os._exit(0)
        print(os.waitpid(pid, 0)[1])
        thread.join()
        pool.shutdown()
    """
    assert run(script, tmp_path) == "3\n0"


OLD_KERNEL = "4.18.0-553.el8_10.x86_64"


def told_of(kernel: str, folder: Path) -> dict[str, str]:
    """Return the environment of a program, and its server, that are told of another kernel."""
    if kernel:
        text = f"import os\nnames = list(os.uname())\nnames[2] = {kernel!r}\n"
        text += "os.uname = lambda: os.uname_result(names)\n"
        (folder / "sitecustomize.py").write_text(text)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("kernel", ["", OLD_KERNEL])
def test_a_signal_for_the_end_of_anybody_is_not_asked_for(kernel: str, tmp_path: Path) -> None:
    """An old kernel would end all workers with the first; this one tells of the program's end."""
    script = """
        import os, safepool
        def signals():
            count = 0
            for name in os.listdir("/proc/self/fdinfo"):
                try:
                    with open(f"/proc/self/fdinfo/{name}") as file:
                        lines = file.read().splitlines()
                except OSError:
                    continue
                flags = next(line for line in lines if line.startswith("flags:"))
                count += bool(int(flags.split()[1], 8) & 0o20000)  # O_ASYNC
            return count
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(signals).result())
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    out = subprocess.check_output(
        [sys.executable, "script.py"], cwd=tmp_path, env=told_of(kernel, tmp_path), text=True
    )

    # In a worker there are its own and the server's, whose signal is the server's.
    assert (int(out) > 0) == (not kernel)


@pytest.mark.parametrize("kernel", ["", OLD_KERNEL])
@pytest.mark.parametrize("with_a_fork_of_it", [False, True])
def test_server_and_workers_end_with_a_killed_program(
    with_a_fork_of_it: bool, kernel: str, tmp_path: Path
) -> None:
    """Within a second, in the middle of C code; a fork of the program must not keep them."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            f"""
            import os, sys, time, safepool
            from safepool.workers import asking, forkserver, upkeep
            pool = safepool.ProcessPool(2)
            for _ in range(2):
                pool.submit(sum, range(10**11))
            while len(pool._processes) < 2:
                time.sleep(0.01)
            time.sleep(0.2)
            if {with_a_fork_of_it} and os.fork() == 0:
                time.sleep(20)
                os._exit(0)
            print(*pool._processes, *forkserver.running(), flush=True)
            time.sleep(60)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=told_of(kernel, tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 3
        program.kill()
        try:
            assert still_alive(pids, after_s=1.0) == []
        finally:
            os.killpg(program.pid, signal.SIGKILL)


# Programs that start their workers in unusual places.
PLACES: dict[str, str] = {
    "SIGCHLD is ignored": """
        import signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        WORK()
    """,
    "a daemonic process": """
        import multiprocessing
        process = multiprocessing.get_context("fork").Process(target=WORK, daemon=True)
        process.start()
        process.join()
    """,
    "the directory is gone": """
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        WORK()
    """,
    "no standard streams": """
        os.close(0)
        os.close(1)
        os.close(2)
        WORK()
    """,
    "a long path and many arguments": """
        sys.argv += ["x" * 1000] * 200
        sys.path += [f"/nowhere/{n}" for n in range(500)]
        WORK()
    """,
}


@pytest.mark.parametrize("place", PLACES)
def test_workers_start_wherever_the_program_is(place: str, tmp_path: Path) -> None:
    script = """
import os, sys
result = os.path.abspath("result.txt")
import safepool
def WORK():
    with safepool.ProcessPool(2) as pool:
        codes = []
        try:
            pool.submit(os._exit, 7).result()
        except safepool.WorkerDiedError as error:
            codes.append(error.exitcode)
        values = list(pool.map(abs, range(-3, 0)))
    with open(result, "w") as file:
        file.write(f"{values} {codes}")
""" + textwrap.dedent(PLACES[place])
    run(script, tmp_path)

    assert (tmp_path / "result.txt").read_text() == "[3, 2, 1] [7]"


# What a shell closes before a program starts: "program 2>&-".
CLOSED = ["0<&-", "1>&-", "2>&-", "0<&- 1>&-", "0<&- 2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"]


@pytest.mark.parametrize("closed", CLOSED)
def test_programs_without_some_stream_print_into_nothing_else(closed: str, tmp_path: Path) -> None:
    """What Python opens next has the stream's number: a socket of the pool, a pipe to a worker."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import os, safepool
            def shout(number):
                for stream in (1, 2):
                    os.write(stream, b"!" * 1000)
                return number
            with safepool.ProcessPool(2, preload=["colorsys"]) as pool:
                values = list(pool.map(shout, range(50)))
                try:
                    pool.submit(os._exit, 7).result()
                except safepool.WorkerDiedError as error:
                    code = error.exitcode
                values += pool.map(shout, range(50))
            print(values == [*range(50)] * 2, code, file=open("result.txt", "w"))
            """
        )
    )
    command = f"exec {sys.executable} script.py {closed}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.txt").read_text() == "True 7\n"
    # Each stream that is there got everything, and nothing else.
    shouted = [b"!" * 100_000 * (f"{number}>" not in closed) for number in (1, 2)]
    assert [done.stdout, done.stderr] == shouted


def test_interpreter_flags_reach_the_workers(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, safepool\n"
        "with safepool.ProcessPool(1) as pool:\n"
        "    print(*pool.submit(lambda: (sys.flags.optimize, sys.flags.dev_mode)).result())\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-X", "dev", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.split() == ["1", "True"]
    assert done.stderr == ""


@pytest.mark.parametrize("wrong", ["numpy", 3, [3]])
def test_preload_takes_auto_or_a_list(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="preload must be"):
        ProcessPool(1, preload=wrong)


def test_submit_and_an_interrupt_do_not_wait_for_imports(tmp_path: Path) -> None:
    """Large libraries take seconds; an event loop or a person does not."""
    (tmp_path / "slow_import.py").write_text("import time\ntime.sleep(30)")
    out = run(
        """
        import time, safepool
        pool = safepool.ProcessPool(1, preload=["slow_import"])
        begin = time.monotonic()
        future = pool.submit(abs, -1)
        try:
            with pool:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(future.cancelled(), time.monotonic() - begin < 15)
        """,
        tmp_path,
    )

    assert out == "True True"


def test_a_worker_that_was_forked_for_an_answer_too_late_never_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers on one channel would both run tasks, and the pool would know of one."""
    receive = asking.RunningServer._receive
    answers = 0

    def lose_the_first(server: Any, timeout_s: float, given_up: Any = None) -> Any:
        nonlocal answers
        answer = receive(server, timeout_s, given_up)
        if answer[0][0] == "forked":
            answers += 1
            if answers == 1:
                for descriptor in answer[1]:
                    os.close(descriptor)
                raise TimeoutError
        return answer

    monkeypatch.setattr(asking.RunningServer, "_receive", lose_the_first)
    with ProcessPool(1) as pool:
        pids = {pool.submit(tasks.pid).result(timeout=60) for _ in range(20)}
        assert pids == {*pool._processes}
    assert answers == 2


def test_endings_are_learnt_where_the_program_blocks_signals(tmp_path: Path) -> None:
    out = run(
        """
        import signal, os, safepool
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(os._exit, 3).exception().exitcode)
            print(pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result())
        """,
        tmp_path,
    )

    assert out.startswith("3\n")
    assert "SIGCHLD" in out


def test_more_descriptors_than_can_travel_are_counted_in_the_error() -> None:
    queues = [multiprocessing.get_context("spawn").SimpleQueue() for _ in range(130)]
    with (
        ProcessPool(1, initializer=len, initargs=(queues,)) as pool,
        pytest.raises(Exception, match="fit one message"),
    ):
        pool.submit(abs, -1).result(timeout=30)
    for queue in queues:
        queue.close()
    with ProcessPool(1, initializer=len, initargs=([*queues[:0]],)) as pool:
        assert pool.submit(abs, -1).result(timeout=30) == 1


def searches_for_native_libraries() -> tuple[int, list[int]]:
    """Tell how often this process has searched, and the threads of what it has found."""
    from safepool.threads import cap

    worker_cap = cap._worker_cap
    assert worker_cap is not None
    native = worker_cap._native
    found = [library.num_threads for library in native.found()]
    return int(native is not cap._found), found


def test_a_worker_caps_what_its_server_has_found() -> None:
    """To search takes most of a worker's start: once for all of them, and again if need be."""
    pytest.importorskip("numpy")
    with ProcessPool(1, preload=["numpy"]) as pool:
        searches, threads = pool.submit(searches_for_native_libraries).result(timeout=60)

    assert searches == 0
    assert threads
    assert set(threads) == {1}
