"""The harness itself: what it must notice, what it must leave alone, and how a hang ends.

Each test is a pytest run of its own, on a file written here with this project's conftest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import leaks
import pytest

TESTS = Path(leaks.__file__).parent

linux_only = pytest.mark.skipif(not leaks.ON_LINUX, reason="/proc is the source")

# One row per kind: the body of a test that leaks it, and how the message must name it.
LEAKS: dict[str, tuple[str, str]] = {
    "child": (
        "kept.append(subprocess.Popen(['sleep', '1001']))",
        r"process \d+ \(state \w, parent \d+\): sleep 1001",
    ),
    "zombie": (
        "os.fork() or os._exit(0)",
        r"process \d+ \(a zombie that nobody waited for",
    ),
    "orphan by exec": (
        "subprocess.run(['setsid', 'sh', '-c', 'sleep 1002 &'], check=True)",
        r"process \d+ .*: sleep 1002",
    ),
    "orphan by fork": (
        """
        child = os.fork()
        if child == 0:
            os.fork() or time.sleep(1003)
            os._exit(0)
        os.waitpid(child, 0)
        """,
        r"process \d+ .*: .*pytest",
    ),
    "worker of the standard pool": (
        """
        kept.append(concurrent.futures.ProcessPoolExecutor(1))
        kept[0].submit(int).result()
        """,
        r"process \d+ .*: .*pytest",
    ),
    "worker of the fork server": (
        """
        context = multiprocessing.get_context('forkserver')
        kept.append(context.Process(target=time.sleep, args=(1004,), daemon=True))
        kept[0].start()
        """,
        r"process \d+ .*forkserver",
    ),
    "thread": (
        "threading.Thread(target=threading.Event().wait, args=(3,), name='mine').start()",
        r"thread 'mine', in .*wait",
    ),
    "daemon thread": (
        """
        threading.Thread(
            target=threading.Event().wait, args=(3,), name='mine', daemon=True
        ).start()
        """,
        r"thread 'mine' \(daemon\), in .*wait",
    ),
    "thread without an object": (
        """
        _thread.start_new_thread(lambda: time.sleep(3), ())
        time.sleep(0.1)
        """,
        r"thread \d+, which threading did not start",
    ),
    "pipe": ("os.pipe()", r"file descriptor \d+: pipe:\[\d+\]"),
    "socket": (
        "[end.detach() for end in socket.socketpair()]",
        r"file descriptor \d+: socket:\[\d+\]",
    ),
    "file": ("os.open('/dev/null', os.O_RDONLY)", r"file descriptor \d+: /dev/null"),
    "memory file": (
        "os.memfd_create('mine')",
        r"file descriptor \d+: /memfd:mine",
    ),
    "mapped memory file": (
        """
        descriptor = os.memfd_create('mine')
        os.truncate(descriptor, 4096)
        kept.append(mmap.mmap(descriptor, 4096))
        os.close(descriptor)
        """,
        r"mapped memory file /memfd:mine \(deleted\) \(inode \d+\)",
    ),
    "shared memory": (
        "open(f'/dev/shm/safepool-of{os.getppid()}-test', 'x').close()",
        r"name /dev/shm/safepool-of\d+-test",
    ),
    "temporary file": ("tempfile.mkstemp(suffix='.mine')[0]", r"name /\S+\.mine"),
    "temporary folder": ("tempfile.mkdtemp(prefix='loky-')", r"name /\S+/loky-"),
}

# The same, for what a test may leave behind: it passes.
HARMLESS: dict[str, str] = {
    "nothing": "pass",
    "garbage": """
        class Ring:
            def __init__(self):
                self.me = self
                self.ends = socket.socketpair()
            def __del__(self):
                [end.close() for end in self.ends]
        gc.collect()
        Ring()
    """,
    "a straggler": """
        def reap(child):
            time.sleep(0.2)
            child.wait()
        child = subprocess.Popen(['true'])
        threading.Thread(target=reap, args=(child,)).start()
    """,
    "multiprocessing's resource tracker": """
        from multiprocessing import shared_memory
        memory = shared_memory.SharedMemory(create=True, size=8)
        memory.close()
        memory.unlink()
    """,
    "multiprocessing's fork server": """
        process = multiprocessing.get_context('forkserver').Process(target=int)
        process.start()
        process.join()
        process.close()
    """,
    "loky's resource tracker": """
        import loky
        with loky.ProcessPoolExecutor(1) as pool:
            pool.submit(int).result()
    """,
    "a name that another program made": """
        maker = f'/dev/shm/loky-{os.getppid()}-test'
        open(maker, 'x').close()
        atexit.register(os.unlink, maker)
    """,
}

HEAD = """
import _thread, atexit, concurrent.futures, gc, mmap, multiprocessing, os, socket, subprocess
import sys, tempfile, threading, time
import pytest
kept = []
"""


def run_pytest(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run one test file in a fresh interpreter, with this project's harness."""
    shutil.copy(TESTS / "conftest.py", folder)
    with (folder / "conftest.py").open("a") as conftest:
        conftest.write("\nleaks.GRACE_S = leaks.NAME_GRACE_S = 0.5\n")
    (folder / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {TESTS}\naddopts = --import-mode=importlib\n"
        "timeout_method = thread\nmarkers =\n    foreign_pools: as in the project\n"
    )
    (folder / "test_it.py").write_text(HEAD + textwrap.dedent(source))
    # In CI pytest repeats whole messages in its summary; here the text is the same everywhere.
    unset = {"CI", "BUILD_NUMBER", "PYTEST_ADDOPTS"}
    environment = {name: os.environ[name] for name in os.environ if name not in unset}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def a_test(body: str, mark: str = "") -> str:
    """Write a test whose body is ``body``."""
    return f"{mark}\ndef test_it():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"


