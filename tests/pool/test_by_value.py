"""What only the program has travels by value: wrapped functions, and instances of its classes.

Each case is a program of its own, since it is its ``__main__`` that no worker can import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support_programs import run_program

TESTS = Path(__file__).parent.parent

# What a program of this file begins and ends with. Each question has a pool of its own.
FRAME = """
import json
import safepool

{body}

if __name__ == "__main__":
    def ask(function, *arguments):
        return pool.submit(function, *arguments).result(timeout=60)
    told = {{}}
    for row, asked in {asked!r}.items():
        with safepool.ProcessPool(1, mp_context={method!r}, main={main!r}) as pool:
            told[row] = eval(asked)
    print(json.dumps(told))
"""


def run(body: str, asked: str, cwd: Path, method: str = "safepool", main: str = "value") -> Any:
    """Run a program; return what an expression gave, by way of JSON."""
    return run_each(body, {"": asked}, cwd, method, main)[""]


def run_each(
    body: str,
    asked: dict[str, str],
    cwd: Path,
    method: str = "safepool",
    main: str = "value",
) -> dict[str, Any]:
    """Run a program; return what each of its expressions gave."""
    program = cwd / "program.py"
    program.write_text(
        FRAME.format(body=textwrap.dedent(body), asked=asked, method=method, main=main)
    )
    done = run_program(program, cwd=cwd, env={**os.environ, "PYTHONPATH": str(TESTS)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# One row per thing that cloudpickle alone cannot send, or sends as something else: its part of
# the program, what that asks, and what it gets. They share a program, so each name is one row's.
THINGS: dict[str, tuple[str, str, Any]] = {
    "a dataclass that another one is derived from": (
        """
        import dataclasses
        @dataclasses.dataclass
        class Needed:
            needed: int
        def derive(kind):
            @dataclasses.dataclass
            class More(kind):
                more: int = 2
            try:
                More()
            except TypeError:
                return dataclasses.fields(kind)[0].default is dataclasses.MISSING
        """,
        "ask(derive, Needed)",
        True,
    ),
    "a dataclass that cloudpickle has loaded": (
        """
        import cloudpickle
        import dataclasses
        @dataclasses.dataclass
        class Loaded:
            needed: int
        cloudpickle.loads(cloudpickle.dumps(Loaded(1)))
        def derive_from_loaded(one):
            kind = type(one)
            try:
                dataclasses.make_dataclass("More", [("more", int, 2)], bases=(kind,))()
            except TypeError:
                return one.needed, dataclasses.fields(kind)[0].default is dataclasses.MISSING
        """,
        "ask(derive_from_loaded, Loaded(3))",
        [3, True],
    ),
    "struct.Struct": (
        """
        import struct
        LAYOUT = struct.Struct("<hh")
        def unpack(layout, data):
            return LAYOUT.size, layout.unpack(data.encode())
        """,
        "ask(unpack, LAYOUT, chr(97) + chr(0) + chr(98) + chr(0))",
        [4, [97, 98]],
    ),
    "lru_cache": (
        """
        import functools
        @functools.lru_cache(maxsize=7, typed=True)
        def typed(x):
            return 2 * x
        typed.extra = "kept"
        def look_at_typed():
            return typed.cache_parameters(), typed.extra, typed.__name__
        """,
        "[ask(typed, 2), ask(look_at_typed)]",
        [4, [{"maxsize": 7, "typed": True}, "kept", "typed"]],
    ),
    "a cache lasts as long as the worker": (
        """
        import functools
        @functools.cache
        def noisy(x):
            calls.append(x)
            return len(calls)
        calls = []
        def use_noisy(x):
            return noisy(x), noisy.cache_info().hits
        """,
        "[ask(noisy, 1), ask(noisy, 1), ask(use_noisy, 1), list(pool.map(noisy, [1, 1]))]",
        [1, 1, [1, 2], [1, 1]],
    ),
    "a recursive cache": (
        """
        import functools
        @functools.cache
        def fibonacci(n):
            return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
        """,
        "[ask(fibonacci, 80), list(pool.map(fibonacci, range(5)))]",
        [23416728348467685, [0, 1, 1, 2, 3]],
    ),
    "a cache that is defined again": (
        """
        import functools
        def cached(factor):
            @functools.cache
            def times(x):
                return factor * x
            return times
        times = cached(2)
        def use_times(x):
            return times(x)
        def again():
            global times
            times = cached(3)
            return ask(use_times, 1)
        """,
        "[ask(use_times, 1), (globals().update(ask=ask), again())[1]]",
        [2, 3],
    ),
    "a cache in a partial, of a lambda, decorated": (
        """
        import functools
        of_lambda = functools.lru_cache(lambda x: 2 * x)
        @safepool.worker
        @functools.lru_cache
        def capped(x):
            return 2 * x
        """,
        "[ask(functools.partial(of_lambda, 2)), ask(capped, 2), list(pool.map(capped, [3]))]",
        [4, 4, [6]],
    ),
    "a cache comes back as itself": (
        """
        import functools
        @functools.cache
        def twice(x):
            return 2 * x
        def back(x):
            return x
        """,
        "[ask(back, twice) is twice, ask(back, [twice])[0] is twice]",
        [True, True],
    ),
    "singledispatch": (
        """
        import functools
        @functools.singledispatch
        def size(x):
            return "?"
        @size.register
        def _(x: list):
            return [size(item) for item in x]
        @size.register
        def _(x: int):
            return x
        @size.register(str)
        @size.register(bytes)
        def _(x):
            return len(x)
        size.extra = "kept"
        def use_size(x):
            return size(x), size.extra, size.dispatch(bool)(True)
        """,
        "[ask(size, [1, 'ab', b'abc', None, [True]]), ask(use_size, 'abc')]",
        [[1, 2, 3, "?", [True]], [3, "kept", True]],
    ),
    "singledispatch registers in the worker": (
        """
        import functools
        class Own:
            pass
        @functools.singledispatch
        def name(x):
            return "object"
        @name.register
        def _(x: Own):
            return "own"
        def use_name(x):
            name.register(float, lambda x: "float")
            return name(x), name(1.5), name(1)
        """,
        "[ask(name, Own()), ask(use_name, Own())]",
        ["own", ["own", "float", "object"]],
    ),
    "a class with all of them": (
        """
        import functools
        class Tool:
            def __init__(self):
                self.n = 3
            @functools.cached_property
            def double(self):
                return 2 * self.n
            @functools.lru_cache
            def plus(self, x):
                return self.n + x
            @functools.singledispatchmethod
            def kind(self, x):
                return "object"
            @kind.register
            def _(self, x: int):
                return "int"
            four = functools.partialmethod(plus, 4)
        def use_tool(tool):
            return tool.double, vars(tool), tool.plus(1), tool.kind(1), tool.kind(""), tool.four()
        """,
        "[ask(use_tool, Tool()), ask(Tool().plus, 2)]",
        [[6, {"n": 3, "double": 6}, 4, "int", "object", 7], 5],
    ),
}


@pytest.mark.parametrize(
    ("method", "main"), [("safepool", "value"), ("safepool", "run"), ("spawn", "auto")]
)
def test_they_work_in_a_worker_as_in_the_program(method: str, main: str, tmp_path: Path) -> None:
    body = "".join(textwrap.dedent(part) for part, _, _ in THINGS.values())

    told = run_each(body, {thing: THINGS[thing][1] for thing in THINGS}, tmp_path, method, main)

    assert told == {thing: expected for thing, (_, _, expected) in THINGS.items()}


# A class that counts how often it is made, in the process that asks.
COUNTED = """
    import dataclasses
    import enum
    made = []
    class Meta(type):
        def __new__(meta, name, bases, namespace, **more):
            made.append("meta " + name)
            return super().__new__(meta, name, bases, namespace)
    class Base:
        def __init_subclass__(cls, **more):
            made.append("init " + cls.__name__)
    class Child(Base, metaclass=Meta):
        shared = 1
        def __init__(self, x):
            self.x = x
        def get(self):
            return made
    @dataclasses.dataclass
    class Data(Base):
        x: int
    class Color(enum.Enum):
        RED = 1
    class ChildError(Exception):
        pass
    def back(x):
        return x
    def make(x):
        return Child(x)
    def change(x):
        type(x).shared = 99
        type(x).get = None
        return x
    def fail(x):
        raise ChildError(x)
    def local():
        class Local(Base):
            def get(self):
                return "local"
        return Local()
