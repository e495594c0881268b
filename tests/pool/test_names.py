"""Globals of a script in its workers: delivered once, and the worker's own from then on.

All rows run in one worker of one program, which is started in every way.
"""

from __future__ import annotations

import ast
import functools
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support_processes import run_python

from safepool.pool.circles import components

# One row per thing that programs rely on: what the script defines, what is asked of it (``ask``
# calls in the worker, a semicolon between statements), and the answers.
ROWS: dict[str, tuple[str, str, list[Any]]] = {
    "a number that a task counts up": (
        """
        n = 0
        def count():
            global n
            n += 1
            return n
        """,
        "ask(count); ask(count)",
        [1, 2],
    ),
    "a dictionary that a task fills": (
        """
        cache = {}
        def look_up(key):
            found = key in cache
            cache[key] = 1
            return found
        """,
        "ask(look_up, 1); ask(look_up, 1); pool_map(look_up, [1, 2])",
        [False, True, [True, False]],
    ),
    "a dictionary that the initializer fills": (
        """
        settings = {}
        def configure(level):
            settings["level"] = level
            settings["seen"] = 0
        def level():
            settings["seen"] += 1
            return settings["level"], settings["seen"]
        """,
        "ask(level); ask(level)",
        [("high", 1), ("high", 2)],
    ),
    "data that is loaded below the guard": (
        """
        data = None
        def load():
            global data
            data = [1, 2, 3]
        def total():
            return sum(data)
        """,
        "load(); ask(total); data.append(4); ask(total); ask(total)",
        [6, 10, 10],
    ),
    "a change of the program's": (
        """
        limit = 1
        options = {"a": 1}
        def both():
            return limit, options["a"]
        def change(a, b):
            global limit
            limit = a
            options["a"] = b
        """,
        "ask(both); change(2, 3); ask(both); change(1, 1); ask(both)",
        [(1, 1), (2, 3), (1, 1)],
    ),
    "a task's change stays until the program's": (
        """
        state = {"n": 0}
        def step():
            state["n"] += 1
            return state["n"]
        def restart():
            state["n"] = 10
        """,
        "ask(step); ask(step); restart(); ask(step); ask(step)",
        [1, 2, 11, 12],
    ),
    "an instance": (
        """
        class App:
            def __init__(self):
                self.n = 0
        app = App()
        service = {"app": app}
        def hit():
            app.n += 1
            return service["app"].n, service["app"] is app
        """,
        "ask(hit); ask(hit)",
        [(1, True), (2, True)],
    ),
    "two names of one object": (
        """
        first = second = {}
        def put_in_first():
            first["x"] = first.get("x", 0) + 1
            return second["x"], first is second
        """,
        "ask(put_in_first); ask(put_in_first)",
        [(1, True), (2, True)],
    ),
    "two lists with an item in common": (
        """
        item = [0]
        left, right = [item], [item]
        del item
        def common():
            left[0][0] += 1
            return right[0][0]
        """,
        "ask(common); ask(common)",
        [1, 2],
    ),
    "a default that is a global": (
        """
        memo = {}
        def remember(key, memory=memo):
            memory[key] = 1
            return len(memo), memory is memo
        def forget():
            memo["of the program"] = 1
        """,
        "ask(remember, 1); ask(remember, 2); forget(); ask(remember, 3)",
        [(1, True), (2, True), (2, True)],
    ),
    "a registry that a decorator fills": (
        """
        registry = {}
        def register(function):
            registry[function.__name__] = function
            return function
        @register
        def registered(which=registry):
            return which is registry
        def call_by_name(name):
            return registry[name] is registered, registry[name]()
        """,
        "ask(call_by_name, 'registered')",
        [(True, True)],
    ),
    "classes that register themselves": (
        """
        class Base:
            known = {}
            def __init_subclass__(cls):
                Base.known[cls.__name__] = cls
        class One(Base):
            value = 1
        def value_of(name):
            return Base.known[name].value, Base.known["One"] is One, list(Base.known)
        """,
        "ask(value_of, 'One')",
        [(1, True, ["One"])],
    ),
    "a cache of a class": (
        """
        class Service:
            made = {}
            @classmethod
            def get(cls, name):
                return cls.made.setdefault(name, len(cls.made) + 1)
        def serve(name):
            return Service.get(name)
        """,
        "ask(serve, 'a'); ask(serve, 'b'); ask(serve, 'b')",
        [1, 2, 2],
    ),
    "a memo in a closure": (
        """
        def memoized(function):
            known = {}
            def call(x):
                if x not in known:
                    known[x] = function(x)
                    return "made"
                return "kept"
            return call
        @memoized
        def double(x):
            return 2 * x
        def use(x):
            return double(x)
        """,
        "ask(double, 1); ask(use, 1); pool_map(use, [1])",
        ["made", "kept", ["kept"]],
    ),
    "closures that share a variable": (
        """
        def pair():
            n, seen = 0, []
            def get():
                return n, len(seen)
            def put():
                nonlocal n
                n += 1
                seen.append(n)
            return get, put
        get, put = pair()
        def put_and_get():
            put()
            return get()
        """,
        "ask(put_and_get); ask(put_and_get); put(); ask(put_and_get)",
        [(1, 1), (2, 2), (2, 2)],
    ),
    "counters of the standard library": (
        """
        import collections
        counter, by_key = collections.Counter(), collections.defaultdict(int)
        def count_both():
            counter["x"] += 1
            by_key["x"] += 2
            return counter["x"], by_key["x"]
        """,
        "ask(count_both); ask(count_both)",
        [(1, 2), (2, 4)],
    ),
    "a list that holds itself": (
        """
        circle = []
        circle.append(circle)
        def is_circle():
            return circle[0] is circle
        """,
        "ask(is_circle)",
        [True],
    ),
    "names that a function asks for at run time": (
        """
        def handle_one():
            return table_of_one
        def handle_other():
            return "other"
        table_of_one = ["one"]
        def dispatch(kind):
            return globals()["handle_" + kind]()
        def dispatch_otherwise(kind):
            import sys
            return getattr(sys.modules["__main__"], "handle_" + kind)()
        """,
        "ask(dispatch, 'one'); ask(dispatch, 'other'); ask(dispatch_otherwise, 'other')",
        [["one"], "other", "other"],
    ),
    "names that shadow builtins": (
        """
        def max(*values):
            return "the script's"
        def shadowed():
            return max(1, 2)
        """,
        "ask(shadowed)",
        ["the script's"],
    ),
    "a function under another name": (
        """
        def slow():
            return "slow"
        def fast():
            return "fast"
        work = slow
        def choose():
            global work
            work = fast
        def call_work():
            return work(), work is slow or work is fast
        """,
        "ask(call_work); choose(); ask(call_work)",
        [("slow", True), ("fast", True)],
    ),
    "an object that cannot be compared": (
        """
        class Odd:
            def __eq__(self, other):
                raise ValueError
            __hash__ = None
        odd = Odd()
        def kind_of_odd():
            return type(odd) is Odd
        """,
        "ask(kind_of_odd); ask(kind_of_odd)",
        [True, True],
    ),
    "an object whose pickle is another one each time": (
        """
        import itertools
        class Stamped:
            stamps = itertools.count()
            def __init__(self):
                self.n = 0
            def __getstate__(self):
                return {"n": self.n, "stamp": next(Stamped.stamps)}
        stamped = Stamped()
        def stamp():
            stamped.n += 1
            return stamped.n
        """,
        "ask(stamp); ask(stamp)",
        [1, 2],
    ),
    "an array": (
        """
        import numpy
        array = numpy.zeros(1_000_000)
        def add():
            array[0] += 1
            return float(array[0])
        def reset():
            array[0] = 5
        """,
        "ask(add); ask(add); reset(); ask(add); ask(add)",
        [1.0, 2.0, 6.0, 7.0],
    ),
    "a generator of random numbers": (
        """
        import random
        dice = random.Random(1)
        def draw():
            return dice.random()
        """,
        "len({ask(draw), ask(draw), *pool_map(draw_of, [1, 2, 3])})",
        [5],
    ),
    "a method, a partial and a callable of it": (
        """
        import functools
        class Callable:
            def __call__(self, x):
                return helper(x)
            def method(self, x):
                return helper(x)
        memory = []
        def helper(x):
            memory.append(x)
            return len(memory)
        """,
        "ask(Callable(), 1); ask(Callable().method, 1); ask(functools.partial(helper, 1))",
        [1, 2, 3],
    ),
}

