"""What is seldom sent: objects and systems that nearly no program has."""

from __future__ import annotations

import ctypes
import datetime as dt
import enum
import errno
import fnmatch
import fractions
import functools
import itertools
import linecache
import os
import pickle
import socket
import sys
import threading
import types
import typing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import safepool
from safepool.transport import (
    by_value,
    exceptions,
    fingerprints,
    held,
    kinds,
    marks,
    memmaps,
    names,
    references,
)
from safepool.transport.annotations import closure_of
from safepool.transport.descriptors import Descriptor
from safepool.transport.fingerprints import UNKNOWN, fingerprint
from safepool.transport.main_names import MainNames
from safepool.transport.payloads import dumps, loads

if TYPE_CHECKING:
    from collections.abc import Callable

LOCK = threading.Lock()


def round_trip(value: object, **how: Any) -> Any:
    return loads([bytearray(segment) for segment in dumps(value, **how)])


# --- objects -----------------------------------------------------------------------------


class Strided:
    """Pickled with a buffer that is not in one piece."""

    def __reduce_ex__(self, _protocol: object) -> tuple[Any, ...]:
        return bytes, (pickle.PickleBuffer(memoryview(b"abcd")[::2]),)


class NoMemory:
    def __reduce__(self) -> tuple[Any, ...]:
        raise MemoryError("of the object itself")


# One row per object that no pickler takes: what is raised.
REFUSED: dict[str, tuple[Callable[[], object], type[Exception]]] = {
    "a buffer with holes": (Strided, pickle.PicklingError),
    "no memory": (NoMemory, MemoryError),
    "a C function by a type of the program": (
        lambda: ctypes.CFUNCTYPE(ctypes.c_int)(("getpid", ctypes.CDLL(None))),
        ValueError,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pickled_says_so_itself(case: str) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(expected):
        dumps(make())


def test_a_count_of_fractions_has_no_text_that_it_can_be_made_of() -> None:
    counter = itertools.count(fractions.Fraction(1, 2))
    with pytest.raises(TypeError, match="count"):
        kinds._reduce_count(counter)


def made_module() -> types.ModuleType:
    module = types.ModuleType("made_by_a_test")
    module.LIMIT = 3  # type: ignore[attr-defined]
    return module


def with_own_dict() -> type:
    return type("Own", (), {"__dict__": property(lambda _: {"a": 1})})


class Simple(ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


def own(kind: type, **attributes: object) -> Any:
    """Make a class of the tests' own that is sent by value."""
    return type(kind)("Own", (kind,), {"__module__": "__main__", **attributes})


def day() -> Any:
    namespace = enum.EnumMeta.__prepare__("Day", (dt.date, enum.Enum))
    namespace["FIRST"] = 2000, 1, 2
    namespace["__module__"] = "__main__"
    return enum.EnumMeta("Day", (dt.date, enum.Enum), namespace)


def counted() -> Callable[[int], object]:
    """A function around one that has nothing in its variable yet, when it is sent."""

    def inner(number: int) -> object:
        return inner if number else later

    reduced = inner
    if not reduced:
        later = 1
    return inner


# One row per object: what is asked of what arrives, whose answer is the same before it is sent.
SENT: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "module that the program has made": (made_module, lambda one: (one.__name__, one.LIMIT)),
    "module whose name is none": (lambda: types.ModuleType(""), lambda one: one.__name__),
    "type variable of a module": (lambda: typing.AnyStr, lambda one: one is typing.AnyStr),
    "class with its own __dict__": (with_own_dict, lambda one: one().__dict__),
    "array of ctypes": (
        lambda: own(ctypes.Array, _type_=ctypes.c_int, _length_=2),
        lambda one: [*one(1, 2)],
    ),
    "number of ctypes": (lambda: own(ctypes.c_int), lambda one: one(3).value),
    "number of ctypes by its base": (
        lambda: own(Simple.__base__, _type_="i"),
        lambda one: one(3).value,
    ),
    "prototype of ctypes": (
        lambda: ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p),
        lambda one: (one._restype_, one._argtypes_),
    ),
    "prototype of ctypes with errno": (
        lambda: ctypes.CFUNCTYPE(ctypes.c_int, use_errno=True),
        lambda one: one._restype_,
    ),
    "enumeration of dates": (day, lambda one: [(member.name, member.day) for member in one]),
    "cache of a module": (
        lambda: fnmatch._compile_pattern,  # type: ignore[attr-defined]
        lambda one: one is fnmatch._compile_pattern,  # type: ignore[attr-defined]
    ),
    "variable that is not set": (counted, lambda one: one(1) is one),
}


@pytest.mark.parametrize("kind", SENT)
def test_it_arrives_as_it_was(kind: str) -> None:
    make, ask = SENT[kind]
    value = make()
    assert ask(round_trip(value, by_value=True)) == ask(value)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="type variables have no defaults")