"""

# One row per way of a value: what is asked, and what is told.
WAYS: dict[str, tuple[str, Any]] = {
    "there and back": ("type(ask(back, Child(3))) is Child", True),
    "made in the worker": ("type(ask(make, 3)) is Child", True),
    "by map": (
        "{type(child) is Child for child in pool.map(back, [Child(1), Child(2)])} == {True}",
        True,
    ),
    "in a container": ("type(ask(back, {'a': [Child(3)]})['a'][0]) is Child", True),
    "the class itself": ("ask(back, Child) is Child", True),
    "a dataclass": ("ask(back, Data(3)) == Data(3)", True),
    "a member of an enumeration": ("ask(back, Color.RED) is Color.RED", True),
    "an exception": ("type(pool.submit(fail, 1).exception()) is ChildError", True),
    "a class of a function": (
        "(lambda value: type(ask(back, value)) is type(value))(local())",
        True,
    ),
    "a class that only the worker has": (
        "[(a := ask(local)).get(), type(ask(back, a)) is type(a), type(ask(local)) is type(a)]",
        ["local", True, False],
    ),
}


def test_an_instance_comes_back_as_one_of_the_programs_own_class(tmp_path: Path) -> None:
    """The class is as it was: not made again, with the methods and attributes it had."""
    before = (
        COUNTED
        + "    functions = Child.get, Child.__init__, Data.__init__\n    before = list(made)\n"
    )
    asked = {
        way: f"""[
            {asked},
            [one for one in made[len(before):] if not one.endswith("Local")],
            functions == (Child.get, Child.__init__, Data.__init__),
            Child(1).get() is made,
        ]"""
        for way, (asked, _) in WAYS.items()
    }

    told = run_each(before, asked, tmp_path)

    assert told == {way: [expected, [], True, True] for way, (_, expected) in WAYS.items()}


@pytest.mark.parametrize("main", ["value", "run"])
def test_objects_of_the_script_are_pickled_once(main: str, tmp_path: Path) -> None:
    """A method for pickling may give something away: a handle, a lease."""
    body = """
        class Counted:
            pickled = 0
            def __reduce__(self):
                Counted.pickled += 1
                return Counted, ()
        def take(*values, **named):
            return 1
        def keep(times):
            return [Counted() for _ in range(times)]
        def count(ask):
            before = Counted.pickled
            ask()
            return Counted.pickled - before
        def begin():
            Counted.pickled = 0
        def tell():
            return Counted.pickled
    """
    asked = """[
        count(lambda: ask(take, Counted())),
        count(lambda: ask(take, [Counted(), Counted()])),
        count(lambda: pool.submit(len, [{1: Counted()}]).result()),
        count(lambda: pool.submit(take, x=Counted()).result()),
        count(lambda: list(pool.map(take, keep(2)))),
        count(lambda: list(pool.map(take, keep(50)))),
        count(lambda: list(pool.map(take, keep(9), keep(9)))),
        count(lambda: list(pool.map(take, keep(9), chunksize=4))),
        ask(begin) or len([ask(keep, 3)]) and ask(tell),
    ]"""

    assert run(body, asked, tmp_path, main=main) == [1, 2, 1, 1, 2, 50, 18, 9, 3]


def test_what_a_worker_changes_of_a_class_stays_there(tmp_path: Path) -> None:
    """As in the standard pool; the program's own is untouched."""
    asked = "[ask(change, Child(3)).shared, Child.shared, Child(1).get() is made]"

    assert run(COUNTED, asked, tmp_path) == [1, 1, True]


