"""Workers never outlive their pool, whatever ends it: a drop, an exit, Ctrl-C, SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import support_tasks as tasks
from support_processes import ends, still_alive, terminal
from support_processes import run_script as run

from safepool import ProcessPool

TESTS = Path(__file__).parent.parent


def begin(script: str, *, cwd: Path) -> subprocess.Popen[str]:
    """Start a script in a process group of its own, its output on pipes."""
    (cwd / "script.py").write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )


def workers_of(line: str) -> list[int]:
    return [int(word) for word in line.split()]


# One row per kind of script people write. Each prints 285, from its own function.
SCRIPTS: dict[str, str] = {
    "no main guard": """
        import safepool
        def square(x): return x * x
        with safepool.ProcessPool(2) as pool:
            print(sum(pool.map(square, range(10))))
    """,
    "a main guard": """
        import safepool
        def square(x): return x * x
        def main():
            with safepool.ProcessPool(2) as pool:
                print(sum(pool.map(square, range(10))))
        if __name__ == "__main__":
            main()
    """,
    "never shut down": """
        import safepool
        pool = safepool.ProcessPool(2)
        print(sum(pool.map(lambda x: x * x, range(10))))
    """,
    "dropped": """
        import safepool
        futures = [safepool.ProcessPool(1).submit(pow, x, 2) for x in range(10)]
        print(sum(f.result() for f in futures))
    """,
    "two pools at once": """
        import safepool
        with safepool.ProcessPool(1) as a, safepool.ProcessPool(1) as b:
            print(sum(b.map(pow, a.map(int, range(10)), [2] * 10)))
    """,
    "in a thread": """
        import threading, safepool
        def work():
            pool = safepool.ProcessPool(1)
            print(sum(pool.map(lambda x: x * x, range(10))))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """,
    "a closed stdin": """
        import os, safepool
        os.close(0)
        with safepool.ProcessPool(1) as pool:
            print(sum(pool.map(lambda x: x * x, range(10))))
    """,
    "a global set by the initializer": """
        import safepool
        data = None
        def begin(x):
            global data
            data = x
        def square_and_add(x):
            return x * x + data
        with safepool.ProcessPool(2, initializer=begin, initargs=(0,)) as pool:
            print(sum(pool.map(square_and_add, range(10))))
    """,
    "a global set by a task, and one that the program changes": """
        import safepool
        cache, factor = None, 1
        def square(x):
            global cache
            first = cache is None
            if first:
                cache = "loaded"
            return x * x * factor, first
        with safepool.ProcessPool(1) as pool:
            squares = list(pool.map(square, range(10)))
            assert [first for _, first in squares] == [True] + [False] * 9
            factor = 2
            assert pool.submit(square, 3).result() == (18, False)
            assert cache is None
        print(sum(value for value, _ in squares))
    """,
    "two functions that call each other": """
        import safepool
        def even(n): return True if n == 0 else odd(n - 1)
        def odd(n): return False if n == 0 else even(n - 1)
        with safepool.ProcessPool(1) as pool:
            assert list(pool.map(even, range(4))) == [True, False, True, False]
            def odd(n): return "redefined"
            assert pool.submit(even, 3).result() == "redefined"
        print(285)
    """,
    "a class of its own": """
        import safepool
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int
            def squared(self): return Point(self.x ** 2)
        with safepool.ProcessPool(1) as pool:
            points = list(pool.map(Point.squared, map(Point, range(10))))
        assert all(type(p) is Point for p in points)
        print(sum(p.x for p in points))
    """,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_work_as_they_are_written(script: str, tmp_path: Path) -> None:
    """The result is right, nothing else is printed, the program ends by itself."""
    done = run(SCRIPTS[script], cwd=tmp_path)

    assert (done.stdout, done.stderr, done.returncode) == ("285\n", "", 0)


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_programs_without_a_file_work(how: str) -> None:
    code = (
        "import safepool\n"
        "def square(x): return x * x\n"
        "with safepool.ProcessPool(1) as pool: print(sum(pool.map(square, range(10))))\n"
    )
    command = [sys.executable, "-c", code] if how == "-c" else [sys.executable]
    done = subprocess.run(
        command, input=code, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.stdout, done.stderr, done.returncode) == ("285\n", "", 0)


@pytest.mark.parametrize("context", [None, "loky", "spawn"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_worker_that_is_told_to_end_runs_its_exit_functions(
    context: str | None, replaced: bool, tmp_path: Path
) -> None:
    """They may take their time: what they write would be lost."""
    path = tmp_path / "written"
    with ProcessPool(1, mp_context=context, max_tasks_per_child=1 if replaced else None) as pool:
        pool.submit(tasks.write_at_exit, str(path), 1.5).result(timeout=30)

    assert path.read_text() == "at exit"


def test_pending_work_is_finished_at_exit(tmp_path: Path) -> None:
    """The interpreter ends when the submitted tasks have, as with the standard pool."""
    done = run(
        """
        import safepool, support_tasks
        pool = safepool.ProcessPool(2)
        for n in range(6):
            pool.submit(support_tasks.sleep_and_return, 0.05, n).add_done_callback(
                lambda future: print(future.result())
            )
        """,
        cwd=tmp_path,
    )

    assert sorted(done.stdout.split()) == list("012345")
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_worker_lost_at_exit_hangs_nothing(tmp_path: Path) -> None:
    """No new process may be started by then (Python 3.12); the rest fails or finishes."""
    done = run(
        """
        import safepool, support_tasks
        pool = safepool.ProcessPool(1)
        fatal = pool.submit(support_tasks.be_killed)
        rest = [pool.submit(support_tasks.square, n) for n in range(3)]
        rest[-1].add_done_callback(lambda f: print("ended", f.done()))
        """,
        cwd=tmp_path,
        timeout_s=30,
    )

    assert (done.stdout, done.returncode) == ("ended True\n", 0)


# One row per thing the workers do when their parent is killed.
OCCUPATIONS = {
    "idle": "",
    "busy in Python": "[pool.submit(support_tasks.sleep_and_return, 60) for _ in '12']",
    "busy in C, holding the GIL": "[pool.submit(support_tasks.sleep_in_c, 60) for _ in '12']",
    "busy, with work queued": "[pool.submit(support_tasks.sleep_and_return, 60) for _ in '12345']",
}


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("occupation", OCCUPATIONS)
def test_workers_end_within_a_second_of_a_killed_parent(occupation: str, tmp_path: Path) -> None:
    with begin(
        f"""
        import safepool, support_tasks, time
        pool = safepool.ProcessPool(2)
        list(pool.map(support_tasks.sleep_and_return, [0.3, 0.3]))
        print(*pool._processes, flush=True)
        futures = {OCCUPATIONS[occupation] or None}
        time.sleep(0.3)
        print("ready", flush=True)
        time.sleep(60)
        """,
        cwd=tmp_path,
    ) as parent:
        assert parent.stdout is not None
        workers = workers_of(parent.stdout.readline())
        assert parent.stdout.readline() == "ready\n"
        assert len(workers) == 2
        parent.kill()

        assert still_alive(workers, after_s=1.0) == []


# One row per way to wait for results when Ctrl-C arrives. Where the with block is left by
# the interrupt, and where only the interpreter's exit sees it.
WAITS = {
    "with and map": """
        with safepool.ProcessPool(2) as pool:
            for _ in pool.map(work, range(40)): pass
    """,
    "with, outside of a result": """
        with safepool.ProcessPool(2) as pool:
            futures = [pool.submit(work, n) for n in range(40)]
            time.sleep(30)
    """,
    "leaving the with block": """
        with safepool.ProcessPool(2) as pool:
            futures = [pool.submit(work, n) for n in range(40)]
    """,
    "no with": """
        pool = safepool.ProcessPool(2)
        futures = [pool.submit(work, n) for n in range(40)]
        futures[-1].result()
    """,
    "at exit": """
        pool = safepool.ProcessPool(2)
        futures = [pool.submit(work, n) for n in range(40)]
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a process group")
@pytest.mark.parametrize("wait", WAITS)
def test_an_interrupt_brings_the_prompt_back(wait: str, tmp_path: Path) -> None:
    """Within a second the program has ended, and no worker has printed a traceback."""
    with begin(
        """
        import safepool, time, os, threading
        def work(n):
            time.sleep(30)
        def tell():
            while len(pool._processes) < 2: time.sleep(0.01)
            time.sleep(0.3)
            print(*pool._processes, flush=True)
        pool = None
        class Teller(threading.Thread):
            def run(self):
                while pool is None: time.sleep(0.01)
                tell()
        Teller(daemon=True).start()
        """
        + WAITS[wait],
        cwd=tmp_path,
    ) as script:
        assert script.stdout is not None
        assert script.stderr is not None
        workers = workers_of(script.stdout.readline())
        os.killpg(script.pid, signal.SIGINT)
        # The promise is one second on an idle machine; the tasks sleep for thirty.
        assert ends(script, within_s=5)
        errors = script.stderr.read()

    assert len(workers) == 2
    assert still_alive(workers, after_s=0) == []
    assert errors.count("Traceback") <= 1, errors
    if wait != "at exit":
        assert script.returncode == -signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a process group")
