"""The harness itself: what it must notice, what it must leave alone, and how a hang ends.

Most tests are a pytest run of their own, on a file written here with this project's conftest.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import leaks
import pytest
from support_processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

TESTS = Path(leaks.__file__).parent

linux_only = pytest.mark.skipif(not leaks.ON_LINUX, reason="/proc is the source")

# One row per kind: the body of a test that leaks it, and how the message must name it.
LEAKS: dict[str, tuple[str, str]] = {
    "child": (
        "kept.append(subprocess.Popen(['sleep', '1001']))",
        r"process \d+ \(state \w, parent \d+\): sleep 1001",
    ),
    "zombie": (
        """
        child = os.fork() or os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        """,
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
        kept[-1].submit(int).result()
        """,
        r"process \d+ .*: .*pytest",
    ),
    "worker of the fork server": (
        """
        context = multiprocessing.get_context('forkserver')
        kept.append(context.Process(target=time.sleep, args=(1004,), daemon=True))
        kept[-1].start()
        """,
        r"process \d+ .*forkserver",
    ),
    "thread": (
        # Joined at exit, and then the main thread has ended for it.
        "threading.Thread(target=threading.main_thread().join, name='mine').start()",
        r"thread 'mine', in .*(wait|join)",
    ),
    "daemon thread": (
        "threading.Thread(target=threading.Event().wait, name='mine', daemon=True).start()",
        r"thread 'mine' \(daemon\), in .*wait",
    ),
    "thread without an object": (
        """
        begun = threading.Event()
        _thread.start_new_thread(lambda: begun.set() or time.sleep(1009), ())
        begun.wait()
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
        "linux.memfd_create('mine', 0)",
        r"file descriptor \d+: /memfd:mine",
    ),
    "mapped memory file": (
        """
        descriptor = linux.memfd_create('mine', 0)
        os.truncate(descriptor, 4096)
        kept.append(mmap.mmap(descriptor, 4096))
        os.close(descriptor)
        """,
        r"mapped memory file /memfd:mine \(deleted\) \(inode \d+\)",
    ),
    "shared memory": (
        # With the maker's process id, so that another session of these tests does not take it
        # for its own.
        """
        name = f'/dev/shm/joblib-{os.getpid()}-test'
        open(name, 'x').close()
        atexit.register(os.unlink, name)
        """,
        r"name /dev/shm/joblib-\d+-test",
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
    "an orphan of another session in the same process group": """
        command = ['sh', '-c', 'sleep 1011 >&2 & echo $!']
        environ = {**os.environ, 'SAFEPOOL_TEST_SESSION': "another session's"}
        pid = int(subprocess.check_output(command, env=environ))
        atexit.register(os.kill, pid, 9)
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
from safepool import linux
kept = []
"""


# Two processes, as README.md's command has them.
SHARED = ("-n", "2", "--dist", "worksteal")

# What neither uses it nor shall wait for its import.
WITHOUT_HYPOTHESIS = ("-p", "no:hypothesispytest")


def run_pytest(
    folder: Path, source: str, *options: str, grace_s: float = 0.5, margin_s: float = 20.0
) -> subprocess.CompletedProcess[str]:
    """Run one test file in a fresh interpreter, with this project's harness.

    Args:
        folder: For the file.
        source: Its text.
        options: For pytest.
        grace_s: What is still there after so long is a leak; for what goes away, long enough
            for a machine that has much else to do.
        margin_s: How long after the time limit the watchdog comes.
    """
    shutil.copy(TESTS / "conftest.py", folder)
    with (folder / "conftest.py").open("a") as conftest:
        conftest.write(f"\nleaks.GRACE_S = {grace_s}\nWATCHDOG_MARGIN_S = {margin_s}\n")
    (folder / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {TESTS}\naddopts = --import-mode=importlib\n"
        "timeout_method = thread\nmarkers =\n    alone: as in the project\n"
        "    foreign_pools: as in the project\n"
    )
    (folder / "test_it.py").write_text(HEAD + textwrap.dedent(source))
    # In CI pytest repeats whole messages in its summary; here the text is the same everywhere.
    unset = {"CI", "BUILD_NUMBER", "PYTEST_ADDOPTS"}
    environment = {name: os.environ[name] for name in os.environ if name not in unset}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *WITHOUT_HYPOTHESIS, *options],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def a_test(body: str, mark: str = "", name: str = "test_it") -> str:
    """Write a test whose body is ``body``."""
    return f"{mark}\ndef {name}():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"


def a_test_each(bodies: Mapping[str, str]) -> str:
    """Write one test per row: so many in one run take hardly longer than one."""
    return "".join(
        a_test(body, name=f"test_{number}") for number, body in enumerate(bodies.values())
    )


def part_of(output: str, number: int) -> str:
    """Return what pytest says of the end of that one's test."""
    return output.partition(f" ERROR at teardown of test_{number} ")[2].partition("\n____")[0]


@functools.cache
def leaking() -> subprocess.CompletedProcess[str]:
    source = a_test_each({leak: body for leak, (body, _) in LEAKS.items()})
    with tempfile.TemporaryDirectory() as folder:
        return run_pytest(Path(folder), source)


@linux_only
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_fails_its_test_and_is_named(leak: str) -> None:
    """Whatever stays behind is named, and ends with the run."""
    _, expected = LEAKS[leak]

    run = leaking()

    said = part_of(run.stdout, list(LEAKS).index(leak))
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(rf"the test left behind:(\n  .*)*\n  {expected}", said), run.stdout
    assert f"{len(LEAKS)} passed, {len(LEAKS)} errors" in run.stdout


@linux_only
def test_what_is_no_leak_passes(tmp_path: Path) -> None:
    """Garbage, stragglers, the libraries' own helpers and other programs are no leak."""
    run = run_pytest(tmp_path, a_test_each(HARMLESS), grace_s=20)

    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(HARMLESS)} passed" in run.stdout


