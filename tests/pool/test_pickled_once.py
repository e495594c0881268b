"""Methods for pickling run as often, and in the same order, as with the standard pool.

Such a method may give something away, count, or take long. Each pool has a program of its own,
since some classes are the script's.
"""

from __future__ import annotations

import collections
import datetime as dt
import gc
import json
import os
import pickle
import textwrap
from pathlib import Path
from typing import Any

import pytest
import support_counted as counted
from support_programs import run_program

from safepool.pool.calls.mapping import MapRun
from safepool.pool.calls.pickling import Pickling
from safepool.pool.core.policy import Policy
from safepool.transport import payloads
from safepool.transport.reductions import Reductions

TESTS = Path(__file__).parent.parent

PROGRAM = """
    import concurrent.futures
    import functools
    import json
    import multiprocessing
    import sys

    import support_counted as counted
    from support_counted import SHAPES, build, deep, take_calls, throw

    exec(counted.SOURCE, globals())

    KINDS = "Reduced Stated Refilled Registered Interned Slotted ReducedError Single Colour"
    MADE = {
        "Refilled": "lambda mark: {0}Refilled({{1: mark, 2: [mark]}})",
        "Single": "lambda mark: {0}ONLY",
        "Colour": "lambda mark: {0}Colour.RED",
    }
    WITH_PARTS = ("Reduced", "Stated", "Registered", "Slotted")
    # Of the other classes.
    MOST_ALIKE = ("submit", "map of many", "result")
    MOST_SHAPES = ("of a module", "of the script", "mixed", "in each other")
    # After the first error of a map, what is pickled of the others is a matter of time.
    OF_ONE_CALL = ("submit", "a keyword", "a function of Python's", "a partial", "map")

    class Plain:
        pass

    def nothing(*values, **named):
        return None

    WAYS = {
        "submit": lambda pool, one: pool.submit(nothing, one(1)),
        "a keyword": lambda pool, one: pool.submit(nothing, x=one(1)),
        "a function of Python's": lambda pool, one: pool.submit(str, one(1)),
        "a partial": lambda pool, one: pool.submit(functools.partial(nothing, one(1))),
        "map": lambda pool, one: pool.map(nothing, [one(1)]),
        "map of many": lambda pool, one: pool.map(nothing, [one(n) for n in (1, 2, 3, 4)]),
        "map of two": lambda pool, one: pool.map(nothing, [one(1), one(2)], [one(3), one(4)]),
        "map of one object": lambda pool, one: pool.map(nothing, [one(1)] * 3),
        "chunks": lambda pool, one: pool.map(nothing, [one(n) for n in (1, 2, 3)], chunksize=2),
        "chunks of one object": lambda pool, one: pool.map(nothing, [one(1)] * 3, chunksize=2),
    }

    def maker(prefix, kind):
        return eval(MADE.get(kind, "{0}" + kind).format(prefix))

    def end(asked):
        try:
            if hasattr(asked, "result"):
                return type(asked.result(timeout=60)).__name__
            return [type(one).__name__ for one in asked]
        except Exception as error:
            return f"{type(error).__name__}: {error}".partition(" at 0x")[0]

    def new(how, **options):
        if how == "standard":
            context = multiprocessing.get_context("spawn")
            return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, **options)
        import safepool
        return safepool.ProcessPool(1, main=how, **options)

    def rows(pool):
        for kind in KINDS.split():
            kinds = maker("counted.", kind), maker("", kind)
            for shape in SHAPES:
                if shape == "in each other" and kind not in WITH_PARTS:
                    continue
                for way, ask in WAYS.items():
                    if shape == "beside a lock" and way not in OF_ONE_CALL:
                        continue
                    if kind == "Reduced" or (way in MOST_ALIKE and shape in MOST_SHAPES):
                        one = lambda mark: build(shape, *kinds, mark, nothing)
                        yield f"{kind}, {shape}, {way}", ask, one
                if kind in MADE or kind == "ReducedError" or shape not in MOST_SHAPES:
                    continue
                asked = shape, *kinds, 1, nothing
                yield f"{kind}, {shape}, result", lambda pool, _: pool.submit(build, *asked), None
                if shape != "beside a lock":  # here it is the error, without the lock
                    ask = lambda pool, _: pool.submit(throw, *asked)
                    yield f"{kind}, {shape}, raised", ask, None
        for kind in (counted.Reduced, Reduced):
            home = kind.__module__
            yield f"a method of {home}", lambda pool, one: pool.submit(one(1).method), kind
            yield f"an object of {home}", lambda pool, one: pool.submit(one(1)), kind
        for bottom in (1, nothing, Plain()):
            row = f"a deep value above {type(bottom).__name__}"
            yield row, lambda pool, one: pool.submit(nothing, one(1)), lambda _: deep(bottom)
            yield f"{row}, result", lambda pool, _: pool.submit(deep, bottom), None
        for kind in (counted.Failing, Failing, counted.Refusing, Refusing):
            def one(mark):
                return [counted.Reduced(mark), Reduced(-mark), kind(), counted.Reduced(0)]
            for way in ("submit", "map"):
                yield f"{kind.__module__}.{kind.__name__}, {way}", WAYS[way], one

    def tell(how):
        told = {}
        with new(how) as pool:
            pool.submit(nothing).result()
            for row, ask, one in rows(pool):
                made = {}
                values = one and (lambda mark: made.setdefault(mark, one(mark)))
                if values is not None:
                    for mark in (1, 2, 3, 4):
                        values(mark)
                take_calls()
                outcome = end(ask(pool, values))
                told[row] = take_calls(), pool.submit(take_calls).result(), outcome
        for shape in ("of a module", "mixed", "in each other"):
            value = build(shape, counted.Reduced, Reduced, 1, nothing)
            take_calls()
            with new(how, initializer=counted.begin, initargs=(value,)) as pool:
                begun = pool.submit(take_calls).result()
            # Others are parts of the script, which are sent too.
            told[f"Reduced, {shape}, initargs"] = [
                [one for one in calls if "Reduced" in one] for calls in (take_calls(), begun)
            ] + [None]
        return told

    if __name__ == "__main__":
        print(json.dumps(tell(sys.argv[1])))
"""


