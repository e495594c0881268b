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
from support_processes import run_python, run_script

from safepool.pool.calls.walk import components

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
    "classes that a task returns, themselves or an object": (
        """
        class Returned:
            class Inner:
                pass
        def back(one):
            return one
        """,
        "len({Returned, ask(back, Returned), Returned.Inner, type(ask(back, Returned.Inner()))})",
        [2],
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
    "what the program deletes": (
        """
        import ctypes
        class Meta(type):
            def __delattr__(cls, name):
                assert Meta is None, "no code of the program's is run"
        class Config(metaclass=Meta):
            debug = True
            def method(self):
                return 1
        class Structure(ctypes.Structure):
            debug = method = True
        made, flag = Config(), 1
        def look():
            both = Config, Structure
            there = [name in vars(one) for one in both for name in ("debug", "method")]
            return there, isinstance(made, Config)
        def ask_for_flag():
            return flag
        def delete():
            global flag
            for name in ("debug", "method"):
                type.__delattr__(Config, name)
                delattr(Structure, name)
            del flag
        def is_there():
            try:
                return bool(ask_for_flag())
            except NameError:
                return False
        """,
        "ask(look); ask(is_there); delete(); ask(look); ask(is_there)",
        [([True] * 4, True), True, ([False] * 4, True), False],
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
    "a library of C, and its functions": (
        """
        import ctypes
        library = ctypes.CDLL(None, use_errno=True)
        library.labs.argtypes = [ctypes.c_long]
        library.labs.restype = ctypes.c_long
        to_number = library.atoi
        to_number.argtypes = [ctypes.c_char_p]
        def call(x):
            library.labs.errcheck = lambda got, *_: got + x
            return library.labs(-(2**40)) - 2**40, to_number(b"12"), library.abs(-3)
        def types():
            return library.labs.restype is ctypes.c_long, to_number.argtypes[0] is ctypes.c_char_p
        """,
        "ask(types); ask(call, 1); ask(call, 2)",
        [(True, True), (1, 12, 3), (2, 12, 3)],
    ),
    "the module's own __getattr__": (
        """
        import sys
        __all__ = ["late"]
        def __getattr__(name):
            if name == "late":
                return 5
            raise AttributeError(name)
        def ask_main(name):
            return getattr(sys.modules["__main__"], name, None)
        """,
        "ask(ask_main, 'late'); ask(ask_main, 'never')",
        [5, None],
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
    "a class and its object, which come to hold each other": (
        """
        class Held: pass
        held = Held()
        def hold():
            Held.one = held
        def is_held():
            return getattr(Held, "one", None) is held, type(held) is Held
        """,
        "ask(is_held); hold(); ask(is_held); setattr(Held, 'more', 1); ask(is_held)",
        [(False, True), (True, True), (True, True)],
    ),
    "a function that is bound anew while it is pickled": (
        """
        class Binds:
            pickled = 0
            def __reduce__(self):
                Binds.pickled += 1
                if Binds.pickled == 2:  # after the look at it
                    global bound
                    bound = lambda: "new"
                return str, ()
        def bound(binds=Binds()):
            return "old"
        def ask_bound():
            return bound()
        """,
        "ask(ask_bound); ask(ask_bound)",
        ["new", "new"],
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
    "a counter of numbers in a class": (
        """
        import itertools
        class Job:
            numbers = itertools.count(3)
        steps = itertools.count(1.5, 0.5)
        def number():
            return next(Job.numbers), next(steps)
        """,
        "ask(number); ask(number)",
        [(3, 1.5), (4, 2.0)],
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
    "a context variable": (
        """
        import contextvars
        request = contextvars.ContextVar("request", default=3)
        unset = contextvars.ContextVar("unset")
        def context():
            before = request.get()
            request.set(before + 1)
            return before, unset.get("nothing")
        """,
        "ask(context); ask(context)",
        [(3, "nothing"), (4, "nothing")],
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
    "memory that is no array": (
        """
        import array as arrays
        raw, numbers = bytearray(100_000), arrays.array("d", [0.0]) * 20_000
        gaps = numpy.zeros((1000, 100))[:, ::2]
        text_items = numpy.array(["a", "b"], dtype=object)
        def touch():
            raw[5] += 1
            numbers[7] += 1
            gaps[3, 3] += 1
            text_items[1] += "b"
            return raw[5], numbers[7], float(gaps[3, 3]), text_items[1]
        def set_all():
            raw[5] = 10
            numbers[7] = 20
            gaps[3, 3] = 30
            text_items[1] = "c"
        """,
        "ask(touch); ask(touch); set_all(); ask(touch); ask(touch)",
        [
            (1, 1.0, 1.0, "bb"),
            (2, 2.0, 2.0, "bbb"),
            (11, 21.0, 31.0, "cb"),
            (12, 22.0, 32.0, "cbb"),
        ],
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


# What the program changes between the fork of a worker and the first call that needs it: the
# standard pool's forked worker has the earlier value.
NOT_FORKED = {
    "data that is loaded below the guard",
    "a function that is bound anew while it is pickled",
}


@pytest.mark.parametrize(
    ("row", "way"),
    [(row, way) for row in ROWS for way in WAYS if way != "fork" or row not in NOT_FORKED],
)
def test_a_global_is_the_workers_own_from_its_delivery_on(row: str, way: str) -> None:
    assert answers(way)[row] == ROWS[row][2]


def test_circles_are_found() -> None:
    edges = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"], "e": ["e"], "f": ["a", "d"]}

    found = components(edges)

    assert [sorted(circle) for circle in found] == [["e"], ["d"], ["a", "b", "c"], ["f"]]


def run(text: str, folder: Path) -> tuple[str, str]:
    """Run a script without a guard; return what it printed, and its warnings."""
    done = run_script(text, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_a_large_array_is_pickled_once_however_it_is_wrapped(tmp_path: Path) -> None:
    """Also of a class that copies it into its pickle: a sampler calls ``map`` once a step."""
    text = """
    import numpy, safepool
    class Counted(numpy.ndarray):
        pickled = 0
        def __reduce_ex__(self, protocol):
            Counted.pickled += 1
            return super().__reduce_ex__(protocol)
    data = numpy.ones(1 << 18).view(Counted)
    def use(x):
        return float(data[0]) * x
    class Wrapped:
        def __init__(self, function):
            self.function = function
        def __call__(self, x):
            return self.function(x)
    with safepool.ProcessPool(2) as pool:
        found = [list(pool.map(Wrapped(use), [1.0, 2.0])) for _ in range(20)]
        few = Counted.pickled < 5
        data[0] = 3
        print(few, found[-1], list(pool.map(Wrapped(use), [1.0])))
    """
    assert run(text, tmp_path) == ("True [1.0, 2.0] [3.0]", "")


# One row per way to hold a generator of random numbers.
GENERATORS: dict[str, str] = {
    "of NumPy": "import numpy; source = numpy.random.default_rng(5)",
    "of the standard library": "import random; source = random.Random(5)",
    "in an instance": """
    import random
    class Source:
        def __init__(self):
            self.dice = random.Random(5)
        def random(self):
            return self.dice.random()
    source = Source()
    """,
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_that_several_workers_use_is_told_of_once(
    kind: str, workers: int, tmp_path: Path
) -> None:
    """Draws repeat between workers, and never within one."""
    made = textwrap.indent(textwrap.dedent(GENERATORS[kind]).strip(), "    ")
    text = f"""
{made}
    import os, safepool, time
    def draw(_):
        time.sleep(0.01)
        return os.getpid(), source.random()
    with safepool.ProcessPool({workers}) as pool:
        drawn = []
        while len({{pid for pid, _ in drawn}}) < {workers}:
            drawn += pool.map(draw, range(4))
        print(len(drawn) == len(set(drawn)))
    """
    out, warned = run(text, tmp_path)

    assert out == "True"
    assert warned.count("draw the same random numbers from the global source") == workers - 1


# One row per kind of value: how it is made, and what follows its last change.
CHANGED_MEANWHILE: dict[str, tuple[str, str]] = {
    "data": ("{'n': 0}", "print(pool.submit(look).result())"),
    # Its own code might be the reason that two pickles differ: that holds for a moment.
    "an object of the script": (
        "Holder(n=0)",
        "print(1000 * any(pool.submit(look).result() == 1000 for _ in range(10_000)))",
    ),
}


@pytest.mark.parametrize("kind", CHANGED_MEANWHILE)
def test_a_value_that_another_thread_changes_during_each_check_is_not_given_up(
    kind: str, tmp_path: Path
) -> None:
    value, last = CHANGED_MEANWHILE[kind]
    text = f"""
    import safepool
    from safepool.pool.calls import known
    class Holder(dict): pass
    value = {value}
    def look():
        return value["n"]
    check = known.print_of
    def change_and_check(values):
        value["n"] += 1
        return check(values)
    with safepool.ProcessPool(1) as pool:
        pool.submit(look).result()
        known.print_of = change_and_check
        value["n"] += 1
        pool.submit(look).result()
        known.print_of = check
        value["n"] = 1000
        {last}
    """
    out, _ = run(text, tmp_path)

    assert out == "1000"


def test_a_large_global_that_changes_is_told_of_once(tmp_path: Path) -> None:
    text = """
    import numpy, safepool
    data = numpy.zeros(3 << 20)
    def first(_=None):
        return float(data[0])
    with safepool.ProcessPool(1) as pool:
        for step in range(6):
            data[0] = step
            assert pool.submit(first).result() == step
            assert [*pool.map(first, [0])] == [step]
    """
    _, warned = run(text, tmp_path)

    assert warned.count("the global data of the script (24 MiB) is changed between") == 1


def test_finding_out_that_takes_long_is_told_of_once(tmp_path: Path) -> None:
    text = """
    import safepool
    from safepool.pool.calls import known
    known._MUCH_S = 0.0
    table = {"a": 1}
    def look_up():
        return table["a"]
    with safepool.ProcessPool(1) as pool:
        print([pool.submit(look_up).result() for _ in range(3)])
    """
    out, warned = run(text, tmp_path)

    assert out == "[1, 1, 1]"
    assert warned.count("table = safepool.share(table)") == 1


def test_what_cannot_be_pickled_fails_the_calls_that_need_it(tmp_path: Path) -> None:
    """And is told where code asks for it that nobody could foresee."""
    text = """
    import safepool, threading
    lock = threading.Lock()
    def locked():
        with lock:
            return 1
    class Holder:
        own = threading.Lock()
    def free():
        return 2
    def ask_for(name):
        return globals()[name]
    def name_it():
        return eval("Holder")
    with safepool.ProcessPool(1) as pool:
        print(pool.submit(free).result())
        for call in ((locked,), (ask_for, "Holder"), (name_it,)):
            try:
                pool.submit(*call).result()
            except Exception as error:
                print(type(error).__name__, error.__notes__)
        print(pool.submit(free).result())
    """
    out, warned = run(text, tmp_path)

    first, needed, asked, named, last = out.splitlines()
    assert (first, last, warned) == ("2", "2", "")
    assert needed.startswith("TypeError")
    assert "global 'lock' of __main__.locked" in needed
    for told in (asked, named):
        assert "'Holder' of __main__ is not in this worker: TypeError" in told


def test_new_workers_get_the_present_values(tmp_path: Path) -> None:
    text = """
    import safepool
    level = 0
    seen = {}
    def look(_=None):
        seen["calls"] = seen.get("calls", 0) + 1
        return level, seen["calls"]
    with safepool.ProcessPool(1, initializer=look, max_tasks_per_child=2) as pool:
        found = [pool.submit(look).result() for _ in range(3)]
        level = 1
        found += [pool.submit(look).result() for _ in range(3)]
        print(found)
    """
    out, _ = run(text, tmp_path)

    assert out == str([(0, 2), (0, 3), (0, 2), (1, 3), (1, 2), (1, 3)])


def test_a_thread_may_change_what_is_pickled(tmp_path: Path) -> None:
    text = """
    import safepool, threading
    table = {n: object for n in range(20_000)}
    done = threading.Event()
    def change():
        n = 0
        while not done.is_set():
            n += 1
            table[f"key {n % 50_000}"] = n
            table.pop(n % 20_000, None)
    def size():
        return len(table) > 0
    thread = threading.Thread(target=change)
    thread.start()
    try:
        with safepool.ProcessPool(1) as pool:
            print({pool.submit(size).result() for _ in range(20)})
    finally:
        done.set()
    """
    assert run(text, tmp_path) == ("{True}", "")


def test_a_changed_array_does_not_keep_the_former_ones(tmp_path: Path) -> None:
    """Neither memory nor descriptors are kept of what nobody will be sent."""
    text = """
    import numpy, os, safepool
    data = numpy.zeros(1 << 20)
    def first(_=None):
        return float(data[0])
    with safepool.ProcessPool(1) as pool:
        counts = []
        for step in range(12):
            data[0] = step
            pool.submit(first).result()
            list(pool.map(lambda _: data[0], [0]))
            counts.append(len(os.listdir("/proc/self/fd")))
        print(counts[-1] - counts[3] < 3)
    """
    if sys.platform == "linux":
        assert run(text, tmp_path)[0] == "True"


def test_imports_for_their_effect_happen_in_workers(tmp_path: Path) -> None:
    """In the script's order, of modules that no function names; a failing one costs nothing."""
    (tmp_path / "registry.py").write_text("known = []\n")
    (tmp_path / "plugin_b.py").write_text("import registry; registry.known.append('b')\n")
    (tmp_path / "plugin_a.py").write_text("import registry; registry.known.append('a')\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner.py").write_text("import registry; registry.known.append('p')\n")
    (tmp_path / "once.py").write_text(
        "import os\nif os.environ.setdefault('ONCE', str(os.getpid())) != str(os.getpid()):\n"
        "    raise RuntimeError\n"
    )
    text = """
    import os, registry, safepool
    import plugin_b
    import once
    try:
        import plugin_a, nowhere
    except ImportError:
        pass
    from package import inner
    def known():
        return registry.known
    with safepool.ProcessPool(1) as pool:
        print(pool.submit(known).result())
    """
    assert run(text, tmp_path) == ("['b', 'a', 'p']", "")