# A program that leaves a name in shared memory behind.
LEAVE_A_NAME = "import os; print(os.getpid()); open(f'/dev/shm/loky-{os.getpid()}-test', 'x')"


@linux_only
@pytest.mark.parametrize("beside_another_session", [True, False])
def test_a_name_whose_maker_has_ended(beside_another_session: bool, tmp_path: Path) -> None:
    """Is a leak; but two sessions on one machine cannot tell whose it was, and do not accuse."""
    body = f"""
        import leaks
        if not {beside_another_session}:
            leaks._another_session_runs = lambda: False
        command = [sys.executable, "-c", {LEAVE_A_NAME!r}]
        pid = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        atexit.register(os.unlink, f"/dev/shm/loky-{{pid}}-test")
    """
    another = subprocess.Popen(
        ["sleep", "1010"], env={**os.environ, leaks.MARK_VARIABLE: "another session's"}
    )
    try:
        run = run_pytest(tmp_path, a_test(body))
    finally:
        another.kill()
        another.wait()

    assert run.returncode == (0 if beside_another_session else 1), run.stdout + run.stderr
    accused = re.search(r"\n  name /dev/shm/loky-\d+-test", run.stdout) is not None
    assert accused is not beside_another_session


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
            assert kept[0].wait(60) == -9
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
        from multiprocessing import shared_memory

        def wait_here():
            time.sleep(1007)

        context = multiprocessing.get_context("fork")
        child_is_there, go_on, child_goes_on = (context.Event() for _ in range(3))

        def child_waits_here():
            child_is_there.set()
            go_on.wait()
            sys.stderr.write("the child runs\\n")
            child_goes_on.set()
            time.sleep(1007)

        # Not in the test: a busy machine may take its whole time for that.
        @pytest.fixture
        def all_running():
            threading.Thread(target=wait_here, name="mine").start()
            context.Process(target=child_waits_here).start()
            subprocess.run(["setsid", "sh", "-c", "sleep 1007 &"], check=True)
            child_is_there.wait()

        @pytest.mark.timeout(2, func_only=True)
        def test_hangs(all_running):
            shared = shared_memory.SharedMemory(create=True, size=1)
            sys.stderr.write(f"it has made {shared.name}\\n")
            go_on.set()
            child_goes_on.wait()
            threading.Lock().acquire() and threading.Event().wait()
    """
    before = leaks.take_snapshot()

    run = run_pytest(tmp_path, source)

    assert run.returncode == 1, run.stdout
    assert "test_it.py::test_hangs exceeded its time limit of 2.0 s" in run.stderr
    assert "~~~ MainThread" in run.stderr
    assert "in test_hangs" in run.stderr
    assert "~~~ mine" in run.stderr
    assert "in wait_here" in run.stderr
    assert "the child runs" in run.stderr
    assert "in child_waits_here" in run.stderr
    assert re.search(r"process \d+ .*: sleep 1007", run.stderr)
    made = re.search(r"it has made (\w+)", run.stderr)
    assert made is not None
    # By the standard library's own process, which ends when all others have.
    wait_until(lambda: not (leaks.SHARED_MEMORY / made[1]).exists())
    assert [leak for leak in leaks.left_since(before) if leak.process] == []


@linux_only
def test_a_hang_in_c_code_that_holds_the_interpreter_ends(tmp_path: Path) -> None:
    """No Python thread can run then; the watchdog in C still says where it hangs."""
    body = """
        import ctypes
        ctypes.PyDLL(None).sleep(1008)
    """

    run = run_pytest(tmp_path, a_test(body), "--timeout=1", margin_s=2)

    # The watchdog cannot clean up.
    for folder in Path(tempfile.gettempdir()).glob("safepool-*"):
        shutil.rmtree(folder)
    assert run.returncode == 1
    assert "in test_it" in run.stderr, run.stderr


BESIDE_EACH_OTHER = """
    here = os.path.dirname(__file__)

    def beside(name, number):
        with open(os.path.join(here, f"{name}-{number}"), "x") as file:
            time.sleep(0.01)
            others = [found for found in os.listdir(here) if found.startswith(("some-", "alone-"))]
            os.unlink(file.name)
        return len(others) - 1

    @pytest.mark.parametrize("number", range(60))
    def test_some(number):
        beside("some", number)

    @pytest.mark.alone
    @pytest.mark.parametrize("number", range(6))
    def test_alone(number):
        assert [beside("alone", number) for _ in range(5)] == [0] * 5

    @pytest.mark.parametrize("number", range(60, 120))
    def test_more(number):
        beside("some", number)

    @pytest.mark.parametrize("number", range(2))
    def test_orphan_by_fork(number):
        child = os.fork()
        if child == 0:
            os.fork() or time.sleep(1012)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.5)

    def test_name():
        command = [sys.executable, "-c", {leave_a_name!r}]
        pid = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        open(os.path.join(here, "pid"), "w").write(str(pid))