def test_the_default_of_a_type_variable_arrives() -> None:
    made: Any = {}
    exec("from typing import TypeVar\nT = TypeVar('T', default=int)\ndef f[U = str](): ...", made)
    kind, arguments, words = kinds._about_variable(made["T"])
    assert kinds._make(kind, arguments, words).__default__ is int
    about = kinds._about_variable(made["f"].__type_params__[0])
    assert kinds._declared(*about, "'key', 0") == "U = _part_of('key', 0)[1]['default']"
    assert round_trip(made["f"], by_value=True).__type_params__[0].__name__ == "U"


def test_a_module_that_cannot_be_imported_is_made_again() -> None:
    """Also where its name is none, or is not text."""
    for name in ("made_by_a_test", "", 3):
        module = made_module()
        module.__name__ = name  # type: ignore[assignment]
        kind, (made_of,), state = kinds.reduce_other(module, {})
        assert (kind, made_of, state["LIMIT"]) == (types.ModuleType, name, 3)


def test_what_an_attribute_names_only_for_a_type_checker_is_nothing() -> None:
    class Lazy:
        @property
        def bound(self) -> object:
            raise NameError("Missing")

    assert kinds._ask(Lazy(), "bound") is None


def test_tables_of_what_is_known_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        pass

    monkeypatch.setattr(kinds, "_MOST_PLAIN", 0)
    assert kinds.reduce_other(Plain(), {}) is NotImplemented
    assert kinds._plain == {Plain}

    monkeypatch.setattr(kinds, "_MOST_NUMBERED", 0)
    monkeypatch.setattr(kinds, "_numbers", {})
    monkeypatch.setattr(kinds, "_numbered_objects", {})
    kinds._number_of(Plain())
    assert not kinds._numbers
    assert not kinds._numbered_objects

    monkeypatch.setattr(by_value, "_MOST_KEPT", 1)
    monkeypatch.setattr(by_value, "_kept", {})
    for name in ("first", "second"):
        by_value._keep(types.SimpleNamespace(__qualname__=name, __module__="m"))
    assert [*by_value._kept] == [("m", "second")]

    monkeypatch.setattr(exceptions, "_MOST_KINDS", 0)
    table = exceptions.StandardTable({})
    assert table[int]
    assert not table


def test_an_object_of_a_name_is_filled_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slotted:
        __slots__ = ("__dict__", "slot")

    made: Any = Slotted()
    monkeypatch.setitem(kinds._named_objects, "ONE", made)
    kinds._fill_named(made, ("ONE", ({"a": 1}, {"slot": 2})))
    assert (made.a, made.slot) == (1, 2)
    kinds._fill_named(made, ("ONE", {"a": 3}))
    assert made.a == 3
    kinds._fill_named(Slotted(), ("ONE", {"a": 4}))
    assert made.a == 3


def test_a_cache_that_is_the_programs_own_is_not_filled() -> None:
    @functools.lru_cache
    def cached() -> None:
        """Do nothing."""

    by_value._fill_cache(cached, {"never": 1})
    assert not hasattr(cached, "never")


def test_a_named_object_says_its_name_and_how_it_shows_itself() -> None:
    class Sentinel:
        __name__ = "NOWHERE"

        def __init__(self, name: str, repr: str) -> None:  # noqa: A002
            self.shown = name, repr

    number, make, arguments = kinds._reduce_sentinel(one := Sentinel("NOWHERE", "<it>"))[1]
    assert kinds._numbered_objects[number] is one
    assert make(*arguments).shown[0] == "NOWHERE"


# --- exceptions --------------------------------------------------------------------------


class Hidden:
    def __repr__(self) -> str:
        raise ValueError("it has no text")

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("and no pickle")


def test_an_error_within_an_error_is_looked_at_as_well() -> None:
    left: list[str] = []
    error = ValueError(KeyError(Hidden()))
    sent = exceptions.Sendable(error, pickle.dumps, left)
    found = pickle.loads(pickle.dumps(sent))

    assert isinstance(found.args[0], KeyError)
    assert "Hidden object at" in repr(found.args[0].args[0])
    assert left == ["argument 0 of KeyError: and no pickle"]


@pytest.mark.skipif(sys.version_info < (3, 13), reason="it has no such exception in C")
def test_an_exception_of_c_code_is_pickled_by_itself() -> None:
    import _interpreters  # type: ignore[import-not-found]

    error = _interpreters.InterpreterError("text")
    assert exceptions.reduce_exception(error) is NotImplemented
    assert round_trip(error).args == ("text",)


# --- fingerprints ------------------------------------------------------------------------