@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1])
def test_an_interrupt_does_not_strike_a_worker_that_starts(delay_s: float, tmp_path: Path) -> None:
    """However young a worker is: no traceback of its own, and none is left behind."""
    with begin(
        """
        import safepool, time, threading
        class Teller(threading.Thread):
            def run(self):
                while pool is None or not pool._processes: time.sleep(0.001)
                print("started", flush=True)
        pool = None
        Teller(daemon=True).start()
        with safepool.ProcessPool(2) as pool:
            list(pool.map(time.sleep, [30] * 10))
        """,
        cwd=tmp_path,
    ) as script:
        assert script.stdout is not None
        assert script.stderr is not None
        script.stdout.readline()
        time.sleep(delay_s)
        os.killpg(script.pid, signal.SIGINT)
        script.wait(timeout=20)
        errors = script.stderr.read()

    assert errors.count("Traceback") == errors.count("script.py") == 1, errors


# What a terminal's Ctrl-C finds: two tasks that heed no SIGTERM, and 38 that wait.
INTERRUPTED = """
    import os, sys, time, safepool, support_endings
    print("pid", os.getpid(), flush=True)
    try:
        with safepool.ProcessPool(2) as pool:
            tasks = support_endings.ignore_sigterm_and_sleep
            futures = [pool.submit(tasks, "begun", 60) for _ in range(40)]
            while len(support_endings.lines("begun")) < 2: time.sleep(0.01)
            print("workers", *pool._processes, flush=True)
            time.sleep(60)
    finally:
        died = [f for f in futures if f.done() and not f.cancelled() and f.exception()]
        print("cancelled", sum(f.cancelled() for f in futures), "died", len(died), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux's, and /proc")
@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_at_a_terminal(interrupts: int, tmp_path: Path) -> None:
    """The prompt is back, what waited is cancelled, nothing of a worker is on the screen."""
    with terminal(INTERRUPTED, cwd=tmp_path) as (script, screen):
        workers = workers_of(screen.until("workers ")[-1].removeprefix("workers "))
        for _ in range(interrupts):
            screen.press(b"\x03")
            time.sleep(0.15)  # two that come closer are one to the kernel
        assert ends(script, within_s=5)  # the promise is one second on an idle machine
        shown = "\n".join(screen.rest())

    assert len(workers) == 2
    assert still_alive(workers, after_s=1.0) == []
    assert script.returncode == -signal.SIGINT
    assert "safepool/workers" not in shown
    assert "support_endings.py" not in shown
    if interrupts == 1:
        assert "cancelled 38 died 2" in shown
        assert shown.count("Traceback") == 1


def test_nothing_is_left_after_many_pools() -> None:
    """Descriptors, threads and children are given back by each pool, not at exit."""
    import support_tasks

    from safepool import ProcessPool

    def descriptors() -> int:
        return len(support_tasks.open_descriptors())

    with ProcessPool(1) as pool:  # starts what a start method keeps for the process
        pool.submit(support_tasks.square, 1).result(timeout=30)
    before = descriptors()
    for _ in range(5):
        with ProcessPool(2) as pool:
            assert list(pool.map(support_tasks.square, range(4))) == [0, 1, 4, 9]

    assert descriptors() == before


# One row per way to use pools from a script. The script's globals lead to the pools, and back.
USES: dict[str, str] = {
    "shut down": "with safepool.ProcessPool(1) as pool: pool.submit(square, 1).result()",
    "never shut down": "pool = safepool.ProcessPool(1); pool.submit(square, 1).result()",
    "joblib": """
        with safepool.parallel_backend(): Parallel(2)(delayed(square)(n) for n in range(4))
    """,
}


@pytest.mark.parametrize("use", USES)
def test_the_globals_of_the_script_are_finalized_when_it_ends(use: str, tmp_path: Path) -> None:
    """As with the standard pool: what they clean up and flush in ``__del__`` is done."""
    script = f"""
        import os
        from joblib import Parallel, delayed
        import safepool
        class Kept:
            def __del__(self): os.write(1, b"finalized")
        def square(x): return x * x
        if __name__ == "__main__":
            kept = Kept()
            {USES[use].strip()}
    """
    done = run(script, cwd=tmp_path)

    assert done.stdout == "finalized"
