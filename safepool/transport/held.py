"""Objects of modules that a script has got by name: a worker uses the object of its own module.

    script    from app import settings as s     global "s" of its functions
    pickle    attribute_of("app", "settings")
    worker    imports app, and finds app.settings

Hence a counter, a cache or a setting of a module is the module's own in a worker, as in the
standard pool, and objects that cannot be pickled (a lock, a client) need no pickling.

The script's source tells which module a name came from. Without a source (standard input), it is
the module that has the same object under the same name. For objects that cannot be pickled and for
small containers, the name may differ.

Not covered:
    * Objects that the script got by a call (``get_settings()``): they travel as copies.
    * A module that sets the name to another object of the same type at run time.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import linecache
import os
import pickle
import sys
import types
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass
from safepool.transport.growing import load
from safepool.transport.marks import found_as

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Their identity tells nothing, or they are sent as names anyway.
_NAMELESS = (int, float, complex, str, bytes, type(None), type(...), type(NotImplemented))
_NAMED = (types.FunctionType, types.BuiltinFunctionType, type)
# Most of what code holds; the others follow from it.
_NO_OBJECTS = frozenset(
    {*_NAMELESS, *_NAMED, types.ModuleType, property, classmethod, staticmethod}
)
_NOT_IMPORTED = frozenset({"__main__", "__mp_main__", "builtins"})
# Limit of a copy, for workers whose module has another object under the name; a larger copy is not
# sent.
_MOST_COPIED_BYTES = 64 * 1024
# A larger container is data, which the program may have given to a module.
_MOST_ITEMS = 1024


class _Origins:
    """Origins of names, from the source of a script.

    Attributes:
        sources: Number of pieces of source that were read; a prompt adds to them.
        names: Modules and attributes, by name. The attribute is empty for a module itself.
        stars: Modules that were imported by ``from ... import *``.
    """

    __slots__ = ("names", "sources", "stars")

    def __init__(self, texts: Sequence[str], space: Mapping[str, Any]) -> None:
        import ast  # noqa: PLC0415 -- a few milliseconds, and many programs need none of this

        self.sources = len(texts)
        self.names: dict[str, list[tuple[str, str]]] = {}
        self.stars: list[str] = []
        for text in texts:
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError, RecursionError):
                continue  # a cell with commands of the notebook
            for node in ast.walk(tree):
                self._read(node, space)

    def _read(self, node: ast.AST, space: Mapping[str, Any]) -> None:
        import ast  # noqa: PLC0415 -- as above

        match node:
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = absolute(module or "", level, space)
                for alias in names if origin else ():
                    if alias.name == "*":
                        self.stars.append(origin)
                    else:
                        self._add(alias.asname or alias.name, origin, alias.name)
                        self._add(alias.asname or alias.name, f"{origin}.{alias.name}", "")
            case ast.Import(names=names):
                for alias in names:
                    self._add(alias.asname or alias.name, alias.name, "")
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Attribute() as value):
                root, *way = ast.unparse(value).split(".")
                found: Any = space.get(root)
                if issubclass(type(found), types.ModuleType):
                    self._add(name, _name_of(found), ".".join(way))

    def _add(self, name: str, module: str, attribute: str) -> None:
        self.names.setdefault(name, []).append((module, attribute))


_origins: dict[int, _Origins | None] = {}


def held_by_module(
    name: str, value: object, space: dict[str, Any] | None = None
) -> tuple[str, str] | None:
    """Tell which module has a global of a script, and under which name.

    The module can be imported. The attribute has dots if it is one of an attribute, and is empty
    if the object stands for the module itself. ``None`` if the object is the script's own, is sent
    as a name anyway, or is a number or text. Without ``space`` the script's globals are
    ``__main__``'s.

    Example:
        >>> import os
        >>> held_by_module("env", os.environ, {"env": os.environ}) is None
        True
        >>> held_by_module("environ", os.environ, {"environ": os.environ})
        ('os', 'environ')
    """
    kind = type(value)  # not isinstance(), which asks the object for its class: it may be lazy
    if issubclass(kind, (*_NAMELESS, types.ModuleType)):
        return None
    if issubclass(kind, _NAMED) and is_importable(value):
        return None
    if space is None:
        space = vars(sys.modules["__main__"])
    origins = _origins_of(space)
    if origins is None:
        return _found_by_name(name, value)
    places = origins.names.get(name, [])
    for module, attribute in [*places, *((star, name) for star in origins.stars)]:
        if _is_there(module, attribute, value):
            return module, attribute
    return None


def held_value(value: object, space: dict[str, Any]) -> tuple[str, str] | None:
    """Return the same for an object that code holds without a name: a default, a variable."""
    kind = type(value)
    if kind in _NO_OBJECTS or issubclass(kind, (*_NAMELESS, *_NAMED, types.ModuleType)):
        return None
    origins = _origins_of(space)
    for name in origins.names if origins is not None else ():
        if space.get(name) is value:
            return held_by_module(name, value, space)
    return None


def _origins_of(space: dict[str, Any]) -> _Origins | None:
    """Return the origins in the source; ``None`` if there is no source."""
    key = id(space)
    known = _origins.get(key)
    if known is not None and known.sources == _count_of_sources(space):
        return known
    if known is None and key in _origins:
        return None
    texts = [*sources_of(space)]
    _origins[key] = _Origins(texts, space) if texts else None
    return _origins[key]


def _count_of_sources(space: Mapping[str, Any]) -> int:
    cells = space.get("In")
    if isinstance(cells, list):
        return len(cells)
    return sum(map(_is_typed, linecache.cache)) or 1


def sources_of(space: Mapping[str, Any]) -> Iterator[str]:
    """Yield the known source of a script, in pieces."""
    cells = space.get("In")  # IPython; without a cell yet in "ipython script.py"
    if isinstance(cells, list) and any(cells):
        yield from map(str, cells)
        return
    name = space.get("__file__")
    if isinstance(name, str):
        if os.path.exists(name) and not os.path.isfile(name):
            return  # a named pipe: to open it would wait for a writer
        lines = linecache.getlines(name, dict(space))
        if lines:
            yield "".join(lines)
        return
    if space is not vars(sys.modules["__main__"]):
        return
    typed = ["".join(linecache.getlines(name)) for name in [*linecache.cache] if _is_typed(name)]
    if typed:
        yield from typed
    elif "-c" in sys.orig_argv[1:-1]:
        yield sys.orig_argv[sys.orig_argv.index("-c", 1) + 1]


def _is_typed(name: object) -> bool:
    # At a prompt, from Python 3.13 on.
    return isinstance(name, str) and name.startswith(("<python-input-", "<stdin>-"))


def absolute(module: str, level: int, space: Mapping[str, Any]) -> str:
    """Return the full name of a module that a statement imports; empty if it has none."""
    if not level:
        return module
    try:
        return importlib.util.resolve_name("." * level + module, space.get("__package__") or "")
    except ImportError:
        return ""


def _found_by_name(name: str, value: object) -> tuple[str, str] | None:
    for module, names in _namespaces():
        if names.get(name) is value and _is_there(module, name, value):
            return module, name
    return _found_under_another_name(value)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    for module, found in sys.modules.copy().items():
        if module in _NOT_IMPORTED:
            continue
        try:
            yield module, object.__getattribute__(found, "__dict__")
        except AttributeError:
            continue


# By id(): where modules have objects, as far as there were modules at the last look.
_places: dict[int, tuple[str, str]] = {}
_looked_at: set[str] = set()


def _found_under_another_name(value: object) -> tuple[str, str] | None:
    if _looked_at != sys.modules.keys():
        _looked_at.clear()
        _looked_at.update(sys.modules)
        _places.clear()
        for module, names in _namespaces():
            for name, one in names.copy().items():
                if type(one) not in _NO_OBJECTS and not name.startswith("__"):
                    _places.setdefault(id(one), (module, name))
    place = _places.get(id(value))
    if place is None or not _is_there(*place, value):
        return None
    if type(value) in (dict, list, set):
        return place if 0 < len(value) <= _MOST_ITEMS else None  # type: ignore[arg-type]
    own = getattr(value, "__dict__", None)
    parts = [*own.values()][:_MOST_ITEMS] if type(own) is dict else []
    return place if any(map(_cannot_be_pickled, [value, *parts])) else None


def _cannot_be_pickled(value: Any) -> bool:
    if type(value) in _NO_OBJECTS:
        return False
    try:
        value.__reduce_ex__(5)
    except Exception as error:  # noqa: BLE001 -- a TypeError mostly; some types have code of their own
        let_handlers_pass(error)
        return True
    return False


def _is_there(module: str, attribute: str, value: object) -> bool:
    found: Any = sys.modules.get(module)
    if found is None or module in _NOT_IMPORTED or module in modules_by_value():
        return False
    try:
        if getattr(found, "__spec__", None) is None:
            return False  # made by the program: no other process can import it
        return _get(found, attribute) is value
    except Exception as error:  # noqa: BLE001 -- a module's own __getattr__
        let_handlers_pass(error)
        return False


def _get(module: Any, attribute: str) -> Any:
    for part in attribute.split(".") if attribute else ():
        module = getattr(module, part)
    return module


def _name_of(module: types.ModuleType) -> str:
    # The module's own __getattribute__ is avoided: it may start a lazy import.
    name: str = object.__getattribute__(module, "__name__")
    return name


def modules_by_value() -> set[str]:
    """Return the modules that the program asked cloudpickle to send by value."""
    # As of `loaded`, in one step: each call of a function of the script asks.
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", set)
    found: set[str] = registered()
    return found


def is_importable(thing: Any) -> bool:
    """Tell whether a function or class, or what wraps one, is found under its own name."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return False
    return found_as(module, name) is thing


