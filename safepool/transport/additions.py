"""Objects that a script has put into modules; a worker without the script puts them there too.

    entry of a dictionary         ``plugins.REGISTRY["x"] = f``, ``sqlite3.register_adapter(C, f)``
    item of a list or set         ``plugins.HOOKS.append(f)``
    attribute of a module, class  ``json.JSONEncoder.default = f``, an accessor of pandas
    virtual subclass              ``plugins.Base.register(C)``
    ``functools.singledispatch``  ``plugins.show.register(C)(f)``

The search is for functions and classes of the script, its instances, and objects that hold one of
these (a partial, a bound method, an entry that a decorator has made). The search covers the
modules that the script imports, and the modules of its names: their containers, their classes, and
the attributes of their own objects. In the standard library it covers only functions and classes,
as attributes, and a table of registries.

Not covered:
    * Changes outside of the modules' namespaces: ``codecs.register``, ``atexit.register``.
    * Data (``plugins.LEVEL = 5``): its origin is unknown.
    * Removals from a container.
"""

from __future__ import annotations

import abc
import collections
import functools
import importlib
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from safepool.errors import let_handlers_pass
from safepool.transport.marks import MAIN_NAMES, PLAIN, is_of_python, main_space, own_dict


class Addition(NamedTuple):
    """Something of the script in a module.

    Attributes:
        path: From there to what holds it: names of attributes, and keys in a tuple of one.
        how: ``"attribute"``, ``"item"``, ``"first"`` or ``"last"`` of a list, ``"member"`` of a
            set, ``"registered"``.
        key: The attribute's name, the item's key, the type that a function is registered for.
    """

    module: str
    path: tuple[Any, ...]
    how: str
    key: Any
    value: Any

    @property
    def place(self) -> tuple[Any, ...]:
        """Identity of the addition among others in this process."""
        return *self[:-1], id(self.value)


_DICTIONARIES = (dict, collections.OrderedDict, collections.defaultdict)
_LISTS = (list, collections.deque)
# A larger one is data.
_MOST_ITEMS = 1024
_MOST_DEEP = 3
# Registries of the standard library, whose other containers are its own affair.
_REGISTRIES = {
    "copyreg": ("dispatch_table",),
    "json.decoder": (),
    "json.encoder": (),
    "shutil": ("_ARCHIVE_FORMATS", "_UNPACK_FORMATS"),
    "sqlite3": ("adapters", "converters"),
    "sqlite3.dbapi2": ("adapters", "converters"),
    "xml.etree.ElementTree": (),
}
# The interpreter's own hooks, which a worker has its own of.
_NOT_LOOKED_AT = frozenset({"sys", "builtins", "signal", "faulthandler", *MAIN_NAMES, "safepool"})


def homes(modules: Iterable[str]) -> dict[str, None]:
    """Return the modules that are looked through: those that the script imports, and others."""
    found = dict.fromkeys(modules)
    # Another module, or code that the script executes, may register its functions for it.
    found |= dict.fromkeys(name for name in _REGISTRIES if name in sys.modules)
    found |= dict.fromkeys(_homes_of(main_space().copy().values()))
    for name in [*found]:
        top, module = name.partition(".")[0], sys.modules.get(name)
        if type(module) is not types.ModuleType or _is_standard(top):
            continue
        # A large package keeps its registries where its users import from.
        values = [*vars(module).values()]
        if len(values) <= _MOST_NAMES:
            below = {one for one in _homes_of(values) if one.partition(".")[0] == top}
            found |= dict.fromkeys(sorted(below) if len(below) <= _MOST_HOMES else ())
    return found


def _homes_of(values: Iterable[Any]) -> set[str]:
    kinds = ((value, type(value)) for value in values if type(value) not in _NOTHING)
    named = (
        value.__module__ if kind in _DEFINITIONS else kind.__module__ for value, kind in kinds
    )
    return {name for name in named if type(name) is str and not _is_standard(name)}


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


_MOST_NAMES = 100
_MOST_HOMES = 8
_DEFINITIONS = frozenset({types.FunctionType, type, abc.ABCMeta})