def functions(number: int) -> tuple[Any, Any]:
    """Return a cache and a generic function, each made by this call."""

    @functools.lru_cache
    def cached() -> int:
        return number

    @functools.singledispatch
    def generic(_: object) -> int:
        return number

    return cached, generic


def test_values_are_told_from_others_by_all_that_they_are_made_of() -> None:
    first, second = functions(1), functions(2)
    for one, same, other in zip(first, functions(1), second, strict=True):
        assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(bytes(17 << 20)) == UNKNOWN
    assert fingerprint(Strided()) is None
    assert fingerprints.ABSENT not in (UNKNOWN, fingerprint(None))


# --- what modules hold -------------------------------------------------------------------


def test_a_cell_with_commands_of_a_notebook_is_passed_over() -> None:
    space = {"In": ["%matplotlib inline", "from os import environ"]}
    origins = held._Origins([*held.sources_of(space)], space)
    assert origins.names["environ"][0] == ("os", "environ")
    assert held._count_of_sources(space) == 2


def test_lines_that_were_typed_at_a_prompt_are_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    main = vars(sys.modules["__main__"])
    monkeypatch.delitem(main, "__file__", raising=False)
    entry = (9, None, ["x = 1234\n"], "<python-input-7>")
    monkeypatch.setitem(linecache.cache, "<python-input-7>", entry)
    assert [*held.sources_of(main)] == ["x = 1234\n"]


def test_a_relative_import_outside_of_a_package_has_no_name() -> None:
    assert held.absolute("sibling", 1, {}) == ""


def test_what_stands_for_a_module_and_is_none_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "no_module", object())  # type: ignore[arg-type]
    assert "no_module" not in dict(held._namespaces())
    assert not held._is_there("never_imported", "x", 1)


def test_a_container_of_a_module_is_found_under_another_name_unless_it_is_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = sys.modules[__name__]
    few, many = {"a": 1}, {*range(2000)}
    monkeypatch.setattr(here, "FEW", few, raising=False)
    monkeypatch.setattr(here, "MANY", many, raising=False)
    held._looked_at.clear()
    assert held._found_under_another_name(few) == (__name__, "FEW")
    assert held._found_under_another_name(many) is None


def test_the_programs_own_copy_stands_for_what_a_module_has_not() -> None:
    assert held.attribute_of("os", "no_such", "builtins.int", pickle.dumps(3)) == 3
    with pytest.raises(AttributeError, match="initializer="):
        held.attribute_of("os", "no_such", "builtins.int", None)
    assert held._copy_of(bytes(held._MOST_COPIED_BYTES)) is None


# --- names and marks ---------------------------------------------------------------------


def test_attributes_are_looked_at_while_another_thread_changes_them() -> None:
    """A loop over the dictionary itself is ended by an error when it changes its size."""

    class Config:
        pass

    def change(letter: str) -> None:
        for number in itertools.cycle(range(50)):
            if over.is_set():
                return
            name = f"{letter}{number}"
            if hasattr(Config, name):
                delattr(Config, name)
            else:
                setattr(Config, name, number)

    over = threading.Event()
    threads = [threading.Thread(target=change, args=[letter]) for letter in "ab"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        attributes = marks.Attributes(Config)
        for _ in range(5000):
            attributes.are_still()
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)


def test_what_is_not_there_is_said_or_nothing() -> None:
    assert not marks.is_full(types.CellType())
    assert not marks.is_of_main(types.SimpleNamespace(__module__=[]))
    assert marks.Attributes(object()).by_path == {}
    with pytest.raises(AttributeError, match="no_such"):
        marks._from_space("no_such")
    with pytest.raises(NameError, match="no_such"):
        names.of_script("no_such.x")
    assert closure_of(types.FunctionType(functions.__code__, {}), lambda value, _: value) is None


def test_the_mark_of_a_set_in_code_is_the_same_in_each_process() -> None:
    found = {
        marks._mark_of_code(compile("1", "f", "eval").replace(co_consts=(items,)))
        for items in (frozenset("abcdefgh"), frozenset("hgfedcba"))
    }
    assert len(found) == 1


def test_a_function_with_a_number_of_many_digits_has_a_mark() -> None:
    """Python refuses its repr(): without a mark the script would not be run for workers."""

    def function(number: int = 10**5000) -> int:
        return number

    before = marks.mark_of(function)
    function.__defaults__ = (10**5000 + 1,)
    assert marks.mark_of(function) != before


def test_a_function_that_is_not_in_the_script_does_not_travel_by_name() -> None:
    known = MainNames()
    known.learn({"round_trip": b"mark"})
    assert not known.has(round_trip)
    known.ask(["x"])
    assert known.changed({"x": 1}) == {"x": 1}


# --- arrays and descriptors --------------------------------------------------------------