"""


@linux_only
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    """What is to be alone is, each accuses its own tests, and the run accuses for both."""
    pytest.importorskip("xdist")

    run = run_pytest(
        tmp_path, BESIDE_EACH_OTHER.replace("{leave_a_name!r}", repr(LEAVE_A_NAME)), *SHARED
    )
    name = Path(f"/dev/shm/loky-{(tmp_path / 'pid').read_text()}-test")
    name.unlink()

    # Between them, from Python 3.12 on: a warning of the fork.
    assert re.search(r"129 passed,.* 2 errors", run.stdout), run.stdout
    assert len(re.findall(r"the test left behind:\n  process \d+ .*\n(?!  )", run.stdout)) == 2
    if not leaks._another_session_runs():
        assert f"the run left behind:\n  name {name}" in run.stderr
    assert run.returncode == 1


@linux_only
def test_a_hang_in_one_of_two_processes_ends_the_run(tmp_path: Path) -> None:
    """With its stacks, and with the children of that process."""
    pytest.importorskip("xdist")
    source = """
        @pytest.mark.timeout(1)
        def test_hangs():
            kept.append(subprocess.Popen(["sleep", "1013"]))
            threading.Event().wait()

        def test_passes():
            pass
    """
    before = leaks.take_snapshot()

    run = run_pytest(tmp_path, source, *SHARED)

    assert "test_it.py::test_hangs exceeded its time limit of 1.0 s" in run.stderr
    assert "in test_hangs" in run.stderr
    assert re.search(r"process \d+ .*: sleep 1013", run.stderr)
    assert "crashed while running 'test_it.py::test_hangs'" in run.stdout
    assert run.returncode == 1
    assert [leak for leak in leaks.left_since(before) if leak.process] == []


def test_an_example_of_hypothesis_may_take_long(tmp_path: Path) -> None:
    """Its own limit of 200 ms is for a machine with nothing else to do."""
    source = """
        from hypothesis import given, settings, strategies as st

        @settings(max_examples=3)
        @given(st.booleans())
        def test_it(_):
            time.sleep(0.3)
    """

    run = run_pytest(tmp_path, source, "-p", "hypothesispytest")

    assert run.returncode == 0, run.stdout


def test_the_check_is_cheap() -> None:
    """Two looks per test: some milliseconds together. The quickest, for busy machines."""
    times_s = []
    for _ in range(20):
        start = time.perf_counter()
        before = leaks.take_snapshot()
        leaks.left_since(before)
        times_s.append(time.perf_counter() - start)

    assert min(times_s) < 0.1
