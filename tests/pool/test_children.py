"""Children of ``multiprocessing`` make pools: their ``__main__`` is ``__mp_main__``."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from support_processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

# What a child does: the expression, and what it gives.
ASKED: dict[str, tuple[str, str]] = {
    "a function": ("pool.submit(work, 1).result()", "2"),
    "a method": ("pool.submit(Point(3).get).result()", "(3, 'of the child')"),
    "an instance and back": ("type(pool.submit(move, Point(1)).result()) is Point", "True"),
    "a lambda with both": (
        "pool.submit(lambda p: (isinstance(p, Point), move(p).get()), Point(1)).result()",
        "(True, (2, 'of the child'))",
    ),
    "a map": ("list(pool.map(work, range(3)))", "[1, 2, 3]"),
    "an exception": ("caught(pool)", "Wrong('no')"),
    "a decorated function": ("pool.submit(decorated, 2).result()", "4"),
    "a decorated method": ("pool.submit(Point(5).double).result()", "10"),
    "decorated inline": ("pool.submit(safepool.worker(work, timeout=60), 1).result()", "2"),
    "joblib": ("by_joblib()", "[(0, True), (1, True), (2, True)]"),
}

PROGRAM = """
import multiprocessing, sys
import safepool
DATA = "of the program"
class Point:
    def __init__(self, x):
        self.x = x
    def get(self):
        return self.x, DATA
    @safepool.worker
    def double(self):
        return 2 * self.x
class Wrong(Exception):
    pass
def work(x):
    return x + 1
def move(point):
    return Point(point.x + 1)
def fail():
    raise Wrong("no")
@safepool.worker
def decorated(x):
    return 2 * x
def caught(pool):
    try:
        pool.submit(fail).result()
    except Wrong as error:
        return repr(error)
def seen(point):
    return point.x, isinstance(point, Point)
def by_joblib():
    from joblib import Parallel, delayed
    with safepool.parallel_backend(n_jobs=2):
        return Parallel()(delayed(seen)(Point(x)) for x in range(3))
def child(main, asked):
    global DATA
    DATA = "of the child"
    with safepool.ProcessPool(1, main=main) as pool:
        for expression in asked:
            print(eval(expression, globals(), {"pool": pool}), flush=True)
if __name__ == "__main__":
    method, main, *asked = sys.argv[1:]
    process = multiprocessing.get_context(method).Process(target=child, args=(main, asked))
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("main", ["run", "value"])
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("way", ["script", "module"])
def test_functions_of_the_script_work_in_a_pool_of_a_child(
    way: str, method: str, main: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["program.py"] if way == "script" else ["-m", "program"]
    asked = [expression for expression, _ in ASKED.values()]
    done = run_python(*command, method, main, *asked, cwd=tmp_path)

    assert (done.stderr, done.returncode) == ("", 0)
    told = dict(zip(ASKED, done.stdout.splitlines(), strict=True))
    assert told == {name: expected for name, (_, expected) in ASKED.items()}


def test_a_worker_makes_a_pool(tmp_path: Path) -> None:
    """It is such a child as well, whichever way it has the script."""
    program = """
    import safepool
    DATA = "of the program"
    class Point:
        pass
    def look(point):
        return type(point) is Point, DATA
    def nest():
        with safepool.ProcessPool(1) as pool:
            return pool.submit(look, Point()).result()
    if __name__ == "__main__":
        DATA = "of main"
        for main in ("run", "value"):
            with safepool.ProcessPool(1, main=main) as pool:
                print(pool.submit(nest).result())
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = run_python("program.py", cwd=tmp_path)

    assert (done.stdout, done.stderr) == ("(True, 'of main')\n" * 2, "")
