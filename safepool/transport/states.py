"""State of objects with methods for pickling, for comparison: none of these methods runs.

    attributes, slots       as they are
    content of a container  by the methods of the built-in type
    locks, files, sockets   their type only: a method for pickling leaves them out

Equal states give equal pickles.

Not covered:
    * Methods whose result depends on more than the object: a counter elsewhere, the time.
"""

from __future__ import annotations

import collections
import types
import weakref
from typing import Any

from safepool.transport.marks import MAIN_NAMES, PLAIN, is_of_python, own_dict

# Types of which an object is what its iterator yields, and those of which it is a plain value.
_ITERATED: frozenset[Any] = frozenset({list, tuple, set, frozenset, collections.deque})
_VALUES: frozenset[Any] = frozenset({int, float, complex, str, bytes})
_MAPPINGS: frozenset[Any] = frozenset({dict, collections.OrderedDict, collections.defaultdict})
_PICKLED = PLAIN | {list, tuple, dict, set, frozenset, type, types.FunctionType}
# Modules whose objects stand for something in this process.
_OF_PROCESS = frozenset(
    {"asyncio", "concurrent", "multiprocessing", "queue", "selectors", "socket", "sqlite3", "ssl"}
    | {"subprocess", "tempfile", "threading", "weakref", "_io", "_thread", "_queue"}
)


def by_state(obj: Any) -> tuple[Any, ...] | None:
    """Return a reduction of an object that is never loaded; ``None`` if its state is hidden."""
    kind = type(obj)
    base = _base_of(kind)
    if base is kind:
        return None
    content = _content_of(obj, base)
    if content is None:
        return None
    slots = {
        name: value
        for one in kind.__mro__
        for name, slot in vars(one).items()
        if type(slot) is types.MemberDescriptorType and is_of_python(one)
        if (value := _get(slot, obj)) is not None
    }
    module = kind.__module__
    named = "" if module in MAIN_NAMES else module, kind.__qualname__
    return _never_loaded, named, (_compared(own_dict(obj)), _compared(slots), content)


def _content_of(obj: Any, base: Any) -> tuple[object, ...] | None:
    """Return what a built-in type holds beside attributes; ``None`` if that is hidden."""
    if base in _MAPPINGS:
        slot = vars(base).get("default_factory")
        return [*base.items(obj)], slot and slot.__get__(obj)
    if base in _ITERATED:
        return ([*base.__iter__(obj)],)
    if base in _VALUES:
        return (base.__getnewargs__(obj),)
    if base is bytearray:
        return (bytes(memoryview(obj)),)
    if issubclass(base, BaseException):
        return (vars(BaseException)["args"].__get__(obj),)
    return () if base is object else None


def _base_of(kind: type) -> Any:
    """Return the first class that C code has made, as ``copyreg`` finds it."""
    for one in kind.__mro__:
        new = vars(one).get("__new__")
        if not is_of_python(one) or (
            type(new) is types.BuiltinFunctionType and new.__self__ is one
        ):
            return one
    return object


def _get(slot: types.MemberDescriptorType, obj: object) -> object:
    try:
        return slot.__get__(obj)
    except AttributeError:
        return None


def _compared(values: Any) -> dict[str, object]:
    return {
        name: type(value).__qualname__ if _is_of_process(value) else value
        for name, value in values.items()
    }


# By type: whether only a method of its holder's can pickle it.
_known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_of_process(value: Any) -> bool:
    """Tell whether an attribute cannot be pickled by any method but its holder's."""
    kind = type(value)
    if kind in _PICKLED:
        return False
    known = _known.get(kind)
    if known is None:
        home = str(kind.__module__).partition(".")[0]
        known = home in _OF_PROCESS or (not is_of_python(kind) and _refuses(value))
        _known[kind] = known
    return known


def _refuses(value: Any) -> bool:
    try:
        value.__reduce_ex__(5)
    except TypeError:
        return True
    except Exception:  # noqa: BLE001 -- of C code; the pickler says it
        return False
    return False


def _never_loaded(*_: object) -> None:
    raise AssertionError
