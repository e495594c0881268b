"""The pickler for objects that a worker cannot import: cloudpickle, and additions to it.

    a class that is known        is looked up by cloudpickle's own number for it before it is made
                                 again: no second run of ``__init_subclass__`` or a metaclass,
                                 and a process's own class is never changed by what arrives
    ``functools.lru_cache``      its function, and its size; the cache is each process's own, and
                                 lasts as long as the worker
    ``functools.singledispatch`` its functions, by type
    ``functools.cached_property``  its function
    an object of a module        the receiver's own, where the script has it by a name (``held``)

The first object that needs it imports the module: a worker or a program that sends only importable
objects never imports cloudpickle.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import sys
import types
import uuid
import weakref
from collections import ChainMap
from typing import TYPE_CHECKING, Any

import cloudpickle
from cloudpickle import cloudpickle as _internals

from safepool.transport import kinds, weak
from safepool.transport.annotations import annotations_of, closure_of, global_names
from safepool.transport.classes import arrived, fill_class, reduce_class
from safepool.transport.exceptions import reduce_exception
from safepool.transport.held import (
    Held,
    held_by_module,
    held_value,
    is_importable,
    modules_by_value,
)
from safepool.transport.lazy import LAZY_TYPES, arrived_lazily, reduce_lazy
from safepool.transport.marks import LRU_CACHE, MAIN_NAMES, is_of_main, is_of_python, main_space
from safepool.transport.names import met, names_of, of_script, reduce_by_program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from safepool.transport.names import Met
    from safepool.untyped import Untyped as CloudPickler
else:
    from cloudpickle import Pickler as CloudPickler

# Every function that singledispatch returns runs this code.
_dispatching: Any = functools.singledispatch(repr)
_SINGLE_DISPATCH: types.CodeType = _dispatching.__code__

# Attributes that the standard library adds to a wrapper besides the function.
_WRAPPER_NAMES = frozenset(
    {*functools.WRAPPER_ASSIGNMENTS, "__wrapped__", "cache_parameters"}
    | {"dispatch", "register", "registry", "_clear_cache"}
)

# Modules of types with a descriptor.
_HANDED = frozenset({"socket", "multiprocessing.connection"})

# cloudpickle keeps the classes that it has sent or made, under its own numbers.
_classes_by_number: Mapping[str, type] = getattr(_internals, "_DYNAMIC_CLASS_TRACKER_BY_ID", {})

# A program's own class or cache is sent with every call that uses it. The last object of each name
# is kept in between, as an imported module would keep it: otherwise the class would be made again,
# and the cache would be empty each time.
_kept: dict[tuple[str, str], Any] = {}
_MOST_KEPT = 1024


def _keep(made: Any) -> None:
    name = str(getattr(made, "__qualname__", "<locals>"))
    if "<" in name:
        return
    key = str(made.__module__), name
    _kept.pop(key, None)
    _kept[key] = made
    if len(_kept) > _MOST_KEPT:
        del _kept[next(iter(_kept))]


class ByValuePickler(CloudPickler):
    """cloudpickle's pickler; its ``dispatch_table`` is :func:`reducer_table`.

    With ``to_worker`` it pickles for a worker, in which ``namespace`` stands for the globals of
    ``__main__``.
    """

    to_worker = False
    namespace: dict[str, Any]

    dump: Any = pickle.Pickler.dump  # cloudpickle's makes another error of a RecursionError

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.script: Met | None = met()
        # By id(): cells of functions, and the empty ones that are sent in their place.
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}

    def _dynamic_function_reduce(self, func: types.FunctionType) -> tuple[Any, ...]:
        rebuild, fill = _internals._make_function, _internals._function_setstate
        arguments = self._function_getnewargs(func)
        if func.__closure__:
            # Two functions that share a variable go on to share it.
            arguments = *arguments[:-1], tuple(map(self._empty_cell, func.__closure__))
        return rebuild, arguments, _state_of(func, self.script), None, None, fill

    def reducer_override(self, obj: Any) -> Any:
        """Reduce classes and functions; ``NotImplemented`` leaves the rest to the table."""
        reduced = self._of_main(obj) if self.to_worker else reduce_by_program(obj)
        if reduced is not None:
            return reduced
        kind = type(obj)  # not isinstance(), which asks the object for its class: it may be lazy
        if kind is types.FunctionType:
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented and obj.__code__ is _SINGLE_DISPATCH:
                return _reduce_single_dispatch(obj)
            return reduced
        if issubclass(kind, type):
            return NotImplemented if _is_by_reference(obj) else _reduce_class(obj)
        if issubclass(kind, BaseException):
            reduced = reduce_exception(obj)
            if reduced is not NotImplemented:
                return reduced
        return kinds.reduce_other(obj, self.dispatch_table)

    def _empty_cell(self, cell: types.CellType) -> types.CellType:
        return self._cells.setdefault(id(cell), (cell, types.CellType()))[1]

    def _of_main(self, obj: Any) -> Any:
        """Reduce a function or class of ``__main__``; ``None`` for any other object."""
        kind = type(obj)
        if not (kind is types.FunctionType or kind is LRU_CACHE or issubclass(kind, type)):
            return None
        of_main = is_of_main(obj) or (
            kind is types.FunctionType and obj.__globals__ is main_space()
        )
        # A decorator's result claims to belong to the decorator's module.
        if self.script is not None and (of_main or "<" in getattr(obj, "__qualname__", "")):
            path = self.script.path_of(obj)
            if path is not None:
                return of_script, (path,)
        if not of_main:
            return None
        # By value, also if cloudpickle would find it in ``__mp_main__``.
        if issubclass(kind, type):
            return _reduce_class(obj)
        if kind is LRU_CACHE or obj.__code__ is _SINGLE_DISPATCH:
            return None
        if obj.__globals__.get("__name__") in MAIN_NAMES:
            # Not always those of the module: ``runpy`` and profilers have a copy.
            self.globals_ref.setdefault(id(obj.__globals__), self.namespace)
        return self._dynamic_function_reduce(obj)


def reducer_table(
    special: dict[type, Callable[[Any], Any]], *, loky_imported: bool
) -> ChainMap[type, Callable[[Any], Any]]:
    """Return the reducers for other objects than classes and functions.

    ``special`` are those for arrays, and those registered with ``multiprocessing``. Others may
    have been registered with loky, and hold here.
    """
    own: dict[type, Callable[[Any], Any]] = {
        types.CodeType: _reduce_code,
        LRU_CACHE: _reduce_lru_cache,
        # From Python 3.13 on it has a cache beside it that cannot be pickled.
        functools.singledispatchmethod: lambda method: (
            type(method),
            (method.func,),
            {"dispatcher": method.dispatcher},
        ),
        # cloudpickle sets a class's attributes one by one, which tells them no names.
        functools.cached_property: lambda prop: (
            functools.cached_property,
            (prop.func,),
            {"attrname": prop.attrname},
        ),
        **dict.fromkeys(LAZY_TYPES, reduce_lazy),
        **kinds.table(),
        **special,
    }
    # Its maps and not itself: one within another is twice as slow (benchmarks/by_value.py).
    theirs: Any = cloudpickle.Pickler.dispatch_table
    table = ChainMap(own, *theirs.maps)
    if loky_imported:
        # loky's is live, so later registrations hold. loky's own reducers for sockets and
        # connections are a copy of the standard library's, which open a listening socket.
        handed = {kind: special[kind] for kind in special if kind.__module__ in _HANDED}
        table.maps[:0] = [handed, sys.modules["loky.backend.reduction"]._dispatch_table]
    return table


def _state_of(
    function: types.FunctionType, script: Met | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what cloudpickle sets on a function that it has made, modules' objects as names.

    Globals of a script's function are sent separately (``pool.calls.names``).
    """
    globals_ = function.__globals__
    names = global_names(function.__code__)
    used = {"".join(name): globals_[name] for name in names if name in globals_}
    apart = script is not None and globals_ is main_space()
    if script is not None and apart:
        script.uses.update(names_of(function.__code__))
    cells = [*map(_internals._get_cell_contents, function.__closure__ or ())]
    defaults = function.__defaults__
    slots = {
        # Copies, as cloudpickle makes them: a pickle of the same content has the same bytes.
        "__name__": "".join(function.__name__),
        "__qualname__": "".join(function.__qualname__),
        **annotations_of(function),
        "__kwdefaults__": _held_in(function.__kwdefaults__, globals_),
        "__defaults__": defaults and tuple(held_or_itself(one, globals_) for one in defaults),
        "__module__": function.__module__,
        "__doc__": function.__doc__,
        "__closure__": closure_of(function, held_or_itself),
        "_cloudpickle_submodules": _submodules(
            function.__code__, itertools.chain(used.values(), cells)
        ),
        "__globals__": {}
        if apart
        else {name: _own_of(name, value, globals_) for name, value in used.items()},
    }
    own = vars(function)
    return {"".join(name): value for name, value in own.items()} if own else {}, slots


