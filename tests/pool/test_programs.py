"""Programs of every kind get the answers that the standard pool gives, and end by themselves."""

from __future__ import annotations

import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING

import pytest
from support_processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

# A global that an initializer sets, which a program of any kind must find in its tasks.
PROGRAM = """
import safepool
data = None
def begin(x):
    global data
    data = x
def square_and_add(x):
    return x * x + data
with safepool.ProcessPool(1, initializer=begin, initargs=(0,)) as pool:
    print(sum(pool.map(square_and_add, range(10))))
"""


def run(*command: str, cwd: Path, stdin: str = "") -> tuple[str, str, int]:
    """Run a program; return its output, its errors, its exit code."""
    done = run_python(*command, cwd=cwd, stdin=stdin)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.parametrize("kind", ["-c", "stdin", "script", "-m", "zip", "directory"])
def test_an_initializer_sets_a_global_in_a_program_of_any_kind(kind: str, tmp_path: Path) -> None:
    """Wherever its ``__main__`` came from, and without a guard."""
    (tmp_path / "__main__.py").write_text(PROGRAM)
    (tmp_path / "program.py").write_text(PROGRAM)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as app:
        app.writestr("__main__.py", PROGRAM)
    commands = {
        "-c": ["-c", PROGRAM],
        "stdin": [],
        "script": ["program.py"],
        "-m": ["-m", "program"],
        "zip": ["app.zip"],
        "directory": ["."],
    }
    stdin = PROGRAM if kind == "stdin" else ""

    assert run(*commands[kind], cwd=tmp_path, stdin=stdin) == ("285\n", "", 0)


# One row per surrounding: a program, and what it prints with the pool that NEW makes.
SURROUNDINGS: dict[str, str] = {
    "SIGCHLD ignored": """
        import signal
        if __name__ == "__main__":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            with NEW(1) as pool:
                print(list(pool.map(support_tasks.square, range(4))))
    """,
    "made in a thread that has ended": """
        import threading
        def make():
            global pool
            pool = NEW(1)
            print(pool.submit(support_tasks.square, 2).result())
        if __name__ == "__main__":
            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
            time.sleep(0.5)
            print(list(pool.map(support_tasks.square, range(4))))
            pool.shutdown()
    """,
    "shut down without waiting, then the end": """
        if __name__ == "__main__":
            pool = NEW(1)
            future = pool.submit(support_tasks.sleep_and_return, 0.3, "done")
            future.add_done_callback(lambda future: print(future.result()))
            if NEW is safepool.ProcessPool:  # the standard pool hangs: gh-83386
                pool.shutdown(wait=False)
    """,
    "a callback submits at the end": """
        import threading
        gate = __file__ + ".gate"
        def open_it_at_the_end():
            while not threading._SHUTTING_DOWN:
                time.sleep(0.01)
            time.sleep(0.3)
            open(gate, "w").close()
        if __name__ == "__main__":
            pool = NEW(1)
            threading.Thread(target=open_it_at_the_end, daemon=True).start()
            def go_on(future):
                try:
                    pool.submit(support_tasks.square, 2)
                except RuntimeError as error:
                    print(str(error).partition(" after")[0])
            pool.submit(support_tasks.wait_for, gate).add_done_callback(go_on)
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGCHLD and fork are POSIX's")
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_a_program_prints_the_same_with_either_pool(surrounding: str, tmp_path: Path) -> None:
    """It also ends by itself, with nothing said about it."""
    standard, ours = tmp_path / "standard.py", tmp_path / "ours.py"
    for script, new in (
        (standard, "concurrent.futures.ProcessPoolExecutor"),
        (ours, "safepool.ProcessPool"),
    ):
        script.write_text(
            f"import time, concurrent.futures, safepool, support_tasks\nNEW = {new}\n"
            + textwrap.dedent(SURROUNDINGS[surrounding])
        )
    output, _, expected_code = run(str(standard), cwd=tmp_path)

    assert output
    assert run(str(ours), cwd=tmp_path) == (output, "", expected_code)


# One row per way in which a worker comes to import a module that starts a pool.
STARTING: dict[str, str] = {
    "for a task": "future = safepool.ProcessPool(1).submit(work)",
    "for an initializer": "future = safepool.ProcessPool(1, initializer=work).submit(abs, -1)",
    "for an argument": "future = safepool.ProcessPool(1).submit(callable, work)",
    "for a map": "future = safepool.ProcessPool(1).map(work, [1])",
}


@pytest.mark.parametrize("way", STARTING)
def test_a_module_that_starts_a_pool_when_it_is_imported(way: str, tmp_path: Path) -> None:
    """Its workers would start workers that import it, and so on, without an end."""
    (tmp_path / "starting.py").write_text(
        f"import safepool\ndef work(*args): return 1\n{STARTING[way]}\n"
    )
    code = """
        import starting
        try:
            print(starting.future.exception(60) if hasattr(starting.future, "exception")
                  else list(starting.future))
        except Exception as error:
            print(error)
        cause = getattr(starting.future, "exception", lambda: None)()
        print(getattr(cause, "__cause__", None))
        """
    out, _, exit_code = run("-c", textwrap.dedent(code), cwd=tmp_path)

    assert exit_code == 0
    assert "module starting starts a process pool when it is imported" in out