class Held:
    """Stands in a pickle for an object of a module, and arrives as the receiver's own."""

    __slots__ = ("_place", "_value")

    def __init__(self, place: tuple[str, str], value: object) -> None:
        self._place = place
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return attribute_of, (*self._place, _kind_of(self._value), _copy_of(self._value))


def attribute_of(module: str, attribute: str, kind: str, copy: bytes | None) -> Any:
    """Return an object of a module. Called by a pickle.

    The copy, if there is one, is a pickle of the object, for a module that has another object
    under this name here, because the program has set it at run time. ``kind`` is the type of the
    sender's.
    """
    found = importlib.import_module(module)
    try:
        value = _get(found, attribute)
    except AttributeError:
        value = None
    if _kind_of(value) == kind:
        return value
    if copy is None:
        raise AttributeError(
            f"{module}.{attribute} is of type {kind} in the program and of type "
            f"{_kind_of(value)} in this worker. The program sets it at run time, and it cannot be "
            f"pickled: set it in the workers too, by ProcessPool(initializer=)"
        )
    return load(copy)


def _kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Short(io.BytesIO):
    """A file that refuses to become long."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > _MOST_COPIED_BYTES:
            raise ValueError(f"the pickle exceeds {_MOST_COPIED_BYTES} bytes")
        return super().write(data)


write_copy: Callable[[object, io.BytesIO], object] = pickle.dump
"""Pickles an object by value. Set by ``payloads``, whose pickler asks this module what is held."""


def _copy_of(value: object) -> bytes | None:
    file = _Short()
    try:
        write_copy(value, file)
    except Exception as error:  # noqa: BLE001 -- user code
        let_handlers_pass(error)
        return None
    return file.getvalue()
