"""Classes by value: parts of a class that cloudpickle leaves out or makes otherwise.

    ``__slots__``      given when the class is made, under the names that it has them. cloudpickle
                       sets the attribute afterwards, and makes a class that takes any other
    enumerations       members with the attributes and values that they have; their ``__new__``
                       and ``__init__`` are not run again
    named tuples       by their real bases
    ``ctypes``         structures and unions: fields last, after what their layout depends on;
                       pointers, arrays and function types by how they were made
    keyword arguments of a class statement are not kept by anybody. If ``__init_subclass__`` or a
    metaclass asks for them, the class is made without running that: its effects are among the
    attributes

Not covered:
    * Metaclasses of C code, other than those of ``ctypes``, that need to see the class's body.
"""

from __future__ import annotations

import abc
import collections.abc
import contextlib
import enum
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cloudpickle import cloudpickle as _internals

from safepool.transport.held import is_importable
from safepool.transport.lazy import loaded
from safepool.transport.marks import delete_from, find_in_main, is_of_python, main_space, set_on

Parts = tuple["Callable[..., type]", tuple[Any, ...], dict[str, Any]]

_OWN_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
# Attributes that the interpreter makes anew.
_MADE_ANEW = frozenset({"__dict__", "__weakref__", "__annotate_func__", "__annotations_cache__"})
# Attributes that enum.EnumType makes from the members.
_OF_MEMBERS = frozenset(
    {"_generate_next_value_", "_member_names_", "_member_map_", "_member_type_"}
    | {"_value2member_map_", "_hashable_values_", "_unhashable_values_", "_unhashable_values_map_"}
)
# Attributes that classes of ctypes other than structures need when they are made.
_OF_CTYPES = frozenset({"_type_", "_length_", "_flags_", "_argtypes_", "_restype_"})
_SET_ONCE = frozenset({"__slots__", "_fields_"})
_OF_A_MEMBER = frozenset({"_value_", "_name_", "__objclass__", "_sort_order_"})
_ATTRIBUTES_OF_MEMBERS = "<members>"
_REGISTERED_WITH = "<registered>"
_NAMES = "<names>"

# Names of the attributes that classes have arrived with.
_arrived_with: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()


def reduce_class(kind: type) -> tuple[Any, ...] | Parts:
    """Return the recipe for making a class again.

    A function, its arguments, and the attributes that :func:`fill_class` sets afterwards. For a
    type that another type determines, only the function and its arguments.
    """
    derived = _reduce_derived(kind)
    if derived is not None:
        return derived
    if issubclass(kind, enum.Enum):
        return _reduce_enum(kind)
    keywords: dict[str, Any] = {"__qualname__": kind.__qualname__}
    if "__module__" in vars(kind):
        keywords["__module__"] = kind.__module__
    if isinstance(vars(kind).get("__dict__"), property):
        keywords["__dict__"] = vars(kind)["__dict__"]
    attributes = _attributes_of(kind)
    if "__slots__" in vars(kind):
        keywords["__slots__"] = _slots_of(kind)
    is_named_tuple = tuple in kind.__bases__ and "_fields" in vars(kind)
    bases = kind.__bases__ if is_named_tuple else _internals._get_bases(kind)
    bases = () if bases == (object,) else bases  # as in most class statements
    for name in _OF_CTYPES & attributes.keys():
        keywords[name] = attributes.pop(name)
    resolved = types.resolve_bases(bases)
    # The bases may bring one that has no name, as those of ctypes.
    meta = None if types.prepare_class("", resolved)[0] is type(kind) else type(kind)
    return _make, (meta, kind.__name__, bases, keywords), attributes


def _attributes_of(kind: type) -> dict[str, Any]:
    found = _internals._extract_class_dict(kind)
    found = {
        name: value
        for name, value in found.items()
        if name not in _MADE_ANEW and not _is_made_anew(kind, value)
    }
    if callable(vars(kind).get("__annotate_func__")):
        found["__annotate__"] = vars(kind)["__annotate_func__"]
    if isinstance(kind, abc.ABCMeta) and found.pop("_abc_impl", None) is not None:
        found["_abc_impl"] = _registered(kind)
    # Not for one of a function, which is sent with each call: it takes as long as all the rest.
    if find_in_main(kind.__qualname__) is kind:
        if abstract := _registered_with(kind):
            found[_REGISTERED_WITH] = abstract
        found[_NAMES] = (*found,)
    if "_fields_" in found:  # of ctypes: it reads the others
        found["_fields_"] = found.pop("_fields_")
    return found


