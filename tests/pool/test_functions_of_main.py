"""Functions of ``__main__`` are pickled again when something has changed, and not otherwise."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any

import pytest

from safepool.pool.mains import is_importable, look_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def run(tmp_path: Path, text: str, said: str = "") -> str:
    """Run a script, whose functions are of ``__main__``, and return what it printed.

    Args:
        tmp_path: Where.
        text: What follows the head below.
        said: A part of the one warning that it prints.
    """
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        from safepool import ProcessPool
        from safepool.transport.payloads import values_sent

        def call(function, *arguments):
            return pool.submit(function, *arguments).result(timeout=60)
        """)
        + textwrap.dedent(text)
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert said in done.stderr
    assert done.stderr.count("Warning:") == (said != "")
    assert said or done.stderr == ""
    return done.stdout.strip()


def test_an_unchanged_function_is_pickled_at_most_twice(tmp_path: Path) -> None:
    """The first call takes it along, since most lambdas are called once; then it is kept."""
    text = """
    FACTOR = 3
    def triple(x): return x * FACTOR
    with ProcessPool(2) as pool:
        before = values_sent()
        futures = [pool.submit(triple, n) for n in range(500)]
        print(sum(future.result() for future in futures), values_sent() - before)
    """
    assert run(tmp_path, text) == f"{3 * 499 * 500 // 2} 2"


def test_every_change_arrives(tmp_path: Path) -> None:
    """Of a global, of a function that it calls, back again, and by other functions between."""
    text = """
    LIMIT = 1
    def helper(x): return x + LIMIT
    def f(x): return helper(x) * 10
    def g(): return LIMIT
    found = []
    with ProcessPool(1) as pool:
        found += [call(f, 1) for _ in range(3)]
        LIMIT = 2
        found += [call(f, 1), call(f, 1), call(g), call(g)]
        LIMIT = 1
        found += [call(f, 1), call(g), call(g), call(f, 1)]
        def helper(x): return x - LIMIT
        found += [call(f, 1), call(f, 3)]
        LIMIT = 5
        found += [call(lambda: LIMIT), call(f, 1), call(g)]
        LIMIT = 1
        found += [list(pool.map(lambda n: n + LIMIT, [1]))[0], call(g), call(f, 1)]
        for LIMIT in range(20, 40):
            found += [call(g) - LIMIT]
    print(found)
    """
    expected = [20] * 3 + [30, 30, 2, 2] + [20, 1, 1, 20] + [0, 20] + [5, -40, 5] + [2, 1, 0]
    assert run(tmp_path, text) == str(expected + [0] * 20)


def test_two_workers_have_the_same_globals(tmp_path: Path) -> None:
    """Each worker gets what a function refers to, whoever has been sent what before."""
    text = """
    import time
    LEVEL = 0
    def level(_=None): time.sleep(0.002); return LEVEL
    def other(_=None): time.sleep(0.001); return LEVEL
    with ProcessPool(2) as pool:
        wrong = 0
        for turn in range(6):
            LEVEL = turn % 3
            futures = [pool.submit((level, other)[n % 2]) for n in range(40)]
            wrong += sum(future.result() != LEVEL for future in futures)
    print(wrong)
    """
    assert run(tmp_path, text) == "0"


def test_what_may_change_unseen_is_pickled_again(tmp_path: Path) -> None:
    """A list, an instance, a class of the program, an attribute of the function."""
    text = """
    items = []
    class Box:
        value = 0
    box = Box()
    def f(): return len(items), box.value, Box.value, getattr(g, "mark", None)
    def g(): return getattr(g, "mark", None)
    with ProcessPool(1) as pool:
        found = [call(f), call(f), call(g), call(g), call(g)]
        items.append(1); box.value = 2; Box.value = 3; g.mark = 4
        found += [call(f), call(g), call(f)]
    print(found)
    """
    changed = (1, 2, 3, 4)
    nothing = (0, 0, 0, None)
    assert run(tmp_path, text) == str([nothing, nothing, None, None, None, changed, 4, changed])


def function(text: str, **names: Any) -> types.FunctionType:
    space = {"__name__": "elsewhere", **names}
    exec(text, space)
    made = space["f"]
    assert isinstance(made, types.FunctionType)
    return made


def _rebind(made: types.FunctionType, name: str, value: object) -> None:
    made.__globals__[name] = value


