"""Pickling and unpickling that run no code of the program, or report that they would.

A pickler calls the program's code: ``__reduce__``, ``__getstate__``, ``__setstate__``, imports,
the ``__getattr__`` of a module. Such code may be slow, take a lock or wait for the pool. Only C
code is trusted here, the few special methods of the standard library and of NumPy, and instances
whose class leaves pickling to ``object``. Pickler and unpickler stop before they call anything
else.

Not covered:
    * A reducer registered with ``copyreg`` for a type of the standard library or of NumPy.
    * A class that gets special methods after its first instance was pickled.
"""

from __future__ import annotations

import copyreg
import functools
import importlib._bootstrap
import io
import pickle
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from safepool.errors import let_handlers_pass
from safepool.transport.frames import Buffer, Missing
from safepool.transport.growing import STEP_BYTES, Sink, Source, load
from safepool.transport.marks import MAIN_NAMES, PLAIN, is_of_python
from safepool.transport.memmaps import Reducers
from safepool.transport.payloads import segments_of
from safepool.transport.reductions import MADE_BY_PYTHON, WITHOUT_CODE
from safepool.transport.sharing import Shared

_CODE = (types.FunctionType, types.BuiltinFunctionType)

# Methods of a class that the picklers may call, besides those of `object` and C code.
_CALLED = (
    *("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs__"),
    *("__getnewargs_ex__", "__new__", "__getattribute__", "__getattr__", "__setattr__"),
    *("__setitem__", "__iter__", "__del__", "__hash__", "items", "append", "extend", "add"),
)
# Makers of objects that are functions, by module.
_MAKERS = {
    "functools": ("partial",),
    "_codecs": ("encode",),
    "copyreg": ("_reconstructor", "__newobj__"),
    "safepool.transport.exceptions": ("_make", "_fill"),
    "safepool.transport.memmaps": ("reopen", "_read_only"),
    "safepool.transport.references": ("attach", "_view_of"),
}
# The opcode STACK_GLOBAL. A search by ``in`` would copy a memoryview.
_NAME = re.compile(b"\x93")
# Their special methods and makers run nothing of the program's.
_LIBRARIES = frozenset({"builtins", "collections", "datetime", "decimal", "fractions", "numpy"})


class UntrustedError(Exception):
    """The bytes would run code of the program."""


def dumps(value: object) -> list[bytes | memoryview]:
    """Return the segments of a value, as :func:`~safepool.transport.payloads.dumps` does.

    Raises `UntrustedError` if that may run code of the program, or fails.

    Example:
        >>> pickle.loads(dumps({"a": [1, 2.0]})[0])
        {'a': [1, 2.0]}
        >>> dumps(lambda: 3)
        Traceback (most recent call last):
            ...
        safepool.transport.trusted.UntrustedError
    """
    try:
        return segments_of(value, _dump)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 -- UntrustedError, or what the other pickler says better
        let_handlers_pass(error)
        raise UntrustedError from None


def _dump(value: object, in_band: Callable[[pickle.PickleBuffer], bool]) -> bytes:
    file = Sink()
    kind = _array_pickler() if "numpy" in sys.modules else _Pickler
    kind(file, protocol=5, buffer_callback=in_band).dump(value)
    return file.getvalue()


def loads(segments: Sequence[Buffer]) -> Any:
    """Return the object of segments, or raise `UntrustedError` if code of the program may run."""
    head, *buffers = segments
    for segment in segments:
        if isinstance(segment, Missing):
            raise segment.error
    assert not isinstance(head, Missing)
    # Normally the pickle has no name (STACK_GLOBAL) and no number of a name.
    named = _NAME.search(head) if isinstance(head, memoryview) else b"\x93" in head
    if not named and not copyreg._extension_registry:  # type: ignore[attr-defined]
        return load(head, buffers)
    file = io.BytesIO(head) if len(head) < STEP_BYTES else Source(head)
    return _Unpickler(file, buffers=buffers).load()