def _registered(abstract: type) -> list[type]:
    registry, *_ = abc._get_dump(abstract)  # type: ignore[attr-defined]
    return [one for reference in registry if (one := reference()) is not None]


def _registered_with(kind: type) -> list[type]:
    spaces = vars(collections.abc), vars(sys.modules.get("numbers", abc)), main_space()
    found = {
        id(one): one
        for space in spaces
        for one in [*space.values()]
        if issubclass(type(one), abc.ABCMeta) and any(kind is other for other in _registered(one))
    }
    # Other names are not read: a module may warn when a name is read (ByteString).
    return [one for one in found.values() if is_importable(one)]


def _is_made_anew(kind: type, value: object) -> bool:
    if isinstance(value, types.FunctionType):
        return False
    if isinstance(value, _OWN_DESCRIPTORS):
        return value.__objclass__ is kind
    return type(value).__name__ == "CField" and type(value).__module__ in ("ctypes", "_ctypes")


def _slots_of(kind: type) -> tuple[str, ...]:
    """Return its slots under the names that they have, which may be private ones."""
    own = [
        name
        for name, value in vars(kind).items()
        if isinstance(value, types.MemberDescriptorType) and value.__objclass__ is kind
    ]
    return (*own, *(name for name in ("__dict__", "__weakref__") if name in vars(kind)))


def _make(meta: type | None, name: str, bases: tuple[Any, ...], keywords: dict[str, Any]) -> type:
    resolved = types.resolve_bases(bases)
    meta = types.prepare_class(name, resolved, {"metaclass": meta} if meta else {})[0]
    first = _first(meta, lambda one: not _is_as_sent(one))
    try:
        namespace: dict[str, Any] = first.__prepare__(name, resolved)
        namespace.update(keywords)
        if resolved is not bases:
            namespace["__orig_bases__"] = bases
        with _other_hooks(resolved, _pass_on_if_as_sent):
            made: type = first.__new__(meta, name, resolved, namespace)
        first.__init__(made, name, resolved, namespace)
    except Exception:  # noqa: BLE001 -- user code, which was given a body and keywords at home
        first = _first(meta, lambda one: one.__module__ in sys.stdlib_module_names)
        with _other_hooks(resolved, lambda _: _be_quiet):
            made = first.__new__(meta, name, resolved, dict(keywords))
    return made


def _first(meta: Any, is_wanted: Callable[[type], bool]) -> Any:
    """Return what makes a class without the code of a metaclass that is not wanted."""
    return next(one for one in meta.__mro__ if is_wanted(one))


# Classes made here from another process's, and filled with their attributes there.
arrived: weakref.WeakSet[type] = weakref.WeakSet()
_HOOK = "__init_subclass__"
_hooking = threading.RLock()


@contextlib.contextmanager
def _other_hooks(bases: Iterable[type], other: Callable[[type], object]) -> Iterator[None]:
    """Replace ``__init_subclass__`` of bases, except where ``other`` returns ``None``."""
    lines = [one for base in bases for one in base.__mro__ if is_of_python(one)]
    others = {one: hook for one in lines if _HOOK in vars(one) and (hook := other(one))}
    if not others:
        yield
        return
    with _hooking:
        own = {one: vars(one)[_HOOK] for one in others}
        try:
            for one, hook in others.items():
                type.__setattr__(one, _HOOK, hook)
            yield
        finally:
            for one, hook in own.items():
                type.__setattr__(one, _HOOK, hook)


def _is_as_sent(kind: type) -> bool:
    """Tell whether a class is as the program has it: what its hooks have filled is sent too."""
    return kind in arrived or kind.__module__ == "__mp_main__"


def _pass_on_if_as_sent(owner: Any) -> object:
    if not _is_as_sent(owner):
        return None

    def pass_on(kind: Any, /, **words: Any) -> None:
        super(owner, kind).__init_subclass__(**words)

    return classmethod(pass_on)


@classmethod  # type: ignore[misc]
def _be_quiet(*_: object, **_words: object) -> None:
    pass


def _reduce_enum(kind: Any) -> Parts:
    members = kind.__members__
    attributes = {
        name: value
        for name, value in _attributes_of(kind).items()
        if name not in _OF_MEMBERS and name not in members
    }
    own = {
        name: {key: value for key, value in vars(one).items() if key not in _OF_A_MEMBER}
        for name, one in members.items()
        if one.name == name
    }
    attributes[_ATTRIBUTES_OF_MEMBERS] = own
    values = {name: (_data_of(kind, one), one.value) for name, one in members.items()}
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    boundary = {"boundary": vars(kind)["_boundary_"]} if issubclass(kind, enum.Flag) else {}
    return (
        _make_enum,
        (type(kind), kind.__name__, kind.__bases__, about, values, boundary),
        (attributes),
    )