# One row per change that must be seen: the function, and the change.
CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "a global": ("x = 1\ndef f(): return x", lambda f: _rebind(f, "x", 2)),
    "a global of a nested function": (
        "x = 1\ndef f(): return [x for _ in (lambda: x,)]",
        lambda f: _rebind(f, "x", 2),
    ),
    "a global that was not there": ("def f(): return x", lambda f: _rebind(f, "x", 2)),
    "a global that is gone": ("x = 1\ndef f(): return x", lambda f: f.__globals__.pop("x")),
    "the code": ("def f(): return 1", lambda f: setattr(f, "__code__", (lambda: 2).__code__)),
    "a default": ("def f(a=1): return a", lambda f: setattr(f, "__defaults__", (2,))),
    "a keyword's default": (
        "def f(*, a=1): return a",
        lambda f: setattr(f, "__kwdefaults__", {"a": 2}),
    ),
    "an annotation": ("def f(a: int): return a", lambda f: f.__annotations__.update(a=str)),
    "what it has captured": (
        "def outer(a=1):\n  def f(): return a\n  return f\nf = outer()",
        lambda f: setattr(f.__closure__[0], "cell_contents", 2),
    ),
    "its text": ("def f(): 'one'", lambda f: setattr(f, "__doc__", "two")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    text, make = CHANGES[change]
    made = function(text)
    first, second = look_at(made), look_at(made)
    assert first is not None
    assert second is not None
    assert first.same_as(second)

    make(made)

    after = look_at(made)
    assert after is None or not first.same_as(after)


# One row per thing that may change and stay the same object.
DOUBTS: dict[str, object] = {
    "a list": [1],
    "a dictionary": {},
    "a list in a tuple": (1, [2]),
    "an instance": object(),
    "a bound method": [].append,
    "a module that is none": types.ModuleType("nowhere"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_may_change_unseen_is_in_doubt(doubt: str) -> None:
    assert look_at(function("def f(): return x", x=DOUBTS[doubt])) is None
    assert look_at(function("def f(a=x): return a", x=DOUBTS[doubt])) is None


def test_what_workers_import_is_in_no_doubt() -> None:
    look = look_at(function("def f(): return m, s, c, t", m=math, s=math.sqrt, c=int, t=(1, "a")))

    assert look is not None
    assert set(look.names) == {"m", "s", "c", "t"}
    assert is_importable(textwrap.dedent)
    assert not is_importable(lambda: 1)
    assert not is_importable(3)


# One row per kind of global: how it is made, the call, and what is said of it.
TOLD = "each call of __main__.at sends the global 'table' again, 34 MiB"
LARGE: dict[str, tuple[str, str, str]] = {
    "large": ("[0.5] * 4_000_000", "call(at, 3)", TOLD),
    "large and used once": ("[0.5] * 4_000_000", "call(at, 3)", ""),
    "placed": ("safepool.share([0.5] * 4_000_000)", "call(at, 3)", ""),
    "that cannot change": ("(0.5,) * 4_000_000", "call(at, 3)", ""),
    "not that large": ("[0.5] * 1_000_000", "call(at, 3)", ""),
    "small, but an argument is": ("[0.5] * 4", "call(at, 3, bytes(40_000_000))", ""),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_global_of_every_call_is_told_of_once(kind: str, tmp_path: Path) -> None:
    made, calls, said = LARGE[kind]
    times = 1 if "once" in kind else 4
    text = f"""
    import safepool
    table = {made}
    def at(place, _=None): return table[place]
    with ProcessPool(1) as pool:
        for _ in range({times}):
            found = {calls}
        print(found)
    """
    assert run(tmp_path, text, said) == "0.5"


def test_no_call_of_a_map_sees_what_another_has_changed(tmp_path: Path) -> None:
    """What travels by value goes in one pickle, unless two calls share something, however deep."""
    text = """
    class Node:
        def __init__(self, below): self.below = below
    def deepest(node):
        while isinstance(node, (Node, tuple)):
            node = node.below if isinstance(node, Node) else node[0]
        node.append(0)
        return len(node)
    def chain(found, depth):
        return Node((chain(found, depth - 1),)) if depth else found
    common = []
    with ProcessPool(1) as pool:
        print(set(pool.map(deepest, [chain(common, 5) for _ in range(50)])))
        before = values_sent()
        print(set(pool.map(deepest, [chain([], 5) for _ in range(50)])))
        print(values_sent() - before < 25)
    """
    assert run(tmp_path, text) == "{1}\n{1}\nTrue"