def test_a_worker_makes_a_class_once_and_learns_what_the_program_changes(tmp_path: Path) -> None:
    """It follows the program, whose class it is; nothing is run again for that."""
    (tmp_path / "counting.py").write_text(
        "made = []\nclass Base:\n"
        "    def __init_subclass__(cls):\n        made.append(cls.__name__)\n"
    )
    body = """
        import counting
        class Child(counting.Base):
            shared = 1
        def look(x):
            import gc
            gc.collect()  # what nothing holds between two tasks is gone
            return counting.made, x.shared
        def after(value):
            Child.shared = value
            return Child()
    """
    asked = "[ask(look, Child()), ask(look, Child()), ask(look, after(5)), counting.made]"

    once = ["Child"]
    assert run(body, asked, tmp_path) == [[once, 1], [once, 1], [once, 5], once]


@pytest.mark.parametrize("main", ["value", "run"])
def test_a_class_that_is_made_later_is_filled_in_once(main: str, tmp_path: Path) -> None:
    """Also where the worker has the base class by running the script."""
    body = """
        class Base:
            made = []
            def __init_subclass__(cls):
                Base.made.append(cls.__name__)
        class One(Base):
            pass
        def look(*instances):
            return list(Base.made)
        def later():
            class Local(Base):
                pass
            return Local()
    """

    told = [["One"], ["One", "Local"]]
    assert run(body, "[ask(look), ask(look, later())]", tmp_path, main=main) == told


