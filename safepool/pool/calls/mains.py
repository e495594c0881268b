"""Check whether a function, class or value of the script has changed since it was pickled.

The check distinguishes:

    parts     what identity tells all about: numbers, text, ``None``, modules, functions and
              classes that workers import, and those of the script, of which it looks further at
              code, names, text, defaults, attributes and what they have captured
    doubts    what may change and stay the same object: lists, instances, attributes of those.
              They are compared by their pickles.

Not covered:
    * Annotations that are changed in place: reading them may run code.
"""

from __future__ import annotations

import enum
import operator
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from safepool.transport.lazy import LAZY_TYPES, loaded
from safepool.transport.marks import (
    LRU_CACHE,
    MAIN_NAMES,
    PLAIN,
    Absent,
    attribute_of,
    found_in,
    held_by_members,
    is_full,
    main_space,
    parts_of,
    space_of,
)
from safepool.transport.names import names_of
from safepool.transport.sharing import Shared

_PLAIN = PLAIN | {type(...), range} | LAZY_TYPES
# Parts of annotations, which are pickled as names.
_BUILT_IN = _PLAIN | {tuple, list, dict, set, frozenset, bytearray, object, type}
_MOST_PARTS = 100
_METHODS = (staticmethod, classmethod)
ABSENT = Absent

# Attributes of a class that change without the program's doing, or say nothing.
_OF_CLASSES = frozenset(
    {"__abstractmethods__", "__annotate_func__", "__annotations__", "__annotations_cache__"}
    | {"__dataclass_fields__", "__dataclass_params__", "__dict__", "__weakref__", "_abc_impl"}
    | {"__static_attributes__", "__firstlineno__"}
    | {"__slotnames__"}  # of copyreg, set by the first pickle of an instance
)


_parts_of = operator.attrgetter(
    "__code__", "__defaults__", "__kwdefaults__", "__doc__", "__name__", "__qualname__"
)


class PlainFunction:
    """A look at a function that has captured nothing and has no attributes: most have not."""

    __slots__ = ("_function", "_parts")

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function
        self._parts = _parts_of(function)

    def is_still(self, value: object) -> bool:
        """Tell whether a value is this function, unchanged."""
        function = self._function
        if value is not function or function.__dict__:
            return False
        parts, before = _parts_of(function), self._parts
        # Others may have an __eq__ of the program's.
        return parts[1] is before[1] and parts[3] is before[3] and bool(parts == before)


def plain_function(value: object) -> PlainFunction | None:
    """Return the short look at a value; ``None`` if it takes a longer one."""
    if type(value) is not types.FunctionType:
        return None
    here = value.__globals__
    if value.__closure__ or value.__kwdefaults__ or value.__dict__ or Look(value).doubts:
        return None
    # Modules that cloudpickle sends along depend on the imports so far.
    modules = (here.get(name) for name in value.__code__.co_names)
    # The type is compared: a lazy module would import something if its attributes were read.
    packages = (type(one) is types.ModuleType and hasattr(one, "__path__") for one in modules)
    return None if any(packages) else PlainFunction(value)


def runs_no_code(value: object) -> bool:
    """Tell whether this is a function of the script whose pickling runs no code of the program.

    True if all objects that it holds are of built-in types.
    """
    if type(value) is not types.FunctionType or value.__globals__ is not main_space():
        return False
    # The pickler looks up the script's object under its name.
    root = main_space().get(value.__qualname__.partition(".")[0])
    if type(root) not in (types.FunctionType, type, type(None)) or value.__dict__:
        return False
    cells = (cell.cell_contents for cell in value.__closure__ or () if is_full(cell))
    if getattr(value, "__annotate__", None) or getattr(value, "__type_params__", ()):
        return False  # from Python 3.14 and 3.12 on: code, and objects with such
    named = value.__kwdefaults__ or {}, value.__annotations__
    return is_data([*(value.__defaults__ or ()), *cells, *named])


def is_data(value: object) -> bool:
    """Tell whether a value, of not many parts, is of built-in types through and through."""
    todo: list[Any] = [value]
    for _ in range(_MOST_PARTS):
        if not todo:
            return True
        one = todo.pop()
        kind = type(one)
        if kind is tuple or kind is list or kind is set or kind is frozenset:
            todo += one
        elif kind is dict:
            todo += one
            todo += one.values()
        elif not (kind in _PLAIN or (kind is type and one in _BUILT_IN)):
            return False
    return False


