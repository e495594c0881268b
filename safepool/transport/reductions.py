"""Results of methods for pickling: each method runs once for an object that is sent.

A value may be pickled several times: by the standard pickler; by value, where that one meets
something that it cannot send; part by part, in search of the part that nobody can send; and again
for another worker. Methods of the program (``__reduce__``, ``__getstate__``, a reducer registered
with ``copyreg``) run in the first of these only, as in the standard pool: a method may give
something away. The others get the same result.

Not covered:
    * Methods that a class gets after its first instance was pickled.
    * Properties that take the place of ``__dict__``, ``__class__`` or a slot.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import pickle
import sys
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any, Literal, Union

from safepool.transport.lazy import loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What a pickler calls of a class, and reads of an instance.
_METHODS = (
    "__reduce_ex__",
    "__reduce__",
    "__getstate__",
    "__getnewargs_ex__",
    "__getnewargs__",
    "__getattribute__",
    "__getattr__",
)
# The same of containers.
_OF_CONTAINERS = ("items", "__iter__")
_CONTAINERS = (dict, list, set, frozenset, collections.deque)
# Nobody sees how often these run. The last are of named tuples, whose methods are made by `exec`.
_LIBRARIES = sys.stdlib_module_names | {"cloudpickle", "loky", "numpy", "safepool"}
MADE_BY_PYTHON = "namedtuple_"
WITHOUT_CODE = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.BuiltinFunctionType,
    type(None),
)
_NOTHING = frozenset({type(None)})
_Replayed: Any = type(itertools.tee((), 1)[0])

# ``reductions``: those of the value that is pickled, ``None`` if it has none yet; without a value
# ``False``.
_thread = threading.local()
_Place = Union["Reductions", Literal[False], None]


class Reductions(dict["tuple[int, int]", "tuple[object, object, Any]"]):
    """Results for the objects of one value, by ``id()`` of object and reducer, which it keeps.

    Attributes:
        failed: Whether the last pickler was ended by an exception of the program.
        is_search: ``True`` while the object that nobody can send is searched for.
        of_one_pickle: ``True`` if results refer to descriptors beside one pickle, which the next
            pickle has not, or hold a buffer of the program, which could not be resized meanwhile.
    """

    failed: bool = False
    is_search: bool = False
    of_one_pickle: bool = False

    def forget_errors(self) -> None:
        """End the search, and let methods that have failed run for another call."""
        self.is_search = False
        for key in [key for key, entry in self.items() if type(entry[2]) is _Failed]:
            del self[key]


def begin(known: Reductions | None) -> _Place:
    """Let the picklers of this thread look into results; return what :func:`end` is to be given.

    Args:
        known: The results so far. ``None`` makes them with the first one: most values have none.
    """
    before: _Place = _thread.__dict__.get("reductions", False)
    _thread.reductions = known
    if known is not None:
        known.failed = False
    return before


def end(before: _Place) -> None:
    """Let the picklers look where they have looked before :func:`begin`."""
    if before and before is _thread.reductions:
        before.failed = False  # of a part of the value, in the middle of it
    _thread.reductions = before


def has_failed() -> bool:
    """Tell whether code of the program has ended the last pickler of this thread."""
    return getattr(_thread.reductions, "failed", False)


def belong_to_pickle() -> None:
    """Note that the result that is being made is of use to this pickle only."""
    known = _reductions()
    if known is not None:
        known.of_one_pickle = True


def _reductions() -> Reductions | None:
    """Return the results of the value that this thread pickles; ``None`` if it pickles none."""
    known: _Place = _thread.__dict__.get("reductions", False)
    if known is None:
        known = _thread.reductions = Reductions()
    return None if known is False else known


by_itself: Callable[[Any], Any] = operator.methodcaller("__reduce_ex__", 5)
"""Reduces an object by its class's methods."""


