"""The fork server learns: what tasks have imported of libraries, the next workers have ahead."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "linux":
    pytest.skip("there is a fork server on Linux only", allow_module_level=True)

# Of each program: "ahead" says of a new worker which of the names it has before it is asked.
HEAD = """
import logging, os, sys, time
sys.path[:0] = ["lib/site-packages", "lib"]
import safepool
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
ALL = ["installed", "installed.part", "installed._private", "other", "own", "colorsys"]
def loaded():
    return [name for name in ALL if name in sys.modules]
def late(*names):
    import importlib
    for name in names:
        importlib.import_module(name)
    return loaded()
def pool(**words):
    return safepool.ProcessPool(1, **{"main": "value", **words})
def ahead(**words):
    with pool(**words) as one:
        return one.submit(loaded).result()
def learn(*names, **words):
    with pool(**words) as one:
        return one.submit(late, *names).result()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an installed package, and a module of the program's own."""
    installed = tmp_path / "lib" / "site-packages" / "installed"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("NUMBER = 3\ndef function():\n    return 3\n")
    (installed / "part.py").write_text("from installed import _private\n")
    (installed / "_private.py").write_text("class Kind:\n    pass\n")
    (tmp_path / "lib" / "own.py").write_text("")
    return tmp_path


def run(folder: Path, text: str, **environment: str) -> list[str]:
    (folder / "script.py").write_text(HEAD + textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def install(folder: Path, text: str, name: str = "other") -> None:
    (folder / "lib" / "site-packages" / f"{name}.py").write_text(textwrap.dedent(text))


def test_what_a_task_has_imported_of_libraries_the_next_pool_has_ahead(folder: Path) -> None:
    """Of the program's own modules nothing is: to import them is to run its code."""
    lines = run(folder, "learn('installed.part', 'own', 'colorsys')\nprint(ahead())\n")

    assert lines == ["['installed', 'installed.part', 'installed._private', 'colorsys']"]


def test_a_worker_that_takes_the_place_of_another_has_it_ahead(folder: Path) -> None:
    lines = run(
        folder,
        """
        with pool(max_tasks_per_child=1) as one:
            one.submit(late, "installed.part").result()
            # The next may have been started before the last has told.
            while not (found := one.submit(loaded).result()):
                pass
            print(found)
        """,
    )

    assert lines == ["['installed', 'installed.part', 'installed._private']"]


def test_it_is_imported_once_and_before_anybody_asks(folder: Path) -> None:
    """A pool that ends lets the server import it, so the next one need not wait."""
    install(folder, "open('imports.txt', 'a').write(f'{__import__(\"os\").getppid()}\\n')\n")
    lines = run(
        folder,
        """
        print(learn("other"))
        while open("imports.txt").read().count("\\n") < 2:
            time.sleep(0.01)
        print([ahead() for _ in range(3)])
        print(*(int(line) == os.getpid() for line in open("imports.txt")))
        """,
    )

    assert lines == ["['other']", "[['other'], ['other'], ['other']]", "False True"]


def test_the_first_pool_has_what_the_program_has_imported(folder: Path) -> None:
    text = "def local():\n    import installed.part, own\nif __name__ == '__main__':\n"
    lines = run(folder, f"{text}    local()\n    print(ahead())\n    print(ahead(main='run'))")

    assert lines == ["['installed', 'installed.part', 'installed._private']"] * 2


# What the program's own modules refer to, in one way or another, and what a worker has ahead.
REFERENCES: dict[str, tuple[str, str]] = {
    "a module": ("import installed", "['installed']"),
    "a module of a package": ("import installed.part", "['installed', 'installed.part']"),
    "a function": ("from installed import function", "['installed']"),
    "a class, by the module that has it": (
        "from installed._private import Kind",
        "['installed._private']",
    ),
    "a module by another name": ("import installed as i", "['installed']"),
    "the standard library": ("import colorsys", "['colorsys']"),
    "a value": ("from installed import NUMBER", "[]"),
    "what was forgotten": ("import installed\ndel installed", "[]"),
    "the program's own": ("import own", "[]"),
    "by a module of the program's own": ("import own_user", "['installed']"),
    "by an object that raises when it is looked at": (
        """
        class Kind(type):
            def __getattribute__(self, name):
                raise RuntimeError(name)
        class Hard(metaclass=Kind):
            pass
        import installed
        """,
        "['installed']",
    ),
    "a module that is loaded when it is used": (
        """
        import importlib.util
        spec = importlib.util.find_spec("installed")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        installed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(installed)
        """,
        "[]",
    ),
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_behind_a_front_end_it_is_what_the_program_refers_to(reference: str, folder: Path) -> None:
    """A notebook's own thousand modules are needed by no task."""
    text, seen = REFERENCES[reference]
    (folder / "lib" / "own_user.py").write_text("import installed\n")
    install(folder, "", "IPython")
    install(folder, "")
    tail = """
        from safepool.workers.preload import modules_of_the_program
        print([name for name in modules_of_the_program() if name in ALL])
        """
    text = "import IPython, other\ndel IPython, other\n" + textwrap.dedent(text)

    assert run(folder, f"{text}\n{textwrap.dedent(tail)}") == [seen]


# What an import leaves or does that a worker must not have from the server: the module's text,
# and what is said of it.
CULPRITS: dict[str, tuple[str, str]] = {
    "a thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        "starts ",
    ),
    "a file": ("file = open(__file__)", "opens /"),
    "a socket": ("import socket\npair = socket.socketpair()", "opens socket:["),
    "a child": (
        "import subprocess\nchild = subprocess.Popen(['sleep', '5'])",
        "starts a process",
    ),
    "a handler of a signal": (
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)",
        "changes what signals do",
    ),
    "a signal that is ignored": (
        "import signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)",
        "changes what signals do",
    ),
    "a path": ("import sys\nsys.path.append('/nowhere')", "changes the path"),
    "a recursion limit": ("import sys\nsys.setrecursionlimit(4321)", "changes the path, the rec"),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_what_an_import_must_not_leave_is_left_to_the_tasks(culprit: str, folder: Path) -> None:
    """The server is started again without it, and told once; all else is ahead."""
    text, said = CULPRITS[culprit]
    install(folder, text)
    lines = run(folder, "learn('other', 'installed')\nprint(ahead(), ahead(env={'A': '1'}))\n")

    assert lines[-1] == "['installed'] ['installed']"
    [line] = [line for line in lines if "is not preloaded" in line]
    assert line.startswith(f"other is not preloaded: its import {said}")


# Imports that leave nothing, and what a task sees all the same; each is true with and without.
HARMLESS: dict[str, tuple[str, str]] = {
    "prints": ("print('hello')", "True"),
    "closes its files by itself": ("open(__file__)", "True"),
    "runs a program": ("import subprocess\nsubprocess.run(['true'])", "True"),
    "starts a thread that ends": (
        "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
        "True",
    ),
    "sets a variable": (
        "import os\nos.environ['SET_BY_OTHER'] = '1'",
        "os.environ['SET_BY_OTHER']",
    ),
    "reads a variable by its bytes": (
        "import os\ntry:\n    os.environ.get(b'PATH')\nexcept TypeError:\n    pass",
        "True",
    ),
    "raises": ("raise ImportError('not here')", "True"),
    "exits": ("import sys\nsys.exit(3)", "True"),
    "registers an exit function": (
        "import atexit\natexit.register(lambda: open('exits.txt', 'a').write('x'))",
        "True",
    ),
    "registers what is called after a fork": (
        "import os\nos.register_at_fork(before=int)",
        "True",
    ),
}


@pytest.mark.parametrize("harmless", HARMLESS)
def test_an_import_ahead_is_seen_by_nothing_but_its_speed(harmless: str, folder: Path) -> None:
    text, seen = HARMLESS[harmless]
    install(folder, text)
    raises = harmless in {"raises", "exits"}
    lines = run(
        folder,
        f"""
        def see():
            try:
                import other
            except BaseException:
                pass
            return "other" in sys.modules, {seen}
        for _ in range(3):
            with pool() as one:
                print(one.submit(see).result(), flush=True)
        print(ahead())
        """,
    )
    told = [line for line in lines if line != "hello" and "safepool" not in line]

    first = told[0]
    assert first.startswith(f"({not raises}, ")
    assert told == [first] * 3 + ["[]" if raises else "['other']"]
    if harmless == "registers an exit function":
        # Of each worker: as if it had imported it itself.
        assert (folder / "exits.txt").read_text() == "xxxx"


def test_what_an_import_has_read_of_the_environment_is_as_it_is_now(folder: Path) -> None:
    """A server whose imports have read another environment has no new workers."""
    install(folder, "import os\nSEEN = os.environ.get('MODE', 'none')\n")
    lines = run(
        folder,
        """
        def see():
            import other
            return other.SEEN
        def seen():
            with pool() as one:
                return one.submit(see).result()
        found = [seen(), seen()]
        os.environ["MODE"] = "first"
        found += [seen(), seen()]
        os.environ["UNRELATED"] = "1"
        found += [seen()]
        del os.environ["MODE"]
        found += [seen()]
        print(*found)
        from safepool.workers import forkserver
        print(len(forkserver.running()) <= 3)
        """,
    )

    assert lines == ["none none first first first none", "True"]


def test_nothing_is_learnt_where_it_was_not_asked_for(folder: Path) -> None:
    lines = run(
        folder,
        """
        learn("installed", preload=[])
        print(ahead())
        learn("installed", threads_per_worker=2)
        print(ahead())
        learn("installed")
        print(ahead(threads_per_worker=2), ahead())
        """,
    )

    assert lines == ["[]", "[]", "[] ['installed']"]


def test_a_script_that_is_run_in_the_server_has_late_imports_ahead_too(folder: Path) -> None:
    """Its own imports come first: it may set before what they read."""
    text = """
        def see(name):
            import importlib
            before = loaded()
            importlib.import_module(name)
            return before
        if __name__ == "__main__":
            for _ in range(2):
                with safepool.ProcessPool(1) as one:
                    print(one.submit(see, "installed.part").result())
        """

    assert run(folder, text) == ["[]", "['installed', 'installed.part', 'installed._private']"]
