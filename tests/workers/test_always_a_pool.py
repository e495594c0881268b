"""There is a pool wherever a standard one works: under agents, filters, long paths, odd starts."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import support_seccomp
from support_processes import run_script, still_alive

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

TESTS = Path(__file__).parent.parent

# What a worker must be able to do, however it was started: run calls, one after the other and
# at the same time, be replaced when it dies, tell how it ended, keep to its caps, log, and end.
WORK = """
import logging, os, sys, time
import safepool

def square(x):
    return x * x

def circumstances():
    import multiprocessing
    import threadpoolctl
    return (
        os.environ["OMP_NUM_THREADS"],
        os.cpu_count(),
        os.getcwd(),
        sys.argv,
        multiprocessing.parent_process().pid,
    )

def work():
    with safepool.ProcessPool(2) as pool:
        results = list(pool.map(square, range(4)))
        seen = pool.submit(circumstances).result()
        death = pool.submit(os._exit, 3).exception()
        killed = pool.submit(os.kill, os.getpid(), 0).exception()
        late = pool.submit(safepool.worker(time.sleep, timeout=0.2), 60).exception()
        again = pool.submit(square, 5).result()
        processes = len(pool.workers())
    assert results == [0, 1, 4, 9], results
    assert seen == ("1", 1, os.getcwd(), sys.argv, os.getpid()), seen
    assert isinstance(death, safepool.WorkerDiedError) and death.exitcode == 3, death
    assert killed is None, killed
    assert isinstance(late, safepool.TaskTimeoutError), late
    assert again == 25
    assert 1 <= processes <= 2, processes
    print("worked")

if __name__ == "__main__":
    work()
