"""A guarded script runs once in the fork server: what its top level makes is in every worker."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import threading
import zipfile
from typing import TYPE_CHECKING

import pytest
from support_processes import run_python, still_alive, terminal

from safepool.workers.plan import guarded_lines

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
    "runpy": ["-c", "import runpy; runpy.run_path('program.py', run_name='__main__')"],
    "-m cProfile": ["-m", "cProfile", "-o", "profile", "program.py"],
    "-m cProfile -m": ["-m", "cProfile", "-o", "profile", "-m", "program"],
    "-m trace": ["-m", "trace", "--count", "-C", "counts", "program.py"],
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


def test_a_script_from_a_named_pipe_is_not_read_again(tmp_path: Path) -> None:
    """To open the pipe a second time would wait for a writer without end."""
    text = """
    def double(x):
        return x * 2
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(double, 3).result())
    """
    pipe = tmp_path / "program"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(TOP + textwrap.dedent(text),))
    writer.start()
    done = run_python("program", cwd=tmp_path)
    writer.join()

    assert done.stdout == "6\n", done.stderr


@pytest.mark.parametrize("when", ["first", "again"])
def test_a_server_that_is_killed_while_it_runs_the_script_is_no_fault_of_it(
    when: str, tmp_path: Path
) -> None:
    """Neither before the pool has a worker nor when it needs another: the script is run again."""
    program = """
    import signal
    if __name__ != "__main__" and os.path.exists("kill"):
        os.unlink("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    def look():
        return __name__, os.getppid()
    if __name__ == "__main__":
        with open("kill", "w"):
            pass
        with safepool.ProcessPool(1, max_tasks_per_child=1) as pool:
            name, server = pool.submit(look).result()
            if sys.argv[1:] == ["again"]:
                with open("kill", "w"):
                    pass
                os.kill(server, signal.SIGKILL)
            print(name, *{pool.submit(look).result()[0] for _ in range(3)})
    """
    out, err = run(program, tmp_path, "program.py", *[when][when == "first" :])

    assert out == "__mp_main__ __mp_main__\n", err
    assert "by value" not in err
    assert runs(tmp_path) == ("PSS" if when == "first" else "PSSSS")


def test_a_pool_with_calls_by_name_waits_for_a_server_that_can_run_the_script(
    tmp_path: Path,
) -> None:
    """Workers without the script lack the names, however many servers were killed over it."""
    program = """
    import signal
    if __name__ != "__main__" and os.path.exists("kill"):
        os.truncate("kill", left := os.path.getsize("kill") - 1)
        if not left:
            os.unlink("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    def look():
        return __name__, os.getppid()
    if __name__ == "__main__":
        with safepool.ProcessPool(1, max_tasks_per_child=1) as pool:
            name, server = pool.submit(look).result()
            with open("kill", "w") as file:
                file.write("kkk")
            os.kill(server, signal.SIGKILL)
            print(name, *{pool.submit(look).result()[0] for _ in range(3)})
    """
    out, err = run(program, tmp_path, "program.py")

    assert out == "__mp_main__ __mp_main__\n", err
    assert "by value" not in err


# One row per way in which a top level fails: the code, what the error tells, and the last line of
# the traceback that is its cause.
FAILS: dict[str, tuple[str, str, str]] = {
    "raises": (
        "json.loads('no')",
        "of its top level raises JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    ),
    "exits": ("sys.exit(3)", "of its top level raises SystemExit: 3", "SystemExit: 3"),
    "is interrupted": (
        "raise KeyboardInterrupt('c')",
        "of its top level raises KeyboardInterrupt: c",
        "KeyboardInterrupt: c",
    ),
    "kills its process": ("os._exit(7)", "the fork server ended with exit code 7", ""),
}

# Prints the error of each call, and the causes of the first.
TELL_ERRORS = """
    def tell(calls):
        errors = [call.exception() for call in calls]
        print(len({str(error) for error in errors}), repr(errors[0]))
        print(repr(errors[0].__cause__), "".join(traceback.format_exception(errors[0])))
"""


@pytest.mark.parametrize("what", FAILS)
def test_a_top_level_that_fails_when_it_is_run_again_breaks_a_pool_without_workers(
    what: str, tmp_path: Path
) -> None:
    """Its calls refer to names that only a run makes. It is run three times, and not on and on."""
    code, reason, last = FAILS[what]
    program = f"""
    import json, signal, traceback
    if __name__ != "__main__" and os.path.exists("fail"):
        {code}
    {TELL_ERRORS}
    if __name__ == "__main__":
        with safepool.ProcessPool(2, max_tasks_per_child=1) as pool:
            server = pool.submit(os.getppid).result()
            pool.submit(tell, [1]).exception()
            open("fail", "w").close()
            os.kill(server, signal.SIGKILL)
            tell([pool.submit(tell, []) for _ in range(5)])
    """
    out, err = run(program, tmp_path)

    told, trace = out.split("\n", 1)
    assert told.startswith("1 PoolBrokenError("), err
    assert reason in told
    assert "Move work that workers do not need below" in told
    assert 'or pass main="value"' in told
    assert f"\n{last}\n" in trace
    assert (", in <module>" in trace) is bool(last)
    assert "script.py" not in trace  # no frame of the package's own
    assert runs(tmp_path) == "PSSSS"


def test_a_top_level_that_fails_twice_when_it_is_run_again_is_run_a_third_time(
    tmp_path: Path,
) -> None:
    program = """
    import signal
    if __name__ != "__main__" and os.path.exists("fail-1"):
        os.unlink("fail-2" if os.path.exists("fail-2") else "fail-1")
        raise RuntimeError
    def look():
        return __name__, os.getppid()
    if __name__ == "__main__":
        with safepool.ProcessPool(1, max_tasks_per_child=1) as pool:
            name, server = pool.submit(look).result()
            for file in ("fail-1", "fail-2"):
                open(file, "w").close()
            os.kill(server, signal.SIGKILL)
            print(name, *{pool.submit(look).result()[0] for _ in range(3)})
    """
    out, err = run(program, tmp_path)

    assert out == "__mp_main__ __mp_main__\n", err
    assert runs(tmp_path) == "PSSSS"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("what", FAILS)
def test_workers_of_the_standard_library_that_end_with_the_script_tell_its_error(
    what: str, method: str, tmp_path: Path
) -> None:
    """Each of two pools: the second knows it from the first.

    From Python 3.14 on it is the fork server that ends: it runs the script before it forks.
    """
    code, reason, last = FAILS[what]
    program = f"""
    import json, traceback
    if __name__ != "__main__":
        {code}
    {TELL_ERRORS}
    if __name__ == "__main__":
        for _ in range(2):
            with safepool.ProcessPool(2, {method!r}) as pool:
                tell([pool.submit(abs, 1)])
    """
    out, err = run(program, tmp_path)

    pools = out.split("1 PoolBrokenError(")[1:]
    assert len(pools) == 2, err
    for told, trace in (pool.split("\n", 1) for pool in pools):
        assert (
            "3 workers in a row died before they ran a task" in told
            or "cannot start a worker: each worker runs" in told
        )
        assert reason in told
        assert "or leave mp_context= out" in told
        assert f"\n{last}\n" in trace


@pytest.mark.parametrize("main", ["run", "value"])
def test_defaults_code_and_dispatch_that_the_program_has_set_reach_workers(
    main: str, tmp_path: Path
) -> None:
    """Set below the guard, before a call; workers that ran the script have what it set itself."""
    program = f"""
    import functools, time
    def plain(x, y=1):
        return x + y
    def named(*, z=1):
        return z
    def coded():
        return "old"
    def born(when=time.time_ns()):
        return when
    @functools.singledispatch
    def shown(x):
        return "any"
    class Point:
        def far(self, y=1):
            return y
    def call():
        return plain(0), named(), coded(), born(), shown(1), shown(""), Point().far()
    if __name__ == "__main__":
        plain.__defaults__, Point.far.__defaults__, named.__kwdefaults__ = (2,), (3,), {{"z": 4}}
        coded.__code__ = (lambda: "new").__code__
        shown.register(int, lambda x: "int")
        expected = call()
        with safepool.ProcessPool(1, main={main!r}) as pool:
            print(*expected, pool.submit(call).result() == expected)
            print(pool.submit(plain, 1).result(), pool.submit(shown, 1).result())
    """
    out, err = run(program, tmp_path)

    told, alone = out.splitlines()
    assert told.startswith("2 4 new "), err
    assert told.endswith(" int any 3 True")
    assert alone == "3 int"


def test_two_pools_share_the_run_and_one_by_value_has_none(tmp_path: Path) -> None:
    program = """
    def look():
        return sys.modules["__main__"].__name__
    if __name__ == "__main__":
        for main in ("run", "auto", "value", "run"):
            with safepool.ProcessPool(1, main=main) as pool:
                print(pool.submit(look).result())
    """
    out, _ = run(program, tmp_path)

    assert out.split() == ["__mp_main__", "__mp_main__", "__main__", "__mp_main__"]
    assert runs(tmp_path) == "PS"


def test_a_method_of_a_global_as_initializer_changes_the_workers_own(tmp_path: Path) -> None:
    """As in a fork: not a copy that nothing else knows."""
    program = """
    import functools
    class Settings:
        def __init__(self):
            self.values = {}
        def load(self, name):
            self.values[name] = 1
    cache, seen, settings = {}, [], Settings()
    def look():
        return cache, seen, settings.values
    if __name__ == "__main__":
        for main in ("run", "value"):
            for initializer in (
                functools.partial(cache.update, a=1),
                functools.partial(seen.append, 2),
                functools.partial(settings.load, "b"),
            ):
                with safepool.ProcessPool(1, main=main, initializer=initializer) as pool:
                    print(*pool.submit(look).result())
    """
    out, err = run(program, tmp_path)

    assert out.splitlines() == 2 * ["{'a': 1} [] {}", "{} [2] {}", "{} [] {'b': 1}"], err


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
        "it starts threads that do not end",
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
    "asks for a pool in a thread, and goes on": (
        """
        import threading
        if __name__ != "__main__":
            thread = threading.Thread(target=safepool.ProcessPool(1).submit, args=(int,))
            thread.start()
            thread.join()
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
            print(pool)
        """
    )
    out, _ = run(program, tmp_path)
    told, *answers, because = out.splitlines()

    assert answers == ["6", "6"]
    assert "is not run in the fork server: " in told
    assert reason in told
    assert "main='value' (" in because
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
    "no such value": (
        "main='spawn'",
        'main must be "auto", "run" or "value", not \'spawn\'. Leave it out for "auto"',
    ),
    "both": (
        "main='value', preload=['__main__']",
        (
            'preload names "__main__", which means main="run", and main="value" contradicts it: '
            "leave one of them out"
        ),
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


# One row per thing that the program changes below the guard: how, what its workers look at, and
# what they find. In front of the guard stands BEFORE.
BEFORE = """
import functools, threading
def wrapped(function):
    return functools.wraps(function)(lambda *args: function(*args))
def again(kind):
    return functools.wraps(kind, updated=())(type("again", (kind,), {}))
def tagged(tags):
    return lambda function: functools.wraps(function)(lambda *args: tags[0])
def times(count):
    return lambda function: functools.wraps(function)(lambda *args: count * function(*args))
DATA = None
SETTINGS = {"a": 1}
LOCK = threading.Lock()
class Meta(type):
    def __setattr__(cls, name, value):
        raise TypeError(name)
    def of_meta(cls): return "own"
class Guarded(metaclass=Meta):
    level = 1
class Base:
    def inherited(self): return "own"
class Config(Base):
    debug = False
    table = [1]
    registry = {}
    def method(self):
        return "own"
    class Inner:
        level = 1
        def method(self):
            return "inner"
    @staticmethod
    def static(): return "own"
    @classmethod
    def of_class(cls): return "own"
    @property
    def value(self): return "own"
    @value.setter
    def value(self, new): self.__dict__["value"] = new
    @functools.cached_property
    def cached(self): return "own"
    def part(self, x=0): return x
    partial = functools.partialmethod(part, x=1)
    @wrapped
    def outside(self): return "own"
    @times(2)
    def multiplied(self): return 1
    @tagged(["own"])
    def tagged(self): return None
    @property
    @wrapped
    def decorated(self): return "own"
    @functools.lru_cache
    def remembered(self): return "own"
    @functools.singledispatchmethod
    def shown(self, x): return "own"
made = Config()
def work(x):
    return x
@wrapped
def around(x):
    return x
@wrapped
@wrapped
def twice(x):
    return x
@functools.lru_cache
def remembered(x):
    return x
@functools.singledispatch
def show(x):
    return "own"
"""
# One row per function in an object that stands for it.
INNER = [
    "Config.static",
    "Config.of_class.__func__",
    "Config.value.fget",
    "Config.value.fset",
    "Config.cached",
    "Config.cached.func",
    "vars(Config)['static']",
    "vars(Config)['partial'].func",
    "Config.outside",
    "Config.outside.__wrapped__",
    "Config.decorated.fget",
    "Config.decorated.fget.__wrapped__",
    "Config.remembered",
    "Config.remembered.__wrapped__",
    "vars(Config)['shown'].func",
    "around",
    "around.__wrapped__",
    "twice.__wrapped__",
    "twice.__wrapped__.__wrapped__",
    "remembered.__wrapped__",
    "show",
]
CHANGES: dict[str, tuple[str, str, str]] = {
    "a global": ("global DATA; DATA = [1, 2]", "DATA", "[1, 2]"),
    "a global in place": ("SETTINGS['b'] = 2", "SETTINGS", "{'a': 1, 'b': 2}"),
    "a global that is new": ("global NEW; NEW = (3, DATA)", "NEW", "(3, None)"),
    "nothing that can be pickled": ("LOCK.acquire()", "LOCK.locked()", "False"),
    "a registry of a class": ("Config.registry['a'] = 1", "Config.registry", "{'a': 1}"),
    "an attribute of a class": ("Config.debug = True", "Config.debug", "True"),
    "an attribute of a class, in place": ("Config.table.append(2)", "Config.table", "[1, 2]"),
    "an attribute of a function": ("work.table = {1: 2}", "work.table", "{1: 2}"),
    "an attribute of a class in a class": ("Config.Inner.level = 2", "Config.Inner.level", "2"),
    "an attribute of a method": ("Config.method.mark = 3", "Config.method.mark", "3"),
    "a method of a class in a class": (
        "Config.Inner.method = lambda self: 'new'",
        "Config.Inner().method()",
        "new",
    ),
    **{f"an attribute of {one}": (f"{one}.mark = [4]", f"{one}.mark", "[4]") for one in INNER},
    "a method": ("Config.method = lambda self: 'new'", "Config().method()", "new"),
    "a method that Python calls": ("Config.__len__ = lambda self: 7", "len(Config())", "7"),
    "a method around it": (
        "Config.method = functools.wraps(Config.method)(lambda self: 'new')",
        "Config().method()",
        "new",
    ),
    "a method of its base": ("Base.inherited = lambda self: 'new'", "Config().inherited()", "new"),
    "an attribute of its base": ("Base.level = 2", "Config.level", "2"),
    "a method of its metaclass": (
        "type.__setattr__(Meta, 'of_meta', lambda cls: 'new')",
        "Guarded.of_meta()",
        "new",
    ),
    "an attribute that its metaclass guards": (
        "type.__setattr__(Guarded, 'level', 2)",
        "Guarded.level",
        "2",
    ),
    "a decorator with another argument": (
        "Config.multiplied = times(3)(Config.multiplied)",
        "Config().multiplied()",
        "6",
    ),
    "a property around it": (
        "Config.value = property(functools.wraps(Config.value.fget)(lambda self: 'new'))",
        "Config().value",
        "new",
    ),
    "None for a method that Python calls": (
        "Config.__iter__ = None",
        "vars(Config).get('__iter__', 1)",
        "None",
    ),
    "a registry of a function": (
        "work.registry = {}; work.registry['a'] = 1",
        "work.registry",
        "{'a': 1}",
    ),
    "all attributes of a function": ("work.__dict__ = {'mark': 1}", "work.mark", "1"),
    "a method that is new, of its own name": (
        """def extra(self): return "new"
    extra.__qualname__ = "Config.extra"
    Config.extra = extra""",
        "Config().extra()",
        "new",
    ),
    "a method that is deleted": ("del Config.method", "hasattr(Config, 'method')", "False"),
    "a method that is set again": (
        "own = Config.method; del Config.method; Config.method = own",
        "Config().method()",
        "own",
    ),
    "an inner class that is deleted": ("del Config.Inner", "hasattr(Config, 'Inner')", "False"),
    "a static method": ("Config.static = staticmethod(lambda: 'new')", "Config.static()", "new"),
    "a class method": (
        "Config.of_class = classmethod(lambda cls: 'new')",
        "Config.of_class()",
        "new",
    ),
    "a property": ("Config.value = property(lambda self: 'new')", "Config().value", "new"),
    "a setter": (
        "Config.value = Config.value.setter(lambda self, new: None)",
        "Config.value.fset.__name__",
        "<lambda>",
    ),
    "a cached property": (
        """Config.cached = functools.cached_property(lambda self: 'new')
    Config.cached.__set_name__(Config, 'cached')""",
        "Config().cached",
        "new",
    ),
    "a partial method": (
        "Config.partial = functools.partialmethod(Config.part, x=2)",
        "Config().partial()",
        "2",
    ),
    "a cache": (
        "Config.remembered = functools.lru_cache(lambda self: 'new')",
        "Config().remembered()",
        "new",
    ),
    "a function": ("global work; work = lambda x: 'new'", "work(1)", "new"),
    "a function of the same name": (
        "global work\n    def work(x): return 'new'\n    work.__qualname__ = 'work'",
        "work(1)",
        "new",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_program_s_present_values_are_those_of_the_workers(
    change: str, tmp_path: Path
) -> None:
    """Programs that were written for fork load their data below the guard."""
    deed, look, expected = CHANGES[change]
    program = f"""{BEFORE}
def inner():
    return {look}
def outer(x):
    assert isinstance(made, Config), "the class is another one"
    return str(inner())
def main():
    {deed}
    with safepool.ProcessPool(1) as pool:
        print(pool.submit(outer, 1).result(), *pool.map(outer, [1]), sep="|")
        print(pool.submit(lambda: str(inner())).result())
        print(pool._mp_context.plan.mode)
if __name__ == "__main__":
    main()
"""
    out, _ = run(program, tmp_path)

    assert out.splitlines() == [f"{expected}|{expected}", expected, "run"]


# One function inside another object stands for all of these.
AFTER_A_CALL = {one: row for one, row in CHANGES.items() if not one.endswith(tuple(INNER[1:]))} | {
    "a decorator with another list": (
        "Config.tagged = tagged(['new'])(Config.tagged.__wrapped__)",
        "Config().tagged()",
        "new",
    ),
    "a decorated class of the same name": (
        "global Base; Base = again(Base)",
        "len(Base.__mro__)",
        "3",
    ),
    "an attribute that is deleted": ("del Config.debug", "hasattr(Config, 'debug')", "False"),
    "a global that is deleted": (
        "global DATA; del DATA",
        "[name for name in [lambda: DATA][0].__code__.co_names if name in globals()]",
        "[]",
    ),
}


@pytest.mark.parametrize("change", AFTER_A_CALL)
def test_what_the_program_changes_after_a_call_reaches_the_workers(
    change: str, tmp_path: Path
) -> None:
    deed, look, expected = AFTER_A_CALL[change]
    program = f"""{BEFORE}
def inner():
    return {look}
def outer(x):
    assert isinstance(made, Config), "the class is another one"
    return str(inner())
def main():
    pool = safepool.ProcessPool(1)
    pool.submit(outer, 1).exception()
    {deed}
    print(pool.submit(outer, 1).result(), *pool.map(outer, [1]), sep="|")
    pool.shutdown()
if __name__ == "__main__":
    main()
"""
    out, _ = run(program, tmp_path)

    assert out == f"{expected}|{expected}\n"


def test_a_class_stays_the_same_if_the_program_sets_an_attribute_after_a_call(
    tmp_path: Path,
) -> None:
    """Objects that the script has made in the worker are still of it."""
    program = """
    class Config:
        @classmethod
        def make(cls): return cls()
        def method(self): pass
    made = Config.make()
    def look(): return isinstance(made, Config), vars(Config).get("new")
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(look).result())
            Config.new = 1
            print(pool.submit(look).result())
            Config.method.new = Config.make.__func__.new = 1
            print(pool.submit(look).result())
            Config.new = 2
            print(pool.submit(look).result())
            del Config.new, Config.method.new
            print(pool.submit(look).result())
    """
    out, _ = run(program, tmp_path)

    told = ["(True, None)", "(True, 1)", "(True, 1)", "(True, 2)", "(True, None)"]
    assert out.splitlines() == told


def test_names_that_the_program_has_deleted_cost_no_later_call(tmp_path: Path) -> None:
    """In Python's own calls: a class may get and lose attributes for as long as the pool lives."""
    program = """
    class Config: pass
    def look(): return sorted(name for name in vars(Config) if name[0] != "_")
    def cost(pool):
        calls, alone = [], False
        while not alone:
            calls.clear()
            sys.setprofile(lambda frame, event, _: event == "call" and calls.append(1))
            future = pool.submit(look)
            alone = "_turn" in vars(future)
            future.result()
            sys.setprofile(None)
        return len(calls)
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            pool.submit(look).result()
            before = cost(pool)
            for number in range(40):
                setattr(Config, f"a{number}", 1)
                pool.submit(look).result()
                delattr(Config, f"a{number}")
            print(pool.submit(look).result(), cost(pool) - before < 40)
    """
    out, _ = run(program, tmp_path)

    assert out == "[] True\n"


def test_an_attribute_that_is_gone_while_others_are_pickled_comes_back(tmp_path: Path) -> None:
    """As another thread may change the class at any time."""
    program = """
    class Deletes:
        def __reduce__(self):
            if self.__dict__.pop("armed", None):
                del Config.level
            return str, ()
    class Config: pass
    def look(): return [getattr(Config, name, None) for name in ("deletes", "level")]
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            Config.level = 1
            print(pool.submit(look).result())
            Config.deletes = Deletes()
            Config.deletes.armed = True
            print(pool.submit(look).result()[:1])  # with or without the other
            Config.level = 1
            print(pool.submit(look).result())
    """
    out, _ = run(program, tmp_path)

    assert out == "[None, 1]\n['']\n['', 1]\n"


def test_an_attribute_is_deleted_nowhere_else(tmp_path: Path) -> None:
    """Not the global of its name, if a task has deleted the class in its worker."""
    program = """
    level = 5
    class Config:
        level = 1
    def forget():
        global Config
        del Config
    def look(): return level, "Config" in globals() and Config.level
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(look).result())
            pool.submit(forget).result()
            del Config.level
            print(pool.submit(look).result())
    """
    out, _ = run(program, tmp_path)

    assert out == "(5, 1)\n(5, False)\n"


def test_what_a_decorator_keeps_is_not_pickled_with_each_call(tmp_path: Path) -> None:
    """No function below a decorator is taken for one that the program has set."""
    program = """
    import functools
    class Kept:
        def __reduce__(self):
            print("pickled")
            return Kept, ()
    def keeping(function):
        kept = Kept()
        @functools.wraps(function)
        def around(*args):
            return function(*args) if kept else None
        return around
    class Config:
        @staticmethod
        @keeping
        def static(): return 1
        @property
        @keeping
        def value(self): return 2
        @classmethod
        @keeping
        def of_class(cls): return 3
    @keeping
    @keeping
    def twice(): return 4
    def look(): return Config.static(), Config().value, Config.of_class(), twice()
    if __name__ == "__main__":
        with safepool.ProcessPool(1) as pool:
            print(*(pool.submit(look).result() for _ in range(2)))
    """
    out, _ = run(program, tmp_path)

    assert out == "(1, 2, 3, 4) (1, 2, 3, 4)\n"


def test_a_class_is_the_same_whichever_way_it_comes(tmp_path: Path) -> None:
    """By name, as an instance, in a closure, in an exception, with an attribute that was set."""
    program = """
    class Base: pass
    class Point(Base):
        class Inner: pass
        kind = 0
    class Wrong(Exception): pass
    def fail(point):
        raise Wrong(point)
    def classes(point, kind, inner):
        return (
            type(point) is Point is kind, isinstance(point, Base), type(inner) is Point.Inner,
            Point.kind,
        )
    if __name__ == "__main__":
        Point.kind = 5
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(classes, Point(), Point, Point.Inner()).result())
            again = lambda *things: classes(*things)
            print(pool.submit(again, Point(), Point, Point.Inner()).result())
            print(pool.submit(lambda: Point).result() is Point)
            try:
                pool.submit(fail, Point()).result()
            except Wrong as error:
                print(type(error.args[0]) is Point)
    """
    out, _ = run(program, tmp_path)

    row = "(True, True, True, 5)"
    assert out.splitlines() == [row, row, "True", "True"]


def test_the_script_finds_itself_in_a_child_of_the_program(tmp_path: Path) -> None:
    """As under the standard library's spawn, before its first line is run."""
    program = """
    import ctypes, json, multiprocessing
    def seen():
        parent = multiprocessing.parent_process()
        return {
            "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "file": __file__,
            "threads": os.environ.get("OMP_NUM_THREADS"), "parent": parent and parent.pid,
            "main": sys.modules["__main__"].__name__, "input": sys.stdin.read(),
            "process": multiprocessing.current_process().name,
        }
    os.environ["OMP_NUM_THREADS"] = "7"
    with open(f"{os.environ['FOLDER']}/{__name__}.json", "w") as file:
        json.dump(seen(), file)
    print("printed by Python")
    ctypes.CDLL(None).puts(b"printed by C")
    print("an error", file=sys.stderr)
    if __name__ == "__main__":
        with safepool.ProcessPool(2) as pool:
            list(pool.map(int, range(100)))
    """
    out, err = run(program, tmp_path, "program.py", "--with", "arguments")
    mine = json.loads((tmp_path / "__main__.json").read_text())
    theirs = json.loads((tmp_path / "__mp_main__.json").read_text())

    for name in ("argv", "path", "cwd", "file", "input"):
        assert theirs[name] == mine[name]
    assert (mine["threads"], theirs["threads"]) == ("7", "1")
    assert (mine["parent"], theirs["main"]) == (None, "__mp_main__")
    assert theirs["parent"] is not None
    assert theirs["process"] != "MainProcess"
    assert sorted(out.splitlines()) == ["printed by C", "printed by Python"]
    assert err == "an error\n"


def test_what_is_to_be_done_at_the_exit_is_done_once_and_by_no_worker(tmp_path: Path) -> None:
    """A worker that ends would remove the folder that all of them use."""
    program = """
    import atexit, shutil, tempfile
    kept = tempfile.TemporaryDirectory(dir=os.environ["FOLDER"])
    made = tempfile.mkdtemp(dir=os.environ["FOLDER"])
    @atexit.register
    def end():
        shutil.rmtree(made)
        with open(os.path.join(os.environ["FOLDER"], "ends"), "a") as ends:
            ends.write("P" if __name__ == "__main__" else "S")
    def look():
        return os.path.isdir(kept.name)
    if __name__ == "__main__":
        with safepool.ProcessPool(1, max_tasks_per_child=1) as pool:
            print([pool.submit(look).result() for _ in range(3)])
    """
    # An interpreter of its own: what is registered first is done last.
    out, err = run(program, tmp_path, "-u", "program.py")

    assert (out, err) == ("[True, True, True]\n", "")
    assert (tmp_path / "ends").read_text() == "SP"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_a_library_of_the_script_is_imported_once_for_all_workers(tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text(
        "import os\nwith open(os.environ['FOLDER'] + '/imports', 'a') as f: f.write('i')\n"
    )
    program = """
    import heavy, time
    def use(x):
        time.sleep(0.01)
        return heavy.os.getpid()
    if __name__ == "__main__":
        with safepool.ProcessPool(3, max_tasks_per_child=2) as pool:
            print(len(set(pool.map(use, range(12), chunksize=1))) > 3)
    """
    out, _ = run(program, tmp_path)

    assert out == "True\n"
    assert (tmp_path / "imports").read_text() == "ii"  # the program, and the server


def test_a_long_top_level_is_told_with_its_seconds_and_the_remedy(tmp_path: Path) -> None:
    program = """
    import logging
    if __name__ == "__main__":
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        from safepool.workers import asking
        asking._LONG_RUN_S = 0.0
        with safepool.ProcessPool(1) as pool:
            pool.submit(int).result()
    """
    out, _ = run(program, tmp_path)

    assert re.search(r"the top level of \S+program.py took [\d.]+ s in the fork server", out)
    assert 'Move work that workers do not need below if __name__ == "__main__":' in out


def test_a_top_level_that_waits_for_the_program_is_told_of_and_given_up(tmp_path: Path) -> None:
    program = """
    import fcntl, logging
    lock = open(os.path.join(os.environ["FOLDER"], "lock"), "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    def work():
        return 3
    if __name__ == "__main__":
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        from safepool.workers import asking
        asking._WAITING_S, asking._RUN_S = 0.0, 0.3
        with safepool.ProcessPool(1) as pool:
            print(pool.submit(work).result())
    """
    out, _ = run(program, tmp_path)
    waits, given_up, result = out.splitlines()

    assert "has been running in the fork server for 0 s" in waits
    assert "is not run in the fork server: its top level takes longer than" in given_up
    assert result == "3"


# An agent has threads in every interpreter, so that no server can be forked.
AGENT = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True, name="agent").start()
"""
UNDER_THE_AGENT = (
    "import os, sys; os.environ['PYTHONPATH'] = os.environ['FOLDER'];"
    "os.execv(sys.executable, [sys.executable, 'program.py'])"
)


def test_a_worker_that_is_started_afresh_runs_the_script_itself(tmp_path: Path) -> None:
    """As a standard worker does by spawn: once, and with the code that the program has."""
    (tmp_path / "sitecustomize.py").write_text(AGENT)
    program = """
    import collections, logging, tempfile
    folder = tempfile.TemporaryDirectory(dir=os.environ["FOLDER"], prefix="made-")
    log = logging.getLogger(__name__)
    class Point:
        pass
    class Client:
        def __reduce__(self):
            raise TypeError("cannot be pickled")
    collections.MINE = Point
    client, factor, table = Client(), 2, {}
    def begin():
        table["begun"] = os.getpid()
    def work(point):
        known = type(point) is Point is collections.MINE and type(client) is Client
        same = log is logging.getLogger(__name__) is logging.getLogger("__main__")
        return __name__, known, same, table["begun"] == os.getpid(), os.path.isdir(folder.name)
    def multiply(x):
        return factor * x
    if __name__ == "__main__":
        logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
        factor = 3
        for _ in range(2):
            with safepool.ProcessPool(1, initializer=begin) as pool:
                print(pool.submit(work, Point()).result(), pool.submit(multiply, 2).result())
            with open(__file__, "w") as file:
                file.write("no Python")
    """
    out, err = run(program, tmp_path, "-c", UNDER_THE_AGENT)
    told, *results = out.splitlines()

    assert (err, told[:26]) == ("", "no fork server can be used")
    assert results == ["('__mp_main__', True, True, True, True) 6"] * 2
    assert runs(tmp_path) == "PSSS"  # one that tells what workers have, and two workers
    assert not [*tmp_path.glob("made-*")]


def test_a_script_that_cannot_be_run_afresh_is_told_once_and_sent_by_value(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AGENT)
    program = """
    import logging
    factor = 2
    def work(x):
        return factor * x
    if __name__ == "__main__":
        logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
        factor = 3
        for _ in range(2):
            with safepool.ProcessPool(1) as pool:
                print(pool.submit(work, 2).result())
    else:
        raise RuntimeError("not here")
    """
    out, _ = run(program, tmp_path, "-c", UNDER_THE_AGENT)
    afresh, told, *results = out.splitlines()

    assert afresh.startswith("no fork server can be used")
    assert "top level raises RuntimeError: not here. Its functions travel" in told
    assert results == ["6", "6"]
    assert runs(tmp_path) == "PS"


def test_workers_of_the_standard_library_have_the_script_by_name(tmp_path: Path) -> None:
    """They run it themselves: what it has registered is what tasks find there."""
    program = """
    import collections, threading
    class Point:
        pass
    collections.MINE, lock, table, factor = Point, threading.Lock(), {}, None
    def begin():
        table["begun"] = os.getpid()
    def work(point):
        with lock:
            known = type(point) is Point is collections.MINE
            return known, table["begun"] == os.getpid(), factor, Point()
    if __name__ == "__main__":
        factor = 3
        for method in ("spawn", "forkserver"):
            with safepool.ProcessPool(1, method, initializer=begin) as pool:
                *known, point = pool.submit(work, Point()).result()
                print(*known, type(point) is Point, pool.submit(lambda: factor + 1).result())
    """
    out, err = run(program, tmp_path)

    assert (out, err) == ("True True 3 True 4\n" * 2, "")


def test_threads_that_a_pool_asks_for_are_no_fault_of_the_script(tmp_path: Path) -> None:
    """A BLAS starts them when the script imports it. Another pool runs the script all the same."""
    pytest.importorskip("numpy")
    program = """
    import logging
    import numpy
    def look():
        return numpy.__name__
    if __name__ == "__main__":
        logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
        for threads in (2, 1):
            with safepool.ProcessPool(1, threads_per_worker=threads) as pool:
                print(pool.submit(look).result())
        print(pool._mp_context.plan.mode)
    """
    out, err = run(program, tmp_path)

    assert (out, err) == ("numpy\nnumpy\nrun\n", "")


# One row per way to give up a pool while its server runs a top level that never ends: what the
# program does then, and what it prints.
ENDLESS = """
import time
if __name__ != "__main__":
    open(os.path.join(os.environ["FOLDER"], "begun"), "w").close()
    time.sleep(1000)
def wait_for_the_run():
    while not os.path.exists(os.path.join(os.environ["FOLDER"], "begun")):
        time.sleep(0.01)
if __name__ == "__main__":
    from safepool.workers import forkserver
    pool = safepool.ProcessPool(1)
    future = pool.submit(wait_for_the_run)
    wait_for_the_run()
"""
GIVEN_UP: dict[str, tuple[str, str]] = {
    "shut down": ("pool.shutdown(cancel_futures=True); print(future.cancelled())", "True"),
    "terminated": (
        "pool.terminate_workers(); pool.shutdown(); print(future.cancelled(), pool.workers())",
        "True ()",
    ),
    "another by value works meanwhile": (
        """print(safepool.ProcessPool(1, main='value').submit(abs, -1).result())
    pool.shutdown(cancel_futures=True)""",
        "1",
    ),
}


@pytest.mark.parametrize("how", GIVEN_UP)
def test_a_pool_is_given_up_while_the_script_is_run(how: str, tmp_path: Path) -> None:
    then, expected = GIVEN_UP[how]
    out, err = run(ENDLESS + f"    {then}\n", tmp_path)

    assert (out, err) == (f"{expected}\n", "")


def test_ctrl_c_while_the_script_is_run(tmp_path: Path) -> None:
    code = TOP + ENDLESS + "    print('waiting', *forkserver.running(), flush=True)\n"
    with terminal(code + "    future.result()\n", cwd=tmp_path) as (script, screen):
        servers = [int(word) for word in screen.until("waiting")[-1].split()[1:]]
        assert servers
        screen.press(b"\x03")
        assert script.wait(30) != 0
        assert "KeyboardInterrupt" in "".join(screen.rest())
    assert still_alive(servers, after_s=5) == []


def test_a_script_whose_file_is_changed_while_it_runs(tmp_path: Path) -> None:
    """Another server runs the code that the first one has run, with the guard where it was."""
    program = """
    class Point:
        def get(self):
            return "old"
    def work():
        return Point().get(), Point
    if __name__ == "__main__":
        from safepool.workers import forkserver
        for text in ("old", "new"):
            with safepool.ProcessPool(1) as pool:
                got, kind = pool.submit(work).result()
                print(got, kind is Point, pool._mp_context.plan.mode)
            with open(__file__) as file:
                lines = file.read().replace('"' + 'old"', '"' + 'new"')
            with open(__file__, "w") as file:
                file.write("TOP = 'changed'\\n" * 30 + lines)
            forkserver.stop_all()
    """
    out, err = run(program, tmp_path)

    assert (out, err) == ("old True run\n" * 2, "")
    assert runs(tmp_path) == "PSS"


# One row per thing that a top level does to its process, and what a worker finds of it.
DEEDS: dict[str, tuple[str, str, str]] = {
    "clears the environment": (
        """
        kept = os.environ["FOLDER"]
        os.environ.clear()
        os.environ.update(FOLDER=kept, OMP_NUM_THREADS="9")
        """,
        "os.environ['OMP_NUM_THREADS']",
        "1",
    ),
    "a signal's handler": (
        "import signal\nsignal.signal(signal.SIGUSR1, print)",
        "signal.getsignal(signal.SIGUSR1) is print",
        "True",
    ),
    "takes the server's signal": (
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)",
        "signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN",
        "True",
    ),
    "a timeout of sockets": (
        "import socket\nsocket.setdefaulttimeout(0.01)",
        "(__import__('time').sleep(0.1), socket.getdefaulttimeout())[1]",
        "0.01",
    ),
    "warnings are errors": ("import warnings\nwarnings.simplefilter('error')", "1", "1"),
    "children that end": (
        """
        import subprocess
        subprocess.run(["true"])
        pid = os.fork()
        if pid == 0:
            raise SystemExit
        os.waitpid(pid, 0)
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        os.waitpid(pid, 0)
        """,
        "1",
        "1",
    ),
    "another stdout": (
        """
        import io
        class Tee(io.StringIO):
            pass
        if __name__ != "__main__":
            sys.stdout = Tee()
            print("kept")
        """,
        "sys.stdout.getvalue()",
        "kept\n",
    ),
    "another directory": ("os.chdir('/')", "os.getcwd()", "/"),
    "a shared array": (
        "np = __import__('numpy')\ndata = safepool.share(np.ones(3))",
        "(float(data.sum()), data.flags.writeable)",
        "(3.0, False)",
    ),
    "a module of its own": (
        "import types\nsys.modules['made'] = types.ModuleType('made')\nsys.modules['made'].x = 3",
        "__import__('made').x",
        "3",
    ),
    "a lock of multiprocessing": (
        "import multiprocessing\nlock = multiprocessing.Lock()\nqueue = multiprocessing.Queue()",
        "[lock.acquire(timeout=1), lock.release()][0]",
        "True",
    ),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_a_top_level_does_to_its_process_is_there_in_a_worker(
    deed: str, tmp_path: Path
) -> None:
    """And the server works all the same."""
    text, look, expected = DEEDS[deed]
    pytest.importorskip("numpy")
    program = (
        textwrap.dedent(text)
        + f"""
def look():
    return str({look})
if __name__ == "__main__":
    with safepool.ProcessPool(1, max_tasks_per_child=1) as pool:
        found = [pool.submit(look).result() for _ in range(2)]
        print(found == [{expected!r}] * 2 or found, pool._mp_context.plan.mode)
"""
    )
    out, err = run(program, tmp_path)

    assert (out, err) == ("True run\n", "")


def test_the_logger_of_the_script_is_the_one_that_the_program_knows(tmp_path: Path) -> None:
    """Its level, its own name in a filter of the worker, and those of the loggers below it."""
    program = """
    import logging
    log = logging.getLogger(__name__)
    below = logging.getLogger(f"{__name__}.below")
    seen = []
    def begin():
        log.addFilter(lambda record: seen.append(record.name) or True)
    def work():
        log.debug("wanted")
        below.debug("wanted")
        logging.getLogger(__name__).getChild("late").debug("wanted")
        known = log is logging.getLogger(__name__) is logging.getLogger("__main__")
        return known, below is log.getChild("below"), log.level, seen
    if __name__ == "__main__":
        logging.basicConfig(format="%(name)s %(message)s", stream=sys.stdout)
        logging.getLogger("__main__").setLevel(logging.DEBUG)
        with safepool.ProcessPool(1, initializer=begin) as pool:
            print(pool.submit(work).result())
    """
    out, err = run(program, tmp_path)

    assert (out.splitlines(), err) == (
        [
            "__main__ wanted",
            "__main__.below wanted",
            "__main__.late wanted",
            "(True, True, 10, ['__main__'])",
        ],
        "",
    )


def test_run_is_told_where_it_has_no_effect(tmp_path: Path) -> None:
    program = """
    def double(x):
        return 2 * x
    if __name__ == "__main__":
        with safepool.ProcessPool(1, "loky", main="run") as pool:
            print(pool.submit(double, 1).result())
    """
    out, err = run(program, tmp_path)

    assert out == "2\n"
    assert 'main="run" has no effect on workers that loky starts' in err


# One row per kind of guard, and what looks like one: the statement, and whether it is one.
GUARDS: dict[str, tuple[str, bool]] = {
    "plain": ("if __name__ == '__main__':\n    pass", True),
    "reversed": ("if '__main__' == __name__: pass", True),
    "and": ("if __name__ == '__main__' and True: pass", True),
    "or": ("if False or __name__ == '__main__': pass", True),
    "in": ("if __name__ in ('__main__', 'other'): pass", True),
    "not": ("if not __name__ == '__main__': pass", True),
    "unequal, with else": ("if __name__ != '__main__':\n    pass\nelse:\n    pass", True),
    "elif": ("if False: pass\nelif __name__ == '__main__': pass", True),
    "in try": ("try:\n    if __name__ == '__main__': pass\nfinally:\n    pass", True),
    "in except": ("try: pass\nexcept E:\n    if __name__ == '__main__': pass", True),
    "in with": ("with open('x'):\n    if __name__ == '__main__': pass", True),
    "match": ("match __name__:\n    case '__main__': pass", True),
    "expression": ("__name__ == '__main__' and main()", True),
    "conditional": ("main() if __name__ == '__main__' else None", True),
    "walrus": ("if (n := __name__) == '__main__': pass", True),
    "by the process": (
        "if multiprocessing.current_process().name == 'MainProcess': pass",
        True,
    ),
    "in a function": ("def f():\n    if __name__ == '__main__': pass", False),
    "in a class": ("class C:\n    if __name__ == '__main__': pass", False),
    "a value": ("name = 'a' if __name__ == '__main__' else __name__", False),
    "in a text": ("x = 'if __name__ == \"__main__\": pass'", False),
    "none": ("print(__name__)", False),
    "no Python": ("if __name__ == '__main__' print(", False),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_which_scripts_are_run(guard: str) -> None:
    source, expected = GUARDS[guard]
    assert bool(guarded_lines(source)) == expected
