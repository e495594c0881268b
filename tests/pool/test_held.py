"""An object that a script has from a module is that of the worker's own module."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pytest
from support_programs import run_program

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

# What a script can import: objects that cannot be pickled, and objects that are changed.
APP = """
import contextvars, functools, random, threading, types
counters = {"hits": 0}
guard = threading.Lock()
request = contextvars.ContextVar("request", default="none")
state = types.SimpleNamespace(cache=[], lock=threading.Lock())
LIMIT = 5
late = None
generator = random.Random(1)
draw = generator.random
def made():
    def inner():
        return counters["hits"]
    return inner
ask = made()
def hit():
    with guard:
        counters["hits"] += 1
def set_late(value):
    global late
    late = value
"""

# One row per way of a script to get an object: its beginning, a function, and what three calls
# in one worker return. Each is what a forked worker of the standard pool returns.
WAYS: dict[str, tuple[str, str, str]] = {
    "from": (
        "from app import counters, hit",
        "hit() or counters['hits']",
        "[1, 2, 3]",
    ),
    "from, renamed": (
        "from app import counters as seen, hit",
        "hit() or seen['hits']",
        "[1, 2, 3]",
    ),
    "from, renamed, what cannot be pickled": (
        "from app import guard as lock\nimport app",
        "lock is app.guard",
        "[True] * 3",
    ),
    "from, renamed, what holds such": (
        "from app import state as of_app\nimport app",
        "of_app is app.state",
        "[True] * 3",
    ),
    "everything": ("from app import *", "hit() or counters['hits']", "[1, 2, 3]"),
    "an assignment": (
        "import app\ncounters = app.counters",
        "app.hit() or counters['hits']",
        "[1, 2, 3]",
    ),
    "an attribute of an attribute": (
        "import app\ncache = app.state.cache",
        "cache.append(x) or len(app.state.cache)",
        "[1, 2, 3]",
    ),
    "of a package": (
        "from package import counters as seen, module",
        "module.hit() or seen['hits']",
        "[1, 2, 3]",
    ),
    "inside of a condition": (
        "try:\n    from app import guard\nexcept ImportError:\n    guard = None",
        "guard.acquire(timeout=1)",
        "[True, False, False]",
    ),
    "a context variable": ("from app import request", "request.get()", "['none'] * 3"),
    "a function of a function": (
        "from app import ask, hit",
        "hit() or ask()",
        "[1, 2, 3]",
    ),
    "a method of an instance": (
        "from app import draw, generator",
        "draw.__self__ is generator",
        "[True] * 3",
    ),
    "a stream": ("from sys import stdout", "stdout is __import__('sys').stdout", "[True] * 3"),
    "a default": (
        (
            "from app import counters, hit\ndef ask(seen=counters, *, more=counters):\n"
            "    return seen['hits'] if seen is more else None"
        ),
        "hit() or ask()",
        "[1, 2, 3]",
    ),
    "a variable of a decorator": (
        (
            "from app import guard\nimport app\ndef locked(lock):\n    def around(function):\n"
            "        def inner(x):\n            with lock:\n                return function(x)\n"
            "        return inner\n    return around\n"
            "@locked(guard)\ndef ask(x): return app.guard.locked()"
        ),
        "ask(x)",
        "[True] * 3",
    ),
    "an attribute of a class": (
        "from app import guard as lock\nimport app\nclass Account:\n    lock = lock",
        "Account.lock is app.guard",
        "[True] * 3",
    ),
    "a constant": ("from app import LIMIT", "LIMIT + x", "[5, 6, 7]"),
    "its own object of the same name": (
        "from app import counters\ncounters = {'hits': 7}",
        "counters['hits']",
        "[7] * 3",
    ),
    "set by the program": (
        "import app\napp.set_late({'a': 1})\nfrom app import late",
        "late['a']",
        "[1] * 3",
    ),
    "given to a module by the script": (
        "import app\napp.extra = extra = {'a': 1}",
        "extra['a']",
        "[1] * 3",
    ),
}

FRAME = """
from safepool import ProcessPool
{begin}

def use(x):
    return {asked}

with ProcessPool(1) as pool:
    told = [pool.submit(use, x).result(timeout=60) for x in range(3)]
assert told == {expected}, told
print("right")
"""

# Another name, or a part of an object: what is found by the name alone does not help.
NEEDS_SOURCE = {
    "a variable of a decorator",
    "an attribute of a class",
    "a default",
    "an attribute of an attribute",
    "given to a module by the script",
    "of a package",
}

# Each way, started from a file, and as text that the interpreter is given. Where the source is not
# asked, every run has one start of the three for each way, and the long run has all.
STARTS = ("script.py", "-c", "-")
STARTED = [
    pytest.param(
        way,
        start,
        marks=[]
        if way in NEEDS_SOURCE or start == STARTS[number % len(STARTS)]
        else [pytest.mark.slow],
    )
    for number, way in enumerate(WAYS)
    for start in STARTS
    if start != "-" or way not in NEEDS_SOURCE
]


@pytest.mark.parametrize(("way", "start"), STARTED)
def test_a_worker_has_the_modules_own(way: str, start: str, tmp_path: Path) -> None:
    begin, asked, expected = WAYS[way]
    text = FRAME.format(begin=textwrap.dedent(begin), asked=asked, expected=expected)

    done = run(tmp_path, text, start)

    assert (done.stdout, done.stderr) == ("right\n", "")


def test_an_error_says_what_a_module_has_only_in_the_program(tmp_path: Path) -> None:
    """Set at run time and not to be pickled: no worker can have it, and none gets another one."""
    begin = "import app, threading\napp.set_late(threading.Lock())\nfrom app import late"

    done = run(tmp_path, FRAME.format(begin=begin, asked="late", expected="[]"), "script.py")

    assert "AttributeError: app.late is of type _thread.lock in the program" in done.stderr
    assert "ProcessPool(initializer=)" in done.stderr


def run(folder: Path, text: str, start: str) -> subprocess.CompletedProcess[str]:
    """Run a program beside the modules above."""
    (folder / "app.py").write_text(APP)
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from .module import counters\n")
    (package / "module.py").write_text(APP)
    (folder / "script.py").write_text(text)
    how = ["-c", text] if start == "-c" else [start]
    return run_program(*how, cwd=folder, stdin=text if start == "-" else "")
