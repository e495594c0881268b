"""Functions and classes of ``__main__``: their names there, and marks that tell them apart.

``__mp_main__`` is the name of ``__main__`` in every process but the first one: in a worker, and in
a child of ``multiprocessing`` by ``spawn`` or ``forkserver``.
"""

from __future__ import annotations

import enum
import functools
import itertools
import marshal
import operator
import sys
import types
from _blake2 import blake2b  # the same as hashlib's, which loads OpenSSL: 3 ms in each process
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAIN_NAMES = frozenset({"__main__", "__mp_main__"})
"""The names under which the program's ``__main__`` is known in this process or another one."""


class Absent:
    """Stands for an object that is not there. It travels as its name."""


LRU_CACHE = type(functools.lru_cache(lambda: None))
"""Type of what ``functools.lru_cache`` returns."""

PLAIN: frozenset[type] = frozenset({int, float, complex, bool, str, bytes, type(None)})
"""Types of which an object holds no other, and cannot be changed."""


def found_as(module: str, name: str) -> Any:
    """Return the object at a qualified name of a module; ``None`` if there is none."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = found_in(found, part)
    return found


def found_in(holder: Any, name: str) -> Any:
    """Return an attribute; ``None`` if there is none.

    A module's ``__getattr__`` may raise anything, as a warning that the program made an error.
    """
    try:
        return getattr(holder, name, None)
    except Exception as error:  # noqa: BLE001 -- the holder does not give it
        let_handlers_pass(error)
        return None


def is_of_python(kind: type) -> bool:
    """Tell whether a class was made at run time, as every class of Python code."""
    return bool(kind.__flags__ & 1 << 9)  # Py_TPFLAGS_HEAPTYPE


def is_full(cell: types.CellType) -> bool:
    """Tell whether something is bound to a variable of a function around."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def is_of_main(thing: Any) -> bool:
    """Tell whether a function, class or other object says that it was made in ``__main__``."""
    try:
        return getattr(thing, "__module__", None) in MAIN_NAMES
    except TypeError:  # it is no text, and has no hash
        return False


def is_made_in_main(thing: Any) -> bool:
    """Tell the same of a function or class, or of the functions that a descriptor stands for."""
    if issubclass(type(thing), (type, types.FunctionType)):
        return is_of_main(thing)
    return any(map(is_of_main, functions_in(thing).values()))


# Globals of a program that runs in others than those of ``__main__``.
_space: dict[str, Any] | None = None


def main_space() -> dict[str, Any]:
    """Return the globals of the program's top level: those of ``__main__``, nearly always."""
    return sys.modules["__main__"].__dict__ if _space is None else _space


def use_space(space: dict[str, Any]) -> None:
    """Take other globals for those of ``__main__``.

    In a profiler or tracer that runs the script, and in a child of ``multiprocessing``.
    """
    global _space  # noqa: PLW0603 -- a fact about this process
    if space is main_space():
        return
    main = sys.modules["__main__"]
    _space = None if space is vars(main) else space
    if main.__name__ == "__main__":
        alias_main()


def find_in_main(qualname: str) -> object:
    """Return what this process's ``__main__`` has under a qualified name; ``None`` if nothing."""
    return at_path(main_space(), qualname)


def at_path(space: Mapping[str, Any], path: str) -> Any:
    """Return the object at a dotted name below these; ``None`` if there is none."""
    first, *rest = path.split(".")
    found = space.get(first)
    for part in rest:
        found = getattr(found, part, None)
    return found


def alias_main() -> None:
    """Let ``__mp_main__`` be ``__main__``, as ``multiprocessing`` does when it is imported.

    By then ``__main__`` may have been another module (a profiler's, a test runner's). Results
    refer to classes of the script as ``__mp_main__.X``.
    """
    main = sys.modules["__main__"]
    if _space is not None:
        main = types.ModuleType("__mp_main__")
        main.__getattr__ = _from_space  # type: ignore[method-assign]
    sys.modules["__mp_main__"] = main