"""

AFRESH = "no fork server can be used"


def run(
    folder: Path, *arguments: str, text: str = WORK, **environment: str
) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, *arguments, "script.py", "an argument"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


LOGGED = WORK.replace("    work()\n", "    logging.basicConfig(stream=sys.stdout)\n    work()\n")

THREAD = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"

# One row per thing that an interpreter does before the program: the file's text, and whether
# workers can still be forked.
STARTUPS: dict[str, tuple[str, bool]] = {
    "nothing": ("", True),
    "a thread": (THREAD, False),
    "three threads": (THREAD * 3, False),
    "a thread that a fork loses, and functions around a fork": (
        f"{THREAD}import os\nos.register_at_fork(before=int, after_in_child=int)\n",
        False,
    ),
    "a thread that ends soon": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(0.01,)).start()\n",
        True,
    ),
    "a fork that is refused": (
        "import os\ndef refused():\n    raise RuntimeError('not here')\nos.fork = refused\n",
        False,
    ),
    "another fork": (
        "import os\nfork = os.fork\ndef other():\n    return fork()\nos.fork = other\n",
        True,
    ),
    "a read of the standard input": ("import sys\nsys.stdin and sys.stdin.read()\n", True),
    "a print": ("print('hello from the start')\n", True),
    "an error": ("raise RuntimeError('not today')\n", True),
    "a handler of the children's signal": (
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n",
        True,
    ),
    "a function around each fork that fails": (
        "import os\ndef fails():\n    raise OSError('no')\nos.register_at_fork(before=fails)\n",
        True,
    ),
}


@pytest.mark.parametrize("startup", STARTUPS)
def test_a_pool_works_whatever_an_interpreter_does_first(startup: str, tmp_path: Path) -> None:
    """Agents and debuggers are started so (ddtrace, debugpy, opentelemetry-instrument)."""
    text, forks = STARTUPS[startup]
    (tmp_path / "sitecustomize.py").write_text(text)
    done = run(tmp_path, text=LOGGED, PYTHONPATH=str(tmp_path))

    assert done.stdout.splitlines()[-1:] == ["worked"], done.stdout + done.stderr
    # The program, and multiprocessing's resource tracker.
    assert done.stdout.count("hello") <= 2
    assert done.stdout.count(AFRESH) == (not forks)


def test_the_reason_why_workers_are_started_afresh_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(THREAD)
    twice = LOGGED + '    with safepool.ProcessPool(1, env={"A": "1"}) as pool:\n'
    twice += "        pool.submit(int).result()\n"
    done = run(tmp_path, text=twice, PYTHONPATH=str(tmp_path))

    [line] = [line for line in done.stdout.splitlines() if AFRESH in line]
    # From Python 3.14 on a thread has its name in the system as well.
    assert "it had threads from its start, usually those of an agent or a debugger: " in line


# The program starts a server, which has threads; one that tells what the script has made; workers.
# Kills the second server, of which there is a third then, and the first worker.
KILL_TWO = """
    import os, signal
    from safepool.workers import launch
    start, started = launch.launch, []

    def start_or_kill(*arguments, **keywords):
        process, sock = start(*arguments, **keywords)
        started.append(process.pid)
        if len(started) in (2, 4):
            os.kill(process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return process, sock

    launch.launch = start_or_kill
    work()
    print(len(started))
"""


def test_what_is_killed_at_its_start_is_started_again_where_none_can_fork(tmp_path: Path) -> None:
    """The out-of-memory killer may take an interpreter before it has read what it is to do."""
    (tmp_path / "sitecustomize.py").write_text(THREAD)
    done = run(tmp_path, text=LOGGED.replace("    work()\n", KILL_TWO), PYTHONPATH=str(tmp_path))

    assert done.stdout.splitlines()[-2:-1] == ["worked"], done.stdout + done.stderr
    assert "before it was initialized" in done.stdout
    assert "cannot start" not in done.stdout
    assert done.stdout.count(AFRESH) == 1


def test_a_pool_works_under_a_thread_of_a_pth_file_and_without_the_site(tmp_path: Path) -> None:
    """A ``.pth`` file of a virtual environment runs code (coverage, debuggers, setuptools)."""
    packages = tmp_path / "packages"
    packages.mkdir()
    line = THREAD.strip().replace("\n", "; ")
    (packages / "agent.pth").write_text(f"import site; {line}\n")
    (tmp_path / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(packages)!r})")
    done = run(tmp_path, text=LOGGED, PYTHONPATH=str(tmp_path))

    assert done.stdout.splitlines()[-1:] == ["worked"], done.stdout + done.stderr
    assert AFRESH in done.stdout


def test_workers_that_are_started_afresh_end_with_a_killed_program(tmp_path: Path) -> None:
    """Within a second, in the middle of C code."""
    (tmp_path / "sitecustomize.py").write_text(THREAD)
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import time, safepool
            pool = safepool.ProcessPool(2)
            for _ in range(2):
                pool.submit(sum, range(10**11))
            while len(pool._processes) < 2 or not all(w.task for w in pool.workers()):
                time.sleep(0.01)
            print(*pool._processes, flush=True)
            time.sleep(60)
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 2
        program.kill()
        assert still_alive(pids, after_s=1.0) == []


# How an interpreter is started: the options, and what tells that a worker has them too.
OPTIONS: dict[str, tuple[list[str], str]] = {
    "bytes beside text are an error": (["-bb"], "sys.flags.bytes_warning == 2"),
    "bytes beside text are a warning": (["-b"], "sys.flags.bytes_warning == 1"),
    "isolated": (["-I"], "sys.flags.isolated == 1"),
    "no environment": (["-E"], "sys.flags.ignore_environment == 1"),
    "no folder of the user": (["-s"], "sys.flags.no_user_site == 1"),
    "a safe path": (["-P"], "sys.flags.safe_path"),
    "optimized": (["-OO"], "sys.flags.optimize == 2"),
    "warnings are errors": (["-W", "error"], "sys.warnoptions == ['error']"),
    "development": (["-X", "dev"], "sys.flags.dev_mode"),
    "long integers": (["-X", "int_max_str_digits=5000"], "sys.get_int_max_str_digits() == 5000"),
    "options of the user's own": (["-X", "mine=1"], "sys._xoptions == {'mine': '1'}"),
    "UTF-8": (["-X", "utf8"], "sys.flags.utf8_mode == 1"),
    "no bytecode": (["-B"], "sys.dont_write_bytecode"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_worker_has_the_options_of_its_program(option: str, tmp_path: Path) -> None:
    arguments, seen = OPTIONS[option]
    package = Path(__file__).parents[2]
    site = [path for path in sys.path if path.endswith("-packages")]
    text = f"""
        import sys
        sys.path += {[str(package), *site]!r}
        import safepool
        if __name__ == "__main__":
            def look():
                return {seen}
            with safepool.ProcessPool(1) as pool:
                print(look(), pool.submit(look).result())
    """
    done = run(tmp_path, *arguments, text=textwrap.dedent(text))

    assert done.stdout == "True True\n", done.stderr
    assert done.stderr == ""


# What is too large for a command line or a new environment (execve(2)), and is no program's
# fault: a Bazel or PEX program has a thousand entries on its path.
SIZES: dict[str, str] = {
    "a path of 400 KB": "sys.path += [f'/nowhere/{n:0200d}' for n in range(2000)]",
    # Few and long: each import looks into every one of them.
    "a path of 4 MB": "sys.path += [f'/nowhere/{n:02000d}' for n in range(2000)]",
    "arguments of 1 MB": "sys.argv += ['x' * 1000] * 1000",
    "a variable of 1 MB": "os.environ['LARGE'] = 'x' * 1_000_000",
    "variables of 4 MB": "os.environ.update({f'N{n}': 'x' * 100_000 for n in range(40)})",
    "names that are no text": "sys.path += ['/nowhere/' + chr(0xDC80)]",
    "objects on the path": "sys.path += [b'/nowhere', None, 3]",
}


@pytest.mark.parametrize("afresh", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_no_size_of_path_or_environment_is_too_large(
    size: str, afresh: bool, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(THREAD * afresh)
    text = f"""
        import os, sys
        {SIZES[size]}
        import safepool
        def look():
            path = [entry for entry in sys.path if isinstance(entry, str)]
            return sys.argv, path, {{**os.environ}}
        if __name__ == "__main__":
            with safepool.ProcessPool(1) as pool:
                seen = pool.submit(look).result()
            print(seen[:2] == look()[:2], {{**seen[2], **os.environ}} == seen[2])
    """
    done = run(tmp_path, text=textwrap.dedent(text), PYTHONPATH=str(tmp_path))

    assert done.stdout == "True True\n", done.stderr


# What multiprocessing.set_executable() is given: the program's text for it, and what the error
# says; nothing for those that work. PYTHON is this interpreter.
EXECUTABLES: dict[str, tuple[str, str]] = {
    "an interpreter, where Python is embedded": (
        "sys.executable = '/bin/false'; multiprocessing.set_executable(PYTHON)",
        "",
    ),
    "nothing, but sys.executable was mended": (
        "multiprocessing.set_executable(None); sys.executable = PYTHON",
        "",
    ),
    "a script that becomes an interpreter": ("multiprocessing.set_executable('./exec.sh')", ""),
    "a script that starts an interpreter": ("multiprocessing.set_executable('./start.sh')", ""),
    "a program that ends": (
        "multiprocessing.set_executable('/bin/false')",
        "was started as an interpreter, and ended with exit code 1",
    ),
    "no file": ("multiprocessing.set_executable('/nowhere/python')", "'/nowhere/python'"),
    "a file that is no program": ("multiprocessing.set_executable('script.py')", "'script.py'"),
    "a folder": ("multiprocessing.set_executable('/tmp')", "'/tmp'"),
    "nothing": ("multiprocessing.set_executable(None); sys.executable = None", "is empty"),
    "an empty name": ("multiprocessing.set_executable(''); sys.executable = ''", "is empty"),
}


@pytest.mark.parametrize("executable", EXECUTABLES)
def test_the_interpreter_is_that_of_multiprocessing(executable: str, tmp_path: Path) -> None:
    """A program that embeds Python says which it is (uwsgi, Blender); what is none is named."""
    text, said = EXECUTABLES[executable]
    for name, how in (("exec", "exec "), ("start", "")):
        (tmp_path / f"{name}.sh").write_text(f'#!/bin/sh\n{how}{sys.executable} "$@"\n')
        (tmp_path / f"{name}.sh").chmod(0o755)
    text = f"""
        import multiprocessing, sys
        PYTHON = sys.executable
        {text}
        import safepool
        with safepool.ProcessPool(2) as pool:
            try:
                print(*pool.map(abs, range(-3, 0)))
            except Exception as error:
                print(type(error).__name__, error)
    """
    done = run(tmp_path, text=textwrap.dedent(text))

    assert done.returncode == 0, done.stderr
    if not said:
        assert done.stdout == "3 2 1\n"
    else:
        assert done.stdout.startswith("PoolBrokenError cannot start a worker: the interpreter")
        assert said in done.stdout
        assert "multiprocessing.set_executable() the path of a Python interpreter" in done.stdout


def test_spawn_names_an_interpreter_that_does_not_exist(tmp_path: Path) -> None:
    """After os.chroot() that is the program's own. Such a process ends without a word."""
    text = """
        import multiprocessing, safepool
        multiprocessing.set_executable("/nowhere/python")
        with safepool.ProcessPool(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            print(pool.submit(abs, -1).exception())
    """
    done = run(tmp_path, text=textwrap.dedent(text))

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot start a worker: the interpreter for workers, '/nowhere")
    assert "does not exist. After os.chroot()" in done.stdout
    assert done.stderr == ""


REFUSALS = [
    ("sched_getaffinity", "sched_setaffinity"),
    ("prlimit64", "getrlimit"),
    ("getpriority", "setpriority"),
    ("pidfd_open",),
    ("pidfd_send_signal",),
    ("pidfd_open", "pidfd_send_signal"),
    ("memfd_create",),
    ("membarrier",),
    ("prctl",),
    tuple(support_seccomp.OPTIONAL),
]


# In every run each call with each error, and with each way to start workers; in the long run each
# with all.
REFUSED = [
    pytest.param(
        names,
        error,
        afresh,
        id=f"{'-'.join(names)}-{error}-{afresh}",
        marks=[pytest.mark.slow] * ((number + (error == "EPERM") + afresh) % 2),
    )
    for number, names in enumerate(REFUSALS)
    for error in ("EPERM", "ENOSYS")
    for afresh in (False, True)
]


@pytest.mark.skipif(not support_seccomp.can_refuse(), reason="unknown numbers of system calls")
@pytest.mark.parametrize(("names", "error", "afresh"), REFUSED)
def test_a_refused_system_call_is_a_limit_that_could_not_be_read(
    names: tuple[str, ...], error: str, afresh: bool, tmp_path: Path
) -> None:
    """Sandboxes refuse what they do not know (seccomp): there is a pool all the same."""
    (tmp_path / "sitecustomize.py").write_text(THREAD * afresh)
    refuse = (
        f"import errno, support_seccomp\nsupport_seccomp.refuse(*{names}, error=errno.{error})\n"
    )
    done = run(
        tmp_path, text=refuse + WORK, PYTHONPATH=os.pathsep.join([str(tmp_path), str(TESTS)])
    )

    assert done.stdout == "worked\n", done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(not support_seccomp.can_refuse(), reason="unknown numbers of system calls")
def test_limits_that_a_filter_hides_are_said(tmp_path: Path) -> None:
    done = run_script(
        """
        import support_seccomp, safepool
        support_seccomp.refuse("sched_getaffinity", "prlimit64", "getrlimit")
        limits = safepool.read_limits()
        print(limits.affinity.source, limits.affinity.cpus >= 1, safepool.cpu_count() >= 1)
        print(*sorted(skipped.source for skipped in limits.skipped))
        """,
        cwd=tmp_path,
    )

    assert done.stdout == (
        "/proc/thread-self/status True True\n"
        "os.sched_getaffinity(0) resource.getrlimit(RLIMIT_NOFILE) "
        "resource.getrlimit(RLIMIT_NPROC)\n"
    )