def additions_to(modules: Iterable[str]) -> list[Addition]:
    """Return the script's changes to modules. No code of the modules is called."""
    found: list[Addition] = []
    seen: set[int] = set()
    for name in modules:
        module = sys.modules.get(name)
        if type(module) is types.ModuleType and name.partition(".")[0] not in _NOT_LOOKED_AT:
            try:
                found += _Search(name, seen).through(vars(module))
            except Exception as error:  # noqa: BLE001 -- changed by a thread, or of an odd metaclass
                let_handlers_pass(error)
    return found


class _Search:
    """A search through one module."""

    def __init__(self, module: str, seen: set[int]) -> None:
        self._module = module
        self._top = module.partition(".")[0]
        self._is_standard = _is_standard(module)
        self._seen = seen
        # Classes of objects that lead nowhere: of a library's functions in C, say.
        self._nowhere: dict[type, bool] = {}

    def through(self, space: dict[str, Any]) -> Iterator[Addition]:
        registries, main = _REGISTRIES.get(self._module, ()), main_space()
        for name, value in space.copy().items():
            kind = type(value)
            if kind in _NOTHING or name[:2] == "__" or self._leads_nowhere(kind):
                continue
            is_function = kind is types.FunctionType and "registry" not in value.__dict__
            if is_function and _is_of_others(value, main):
                continue
            if _is_defined_by_script(value):
                yield Addition(self._module, (), "attribute", name, value)
            elif isinstance(value, type) or not self._is_standard or name in registries:
                yield from self._below((name,), value, _MOST_DEEP)

    def _leads_nowhere(self, kind: type) -> bool:
        """Tell whether no object of a class is the script's, or holds something of it."""
        known = self._nowhere.get(kind)
        if known is None:
            known = self._nowhere[kind] = not (
                kind in _CONTAINERS
                or kind in _MADE_OF_OTHERS
                or issubclass(kind, type)
                or (_top_of(kind) == self._top and is_of_python(kind) and not self._is_standard)
            )
        return known

    def _below(self, path: tuple[Any, ...], value: Any, depth: int) -> Iterator[Addition]:
        kind = type(value)
        if kind in _NOTHING or id(value) in self._seen or not depth:
            return
        self._seen.add(id(value))
        if kind in _DICTIONARIES:
            yield from self._items(path, value, depth)
        elif kind in _LISTS:
            yield from self._in_list(path, value)
        elif kind is set:
            members = value.copy() if len(value) <= _MOST_ITEMS else ()
            yield from (self._at(path, "member", None, one) for one in members if _is_of(one))
        elif kind is types.FunctionType:
            yield from self._dispatched(path, value)
        elif issubclass(kind, type):
            if is_of_python(value) and _top_of(value) == self._top:
                yield from self._in_class(path, value)
        elif _top_of(kind) == self._top and is_of_python(kind) and not self._is_standard:
            yield from self._in_object(path, value, depth)

    def _at(self, path: tuple[Any, ...], how: str, key: Any, value: Any) -> Addition:
        return Addition(self._module, path, how, key, value)

    def _items(self, path: tuple[Any, ...], value: Any, depth: int) -> Iterator[Addition]:
        if len(value) > _MOST_ITEMS:
            return
        for key, one in value.copy().items():
            if _is_of(one) or _is_of(key):
                yield self._at(path, "item", key, one)
            elif type(one) in _DICTIONARIES or type(one) in _LISTS or type(one) is set:
                yield from self._below((*path, (key,)), one, depth - 1)

    def _in_list(self, path: tuple[Any, ...], value: Any) -> Iterator[Addition]:
        items = [*value] if len(value) <= _MOST_ITEMS else []
        how = "first"
        for one in items:
            if _is_of(one):
                yield self._at(path, how, None, one)
            else:
                how = "last"

    def _in_object(self, path: tuple[Any, ...], value: Any, depth: int) -> Iterator[Addition]:
        own = own_dict(value)
        for name, one in [*own.items()] if len(own) <= _MOST_ITEMS else ():
            if _is_defined_by_script(one):
                yield self._at(path, "attribute", name, one)
            else:
                yield from self._below((*path, name), one, depth - 1)

    def _dispatched(self, path: tuple[Any, ...], function: Any) -> Iterator[Addition]:
        registry = vars(function).get("registry")
        if type(registry) is types.MappingProxyType and hasattr(function, "dispatch"):
            for kind, one in registry.items():
                if _is_of(one) or _is_of(kind):
                    yield self._at(path, "registered", kind, one)

    def _in_class(self, path: tuple[Any, ...], kind: Any) -> Iterator[Addition]:
        main = main_space()
        for name, one in [*vars(kind).items()]:
            one_kind = type(one)
            if one_kind in _NOTHING or _is_of_others(one, main):
                continue
            if _is_of(one) and name not in _OF_INTERPRETER:
                yield self._at(path, "attribute", name, one)
            elif one_kind in _CONTAINERS and not self._is_standard:
                yield from self._below((*path, name), one, 1)
        if isinstance(kind, abc.ABCMeta):
            registry, *_ = abc._get_dump(kind)  # type: ignore[attr-defined]
            for reference in registry:
                if (one := reference()) is not None and _is_of(one):
                    yield self._at(path, "registered", None, one)


