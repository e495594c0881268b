"""A guarded script runs once in the fork server: what its top level makes is in every worker."""

from __future__ import annotations

import sys
import textwrap
import zipfile
from typing import TYPE_CHECKING

import pytest
from support_processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

# The top level leaves a letter in a file for each run of it.
TOP = """
import os, sys
import safepool
with open(os.path.join(os.environ["FOLDER"], "runs"), "a") as runs:
    runs.write("P" if __name__ == "__main__" else "S" if __name__ == "__mp_main__" else "?")
"""


def run(program: str, folder: Path, *command: str, status: int = 0) -> tuple[str, str]:
    """Run a program in one of the ways to start it; return what it printed, and its errors."""
    text = TOP + textwrap.dedent(program)
    (folder / "program.py").write_text(text)
    done = run_python(*(command or ("program.py",)), cwd=folder)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLDER", str(tmp_path))


def runs(folder: Path) -> str:
    """Return who has run the top level: the program, and each server."""
    return (folder / "runs").read_text()


PROGRAM = """
import collections
registry = {}
registry["own"] = lambda: "registered"
collections.SETTING = 3
data = [1, 2]
class Point:
    def __init__(self, x):
        self.x = x
def look(point):
    import collections
    return (
        isinstance(point, Point), Point(point.x + 1), registry["own"](), collections.SETTING, data
    )
def main():
    with safepool.ProcessPool(2) as pool:
        same, point, *rest = pool.submit(look, Point(1)).result()
        print(same, type(point) is Point, point.x, *rest)
        print({type(p) is Point for p in pool.map(lambda x: Point(x), range(20))})
if __name__ == "__main__":
    main()
"""

WAYS: dict[str, list[str]] = {
    "script": ["program.py"],
    "-m module": ["-m", "program"],
    "-m package": ["-m", "package"],
    "-m package.module": ["-m", "package.program"],
    "folder": ["package"],
    "zip": ["app.zip"],
    "-m pdb": ["-m", "pdb", "-c", "continue", "-c", "quit", "program.py"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_top_level_is_run_once_for_all_workers(way: str, tmp_path: Path) -> None:
    """However the program was started."""
    package = tmp_path / "package"
    package.mkdir()
    for name in ("__main__.py", "program.py"):
        (package / name).write_text(TOP + PROGRAM)
    (package / "__init__.py").write_text("")
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as app:
        app.writestr("__main__.py", TOP + PROGRAM)
    out, _ = run(PROGRAM, tmp_path, *WAYS[way])

    assert "True True 2 registered 3 [1, 2]\n{True}\n" in out
    assert runs(tmp_path) == "PS"


def test_two_pools_share_the_run_and_one_by_value_has_none(tmp_path: Path) -> None:
    program = """
    def look():
        return sys.modules["__main__"].__name__, hasattr(sys.modules["__main__"], "TOP")
    TOP = 1
    if __name__ == "__main__":
        for main in ("run", "auto", "value", "run"):
            with safepool.ProcessPool(1, main=main) as pool:
                print(pool.submit(look).result())
    """
    out, _ = run(program, tmp_path)

    ran = "('__mp_main__', True)"
    assert out.splitlines() == [ran, ran, "('__main__', False)", ran]
    assert runs(tmp_path) == "PS"


# One row per top level that cannot be run in the server: its text, and the reason that is told.
NOT_RUN: dict[str, tuple[str, str]] = {
    "raises": (
        "if __name__ != '__main__': raise KeyError('x')",
        "line 6 of its top level raises KeyError: 'x'",
    ),
    "exits": ("if __name__ != '__main__': sys.exit(3)", "raises SystemExit: 3"),
    "reads standard input": ("if __name__ != '__main__': input()", "raises EOFError"),
    "kills its process": (
        "if __name__ != '__main__': os._exit(7)",
        "the fork server ended with exit code 7",
    ),
    "starts a thread that stays": (
        """
        import threading
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        """,
        "it starts threads that stay",
    ),
    "starts a process that stays": (
        """
        import atexit, subprocess
        child = subprocess.Popen(["sleep", "1000"])
        atexit.register(lambda: (child.kill(), child.wait()))
        """,
        "it starts a process that stays (sleep",
    ),
    "asks for a pool": (
        """
        if __name__ != "__main__":
            try:
                safepool.ProcessPool(1).submit(int).result()
            except Exception:
                pass
        """,
        "it asks for a pool",
    ),
    "asks for a standard pool": (
        """
        from concurrent.futures import ProcessPoolExecutor
        import multiprocessing
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as standard:
            standard.submit(int).result()
        """,
        "it starts a process",
    ),
}


@pytest.mark.parametrize("what", NOT_RUN)
def test_a_top_level_that_cannot_be_run_is_told_once_and_sent_by_value(
    what: str, tmp_path: Path
) -> None:
    text, reason = NOT_RUN[what]
    program = textwrap.dedent(text) + textwrap.dedent(
        """
        import logging
        def look(x):
            return x * factor
        factor = 2
        if __name__ == "__main__":
            logging.basicConfig(format="%(message)s", stream=sys.stdout)
            for _ in range(2):
                with safepool.ProcessPool(1) as pool:
                    print(pool.submit(look, 3).result())
            print(pool._mp_context.plan.because)
        """
    )
    out, _ = run(program, tmp_path)
    told, *answers, because = out.splitlines()

    assert answers == ["6", "6"]
    assert "is not run in the fork server: " in told
    assert reason in told
    assert reason in because


def test_a_pool_that_the_top_level_itself_asks_for_runs_nothing_twice(tmp_path: Path) -> None:
    """There is a guard, but not around the pool: run in the server, it would ask for another."""
    program = """
    def double(x):
        return 2 * x
    if __name__ == "__main__":
        print("started")
    with safepool.ProcessPool(1) as pool:
        print(list(pool.map(double, [1])), pool._mp_context.plan.because)
    """
    out, err = run(program, tmp_path)

    assert out.splitlines()[1].startswith("[2] line 12 of its top level asks for the pool")
    assert (runs(tmp_path), err) == ("P", "")


# One row per wrong value: how the pool is made, and what the error says.
WRONG: dict[str, tuple[str, str]] = {
    "no such value": ("main='spawn'", 'main must be "auto", "run" or "value", not \'spawn\''),
    "both": (
        "main='value', preload=['__main__']",
        'preload names "__main__", which is main="run", and main="value" is the opposite',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_an_error(case: str, tmp_path: Path) -> None:
    words, said = WRONG[case]
    _, err = run(f"safepool.ProcessPool(1, {words})", tmp_path, status=1)

    assert err.splitlines()[-1] == f"ValueError: {said}"


def test_run_is_an_error_where_there_is_no_script(tmp_path: Path) -> None:
    _, err = run("", tmp_path, "-c", TOP + "safepool.ProcessPool(1, main='run')", status=1)

    assert "no script: the program was given by -c or standard input" in err
    assert 'Leave main= out, or pass main="value"' in err
