"""Functions of ``__main__``: is what was pickled for the last call still right for this one?

They travel by value, with the globals that they refer to, and pickling that costs more than most
short calls. So the pickle is kept, with a look at everything that went into it:

    of the function     its code, names, text, defaults, annotations and what it has captured
    of its globals      each that its code names, or code inside of it
    and of functions of ``__main__`` among those, the same

Compared is by identity, nothing by value. A look is had only where identity tells all:
numbers, text, ``None``, modules, functions and classes that workers import, tuples of those. A
function that refers to anything else (a list, an instance, a class of ``__main__``), or has
attributes, is pickled again for each call, as is one that has changed too often.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any, TypeGuard

from safepool.transport.lazy import LAZY_TYPES
from safepool.transport.marks import MAIN_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Look", "is_importable", "is_of_main", "largest_global", "look_at"]

_PLAIN = (
    frozenset({int, float, complex, bool, str, bytes, type(None), type(...), range}) | LAZY_TYPES
)
_ABSENT = object()


class _DoubtError(Exception):
    """What was found may change without being another object."""


class Look:
    """What a function of ``__main__`` refers to at one moment.

    Attributes:
        names: The globals among it, by name.
    """

    __slots__ = ("_functions", "_parts", "names")

    def __init__(self) -> None:
        self._functions: set[types.FunctionType] = set()
        self.names: dict[str, object] = {}
        self._parts: list[object] = []

    def same_as(self, other: Look) -> bool:
        """Tell whether nothing has changed."""
        mine, theirs = self._parts, other._parts
        return len(mine) == len(theirs) and all(map(_is, mine, theirs))

    def add_function(self, function: types.FunctionType) -> None:
        """Look at a function of ``__main__``.

        Raises:
            _DoubtError: It refers to something that may change unseen.
        """
        code = function.__code__
        if function in self._functions:
            return
        self._functions.add(function)
        self._parts.append(function)
        if function.__dict__:
            raise _DoubtError
        self._parts += [code, function.__name__, function.__qualname__, function.__doc__]
        self._add_all(function.__defaults__ or ())
        for named in (function.__kwdefaults__ or {}, function.__annotations__):
            self._add_all(named)
            self._add_all(named.values())
        for cell in function.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError:  # nothing is in it yet
                self._parts.append(_ABSENT)
        space = function.__globals__
        for name in _names_in(code):
            value = space.get(name, _ABSENT)
            self._parts.append(value)
            if value is not _ABSENT:
                self.names[name] = value
                self._add(value)

    def _add_all(self, values: Iterable[object]) -> None:
        for value in values:
            self._add(value)
        self._parts.append(_ABSENT)  # where they end

    def _add(self, value: Any) -> None:
        kind = type(value)
        self._parts.append(value)
        if kind in _PLAIN:
            return
        if kind is tuple or kind is frozenset:
            self._add_all(value)
        elif kind is types.ModuleType:
            if sys.modules.get(value.__name__) is not value:
                raise _DoubtError
            if hasattr(value, "__path__"):
                # cloudpickle sends along which of its modules are imported by now.
                self._parts.append(_interned(len(sys.modules)))
        elif kind is types.FunctionType and is_of_main(value):
            self.add_function(value)
        elif not is_importable(value):
            raise _DoubtError


def look_at(function: types.FunctionType) -> Look | None:
    """Return what a function of ``__main__`` refers to; ``None`` if that may change unseen."""
    look = Look()
    try:
        look.add_function(function)
    except (_DoubtError, RecursionError):
        return None
    return look


def largest_global(
    function: types.FunctionType, size_of: Callable[[object], int]
) -> tuple[str, int]:
    """Return which global that the function names is the largest, and its size; none is 0.

    Args:
        function: Of ``__main__``. Those that it calls are not looked into.
        size_of: Returns the size of a value.
    """
    space = function.__globals__
    sizes = {
        name: size_of(space[name])
        for name in _names_in(function.__code__)
        if name in space and not isinstance(space[name], (types.ModuleType, type))
    }
    return max(sizes.items(), key=lambda item: item[1], default=("", 0))


def is_of_main(function: Any) -> TypeGuard[types.FunctionType]:
    """Tell whether this is a function of the program's ``__main__``, also a nested one."""
    return (
        type(function) is types.FunctionType
        and function.__module__ in MAIN_NAMES
        and function.__globals__.get("__name__") in MAIN_NAMES
    )


def is_importable(thing: Any) -> bool:
    """Tell whether a function or class is found under its own name in a module."""
    if not isinstance(thing, (types.FunctionType, types.BuiltinFunctionType, type)):
        return False
    module, name = getattr(thing, "__module__", None), thing.__qualname__
    if module is None or module in MAIN_NAMES:
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is thing


_numbers: dict[int, int] = {}


def _interned(number: int) -> int:
    """Return the same object for the same number."""
    return _numbers.setdefault(number, number)


def _is(one: object, other: object) -> bool:
    return one is other


def _names_in(code: types.CodeType) -> list[str]:
    # More than cloudpickle looks for: names of attributes are among them.
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(_names_in(constant))
    return list(found)