@linux_only
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_fails_its_test_and_is_named(leak: str, tmp_path: Path) -> None:
    """Whatever stays behind is named, and ends with the run."""
    body, expected = LEAKS[leak]

    run = run_pytest(tmp_path, a_test(body))

    (leaks.SHARED_MEMORY / f"safepool-of{os.getpid()}-test").unlink(missing_ok=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(rf"the test left behind:(\n  .*)*\n  {expected}", run.stdout), run.stdout
    assert "1 error" in run.stdout


@linux_only
@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_is_no_leak_passes(harmless: str, tmp_path: Path) -> None:
    """Garbage, stragglers, the libraries' own helpers and other programs are no leak."""
    run = run_pytest(tmp_path, a_test(HARMLESS[harmless]))

    assert run.returncode == 0, run.stdout + run.stderr


JOBLIB_CALL = """
    import joblib
    with joblib.parallel_config('loky'):
        joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(n) for n in range(4))
"""


@pytest.mark.foreign_pools
@pytest.mark.parametrize("marked", [True, False])
def test_reusable_executors_need_the_marker(marked: bool, tmp_path: Path) -> None:
    """They outlive a call: allowed for a test that says so, and then ended for it."""
    mark = "@pytest.mark.foreign_pools" if marked else ""

    run = run_pytest(tmp_path, a_test(JOBLIB_CALL, mark=mark))

    assert run.returncode == (0 if marked else 1), run.stdout + run.stderr


def test_a_leak_is_charged_to_one_test_only(tmp_path: Path) -> None:
    """The tests after it pass, and what leaked is dead by then."""
    source = """
        def test_leaks():
            kept.append(subprocess.Popen(["sleep", "1005"]))

        def test_after_it():
            assert kept[0].wait(5) == -9
    """

    run = run_pytest(tmp_path, source)

    assert "2 passed, 1 error" in run.stdout, run.stdout


@linux_only
@pytest.mark.parametrize("scope", ["module", "session"])
def test_a_shared_fixture_is_checked_at_its_end(scope: str, tmp_path: Path) -> None:
    """It may start a process in any test that it serves, and may leave none."""
    source = f"""
        @pytest.fixture(scope="{scope}")
        def start():
            return lambda *command: kept.append(subprocess.Popen(command))

        def test_first(start): start("sleep", "1006")
        def test_second(start): start("sleep", "1007")
        def test_third(start): assert kept[0].poll() is None
    """

    run = run_pytest(tmp_path, source)

    found = re.search(rf"the {scope} left behind:((\n  .*)+)", run.stdout)
    assert found, run.stdout
    assert "sleep 1006" in found[1]
    assert "sleep 1007" in found[1]
    assert len(re.findall("left behind:\n  process", run.stdout)) == 1
    assert "3 passed, 1 error" in run.stdout, run.stdout


def test_a_shared_fixture_that_cleans_up_passes(tmp_path: Path) -> None:
    """Replacing a process between tests is a shared pool's right."""
    source = """
        @pytest.fixture(scope="module")
        def replace():
            running = []
            def end():
                while running:
                    running[-1].kill()
                    running.pop().wait()
            def replace():
                end()
                running.append(subprocess.Popen(["sleep", "1008"]))
            yield replace
            end()

        def test_first(replace): replace()
        def test_second(replace): replace()
    """

    run = run_pytest(tmp_path, source)

    assert "2 passed" in run.stdout, run.stdout
    assert run.returncode == 0


@linux_only
def test_a_hang_prints_every_stack_and_ends_every_process(tmp_path: Path) -> None:
    """Threads, children, their stacks, captured output: all that is needed to explain it."""
    source = """
        def wait_here():
            time.sleep(1007)

        def child_waits_here():
            sys.stderr.write("the child runs\\n")
            time.sleep(1007)

        def test_hangs():
            threading.Thread(target=wait_here, name="mine").start()
            context = multiprocessing.get_context("fork")
            context.Process(target=child_waits_here).start()
            subprocess.run(["setsid", "sh", "-c", "sleep 1007 &"], check=True)
            threading.Lock().acquire() and threading.Event().wait()
    """
    before = leaks.take_snapshot()
    start = time.monotonic()

    run = run_pytest(tmp_path, source, "--timeout=2")

    assert time.monotonic() - start < 30
    assert run.returncode == 1
    assert "test_it.py::test_hangs exceeded its time limit of 2.0 s" in run.stderr
    assert "~~~ MainThread" in run.stderr
    assert "in test_hangs" in run.stderr
    assert "~~~ mine" in run.stderr
    assert "in wait_here" in run.stderr
    assert "the child runs" in run.stderr
    assert "in child_waits_here" in run.stderr
    assert re.search(r"process \d+ .*: sleep 1007", run.stderr)
    assert [leak for leak in leaks.left_since(before) if leak.process] == []


@linux_only
def test_a_hang_in_c_code_that_holds_the_interpreter_ends(tmp_path: Path) -> None:
    """No Python thread can run then; the watchdog in C still says where it hangs."""
    body = """
        import ctypes
        ctypes.PyDLL(None).sleep(1008)
    """

    run = run_pytest(tmp_path, a_test(body), "--timeout=1")

    # The watchdog cannot clean up.
    for folder in Path(tempfile.gettempdir()).glob("safepool-*"):
        shutil.rmtree(folder)
    assert run.returncode == 1
    assert "in test_it" in run.stderr, run.stderr


def test_the_check_is_cheap() -> None:
    """Two looks per test: some milliseconds together. A bound far above, for busy machines."""
    times_s = []
    for _ in range(20):
        start = time.perf_counter()
        before = leaks.take_snapshot()
        leaks.left_since(before)
        times_s.append(time.perf_counter() - start)

    assert sorted(times_s)[10] < 0.1