def test_a_class_is_registered_with_abstract_classes_of_modules(tmp_path: Path) -> None:
    """Those of the standard library, and those that the script has by name.

    A class that is registered with another one does not make a module warn of old names.
    """
    (tmp_path / "shapes.py").write_text(
        "import abc\nclass Shape(abc.ABC):\n    pass\n"
        "class Old(abc.ABC):\n    pass\n_Old = Old\ndel Old\n"
        "def __getattr__(name):\n"
        "    raise DeprecationWarning(name) if name == 'Old' else AttributeError(name)\n"
    )
    body = """
        import collections.abc, numbers
        from shapes import Shape as Abstract, _Old
        @Abstract.register
        @collections.abc.Sequence.register
        class Registered:
            pass
        class Other:
            pass
        numbers.Number.register(Other)
        def ask_all(*things):
            kinds = Abstract, collections.abc.Sequence, numbers.Number
            return [[isinstance(thing, kind) for kind in kinds] for thing in things]
    """

    told = [[True, True, False], [False, False, True]]
    assert run(body, "ask(ask_all, Registered(), Other())", tmp_path) == told


# One row per code of the script that runs when a class is made: what fills a list ``made``.
HOOKS: dict[str, str] = {
    "__init_subclass__": """
        class Base:
            made = []
            def __init_subclass__(cls, **words):
                super().__init_subclass__(**words)
                Base.made.append(cls.__name__)
        made = Base.made
    """,
    "__init_subclass__, a global": """
        made = []
        class Base:
            def __init_subclass__(cls):
                made.append(cls.__name__)
    """,
    "a metaclass": """
        class Meta(type):
            made = []
            def __new__(meta, name, bases, namespace):
                kind = super().__new__(meta, name, bases, namespace)
                if bases:
                    meta.made.append(name)
                return kind
        class Base(metaclass=Meta):
            pass
        made = Meta.made
    """,
    "a metaclass's __init__": """
        class Meta(type):
            def __init__(cls, name, bases, namespace):
                super().__init__(name, bases, namespace)
                if bases:
                    cls.made.append(name)
                else:
                    cls.made = []
        class Base(metaclass=Meta):
            pass
        made = Base.made
    """,
    "a metaclass of an abstract class": """
        import abc
        made = []
        class Meta(abc.ABCMeta):
            def __new__(meta, name, bases, namespace):
                made.extend([name] if bases else [])
                return super().__new__(meta, name, bases, namespace)
        class Base(metaclass=Meta):
            pass
    """,
    "enumerations": """
        import enum
        made = []
        class Base(enum.Enum):
            def __init_subclass__(cls):
                made.append(cls.__name__)
    """,
}


@pytest.mark.parametrize("main", ["value", "run"])
@pytest.mark.parametrize("hook", HOOKS)
def test_what_classes_have_filled_when_they_were_made_is_there_once(
    hook: str, main: str, tmp_path: Path
) -> None:
    body = f"""
{textwrap.dedent(HOOKS[hook])}
class One(Base):
    X = 1
class Two(Base):
    X = 2
def look():
    class Three(Base):
        X = 3
    return made, [kind.__name__ for kind in (One, Two)]
"""
    asked = "[ask(look), made]"

    told = [[["One", "Two", "Three"], ["One", "Two"]], ["One", "Two"]]
    assert run(body, asked, tmp_path, main=main) == told