def reduce_once(reduce: Callable[[Any], Any], obj: Any) -> Any:
    """Return ``reduce(obj)``, which is called once for an object of the value.

    Raises:
        Exception: The exception of ``reduce``.
    """
    known = _thread.__dict__.get("reductions") or _reductions()
    if known is None:
        return reduce(obj)
    key = id(obj), id(reduce)  # picklers may have different reducers
    entry = known.get(key)
    if entry is None:
        try:
            reduced = reduce(obj)
        except Exception as error:
            # Otherwise C code has raised it: another pickler may have a way of its own.
            trace = error.__traceback__
            if trace is not None and trace.tb_next is not None and not _is_by_value(type(obj)):
                known.failed = True
                known[key] = obj, reduce, _Failed(error)
            raise
        if type(reduced) is tuple:
            if not _NOTHING.issuperset(map(type, reduced[3:5])):
                items = [_replayed(part, known, key) for part in reduced[3:5]]
                reduced = _WithItems((*reduced[:3], *items, *reduced[5:]))
            if any(map(_lends, reduced[1:3])):
                known.of_one_pickle = True
        entry = known[key] = obj, reduce, reduced
    reduced = entry[2]
    if type(reduced) is _Failed:
        known.failed = True
        raise pickle.PicklingError if known.is_search else reduced.error
    if type(reduced) is _WithItems:
        return tuple(one.__copy__() if type(one) is _Replayed else one for one in reduced)
    return reduced


class _WithItems(tuple[Any, ...]):
    """Result of a method, with iterators that are to be copied."""

    __slots__ = ()


class _Failed:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _lends(part: Any) -> bool:
    """Tell whether an argument or a state is a buffer of the program, or holds one."""
    kind = type(part)
    if kind is dict:
        part = part.values()
    elif kind is not tuple and kind is not list:
        return kind is pickle.PickleBuffer
    return pickle.PickleBuffer in map(type, part)


def _is_by_value(kind: type) -> bool:
    """Tell whether a reducer for a class holds in the second pickler only."""
    loky = loaded("loky.backend.reduction", "_dispatch_table")
    cloudpickle = loaded("cloudpickle", "Pickler")
    tables = (loky and loky._dispatch_table, cloudpickle and cloudpickle.Pickler.dispatch_table)
    return any(kind in table for table in tables if table is not None)


def _replayed(items: Any, known: Reductions, key: tuple[int, int]) -> Any:
    """Return an iterator that can be copied at its beginning; anything else as it is."""
    if not hasattr(type(items), "__next__"):
        return items
    return itertools.tee(_watched(items, known, key), 1)[0]


def _watched(items: Iterator[Any], known: Reductions, key: tuple[int, int]) -> Iterator[Any]:
    try:
        yield from items
    except GeneratorExit:
        raise  # nobody needs the rest
    except BaseException as error:
        # A copy would end here, as if these were all.
        obj, reduce, _ = known.pop(key)
        if isinstance(error, Exception):
            known.failed = True
            known[key] = obj, reduce, _Failed(error)
        raise


_kinds: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def runs_code(kind: type) -> bool:
    """Tell whether code of the program runs when an instance is pickled."""
    known = _kinds.get(kind)
    if known is None:
        names = _METHODS + _OF_CONTAINERS * issubclass(kind, _CONTAINERS)
        known = any(is_of_program(_found(kind, name)) for name in names)
        _kinds[kind] = known
    return known


def _found(kind: type, name: str) -> Any:
    """Return a method as it lies in the class, or ``None``."""
    for one in type.__getattribute__(kind, "__mro__"):
        if name in vars(one):
            return vars(one)[name]
    return None


def is_of_program(method: Any) -> bool:
    """Tell whether a method or a registered function may be code of the program."""
    if type(method) is types.FunctionType:
        return not _is_library(method.__globals__.get("__name__"))
    return not isinstance(method, WITHOUT_CODE)


@functools.lru_cache(maxsize=1024)
def _is_library(home: str | None) -> bool:
    name = str(home)
    return name.partition(".")[0] in _LIBRARIES or name.startswith(MADE_BY_PYTHON)