def told(how: str, folder: Path) -> dict[str, list[Any]]:
    """Return the calls in the program and in the worker, and the outcome, by row."""
    program = folder / f"{how}.py"
    program.write_text(textwrap.dedent(PROGRAM))
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = run_program(program, how, cwd=folder, timeout_s=300, env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The same of the standard pool."""
    return told("standard", tmp_path_factory.mktemp("standard"))


@pytest.mark.parametrize("main", ["run", "value"])
def test_methods_for_pickling_run_as_with_the_standard_pool(
    main: str, standard: dict[str, list[Any]], tmp_path: Path
) -> None:
    """In program and worker, in the same order; an error of such a method is raised once."""
    ours = told(main, tmp_path)

    assert len(standard) > 150
    assert ours.keys() == standard.keys()
    for row, (_, begun, _) in ours.items():
        if row.endswith("raised"):
            # A worker finds out whether an error can be unpickled: what that calls comes last.
            del begun[len(standard[row][1]) :]
    wrong = {row: (found, standard[row]) for row, found in ours.items() if found != standard[row]}
    assert wrong == {}


MEMBERS = """
    import enum
    import functools
    import safepool
    from support_counted import Reduced, take_calls

    class Own(Reduced):
        pass

    def scale(x):
        return FACTOR * x

    FACTOR = 1

    class Colour(enum.Enum):
        RED = [Own(1)]
        BLUE = {"x": Reduced(2)}
        GREEN = (3, [Own(3)])
        SCALED = ("x", functools.partial(scale, 2))

        def times(self):
            return self.value[1]()

    def look():
        return Colour.RED.value[0].mark, Colour.SCALED.times(), take_calls()

    if __name__ == "__main__":
        FACTOR = 10
        Colour.RED.value[0].mark = 5
        take_calls()
        with safepool.ProcessPool(1, main="run") as pool:
            for _ in range(3):
                print(*pool.submit(look).result())
        print(take_calls())
"""


def test_members_of_a_script_s_enumeration_are_the_worker_s_own(tmp_path: Path) -> None:
    """Whatever they hold: no method of it runs. Functions that they hold have their globals."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(MEMBERS))
    env = {**os.environ, "PYTHONPATH": str(TESTS)}

    done = run_program(program, cwd=tmp_path, env=env)

    made = ["Own1.__init__", "Reduced2.__init__", "Own3.__init__"]
    lines = [f"1 20 {made}", *["1 20 []"] * 2, "[]"]
    assert done.stdout.splitlines() == lines, done.stderr


def drawn(items: list[object], at_once: int | None) -> tuple[MapRun, Any]:
    """Return a map, and its only span."""
    run = MapRun(len, "len", Policy(), at_once, starred=False)
    return run, run.draw(items)


@pytest.mark.parametrize("at_once", [None, 3])
def test_calls_that_are_sent_again_keep_what_their_methods_have_returned(
    at_once: int | None,
) -> None:
    """To another worker, in another way, alone: the methods have run."""
    run, span = drawn([[counted.Reduced(n)] for n in range(3)], at_once)
    pickling = Pickling(None)
    counted.take_calls()

    first = pickling.span(span)
    again = pickling.span(span)
    rest = span.split(1)
    others = [pickling.span(one) for one in (span, rest, rest.only(0))]

    assert counted.take_calls() == [f"Reduced{n}.__reduce__" for n in range(3)]
    assert [*map(bytes, first.segments)] == [*map(bytes, again.segments)]
    assert all(one.segments for one in others)
    run.put(0, [None, None])
    run.put_error(2, ValueError())
    assert run.reductions == {}


def test_an_item_that_fails_is_asked_once() -> None:
    """Also when it is tried alone, after the others with which it was to travel."""
    _, span = drawn([[counted.Reduced(1)], counted.Failing()], None)
    pickling = Pickling(None)
    counted.take_calls()

    assert not pickling.span(span).segments
    assert pickling.span(span.only(0)).segments
    with pytest.raises(ZeroDivisionError, match="not for others"):
        pickling.span(span.only(1))
    assert counted.take_calls() == ["Reduced1.__reduce__", "Failing0.__reduce__"]


@pytest.mark.parametrize("at_once", [None, 2])
def test_calls_with_the_same_object_have_an_error_each(at_once: int | None) -> None:
    """The second is not what the search for the first one's culprit has met."""
    refusing = counted.Refusing()
    run, span = drawn([refusing, [refusing]], at_once)
    pickling = Pickling(None)
    errors: list[Any] = []

    assert not pickling.span(span).segments
    for place in range(2):
        with pytest.raises(TypeError, match="cannot pickle this one") as raised:
            pickling.span(span.only(place))
        assert raised.traceback[-1].name == "__reduce__"
        errors.append(raised.value)

    assert [len(error.__notes__) for error in errors] == [1, 1]
    assert run.reductions == {}


def test_nothing_is_kept_for_objects_that_run_no_code_of_the_program() -> None:
    """They are many, and their results would stay until the call has ended."""
    done = Reductions()
    values = [dt.date(2026, 11, 30), collections.deque([1]), OSError(2, "no"), lambda: 1]

    payloads.dumps(values, reductions=done)

    assert not done


def test_nothing_is_kept_for_a_map_that_nobody_reads() -> None:
    run, span = drawn([[counted.Reduced(1)]], None)
    pickling = Pickling(None)
    assert pickling.span(span).segments
    assert run.reductions

    run.drop()
    assert pickling.span(span).segments

    assert run.reductions == {}


class Lends:
    """Hands over its own memory."""

    def __init__(self, how: str) -> None:
        self.memory = bytearray(8)
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        lent = pickle.PickleBuffer(self.memory)
        if self.how == "argument":
            return bytearray, (lent,)
        return Lends, ("",), {"memory": lent} if self.how == "attribute" else lent


@pytest.mark.parametrize("how", ["argument", "attribute", "state"])
def test_memory_is_not_lent_longer_than_it_is_pickled(how: str) -> None:
    """The program may go on to fill the buffer while the call waits for its result."""
    lending = Lends(how)
    run, span = drawn([lending], None)

    assert Pickling(None).span(span).segments

    assert run.reductions == {}
    gc.collect()
    lending.memory += b"more"


@pytest.mark.parametrize("base", [dict, list, set, frozenset, collections.deque])
def test_a_container_is_iterated_once(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own method, which may take something out."""
    begun = []

    def iterate(one: Any) -> Any:
        begun.append(one)
        return base.__iter__(one)

    names = {"__iter__": iterate, "items": lambda one: iterate(one) and base.items(one)}
    kind = type("Iterated", (base,), {**names, "__module__": __name__})
    value = kind([(1, 2)])
    monkeypatch.setitem(globals(), "Iterated", kind)

    segments = payloads.dumps([value, lambda: 1])

    assert begun == [value]
    assert payloads.loads(segments)[0] == value


class Yields(dict[Any, Any]):
    """Hands over its items one by one, and fails at the last."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, self._pairs()

    def _pairs(self) -> Any:
        yield 1, counted.Reduced(1)
        raise LookupError("no more")


def test_items_that_end_in_an_error_are_not_sent_without_the_rest() -> None:
    """A copy of the iterator would end where the error was."""
    with pytest.raises(LookupError, match="no more"):
        payloads.dumps([Yields(), lambda: 1])


@pytest.mark.parametrize("at_once", [None, 2])
def test_items_that_end_in_an_error_do_so_again(at_once: int | None) -> None:
    """The call is sent alone after it was to travel with others: not with a part of its items."""
    _, span = drawn([[1], Yields()], at_once)
    pickling = Pickling(None)
    counted.take_calls()

    assert not pickling.span(span).segments
    assert pickling.span(span.only(0)).segments
    with pytest.raises(LookupError, match="no more"):
        pickling.span(span.only(1))
    assert counted.take_calls() == ["Reduced1.__init__"]


def test_items_that_end_in_an_interrupt_are_asked_for_again() -> None:
    """Not with the first ones only."""
    done = Reductions()
    stops = [KeyboardInterrupt]

    class Interrupted(dict[Any, Any]):
        def __reduce__(self) -> tuple[Any, ...]:
            return dict, (), None, None, self._pairs()

        def _pairs(self) -> Any:
            yield 1, 2
            while stops:
                raise stops.pop()
            yield 3, 4

    value = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        payloads.dumps(value, reductions=done)
    assert payloads.loads(payloads.dumps(value, reductions=done)) == {1: 2, 3: 4}


def test_the_search_for_the_culprit_asks_nobody_again() -> None:
    """It pickles the parts of the value, whose methods have run."""
    _, span = drawn([{"a": [counted.Reduced(1), counted.Refusing()]}], None)
    counted.take_calls()

    with pytest.raises(TypeError, match="cannot pickle this one") as raised:
        Pickling(None).span(span)

    assert counted.take_calls() == ["Reduced1.__reduce__", "Refusing0.__reduce__"]
    assert "item 1 of item 'a'" in raised.value.__notes__[0]


def test_the_search_in_an_item_does_not_ask_the_function_again() -> None:
    """It was pickled before, and sent."""
    asked = counted.Reduced(1)
    run = MapRun(asked.method, "method", Policy(), None, starred=False)
    span: Any = run.draw([[counted.Refusing()]])
    counted.take_calls()

    with pytest.raises(TypeError, match="cannot pickle this one") as raised:
        Pickling(None).span(span)

    assert counted.take_calls() == ["Reduced1.__reduce__", "Refusing0.__reduce__"]
    assert "item 0 of argument 0" in raised.value.__notes__[0]