def loads_small(pickled: bytes) -> Any:
    """Return the object of a small pickle without buffers, as :func:`loads`."""
    if b"\x93" not in pickled and not copyreg._extension_registry:  # type: ignore[attr-defined]
        return pickle.loads(pickled)
    return loads([pickled])


class _Pickler(pickle.Pickler):
    """Refuses objects that are not known to be harmless. Asked for all but built-in types."""

    def reducer_override(self, obj: Any) -> Any:
        if not _is_trusted(obj):
            raise UntrustedError
        return NotImplemented


@functools.cache
def _array_pickler() -> Any:
    return type("ArrayPickler", (_Pickler,), {"dispatch_table": Reducers(arrays=True)})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        found = _found_in(module_name, global_name)
        trusted = global_name in _MAKERS.get(module_name, ())
        if not trusted:
            a_class = isinstance(found, type)
            trusted = _is_tame(found) if a_class else _is_library(module_name)
        # eval(), other such functions, and functions that make a class are excluded.
        built_in = module_name == "builtins" and type(found) is not type
        if not trusted or found is None or found is type or built_in:
            raise UntrustedError
        return found


def imports_here() -> bool:
    """Tell whether the calling thread is in the middle of an import."""
    bootstrap: Any = importlib._bootstrap
    locks = bootstrap._module_locks
    if not locks:
        return False
    me = threading.get_ident()
    found = [reference() for reference in [*locks.values()]]
    return any(getattr(lock, "owner", None) == me for lock in found)


def is_settled(module: types.ModuleType) -> bool:
    """Tell whether no thread is importing a module: a pickler would wait for that."""
    return not getattr(vars(module).get("__spec__"), "_initializing", False)


def _is_trusted(obj: Any) -> bool:
    kind = type(obj)
    if kind in PLAIN or kind is Shared or kind is functools.partial:
        return True
    if issubclass(kind, type):  # NumPy's dtypes have a class of their own for classes
        return (kind is type or _is_library(kind.__module__)) and is_found(obj)
    if kind in _CODE:
        return is_found(obj)
    if kind.__module__ in MAIN_NAMES:
        return False
    return _is_tame(kind)


def is_found(thing: Any) -> bool:
    """Return whether a function or class is pickled as a name only."""
    module_name = thing.__module__
    return module_name not in MAIN_NAMES and _found_in(module_name, thing.__qualname__) is thing


def _found_in(module_name: str, path: str) -> Any:
    """Return the object at a dotted name; ``None`` if there is none, or to look may run code."""
    module = sys.modules.get(module_name)
    if module is None or not is_settled(module):
        return None
    first, *others = path.split(".")
    found: Any = vars(module).get(first)
    for name in others:
        if type(found) is not type:
            return None
        found = vars(found).get(name)
    return found


_known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_tame(kind: type) -> bool:
    """Tell whether instances are pickled and made again by code that is trusted."""
    known = _known.get(kind)
    if known is None:
        known = _known[kind] = _looks_tame(kind)
    return known


def _looks_tame(kind: type) -> bool:
    if _is_library(kind.__module__):
        return kind.__module__ != "builtins" or kind is not types.MethodType
    if type(kind) is not type or kind in copyreg.dispatch_table:
        return False
    special: Any = kind
    by_object = (
        special.__reduce_ex__ is object.__reduce_ex__ and special.__reduce__ is object.__reduce__
    )
    if not is_of_python(kind) or not by_object:
        return False  # C code of somebody's, or a constructor that is called
    return all(_is_harmless(getattr(kind, name, None)) for name in _CALLED)


def _is_harmless(method: Callable[..., Any] | None) -> bool:
    if isinstance(method, WITHOUT_CODE):
        return True
    if not isinstance(method, types.FunctionType):
        return False
    home = str(method.__globals__.get("__name__"))
    return _is_library(home) or home.startswith(MADE_BY_PYTHON)


def _is_library(module_name: str | None) -> bool:
    return module_name is not None and module_name.partition(".")[0] in _LIBRARIES
