"""Annotations travel as Python keeps them; from Python 3.14 on, as the function that makes them.

They are never evaluated for sending: their names may be imported for a type checker only (``if
TYPE_CHECKING:``), and would raise ``NameError``.

Source: PEP 649 and PEP 749.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable
from typing import Any

from cloudpickle import cloudpickle as _internals

# Variable by which an annotation in a class's body finds the class's other names.
_CLASS_SPACE = "__classdict__"


if sys.version_info >= (3, 14):

    def global_names(code: types.CodeType) -> dict[str, None]:
        """Return the names of globals that code may read or write, in order.

        An annotation in a class's body asks the class first, by instructions that cloudpickle
        does not know.
        """
        names: dict[str, None] = dict(_internals._extract_code_globals(code))
        if _CLASS_SPACE in code.co_freevars:
            names |= dict.fromkeys(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names |= global_names(constant)
        return names

else:
    global_names: Callable[[types.CodeType], dict[str, None]] = _internals._extract_code_globals


def annotations_of(thing: Any) -> dict[str, Any]:
    """Return the attributes that give a copy of a function the same annotations."""
    found: dict[str, Any] = {}
    if sys.version_info >= (3, 14) and thing.__annotate__ is not None:
        found["__annotate__"] = thing.__annotate__
    else:
        found["__annotations__"] = thing.__annotations__
    if getattr(thing, "__type_params__", ()):
        found["__type_params__"] = thing.__type_params__
    return found


def closure_of(
    function: types.FunctionType, stand_in: Callable[[object, dict[str, Any]], object]
) -> tuple[types.CellType, ...] | None:
    """Return a function's variables of functions around it, as they are sent."""
    cells = function.__closure__
    if cells is None:
        return None
    names = function.__code__.co_freevars
    return tuple(
        _cell_of(name, cell, lambda value: stand_in(value, function.__globals__))
        for name, cell in zip(names, cells, strict=True)
    )


def _cell_of(
    name: str, cell: types.CellType, stand_in: Callable[[object], object]
) -> types.CellType:
    try:
        value = cell.cell_contents
    except ValueError:
        return cell  # nothing is in it yet
    # The body of a class is sent as that class.
    instead = _Space(value) if name == _CLASS_SPACE else stand_in(value)
    return cell if instead is value else types.CellType(instead)


class _Space:
    """Stands for the attributes of a class, and arrives as those of the class there."""

    def __init__(self, space: Any) -> None:
        self._space = space

    def __reduce__(self) -> tuple[Any, ...]:
        kind = _class_with(self._space)
        return (dict, ()) if kind is None else (vars, (kind,))


def _class_with(space: Any) -> type | None:
    """Return the class that has these attributes; ``None`` if it is gone.

    Through all classes: after gc.freeze() the collector does not find references.
    """
    rest: list[type] = [object]
    seen: set[type] = set()
    while rest:
        kind = rest.pop()
        if kind not in seen:
            seen.add(kind)
            if any(one is space for one in gc.get_referents(vars(kind))):
                return kind
            rest += type.__subclasses__(kind)
    return None