def _held_in(values: dict[str, Any] | None, space: dict[str, Any]) -> dict[str, Any] | None:
    return values and {name: held_or_itself(value, space) for name, value in values.items()}


def held_or_itself(value: object, space: dict[str, Any]) -> object:
    """Return what stands for an object of a module, or the object."""
    place = held_value(value, space)
    return value if place is None else Held(place, value)


def _own_of(name: str, value: object, space: dict[str, Any]) -> object:
    place = held_by_module(name, value, space)
    return (arrived_lazily(value) or value) if place is None else Held(place, value)


def _submodules(code: types.CodeType, values: Iterable[object]) -> list[types.ModuleType]:
    # Modules with lazy imports are excluded: reading an attribute would import something.
    safe = [one for one in values if type(one) is types.ModuleType and not arrived_lazily(one)]
    return _internals._find_imported_submodules(code, safe) if safe else []


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    """Reduce as cloudpickle does, and keep the name of the file.

    cloudpickle 3.1.3 and later leave it out, and with it the lines of every traceback.
    """
    reduced: Any = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    rebuild, arguments = reduced
    # Texts alone are compared with text: "python -bb" makes an error of bytes beside one.
    kept = (
        code.co_filename if isinstance(item, str) and item == "<dynamic-code>" else item
        for item in arguments
    )
    return rebuild, tuple(kept)