def _data_of(kind: Any, member: Any) -> tuple[Any, ...]:
    """Return the plain value of a member: the text of one that is a ``str``."""
    base = kind._member_type_
    if base.__new__ is object.__new__:
        return ()
    arguments = getattr(base, "__getnewargs__", None)
    if arguments is not None:
        return tuple(arguments(member))
    return member.value if isinstance(member.value, tuple) else (member.value,)


def _make_enum(
    meta: Any,
    name: str,
    bases: tuple[type, ...],
    about: dict[str, Any],
    values: dict[str, tuple[tuple[Any, ...], object]],
    boundary: dict[str, Any],
) -> type:
    first = _first(meta, lambda one: not _is_as_sent(one))
    namespace = first.__prepare__(name, bases, **boundary)
    namespace.update(about)
    namespace["__new__"] = _new_member
    namespace["__init__"] = _leave_member
    for member, made_of in values.items():
        namespace[member] = made_of
    with _other_hooks(bases, _pass_on_if_as_sent):
        made: type = first.__new__(meta, name, bases, namespace, **boundary)
    for own in ("__init__", "__new_member__"):  # derived enumerations would inherit them
        type.__delattr__(made, own)
    return made


def _new_member(kind: Any, *arguments: Any) -> Any:
    # An enumeration of tuples takes one tuple.
    data, value = arguments if len(arguments) == 2 else arguments[0]
    base = kind._member_type_
    member = base.__new__(kind, *data)
    member._value_ = value
    return member


def _leave_member(_member: object, *_: object) -> None:
    pass


def _reduce_derived(kind: Any) -> tuple[Any, ...] | None:
    """Return how ``ctypes`` makes a type of another one; ``None`` if it is another type."""
    ctypes = loaded("ctypes", "PyDLL")
    if ctypes is None or not (hasattr(kind, "_type_") or hasattr(kind, "_flags_")):
        return None
    base = kind.__bases__[0] if len(kind.__bases__) == 1 else None
    if base is ctypes._Pointer and ctypes.POINTER(kind._type_) is kind:
        return ctypes.POINTER, (kind._type_,)
    if base is ctypes._SimpleCData:
        native = getattr(ctypes, kind.__name__[:-3], None)
        for order in ("__ctype_be__", "__ctype_le__"):
            if getattr(native, order, None) is kind:  # c_ushort_be
                return getattr, (native, order)
    if base is ctypes.Array and kind._type_ * kind._length_ is kind:
        return operator.mul, (kind._type_, kind._length_)
    is_prototype = hasattr(kind, "_argtypes_")
    if base is ctypes._CFuncPtr and is_prototype and kind._flags_ == ctypes._FUNCFLAG_CDECL:
        return ctypes.CFUNCTYPE, (kind._restype_, *kind._argtypes_)
    return None


def fill_class(kind: type, attributes: dict[str, Any]) -> None:
    """Set the attributes of a class that has been made, without running code of its metaclass."""
    for name, value in attributes.items():
        if name in _FILLED_BY:
            _FILLED_BY[name](kind, value)
        elif name not in _SET_ONCE or name not in vars(kind):
            set_on(kind, name, value)
    if "__firstlineno__" in attributes:  # Python removes it when another one is set
        set_on(kind, "__firstlineno__", attributes["__firstlineno__"])


def _register(kind: Any, registered: list[type]) -> None:
    for one in registered:
        abc.ABCMeta.register(kind, one)


def _register_with(kind: type, abstract: list[Any]) -> None:
    for one in abstract:
        abc.ABCMeta.register(one, kind)


def _fill_members(kind: Any, attributes: dict[str, dict[str, Any]]) -> None:
    for member, own in attributes.items():
        vars(kind.__members__[member]).update(own)


def _delete_others(kind: type, names: tuple[str, ...]) -> None:
    """Delete attributes that the class had when it arrived before, and has not any more."""
    for gone in ({*_arrived_with.get(kind, ())} - {*names}) & vars(kind).keys():
        delete_from(kind, gone)
    _arrived_with[kind] = names


_FILLED_BY: dict[str, Callable[[Any, Any], None]] = {
    "_abc_impl": _register,
    _REGISTERED_WITH: _register_with,
    _ATTRIBUTES_OF_MEMBERS: _fill_members,
    _NAMES: _delete_others,
}