def _from_space(name: str) -> Any:
    try:
        return main_space()[name]
    except KeyError:
        raise AttributeError(f"__main__ has no {name!r}") from None


class Attributes:
    """Attributes of a function or class, and of those in it, at one moment.

    Members of enumerations and entries of the interpreter are left out.

    Attributes:
        by_path: Functions, classes and descriptors that have the path for their own name. ``None``
            for all others: what the program has set at any time.
    """

    __slots__ = ("_bare", "_looks", "_thing", "by_path")

    def __init__(self, thing: Any) -> None:
        name = attribute_of(thing, "__qualname__")
        seen: dict[int, _Seen] = {}
        self.by_path: dict[str, Any] = dict(_attributes_on(thing, name, name, seen))
        self._thing = thing
        # Most functions have no attributes: one look at all of them.
        self._bare = [one for one, _, held in seen.values() if one and not held]
        self._looks = [(one, space, _print_of(held)) for one, space, held in seen.values() if held]

    def are_still(self) -> bool:
        """Tell whether all are those of that moment; others than definitions may have changed."""
        if any(map(_DICT_OF, self._bare)):
            return self._are_same()
        for function, space, before in self._looks:
            if (function and function.__dict__ is not space) or _print_of(space.copy()) != before:
                return self._are_same()
        return True

    def _are_same(self) -> bool:
        now = Attributes(self._thing)
        same = now.by_path.keys() == self.by_path.keys() and all(
            self.by_path[path] is one for path, one in now.by_path.items()
        )
        if same:
            self._bare, self._looks = now._bare, now._looks
        return same


_DICT_OF = operator.attrgetter("__dict__")


