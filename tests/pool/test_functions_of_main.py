"""Functions of ``__main__`` are pickled again when something has changed, and not otherwise."""

from __future__ import annotations

import math
import textwrap
import types
from typing import TYPE_CHECKING, Any

import pytest
from support_programs import run_program

from safepool.pool.calls.mains import Look, is_importable, plain_function

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
        from safepool.transport import payloads

        def made():
            return len(pickled)

        pickled, dumps = [], payloads._by_value_dumps
        def counted(value, *arguments, **keywords):
            pickled.append(value)
            return dumps(value, *arguments, **keywords)
        payloads._by_value_dumps = counted

        def call(function, *arguments):
            return pool.submit(function, *arguments).result(timeout=60)
        """)
        + textwrap.dedent(text)
    )
    done = run_program("script.py", cwd=tmp_path)
    assert said in done.stderr
    assert done.stderr.count("Warning:") == (said != "")
    assert said or done.stderr == ""
    return done.stdout.strip()


def test_an_unchanged_name_is_pickled_once(tmp_path: Path) -> None:
    """With the first call, and not again."""
    text = """
    FACTOR = 3
    def triple(x): return x * FACTOR
    with ProcessPool(2) as pool:
        call(triple, 1)
        before = made()
        futures = [pool.submit(triple, n) for n in range(500)]
        found = sum(pool.map(triple, range(500)))
        print(sum(future.result() for future in futures), found, made() - before)
    """
    expected = 3 * 499 * 500 // 2
    assert run(tmp_path, text) == f"{expected} {expected} 0"


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


def test_what_changes_and_stays_the_same_object_is_seen(tmp_path: Path) -> None:
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


def function(text: str, **names: Any) -> Any:
    space = {"__name__": "elsewhere", **names}
    exec(text, space)
    return space["f"]


# One row per change that must be seen: the function, and the change.
CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "the code": ("def f(): return 1", lambda f: setattr(f, "__code__", (lambda: 2).__code__)),
    "a default": ("def f(a=1): return a", lambda f: setattr(f, "__defaults__", (2,))),
    "a keyword's default": (
        "def f(*, a=1): return a",
        lambda f: setattr(f, "__kwdefaults__", {"a": 2}),
    ),
    "an attribute": ("def f(): return 1", lambda f: setattr(f, "mark", 1)),
    "what it has captured": (
        "def outer(a=1):\n  def f(): return a\n  return f\nf = outer()",
        lambda f: setattr(f.__closure__[0], "cell_contents", 2),
    ),
    "its text": ("def f(): 'one'", lambda f: setattr(f, "__doc__", "two")),
    "a method": (
        "class f:\n  def m(self): return 1",
        lambda f: setattr(f.m, "__defaults__", (2,)),
    ),
    "an attribute of a class": ("class f:\n  a = 1", lambda f: setattr(f, "a", 2)),
    "a property of a class": (
        "class f:\n  @property\n  def p(self): return 1",
        lambda f: setattr(f.p.fget, "__code__", (lambda _: 2).__code__),
    ),
    "what a cache wraps": (
        "import functools\n@functools.cache\ndef f(): return 1",
        lambda f: setattr(f.__wrapped__, "__code__", (lambda: 2).__code__),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    text, make = CHANGES[change]
    made = function(text)
    first, second = Look(made), Look(made)
    short = plain_function(made)
    assert first.same_as(second)
    assert not first.doubts
    assert short is None or short.is_still(made)

    make(made)

    assert not first.same_as(Look(made))
    assert short is None or not short.is_still(made)


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
    assert Look(DOUBTS[doubt]).doubts
    assert Look(function("def f(a=x): return a", x=DOUBTS[doubt])).doubts


def test_what_workers_import_is_in_no_doubt() -> None:
    look = Look(math, math.sqrt, int, (1, "a"))

    assert not look.doubts
    assert is_importable(textwrap.dedent)
    assert not is_importable(lambda: 1)
    assert not is_importable(3)


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
        before = made()
        print(set(pool.map(deepest, [chain([], 5) for _ in range(50)])))
        print(made() - before < 25)
    """
    assert run(tmp_path, text) == "{1}\n{1}\nTrue"