# One row per view of an array that is shared.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "part": lambda array: array[2:8:2],
    "backwards": lambda array: array[::-1],
    "other shape": lambda array: array.reshape(-1, 5),
    "other type": lambda array: array[1:].view("i8"),
    "turned": lambda array: array.T[1:],
    "nothing": lambda array: array[3:3],
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_shared_array_are_sent_as_such(view: str, order: Any) -> None:
    """Without a copy, however NumPy has made the array from its pickle."""
    shared = safepool.share(np.asarray(np.arange(100.0).reshape(20, 5), order=order))
    value = shared.value
    made = VIEWS[view](value)
    with references.Collected() as collected:
        sent = dumps([made, np.arange(3.0), value])
    assert collected.found == (shared,)
    with references.Given({shared.number: value}):
        found, other, whole = loads([bytearray(segment) for segment in sent])
    assert found.tolist() == made.tolist()
    assert found.dtype == made.dtype
    assert np.shares_memory(found, value) == np.shares_memory(made, value)
    assert not found.flags.writeable
    assert other.tolist() == [0.0, 1.0, 2.0]
    assert whole is value


def test_a_view_of_what_was_shared_is_copied_when_its_handle_is_gone() -> None:
    shared = safepool.share(np.arange(100.0))
    view = shared.value[3:5]
    key = shared._key
    assert key in references._arrays
    del shared
    assert key not in references._arrays
    with references.Collected() as collected:
        assert round_trip(view).tolist() == [3.0, 4.0]
    assert not collected.found


def test_an_array_where_another_value_of_a_shared_object_was_is_copied() -> None:
    """Two threads may have loaded the object at the same time."""
    shared = safepool.share(np.arange(100.0))
    other = np.ones(100)
    assert len(shared.value) == 100
    references._arrays[id(other)] = references._arrays[shared._key]
    with references.Collected() as collected:
        assert round_trip(other[1:3]).tolist() == [1.0, 1.0]
        assert round_trip(other).tolist() == other.tolist()
    assert not collected.found


def test_a_print_is_never_read() -> None:
    with pytest.raises(AssertionError):
        memmaps._never_loaded(1)


def test_a_descriptor_is_detached_once_or_closed_with_its_object() -> None:
    read, write = os.pipe()
    one = Descriptor(read)
    assert one.detach() == read
    with pytest.raises(OSError, match="only once"):
        one.detach()
    del one
    os.close(read)
    other = Descriptor(write)
    del other
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write)


if sys.platform == "linux":
    from safepool import linux
    from safepool.transport import _memfd
    from safepool.transport.files import accept, store
    from safepool.transport.frames import CorruptFrameError

    LARGE = bytes(range(256)) * (1 << 12)

    def test_a_copy_that_is_no_longer_needed_is_stopped() -> None:
        with pytest.raises(InterruptedError):
            store([LARGE], lambda: True)

    def test_a_system_without_the_newest_flags_and_large_pages_does_the_same(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        create, tried = linux.memfd_create, []

        def before_linux_6_3(name: str, flags: int) -> int:
            tried.append(flags)
            if flags & _memfd._NOEXEC:
                raise OSError(errno.EINVAL, "Invalid argument")
            return create(name, flags)

        monkeypatch.setattr(linux, "memfd_create", before_linux_6_3)
        monkeypatch.setattr(_memfd, "_PREPARED_BYTES", 1)
        monkeypatch.setattr(_memfd, "_HUGE_BYTES", 1 << 16)
        monkeypatch.setattr(_memfd, "_COLLAPSE", -1)
        monkeypatch.setattr(_memfd, "_collapses", True)
        for _ in range(2):
            (stored,) = store([LARGE])
            assert not _memfd._collapses
            assert bytes(stored.segments()[0]) == LARGE
            stored.close()
        assert len(tried) == 4

    def test_a_file_that_cannot_be_mapped_is_read() -> None:
        descriptor = linux.memfd_create("safepool-arrays", linux.MFD_CLOEXEC)
        try:
            os.write(descriptor, LARGE)
            assert bytes(_memfd._read(descriptor, len(LARGE))) == LARGE
            with pytest.raises(CorruptFrameError, match=f"found {len(LARGE)}"):
                _memfd._read(descriptor, len(LARGE) + 1)
        finally:
            os.close(descriptor)

    def test_a_worker_whose_pool_is_gone_learns_it_at_once() -> None:
        ours, theirs = socket.socketpair()
        ours.close()
        with theirs, pytest.raises(ConnectionError):
            accept(theirs)

    def test_a_side_whose_descriptor_a_task_has_closed_is_closed() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        side = _memfd.Side(ours, waits=False)
        os.close(ours.fileno())
        side.close()
        side.close()
        theirs.close()