def _print_of(held: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return names and the identities of what they are bound to."""
    return *held, *map(id, held.values())


# A function, as its space may be replaced, or ``None``; the live space; what it held, copied in
# one step of C code, as other threads may change it at any time.
_Seen = tuple[types.FunctionType | None, Any, dict[str, Any]]


def _see(thing: Any) -> _Seen:
    space: Any = space_of(thing)
    return thing if type(thing) is types.FunctionType else None, space, space.copy()


def _attributes_on(
    thing: Any, path: str, name: str, seen: dict[int, _Seen]
) -> Iterator[tuple[str, Any]]:
    """Yield paths and what :attr:`Attributes.by_path` has for them.

    Args:
        thing: A function or class.
        path: Where it is found.
        name: Its qualified name, which is also that of the function around which it is a wrapper.
        seen: By ``id()``, the looks at objects.
    """
    if id(thing) in seen:
        return
    seen[id(thing)] = _, _, space = _see(thing)
    members = _members_of(thing)
    is_dispatch = type(space.get("registry")) is types.MappingProxyType
    known = _OF_INTERPRETER | _OF_DISPATCH if is_dispatch else _OF_INTERPRETER
    for attribute, value in space.items():
        is_special = attribute[:2] == "__" == attribute[-2:]
        if attribute in known or (is_special and members is not None):
            continue
        # A member that is sent is looked up in the worker's class: its attributes do not travel.
        if members is not None and (attribute in members or _is_of_enumeration(attribute, value)):
            continue
        where, own = f"{path}.{attribute}", f"{name}.{attribute}"
        if _qualname_in(value) != own:
            yield where, None
        elif issubclass(type(value), (type, types.FunctionType)):
            yield where, value
            yield from _attributes_on(value, where, own, seen)
        elif all(part.__qualname__ == own for part in functions_in(value).values()):
            yield where, value
            yield from _attributes_in(value, where, own, seen)
        else:  # another setter, say
            yield where, None
    for part, one in functions_in(thing).items():
        if one.__qualname__ == name:
            yield from _attributes_on(one, f"{path}.{part}", name, seen)


def _attributes_in(
    wrapper: Any, path: str, name: str, seen: dict[int, _Seen]
) -> Iterator[tuple[str, Any]]:
    """Yield the same of an object that stands for functions, and of these functions."""
    functions = functions_in(wrapper)
    for part, one in functions.items():
        yield from _attributes_on(one, f"{path}.{part}", name, seen)
    needed = {*parts_of(wrapper), *_OF_WRAPPERS}
    seen[id(wrapper)] = _, _, space = _see(wrapper)
    for attribute, value in space.items():
        is_of_function = any(vars(one).get(attribute) is value for one in functions.values())
        if not (attribute in needed or attribute[:1] == "_" or is_of_function):
            yield f"{path}.{attribute}", None


def functions_in(wrapper: Any) -> dict[str, types.FunctionType]:
    """Return by name the functions that an object stands for, or that a function is around."""
    found = parts_of(wrapper)
    return {name: one for name, one in found.items() if type(one) is types.FunctionType}


# As functools needs them.
_OF_WRAPPERS = frozenset({"attrname", "lock", "cache_parameters"})


def _is_of_enumeration(name: str, value: object) -> bool:
    """Tell whether an attribute is a table of an enumeration, and no method such as _missing_."""
    return name[:1] == "_" == name[-1:] and type(_function_in(value)) is not types.FunctionType


def _members_of(thing: object) -> Mapping[str, Any] | None:
    """Return the members of an enumeration, by name; ``None`` if it is none."""
    if not issubclass(type(thing), enum.EnumType):
        return None
    members = space_of(thing).get("_member_map_")
    return members if type(members) is dict else {}


def held_by_members(kind: type) -> Iterator[Any]:
    """Yield what the members of an enumeration hold; nothing for another class."""
    todo: list[Any] = [own_dict(one) for one in (_members_of(kind) or {}).values()]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if type(one) in _HOLDERS and id(one) not in seen:
            seen.add(id(one))
            todo += one.values() if type(one) is dict else one
        elif type(one) not in _HOLDERS:
            yield one


_HOLDERS = frozenset({dict, tuple, list, set, frozenset})
_PARTS = ("__func__", "func", "dispatcher", "fget", "fset", "fdel", "__wrapped__")
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def parts_of(thing: object) -> dict[str, Any]:
    """Return by name the functions that an object is made of, and calls."""
    found = {name: _part_of(thing, name) for name in _PARTS}
    if found["__func__"] is not None:
        del found["__wrapped__"]  # the same
    return {name: part for name, part in found.items() if part is not None}


def _part_of(thing: object, name: str) -> Any:
    """Return an attribute that is simply there; ``None`` if code would have to be asked."""
    for kind in type.__getattribute__(type(thing), "__mro__"):
        found = space_of(kind).get(name)
        if found is not None:
            return found.__get__(thing) if type(found) in _SLOTS else None
    return space_of(thing).get(name)


# Reading attributes of these types runs no code of the program.
_WITHOUT_CODE = frozenset({types.FunctionType, type})


def attribute_of(thing: Any, name: str) -> Any:
    """Return an attribute, or ``None``, without running code of the program."""
    if type(thing) in _WITHOUT_CODE:
        return getattr(thing, name, None)
    get: Any = type if issubclass(type(thing), type) else object
    try:
        return get.__getattribute__(thing, name)
    except AttributeError:
        return None


def space_of(thing: object) -> Mapping[str, Any]:
    """Return the names in a class, function or module, as :func:`attribute_of`."""
    if type(thing) in _WITHOUT_CODE or type(thing) is types.ModuleType:
        return vars(thing)
    # A proxy's __class__ is code, which asks the object behind the proxy.
    kinds = [_vars_of_class(kind) for kind in attribute_of(type(thing), "__mro__")]
    if not all(type(kind.get("__dict__")) in _OF_OBJECTS for kind in kinds):
        return {}
    found = attribute_of(thing, "__dict__")
    return found if type(found) in (dict, types.MappingProxyType) else {}


def own_dict(value: object) -> Mapping[str, Any]:
    """Return the attributes of an object itself, without any code of its class."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) in (dict, types.MappingProxyType) else {}


_OF_OBJECTS = (types.GetSetDescriptorType, type(None))
_vars_of_class: Callable[[type], Mapping[str, Any]] = vars(type)["__dict__"].__get__


def _qualname_in(value: object) -> object:
    """Return the qualified name of a function or class, or of the function in a descriptor."""
    if type(value) is types.FunctionType:
        return value.__qualname__
    if type(value) in _NAMELESS:
        return None
    if issubclass(type(value), DESCRIPTORS):
        value = next(iter(parts_of(value).values()), None)
    name = attribute_of(value, "__qualname__")
    return name if type(name) is str else None


def _function_in(value: object) -> object:
    """Return the function in a descriptor of the standard library's, or the value itself."""
    kind = type(value)
    if issubclass(kind, (staticmethod, classmethod)):
        return object.__getattribute__(value, "__func__")
    return object.__getattribute__(value, "fget") if issubclass(kind, property) else value


DESCRIPTORS = (
    *(staticmethod, classmethod, property),
    *(functools.cached_property, functools.singledispatchmethod),
)
"""Types whose objects stand in a class for the function that they hold."""
_NAMELESS = frozenset({int, float, str, bool, type(None), tuple, list, dict, set})


# Set by the interpreter, abc, copyreg, dataclasses, typing and functools. They do not say what a
# class does, or belong to the process.
_OF_INTERPRETER = frozenset(
    {"__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__"}
    | {"__annotations_cache__", "__dict__", "__doc__", "__firstlineno__", "__match_args__"}
    | {"__module__", "__orig_bases__", "__parameters__", "__qualname__", "__slotnames__"}
    | {"__slots__", "__static_attributes__", "__type_params__", "__weakref__", "__wrapped__"}
    | {"__dataclass_fields__", "__dataclass_params__", "__name__", "_abc_impl"}
    | {"__protocol_attrs__", "__non_callable_proto_members__"}
)
# What functools.singledispatch sets on its function.
_OF_DISPATCH = frozenset({"register", "dispatch", "registry", "_clear_cache"})


def find_attribute(path: str) -> tuple[Any, ...]:
    """Return a tuple of the object of ``__main__`` at a path; ``()`` if there is none.

    The search calls no descriptor and no ``__getattr__``.
    """
    first, *rest = path.split(".")
    here: Mapping[str, Any] = main_space()
    if first not in here:
        return ()
    found = here[first]
    for part in rest:
        here = space_of(found)
        if part not in here and type(found) not in _WITHOUT_CODE:
            here = parts_of(found)
        if part not in here:
            return ()
        found = here[part]
    return (found,)


def set_on(thing: Any, name: str, value: object) -> None:
    """Set an attribute of a function or class, without running code of its metaclass."""
    try:
        (type if issubclass(type(thing), type) else object).__setattr__(thing, name, value)
    except TypeError:  # of ctypes, whose own way it must be
        setattr(thing, name, value)


def delete_from(thing: Any, name: str) -> None:
    """Delete an attribute of a function or class, without running code of its metaclass."""
    try:
        (type if issubclass(type(thing), type) else object).__delattr__(thing, name)
    except TypeError:  # as above
        delattr(thing, name)


def marks_of(module: types.ModuleType) -> dict[str, bytes]:
    """Return a mark of each function, class and descriptor that a module owns, by its path."""
    marks: dict[str, bytes] = {}
    for name, value in [*vars(module).items()]:
        for path, found in _named(value, name):
            marks.setdefault(path, mark_of(found))
    return marks


def _named(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what has the path for its own name, and what is inside of it, each with its path."""
    if issubclass(type(value), (type, types.FunctionType)):
        if value.__qualname__ == path and is_of_main(value):
            yield path, value
            if issubclass(type(value), type):
                yield from _named_in(value, path)
    elif str(getattr(type(value), "__module__", "")).partition(".")[0] in _WRAPPERS:
        attributes = dict(own_dict(value))
        if attributes.get("__qualname__") == path and attributes.get("__module__") in MAIN_NAMES:
            yield path, value
        for name, part in attributes.items():
            if isinstance(part, types.FunctionType) and part.__qualname__ == f"{path}.{name}":
                yield part.__qualname__, part


def _named_in(kind: type, path: str) -> Iterator[tuple[str, Any]]:
    for name, part in [*space_of(kind).items()]:
        where = f"{path}.{name}"
        if type(part) not in _IN_CLASSES:
            yield from _named(part, where)
        elif _qualname_in(part) == where:
            yield where, part


_IN_CLASSES = frozenset({*DESCRIPTORS, LRU_CACHE})

# Modules whose objects stand for the function that they wrap, under its name.
_WRAPPERS = frozenset({"functools", "safepool"})


def mark_of(thing: Any) -> bytes:
    """Return a mark that distinguishes functions or classes of the same name.

    A class is known by its functions: its attributes may be set at any time. A descriptor is known
    by the functions that it stands for.
    """
    if type(thing) in DESCRIPTORS:
        return b"+".join(map(mark_of, functions_in(thing).values()))
    if isinstance(thing, type):
        return b"class" + b"".join(b"," + part for part in sorted(_parts_of_class(thing)))
    function = thing if hasattr(thing, "__code__") else getattr(thing, "__wrapped__", None)
    code = getattr(function, "__code__", None)
    return b"" if code is None else _mark_of_code(code) + _mark_of_held(function)


def is_mark_of(mark: bytes | None, thing: Any) -> bool:
    """Return whether a function or class has a mark from another process.

    Functions of a class may have been replaced since, but not all of them.
    """
    mine = mark_of(thing)
    if mark is None or not isinstance(thing, type):
        return mine == mark
    own, theirs = {*mine.split(b",")}, {*mark.split(b",")}
    return own <= theirs or bool(own & theirs - {b"class", b"0"})


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code, and the code of all functions and classes inside of it."""
    todo = [code]
    while todo:
        inner = todo.pop()
        todo += [one for one in inner.co_consts if isinstance(one, types.CodeType)]
        yield inner


def _mark_of_code(code: types.CodeType) -> bytes:
    mark = blake2b(digest_size=8)
    for one in codes_in(code):
        # The items of a frozenset are in another order in each process.
        constants = [
            repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
            for constant in one.co_consts
            if not isinstance(constant, types.CodeType)
        ]
        about = one.co_firstlineno, one.co_name, one.co_names, one.co_varnames, constants
        mark.update(repr(about).encode("utf-8", "surrogatepass"))
        mark.update(one.co_code)
    return mark.hexdigest().encode()


def _mark_of_held(function: Any) -> bytes:
    """Return a mark of plain values that a function has, and of the functions it dispatches to.

    Values are its defaults, and what it has captured: a decorator's arguments.
    """
    cells = getattr(function, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if is_full(cell)]
    if type(function) is types.FunctionType:
        held += function.__defaults__ or ()
        held += itertools.chain(*(function.__kwdefaults__ or {}).items())
    for kind, one in _registry_of(function).items():
        code = attribute_of(one, "__code__")
        own = _mark_of_code(code) if type(code) is types.CodeType else b""
        held += attribute_of(kind, "__qualname__"), own
    plain = [one if type(one) in PLAIN else ... for one in held]
    if all(one is ... for one in plain):
        return b""
    # Not by repr(), which refuses an int of many digits. Version 2 has no references, which depend
    # on who else holds a value.
    return blake2b(marshal.dumps(plain, 2), digest_size=8).hexdigest().encode()


def _registry_of(function: Any) -> Mapping[Any, Any]:
    """Return the functions by type of one of ``functools.singledispatch``."""
    found = space_of(function).get("registry")
    return found if type(found) is types.MappingProxyType else {}


def _parts_of_class(kind: type) -> Iterator[bytes]:
    """Yield what marks a class: where it begins, from Python 3.13 on, and its functions."""
    yield b"%d" % space_of(kind).get("__firstlineno__", 0)
    for name, part in [*space_of(kind).items()]:
        inner = _function_in(part)
        code = attribute_of(inner, "__code__")
        # Methods that dataclasses and named tuples generate are in no file.
        if (
            type(code) is types.CodeType
            and code.co_filename[:1] != "<"
            and attribute_of(inner, "__qualname__") == f"{kind.__qualname__}.{name}"
        ):
            yield _mark_of_code(code)