_NOTHING = (
    PLAIN
    | {tuple, types.ModuleType}
    | {types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType}
    | {types.GetSetDescriptorType, types.MemberDescriptorType, types.GenericAlias}
)
_MADE_OF_OTHERS = frozenset(
    {types.FunctionType, types.MethodType, staticmethod, classmethod, property, functools.partial}
)
_CONTAINERS = frozenset({*_DICTIONARIES, *_LISTS, set})
_OF_INTERPRETER = frozenset({"__weakref__", "_abc_impl", "__init_subclass__"})


def _top_of(kind: Any) -> str:
    return str(vars(kind).get("__module__", "")).partition(".")[0]


def _is_of_others(value: Any, main: dict[str, Any]) -> bool:
    """Return whether a function, method or property is clearly not the script's; quick."""
    kind = type(value)
    if kind is property:
        value = value.fget
    elif kind is classmethod or kind is staticmethod:
        value = value.__func__
    for _ in range(_MOST_WRAPPED):
        if type(value) is not types.FunctionType or value.__globals__ is main:
            return False
        value = value.__dict__.get("__wrapped__")
        if value is None:
            break
    return True


_MOST_WRAPPED = 16


def _wrapped_in(function: Any) -> Iterator[types.FunctionType]:
    for _ in range(_MOST_WRAPPED):
        if type(function) is not types.FunctionType:
            return
        yield function
        function = function.__dict__.get("__wrapped__")


def _is_defined_by_script(value: Any) -> bool:
    """Tell whether this is a function or class of the script, or made of one."""
    kind = type(value)
    if kind is types.FunctionType:
        return any(one.__globals__ is main_space() for one in _wrapped_in(value))
    if issubclass(kind, type):
        return vars(value).get("__module__") in MAIN_NAMES
    if kind is staticmethod or kind is classmethod or kind is types.MethodType:
        return _is_defined_by_script(value.__func__)
    if kind is property:
        return any(map(_is_defined_by_script, (value.fget, value.fset, value.fdel)))
    return kind is functools.partial and _is_defined_by_script(value.func)


def _is_of(value: Any) -> bool:
    """Return whether this belongs to the script, or holds an object of the script."""
    kind = type(value)
    if kind in _NOTHING:
        return kind is tuple and any(map(_is_defined_by_script, value))
    if _is_defined_by_script(value):
        return True
    if issubclass(kind, type) or not is_of_python(kind):
        return False
    if kind.__module__ in MAIN_NAMES:
        return True
    own = own_dict(value)
    return len(own) <= _MOST_ATTRIBUTES and any(map(_is_defined_by_script, [*own.values()]))


_MOST_ATTRIBUTES = 32


def add(one: Addition) -> None:
    """Put something into a module of this process, which may be another one here and raise."""
    holder: Any = importlib.import_module(one.module)
    for step in one.path:
        holder = holder[step[0]] if type(step) is tuple else vars(holder)[step]
    value = one.value
    if one.how == "item":
        holder[one.key] = value
    elif one.how == "member":
        holder.add(value)
    elif one.how == "registered":
        if one.key is None:
            abc.ABCMeta.register(holder, value)
        else:
            holder.register(one.key, value)
    elif one.how == "attribute":
        (type.__setattr__ if isinstance(holder, type) else setattr)(holder, one.key, value)
    elif not any(value is other for other in holder):
        if one.how == "first":
            before = sum(map(_is_of, holder))
            holder.insert(before, value)
        else:
            holder.append(value)
