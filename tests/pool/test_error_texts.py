"""What an error of a call tells beside its own words: which call, what in it, and whose lines."""

from __future__ import annotations

import operator
import re
import threading
import traceback
from typing import TYPE_CHECKING, Any

import support_error_texts as texts

import safepool
from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = re.compile(r'File ".*/(safepool|cloudpickle)/')

RESULT = "while the result of support_error_texts.{} was pickled"
CALL = "while the call of support_error_texts.{} was pickled, with its arguments"

# One row per thing that cannot be pickled: the function, what it is given, how the note begins,
# and how it goes on.
UNPICKLED: dict[str, tuple[Callable[[Any], object], Any, str, str]] = {
    "an item of a result": (texts.lock_in_dict, 1, RESULT, ". It is item 1 of item 'a'"),
    "an attribute of a result": (
        texts.hold,
        1,
        RESULT,
        ". It is item 1 of item 'locks' of attribute 'held' of a Holder",
    ),
    "the result itself": (texts.lock, 1, RESULT, ""),
    "a result that refuses": (texts.refuse, 1, RESULT, ""),
    "an argument": (texts.first, threading.Lock(), CALL, ". It is argument 0"),
    "an item": (texts.either, [1, threading.Lock()], CALL, ". It is item 1 of argument 0"),
}


def error_of(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("it has not failed")


def note_of(error: Any) -> str:
    """Return our note; from 3.14 on the pickler has its own before it."""
    (note,) = [one for one in error.__notes__ if not one.startswith("when serializing")]
    return str(note)


def test_what_cannot_be_pickled_is_told_of_results_as_of_arguments() -> None:
    """By submit() and by map(), alone and among other calls of a batch."""
    with ProcessPool(1) as pool:
        for row, (function, item, what, end) in UNPICKLED.items():
            begin = what.format(function.__name__)
            calls: dict[str, Callable[[], object]] = {
                "submit": pool.submit(function, item).result,
                "map": lambda f=function, x=item: [*pool.map(f, [x])],  # type: ignore[misc]
                "a chunk": lambda f=function, x=item: [*pool.map(f, [x] * 3, chunksize=3)],  # type: ignore[misc]
            }
            for how, call in calls.items():
                error: Any = error_of(call)
                # What in it is looked for a few times only.
                expected = {begin + end, begin if how == "a chunk" else begin + end}
                note = note_of(error)
                assert note in expected, (row, how)
                if "the result" in begin:
                    assert note in str(error.__cause__), (row, how)


def test_many_results_that_cannot_be_pickled_are_not_each_looked_into() -> None:
    """A worker has other calls to do."""
    with ProcessPool(1) as pool:
        futures = [pool.submit(texts.lock_in_dict, n) for n in range(9)]
        notes = [note_of(future.exception(timeout=60)) for future in futures]
    found = ["It is item 1" in note for note in notes]
    assert found == [True] * 3 + [False] * 6


# One row per error of a call: the function, and the first of its lines.
RAISED: dict[str, tuple[Callable[[Any], object], object, str]] = {
    "a function": (texts.fail, 1, "in fail\n"),
    "a decorated function": (texts.fail_decorated, 1, "in fail_decorated\n"),
    "the pickling of a result": (texts.refuse, 1, "in __reduce__\n"),
    "the unpickling of an argument": (texts.fail, texts.RefusesToArrive(), "in _give_up\n"),
}


def test_the_remote_traceback_begins_with_the_programs_own_lines() -> None:
    with ProcessPool(1) as pool:
        for row, (function, item, first) in RAISED.items():
            for call in (
                pool.submit(function, item).result,
                lambda f=function, x=item: [*pool.map(f, [x])],  # type: ignore[misc]
            ):
                error = error_of(call)
                assert isinstance(error, texts.RefusesError), row
                cause = str(error.__cause__)
                assert cause.split("File ")[1].partition("\n")[0].endswith(first.strip()), cause
                assert not OURS.search(cause), cause


def test_here_a_single_line_of_ours_is_left() -> None:
    """Whether a worker has raised it, or the pickling of an argument."""
    with ProcessPool(1) as pool:
        for function, item in ((texts.fail, 1), (texts.first, texts.Refuses())):
            for call in (
                pool.submit(function, item).result,
                lambda f=function, x=item: [*pool.map(f, [x])],  # type: ignore[misc]
            ):
                error = error_of(call)
                error.__cause__ = None
                here = "".join(traceback.format_exception(error))
                assert len(OURS.findall(here)) <= 1, here


# One row per map whose items look like the arguments of calls: the function, the items, and
# whether the error has a hint.
PAIRS: dict[str, tuple[Callable[..., Any], list[Any], bool]] = {
    "pairs": (texts.add, [(1, 2), (3, 4)], True),
    "lists": (texts.add, [[1, 2]], True),
    "a builtin function": (operator.add, [(1, 2)], True),
    "a function of one argument": (texts.first, [(1, 2)], False),
    "a function that takes one or two": (texts.either, [(1, 2)], False),
    "triples": (texts.add, [(1, 2, 3)], False),
    "numbers": (texts.add, [1, 2], False),
}


def test_pairs_for_a_function_of_two_arguments_get_a_hint() -> None:
    with ProcessPool(1) as pool:
        for row, (function, items, has) in PAIRS.items():
            error: Any = error_of(lambda: [*pool.map(function, items)])  # noqa: B023
            notes = "\n".join(getattr(error, "__notes__", ()))
            assert isinstance(error, TypeError), row
            assert notes.endswith("map(function, *zip(*items))") == has, (row, notes)
    with safepool.Pool(1) as standard:
        for row, (function, items, has) in PAIRS.items():
            for call in (standard.map, lambda *given: [*standard.imap(*given)]):
                error = error_of(lambda: call(function, items))  # noqa: B023
                notes = "\n".join(getattr(error, "__notes__", ()))
                assert notes.endswith("write starmap(function, items)") == has, (row, notes)


def test_a_coroutine_that_is_given_in_the_place_of_its_function_gets_a_hint() -> None:
    async def service() -> None: ...

    given: Any = service()
    with ProcessPool(1) as pool:
        error = error_of(pool.submit(given).result)
    given.close()
    # Python 3.14 notes what it was pickling, too.
    assert any(note.endswith("pass its function and its arguments") for note in error.__notes__)
