"""Objects arrive as they were, by reference or by value, buffers uncopied."""

from __future__ import annotations

import collections
import functools
import pickle
import subprocess
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pytest
import support_tasks

from safepool import ProcessPool
from safepool.pool.calls.mains import is_plain
from safepool.transport.descriptors import are_beyond
from safepool.transport.held import modules_by_value
from safepool.transport.payloads import dumps, loads

if TYPE_CHECKING:
    from pathlib import Path


def round_trip(value: object) -> Any:
    # Copied, as a channel does: what arrives is memory of its own.
    return loads([bytearray(segment) for segment in dumps(value)])


@pytest.mark.parametrize(
    "value",
    [None, 3, "text", b"", {"a": [1, (2, 3)]}, collections.OrderedDict(a=1), "says __main__"],
    ids=repr,
)
def test_plain_values_arrive_equal(value: object) -> None:
    assert round_trip(value) == value


def test_what_another_thread_is_about_to_import_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its module is there, and empty yet: the scheduler's thread looks at it with each task."""
    for name in ("cloudpickle", "numpy", "ctypes", "multiprocessing.reduction"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    assert (modules_by_value(), are_beyond(), is_plain([1])) == (set(), False, False)
    assert round_trip({"a": [1, 2]}) == {"a": [1, 2]}


def test_what_is_known_to_travel_by_value_is_pickled_once() -> None:
    """A reducer with side effects runs once, as with every other pickler."""
    reduced: list[int] = []

    class Counted:
        def __reduce__(self) -> tuple[Any, ...]:
            reduced.append(1)
            return int, ()

    dumps((lambda: 3, Counted()), by_value=True)
    assert reduced == [1]


def test_importable_functions_travel_by_reference() -> None:
    """A function that the worker can import is a name, not a copy of its code."""
    assert round_trip(support_tasks.square) is support_tasks.square
    assert len(dumps(support_tasks.square)[0]) < 100


def test_closures_partials_and_lambdas_travel_by_value() -> None:
    offset = 10

    def shifted(x: int) -> int:
        return x + offset

    assert round_trip(shifted)(1) == 11
    assert round_trip(functools.partial(shifted, 5))() == 15
    assert round_trip(lambda: offset)() == 10


def test_large_arrays_travel_out_of_band_and_arrive_writable() -> None:
    """The pickle holds no array; the array is a view of the segment it came in."""
    array = np.arange(100_000.0).reshape(100, 1000)
    pickled, *buffers = dumps([array, array.T])

    assert len(pickled) < 1000
    assert [memoryview(buffer).nbytes for buffer in buffers] == [array.nbytes, array.nbytes]
    assert memoryview(buffers[0]).obj is not None

    first, second = round_trip([array, array.T])
    np.testing.assert_array_equal(first, array)
    np.testing.assert_array_equal(second, array.T)
    assert second.flags.f_contiguous
    first[0, 0] = 5


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0),
        np.zeros((0, 3)),
        np.arange(100_000)[::2],
        np.array([{"an": "object"}], dtype=object),
        np.arange(10).astype(">i4"),
    ],
    ids=["empty", "empty with a shape", "strided", "of objects", "big-endian"],
)
def test_odd_arrays_arrive_equal(array: Any) -> None:
    np.testing.assert_array_equal(round_trip(array), array)


def test_what_cannot_be_pickled_is_named() -> None:
    """The error is the pickler's own and says which type it could not take."""
    with pytest.raises((TypeError, pickle.PicklingError), match="lock"):
        dumps([support_tasks.return_lock()])


def test_modules_registered_by_value_are_sent_by_value() -> None:
    """cloudpickle.register_pickle_by_value holds, as it does with loky."""
    cloudpickle.register_pickle_by_value(support_tasks)
    try:
        assert len(dumps(support_tasks.square)[0]) > 200
    finally:
        cloudpickle.unregister_pickle_by_value(support_tasks)


def test_reducers_registered_with_loky_hold() -> None:
    """Programs teach loky to pickle what pickle cannot; here it works as well."""
    from loky.backend import reduction

    kind = type(support_tasks.return_lock())
    reduction.register(kind, lambda _lock: (str, ("was a lock",)))
    try:
        assert round_trip(support_tasks.return_lock()) == "was a lock"
    finally:
        del reduction._dispatch_table[kind]


class Refuses:
    """An object that cannot be pickled by its own method."""

    def __reduce__(self) -> str:
        raise TypeError("cannot pickle this one")


class Accepts:
    """An object that has a way of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Accepts, ()


@pytest.mark.parametrize("kind", [Refuses, Accepts])
def test_reducers_registered_with_loky_hold_for_classes_with_a_method(kind: Any) -> None:
    """Also after that method has run for a pickle by reference."""
    from loky.backend import reduction

    reduction.register(kind, lambda _: (str, ("by loky",)))
    try:
        assert round_trip([kind(), lambda: 1])[0] == "by loky"
    finally:
        del reduction._dispatch_table[kind]


def test_main_is_another_module_in_another_process(tmp_path: Path) -> None:
    """Functions, classes and instances of a script go by value and come back as its own."""
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import subprocess, sys
        from safepool.transport.payloads import dumps, loads

        class Point:
            def __init__(self, x): self.x = x
        def double(point): return Point(point.x * 2)

        if len(sys.argv) == 1:
            sent = dumps((double, Point(4)))
            code = (
                "import sys; from safepool.transport.payloads import dumps, loads;"
                "f, p = loads([sys.stdin.buffer.read()]);"
                "sys.stdout.buffer.write(dumps(f(p))[0])"
            )
            done = subprocess.run([sys.executable, "-c", code], input=bytes(sent[0]),
                                  capture_output=True, check=True)
            result = loads([done.stdout])
            assert type(result) is Point, type(result)
            print(result.x)
        """)
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("8\n", "")


def test_a_function_by_value_keeps_its_file_and_lines() -> None:
    """A traceback of a worker shows where in the script it was."""
    with ProcessPool(1) as pool:
        error = pool.submit(lambda: 1 / 0).exception(timeout=60)

    assert error is not None
    shown = str(error.__cause__)
    assert f'File "{__file__}"' in shown
    assert "pool.submit(lambda: 1 / 0)" in shown