# One row per place where something hides that no pickler can send: the call, and where the
# error says that it is.
HIDDEN: dict[str, tuple[str, str]] = {
    "a global": ("use, 1", "It is global 'lock' of __main__.use"),
    "a global of a global": (
        "outer, 1",
        "It is global 'lock' of __main__.use of global 'use' of __main__.outer",
    ),
    "a closure": ("around(), 1", "It is variable 'hidden' around __main__.around.<locals>.inside"),
    "an argument": ("abs, {'a': [1, lock]}", "It is item 1 of item 'a' of argument 0"),
    "an attribute": ("back, Holder()", "It is attribute 'held' of a Holder of argument 0"),
    "a class": (
        "back, Class()",
        "It is attribute 'held' of class Class of the class of argument 0",
    ),
    "a method": (
        "Holder().method",
        "attribute 'held' of a Holder of the object of method 'method'",
    ),
    "a partial": ("functools.partial(back, lock)", "It is argument 0"),
    "no function at all": ("lock, 1", "while the call of"),
    "a cache": ("cached, 1", "global 'lock' of __main__.cached of the wrapped function"),
}


def test_an_error_says_where_in_the_program_it_is(tmp_path: Path) -> None:
    body = """
        import functools, threading, traceback
        lock = threading.Lock()
        def use(x):
            with lock:
                return x
        def outer(x):
            return use(x)
        def around():
            hidden = threading.Lock()
            def inside(x):
                return hidden, x
            return inside
        def back(x):
            return x
        class Holder:
            def __init__(self):
                self.held = threading.Lock()
            def method(self):
                pass
        class Class:
            held = threading.Lock()
        @functools.cache
        def cached(x):
            return lock, x
        def errors_of(pool, *call):
            errors = [pool.submit(*call).exception(timeout=60)]
            if len(call) > 1:
                try:
                    list(pool.map(*call[:1], call[1:]))
                except Exception as error:
                    errors.append(error)
            return ["".join(traceback.format_exception_only(error)) for error in errors]
    """
    calls = {place: f"errors_of(pool, {call})" for place, (call, _) in HIDDEN.items()}

    for place, (first, *others) in run_each(body, calls, tmp_path).items():
        words = HIDDEN[place][1]
        assert "cannot pickle '_thread.lock' object" in first, place
        assert words in first, place
        # In map the function and each item are pickled by themselves: another end of the way.
        assert all(words.split(" of argument")[0] in other for other in others), place


def test_a_shared_object_is_a_global_under_its_own_name(tmp_path: Path) -> None:
    """A worker unpickles it once, however many calls use it; the program has it as ``value``."""
    body = """
        import os
        class Table(dict):
            made = []
            def __setstate__(self, state):
                self.made.append(os.getpid())
        table = Table({1: "one"})
        table.told = True
        table = safepool.share(table)
        def look(n):
            return table[n], len(table.made)
    """
    asked = "[[ask(look, 1), ask(look, 1)], list(pool.map(look, [1, 1])), table.value[1]]"

    once = ["one", 1]
    assert run(body, asked, tmp_path) == [[once, once], [once, once], "one"]


@pytest.mark.parametrize("method", ["safepool", "loky", "spawn"])
def test_a_function_of_a_package_that_is_run_imports_from_it(method: str, tmp_path: Path) -> None:
    """``python -m package``: a relative import in a function of its ``__main__``."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("value = 7\n")
    body = "def late(x):\n    from .beside import value\n    return value + x\n"
    asked = "[ask(late, 1), list(pool.map(late, [2]))]"
    (package / "__main__.py").write_text(
        FRAME.format(body=body, asked={"": asked}, method=method, main="auto")
    )

    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "package"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"": [8, [9]]}


def test_an_error_says_how_workers_get_what_multiprocessing_has_made(tmp_path: Path) -> None:
    """A global lock is there in a forked worker of the standard pool; here it is handed over."""
    body = """
        import multiprocessing
        def use(x):
            return shared, x
        def notes(made):
            global shared
            shared = made
            return pool.submit(use, 1).exception(timeout=60).__notes__
    """
    kinds = ["Lock()", 'Value("i")', "Queue()", "Event()"]
    asked = {made: f"notes(multiprocessing.{made})" for made in kinds}

    for made, notes in run_each(body, asked, tmp_path).items():
        note = "\n".join(notes)  # from Python 3.14 on beside pickle's own
        assert "global 'shared' of __main__.use" in note, made
        assert "initargs=" in note, made