_NAMELESS_TYPES = (type(None), type(...), type(NotImplemented))


def _is_nameless(kind: type) -> bool:
    return any(kind is one for one in _NAMELESS_TYPES) or kind in _internals._BUILTIN_TYPE_NAMES


def _is_by_reference(kind: type) -> bool:
    return not _is_nameless(kind) and bool(_internals._should_pickle_by_reference(kind))


def _reduce_class(kind: type) -> Any:
    """Let the receiver ask whether it has the class before it makes it."""
    if _is_nameless(kind):
        return _internals._class_reduce(kind)
    parts = reduce_class(kind)
    if len(parts) == 2:
        return parts
    number = _internals._get_or_create_tracker_id(kind)
    make, arguments = parts[:2]
    attributes: dict[str, Any] = parts[2]
    if kind.__module__ in MAIN_NAMES:
        attributes = _held_in(attributes, main_space()) or {}
    code = {name: value for name, value in attributes.items() if type(value) in _CODE}
    if code and any(map(_may_ask_its_class, attributes.values())):
        data = {name: value for name, value in attributes.items() if name not in code}
        ready = {
            name: type(value)() if type(value) in _EMPTIED else value
            for name, value in data.items()
            if _NEW in code and name != "_fields_" and type(value) in _EMPTIED | _SAYS_ALL
        }
        attributes = {_METHODS_FIRST: _Methods(kind, code, ready), **data}
        if _NEW in code:
            attributes[_NEW] = code[_NEW]
    return _class_of, (number, make, arguments), attributes, None, None, _fill_class


_CODE = frozenset({types.FunctionType, classmethod, staticmethod, property})
_SAYS_ALL = _CODE | {int, float, bool, str, bytes, type(None)}
_EMPTIED = frozenset({dict, list, set, *weak.KINDS})
_METHODS_FIRST = "<methods>"
_NEW = "__new__"


def _may_ask_its_class(value: object) -> bool:
    if type(value) is tuple:
        return any(map(_may_ask_its_class, value))
    return type(value) not in _SAYS_ALL