# Beside the rows' own.
MORE = """
def draw_of(_):
    return draw()
"""

MAIN = """
def main():
    with safepool.ProcessPool(
        1, mp_context={method!r}, initializer=configure, initargs=("high",)
    ) as pool:
        def ask(function, *arguments):
            answer = pool.submit(function, *arguments).result(timeout=60)
            answers.append(answer)
            return answer
        def pool_map(function, items):
            answer = list(pool.map(function, items))
            answers.append(answer)
            return answer
        told = {{}}
        for name, statements in ASKED.items():
            answers = []
            for statement in statements:
                try:
                    value = eval(statement, globals(), {{"ask": ask, "pool_map": pool_map}})
                except Exception as error:
                    answers.append(repr(error))
            told[name] = [value] if "len(" in statements[-1][:4] else answers
        print(told)
"""


def program(*, guarded: bool, method: str | None) -> str:
    """Return a program with all rows, which prints the answers."""
    parts = ["import safepool", *(textwrap.dedent(text) for text, _, _ in ROWS.values()), MORE]
    asked = {name: [one.strip() for one in text.split(";")] for name, (_, text, _) in ROWS.items()}
    guard = 'if __name__ == "__main__":' if guarded else "if True:"
    parts += [f"ASKED = {asked!r}", MAIN.format(method=method), f"{guard}\n    main()"]
    return "\n".join(parts)


@functools.cache
def answers(way: str) -> dict[str, list[Any]]:
    """Run the program in one way; return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "program.py")
        text = program(guarded=way == "guarded", method="fork" if way == "fork" else None)
        file.write_text(text)
        command = {"-c": ["-c", text], "profiled": ["-m", "cProfile", "-o", "out", "program.py"]}
        done = run_python(*command.get(way, ["program.py"]), cwd=Path(folder))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = ast.literal_eval(done.stdout)
    return found


WAYS = ["script", "guarded", "-c", "profiled"]
if sys.platform != "win32":
    WAYS.append("fork")


# What the program changes between the fork of a worker and the first call that needs it.
NOT_FORKED = {"data that is loaded below the guard"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ROWS)
def test_a_global_is_the_workers_own_from_its_delivery_on(row: str, way: str) -> None:
    if way == "fork" and row in NOT_FORKED:
        pytest.skip("the standard pool's forked worker has the earlier value as well")
    assert answers(way)[row] == ROWS[row][2]


def test_circles_are_found() -> None:
    edges = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"], "e": ["e"], "f": ["a", "d"]}

    found = components(edges)

    assert [sorted(circle) for circle in found] == [["e"], ["d"], ["a", "b", "c"], ["f"]]