class Look:
    """State of some values at one moment; ``doubts`` must be compared by content."""

    __slots__ = ("_parts", "_seen", "doubts")

    def __init__(self, *values: object) -> None:
        self._seen: set[int] = set()
        self._parts: list[object] = []
        self.doubts: list[object] = []
        for value in values:
            self._open_or_add(value)

    def same_as(self, other: Look) -> bool:
        """Return whether nothing has changed, apart from objects in doubt."""
        mine, theirs = self._parts, other._parts
        same = len(mine) == len(theirs) and len(self.doubts) == len(other.doubts)
        return same and all(map(operator.is_, mine, theirs))

    def forget_doubts(self) -> None:
        """Keep nothing alive that is compared by content."""
        self.doubts = [None] * len(self.doubts)

    def _open(self, thing: Any) -> None:
        """Look into a function or class of the script."""
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        self._parts.append(thing)
        if type(thing) is types.FunctionType:
            self._open_function(thing)
        elif issubclass(type(thing), type):
            self._open_class(thing)
        else:
            self._open_or_add(getattr(thing, "__wrapped__", None))

    def _open_function(self, function: types.FunctionType) -> None:
        parts = self._parts
        code = function.__code__
        parts += [code, function.__name__, function.__qualname__, function.__doc__]
        self._add_all(function.__defaults__ or ())
        for named in (function.__kwdefaults__, function.__dict__):
            if named:
                self._add_all(named)
                self._add_all(named.values())
            else:
                parts.append(ABSENT)
        for cell in function.__closure__ or ():
            try:
                self._open_or_add(cell.cell_contents)
            except ValueError:  # nothing is in it yet
                parts.append(ABSENT)
        space = function.__globals__
        for name in code.co_names:
            value = space.get(name)
            if type(value) is types.ModuleType and hasattr(value, "__path__"):
                # cloudpickle sends along which of its modules are imported by now.
                parts.append(_interned(len(sys.modules)))

    def _open_class(self, kind: type) -> None:
        if issubclass(type(kind), enum.EnumMeta):
            return  # its members are fixed when it is made
        self._add_all(type.__getattribute__(kind, "__bases__"))
        for name, value in list(space_of(kind).items()):
            if name in _OF_CLASSES:
                continue
            self._parts.append(name)
            if issubclass(type(value), _METHODS):
                self._parts.append(value)
                self._open_or_add(value.__func__)
            elif type(value) is property:
                self._parts.append(value)
                for function in (value.fget, value.fset, value.fdel):
                    self._open_or_add(function)
            elif type(value) in (types.MemberDescriptorType, types.GetSetDescriptorType):
                self._parts.append(value)
            else:
                self._open_or_add(value)

    def _open_or_add(self, value: Any) -> None:
        # An object that is no global is looked at where it is found.
        if is_definition(value) and not is_importable(value):
            self._open(value)
        else:
            self._add(value)

    def _add_all(self, values: Iterable[object]) -> None:
        for value in values:
            self._add(value)
        self._parts.append(ABSENT)  # where they end

    def _add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self._parts.append(value)
        elif kind is tuple or kind is frozenset:
            self._add_all(value)
        elif issubclass(kind, types.ModuleType) and _is_imported(value):
            self._parts.append(value)
        elif is_definition(value):
            if is_importable(value):
                self._parts.append(value)
            else:
                self._open(value)
        elif kind is Shared or is_importable(value) or _is_frozen_array(value):
            self._parts.append(value)
        else:
            self.doubts.append(value)


def _is_imported(module: types.ModuleType) -> bool:
    # The module's own __getattribute__ is avoided: it may start a lazy import.
    return sys.modules.get(object.__getattribute__(module, "__name__")) is module


def is_definition(value: Any) -> bool:
    """Return whether this is a function or class, or a wrapper of the standard library."""
    kind = type(value)
    if kind is types.FunctionType or issubclass(kind, type) or kind is LRU_CACHE:
        return True
    home = type.__getattribute__(kind, "__module__")
    return type(home) is str and home == "safepool.decorator" and hasattr(value, "__wrapped__")


def uses_of(
    thing: object, named_by: Callable[[types.CodeType], frozenset[str]] = names_of
) -> frozenset[str]:
    """Return the globals of the script that a function or class names, with all that is in it."""
    names: set[str] = set()
    seen: set[int] = set()
    todo: list[Any] = [thing]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if type(one) is types.FunctionType:
            if one.__globals__ is main_space():
                names |= named_by(one.__code__)
            todo += [cell.cell_contents for cell in one.__closure__ or () if is_full(cell)]
            todo += [*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        elif issubclass(type(one), type):
            if is_importable(one):
                continue
            bases = type.__getattribute__(one, "__bases__")
            todo += [*bases, type(one), *space_of(one).values(), *held_by_members(one)]
        else:
            todo += parts_of(one).values()
        todo.append(space_of(one).get("__wrapped__"))
    return frozenset(names)


def is_plain(value: object) -> bool:
    """Return whether the identity of a value, no function or class, is enough."""
    if type(value) in _PLAIN:
        return True
    if is_definition(value):
        return is_importable(value)
    return not Look(value).doubts


def is_of_main(function: Any) -> TypeGuard[types.FunctionType]:
    """Tell whether this is a function of the program's ``__main__``, also a nested one."""
    return (
        type(function) is types.FunctionType
        and function.__module__ in MAIN_NAMES
        and function.__globals__.get("__name__") in MAIN_NAMES
    )


def is_importable(thing: Any) -> bool:
    """Tell whether a function or class is found under its own name in a module.

    A module or metaclass with ``__getattr__`` may make the attribute on request.
    """
    if not issubclass(type(thing), (types.FunctionType, types.BuiltinFunctionType, type)):
        return False
    module, name = attribute_of(thing, "__module__"), attribute_of(thing, "__qualname__")
    # A result of functools.wraps() around a function of the script has the other function's name.
    if type(module) is not str or module in MAIN_NAMES or _is_defined_by_script(thing):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        space = space_of(found)
        found = space[part] if part in space else found_in(found, part)
        if type(found) is staticmethod:
            found = found.__func__
    return found is thing


def _is_defined_by_script(thing: Any) -> bool:
    return type(thing) is types.FunctionType and thing.__globals__ is main_space()


def _is_frozen_array(value: Any) -> bool:
    """Return whether an array is read-only, together with all arrays that it is a view of."""
    numpy = loaded("numpy", "ndarray")
    if numpy is None or type(value) is not numpy.ndarray or value.dtype.hasobject:
        return False
    while type(value) is numpy.ndarray and not value.flags.writeable:
        value = value.base
    return value is None or type(value) is bytes


_numbers: dict[int, int] = {}


def _interned(number: int) -> int:
    """Return the same object for the same number."""
    return _numbers.setdefault(number, number)