class _Methods:
    """Methods of a class, set while its attributes are read.

    An attribute may be an instance of the class, or a dictionary that has one for a key: to make
    it may take the class's ``__hash__`` or ``__setstate__``. Its own ``__new__`` may ask for
    attributes that are not there yet: numbers and texts are there, and its containers, which are
    still empty. If that is not enough for it, the base makes the instance.
    """

    def __init__(self, kind: type, methods: dict[str, Any], ready: dict[str, Any]) -> None:
        self._about = kind, methods, ready

    def __reduce__(self) -> tuple[Any, ...]:
        return _set_methods, self._about


def _set_methods(kind: type, methods: dict[str, Any], ready: dict[str, Any]) -> None:
    if _NEW in methods:
        new = methods[_NEW].__get__(None, kind)
        methods[_NEW] = staticmethod(functools.partial(_new_or_by_base, new))
    _fill_class(kind, methods | ready)


def _new_or_by_base(new: Callable[..., Any], kind: Any, *arguments: Any, **words: Any) -> Any:
    try:
        return new(kind, *arguments, **words)
    except Exception:  # noqa: BLE001 -- user code
        base = next(one for one in kind.__mro__ if not is_of_python(one))
        return base.__new__(kind) if base is object else base.__new__(kind, *arguments)


def _class_of(number: str, make: Callable[..., type], arguments: tuple[Any, ...]) -> type:
    known = _classes_by_number.get(number)
    if known is None:
        known = _internals._lookup_class_or_track(number, make(*arguments))
        arrived.add(known)
        _keep(known)
    return known


def _fill_class(kind: type, attributes: dict[str, Any]) -> None:
    # What was defined here stays as it is: its functions have this process's globals. A class made
    # from the program's follows the program's, which may have changed.
    if kind in arrived:
        attributes.pop(_METHODS_FIRST, None)
        fill_class(kind, attributes)


# Caches that this process has sent or made, by a number that goes with them.
_caches: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_cache_numbers: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_arrived_caches: weakref.WeakSet[Any] = weakref.WeakSet()


def _reduce_lru_cache(cache: Any) -> Any:
    if _is_importable(cache):
        return cache.__reduce__()
    number = _cache_numbers.get(cache)
    if number is None:
        number = _cache_numbers[cache] = uuid.uuid4().hex
        _caches[number] = cache
    size = cache.cache_parameters()
    arguments = number, cache.__wrapped__, size["maxsize"], size["typed"]
    return _cache_of, arguments, _attributes(cache), None, None, _fill_cache


def _cache_of(number: str, function: Callable[..., Any], maxsize: int | None, typed: bool) -> Any:
    known = _caches.get(number)
    if known is None:
        known = functools.lru_cache(maxsize, typed)(function)
        _caches[number] = known
        _cache_numbers[known] = number
        _arrived_caches.add(known)
        _keep(known)
    return known


def _fill_cache(cache: Any, attributes: dict[str, Any]) -> None:
    if cache in _arrived_caches:  # as for a class
        vars(cache).update(attributes)


def _reduce_single_dispatch(function: Any) -> Any:
    state = dict(function.registry), _attributes(function)
    return functools.singledispatch, (function.__wrapped__,), state, None, None, _fill_dispatch


def _fill_dispatch(function: Any, state: tuple[dict[type, Any], dict[str, Any] | None]) -> None:
    registry, attributes = state
    for kind, implementation in registry.items():
        function.register(kind, implementation)
    vars(function).update(attributes or {})


def _attributes(wrapper: Any) -> dict[str, Any] | None:
    """Return the attributes of a wrapper that the standard library has not set."""
    of_function = vars(wrapper.__wrapped__) if hasattr(wrapper.__wrapped__, "__dict__") else {}
    own = {
        name: value
        for name, value in vars(wrapper).items()
        if name not in _WRAPPER_NAMES and of_function.get(name, of_function) is not value
    }
    return own or None


def _is_importable(wrapper: Any) -> bool:
    module = getattr(wrapper, "__module__", None)
    return module not in modules_by_value() and is_importable(wrapper)
