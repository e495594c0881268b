"""Search for the part of a value that could not be pickled. The search runs after the failure.

The pickler's message names a type: "cannot pickle '_thread.lock' object". The message does not
name the program's global.
"""

from __future__ import annotations

import functools
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from safepool.errors import let_handlers_pass
from safepool.transport.marks import codes_in

# Deeper or wider than this the way says nothing that helps, and each step pickles again.
_MOST_STEPS = 8
_MOST_PARTS = 256
# The caller has other work waiting.
_MOST_S = 0.2


def find_unpicklable(value: object, dumps: Callable[[object], object]) -> str:
    """Return the path to the object in ``value`` that cannot be pickled, in words.

    It leads to the innermost object that was found first; empty if it is ``value`` itself, or
    unknown.

    Example:
        >>> import pickle, threading
        >>> find_unpicklable({"a": [1, threading.Lock()]}, pickle.dumps)
        "item 1 of item 'a'"
    """
    way: list[str] = []
    end = time.monotonic() + _MOST_S
    while len(way) < _MOST_STEPS:
        for place, (where, part) in enumerate(_parts(value)):
            if place >= _MOST_PARTS or time.monotonic() > end:
                return " of ".join(way)
            if not _fails(part, dumps):
                continue
            way.insert(0, where)
            value = part
            break
        else:
            break
    return " of ".join(way)


def _fails(part: object, dumps: Callable[[object], object]) -> bool:
    try:
        dumps(part)
    except Exception as error:  # noqa: BLE001 -- user code is run by pickling
        let_handlers_pass(error)
        return True
    return False


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    """Yield the known parts of a value that are pickled with it: name in words, and part."""
    match value:
        case dict():
            yield from ((f"item {_short(key)}", part) for key, part in value.items())
        case list() | tuple():
            yield from ((f"item {place}", part) for place, part in enumerate(value))
        case set() | frozenset():
            yield from (("an item", part) for part in value)
        case functools.partial():
            yield "the function", value.func
            yield from ((f"argument {place}", part) for place, part in enumerate(value.args))
            yield from ((f"argument {key!r}", part) for key, part in value.keywords.items())
        case types.MethodType():
            yield f"the object of method {value.__name__!r}", value.__self__
        case types.FunctionType():
            yield from _parts_of_function(value)
        case type():
            yield from (
                (f"attribute {name!r} of class {value.__qualname__}", part)
                for name, part in vars(value).items()
                if not isinstance(part, (types.GetSetDescriptorType, types.MemberDescriptorType))
            )
        case _:
            wrapped = getattr(value, "__wrapped__", None)
            if wrapped is not None:
                yield "the wrapped function", wrapped
            # An object of the standard library travels by its name, or is the one that cannot be
            # pickled.
            if type(value).__module__.partition(".")[0] not in sys.stdlib_module_names:
                yield "the class", type(value)
            state = getattr(value, "__dict__", {})
            kind = type(value).__qualname__
            yield from ((f"attribute {name!r} of a {kind}", part) for name, part in state.items())


def _parts_of_function(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    name = f"{function.__module__}.{function.__qualname__}"
    for used in (name for code in codes_in(function.__code__) for name in code.co_names):
        if used in function.__globals__:
            yield f"global {used!r} of {name}", function.__globals__[used]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for used, cell in cells:
        try:
            yield f"variable {used!r} around {name}", cell.cell_contents
        except ValueError:
            pass  # not set yet
    for place, default in enumerate(function.__defaults__ or ()):
        yield f"default {place} of {name}", default
    for key, default in (function.__kwdefaults__ or {}).items():
        yield f"default {key!r} of {name}", default
    for key, attribute in vars(function).items():
        yield f"attribute {key!r} of {name}", attribute


def _short(key: object) -> str:
    text = repr(key) if isinstance(key, (str, int, bytes)) else f"of a {type(key).__name__} key"
    return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"
