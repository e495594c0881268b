"""Further kinds of objects at a script's top level, which are sent by value.

    what pickles as a name   ``NewType``, type variables and aliases, and objects whose
                             ``__reduce__`` returns a name: the receiver's own, if its ``__main__``
                             has one of this name, else made once for each name
    ``object()``             made once, so that ``x is MISSING`` holds
    modules                  of a type derived from ``ModuleType``: imported by name
    context variables        made once, with their default and no value
    weak containers          with what they hold (``weak``)
    ``threading.local``      made once, empty: what a thread has there stays with the thread
    ``dataclasses.MISSING``  the receiver's own, with which a field's default is compared;
                             and whatever ``sentinel()`` makes (Python 3.15)
    ``struct.Struct``        by its format
    ``itertools.count``      with its next number, an int or a float (Python 3.14 pickles none)
    libraries of ``ctypes``  loaded by name, and their functions, with the types that they were
                             given: an address is good in one process only

An object that comes back in a result is the program's own again.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import importlib.util
import itertools
import struct
import sys
import threading
import types
import typing
import uuid
from collections.abc import Callable
from typing import Any

from safepool.transport import weak
from safepool.transport.lazy import loaded
from safepool.transport.marks import MAIN_NAMES, find_in_main, found_as
from safepool.transport.reductions import by_itself, is_of_program, reduce_once, runs_code

# Objects without a name that are known to both ends; the oldest are forgotten.
_MOST_NUMBERED = 1024
# Types that need no treatment; emptied when there are too many.
_plain: set[type] = set()
_MOST_PLAIN = 256


def reduce_other(obj: Any, dispatch_table: typing.Mapping[type, Any]) -> Any:
    """Return how to make an object that is no function or class; usually ``NotImplemented``."""
    kind: Any = type(obj)
    if kind in _plain:
        return NotImplemented
    if kind in dispatch_table:
        reduce = dispatch_table[kind]
        return reduce_once(reduce, obj) if is_of_program(reduce) else NotImplemented
    special = _reduce_special(obj, kind)
    if special is not None:
        return special
    plain: Any = object
    by_object = kind.__reduce__ is plain.__reduce__ and kind.__reduce_ex__ is plain.__reduce_ex__
    if by_object and not runs_code(kind):
        if len(_plain) >= _MOST_PLAIN:
            _plain.clear()
        _plain.add(kind)
        return NotImplemented
    reduced = reduce_once(by_itself, obj) if runs_code(kind) else by_itself(obj)
    if isinstance(reduced, str) and not _is_in_its_module(obj, reduced) and _has(reduced, obj):
        return _named(reduced, object.__new__, (kind,), object.__getstate__(obj))
    return reduced


def _reduce_special(obj: Any, kind: Any) -> Any:
    if issubclass(kind, types.ModuleType):
        return _reduce_module(obj)
    if kind is object:
        return _reduce_object(obj)
    if issubclass(kind, threading.local) and kind.__reduce__ is threading.local.__reduce__:
        return _numbered(obj, kind, ())
    if issubclass(kind, weak.KINDS) and _only_adds(kind):
        return weak.reduce_container(obj)
    return _reduce_c(obj, kind)


def _only_adds(kind: Any) -> bool:
    """Return whether a class keeps the storage of the standard library's weak container."""
    base = next(one for one in weak.KINDS if issubclass(kind, one))
    return all(getattr(kind, name) is getattr(base, name) for name in ("__init__", "__reduce__"))


def _reduce_c(obj: Any, kind: Any) -> Any:
    """Reduce a library of ``ctypes``, or one of its functions; ``None`` for others."""
    ctypes = loaded("ctypes", "PyDLL")
    if ctypes is None:
        return None
    if kind in (ctypes.CDLL, ctypes.PyDLL):
        functions = {
            name: (one.__name__, about)
            for name, one in vars(obj).items()
            if issubclass(type(one), obj._FuncPtr) and (about := _about_function(one))
        }
        with_errno = bool(obj._FuncPtr._flags_ & ctypes._FUNCFLAG_USE_ERRNO)
        made_of = kind, (obj._name,), {"use_errno": with_errno}
        return _make, made_of, functions, None, None, _fill_library
    if issubclass(kind, ctypes._CFuncPtr):
        library: Any = (obj._objects or {}).get("0")
        if type(library) in (ctypes.CDLL, ctypes.PyDLL) and kind is library._FuncPtr:
            return _function_of, (library, obj.__name__, _about_function(obj))
    return None


def _about_function(function: Any) -> dict[str, Any]:
    fresh = type(function)
    about = {
        "argtypes": function.argtypes,
        "restype": None if function.restype is fresh._restype_ else (function.restype,),
        "errcheck": function.errcheck,
    }
    return {name: value for name, value in about.items() if value is not None}


def _fill_library(library: Any, functions: dict[str, tuple[str, dict[str, Any]]]) -> None:
    for name, made_of in functions.items():
        setattr(library, name, _function_of(library, *made_of))


def _function_of(library: Any, name: str, about: dict[str, Any]) -> Any:
    function = library[name]
    for key, value in about.items():
        setattr(function, key, value[0] if key == "restype" else value)
    return function


def table() -> dict[type, Callable[[Any], Any]]:
    """Return the reducers of types that are known, for a dispatch table."""
    reducers: dict[type, Callable[[Any], Any]] = {
        **weak.containers(),
        **weak.references(),
        contextvars.ContextVar: _reduce_context_variable,
        struct.Struct: lambda layout: (struct.Struct, (layout.format,)),
        typing.NewType: _reduce_new_type,
        typing.TypeVar: _reduce_variable,
        typing.ParamSpec: _reduce_variable,
        typing.TypeVarTuple: _reduce_variable,
        typing.ParamSpecArgs: lambda args: (typing.ParamSpecArgs, (args.__origin__,)),
        functools.partialmethod: lambda method: (
            _make,
            (functools.partialmethod, (method.func, *method.args), method.keywords),
            vars(method),
        ),
        typing.ParamSpecKwargs: lambda args: (typing.ParamSpecKwargs, (args.__origin__,)),
    }
    if sys.version_info >= (3, 15):
        reducers[type(dataclasses.MISSING)] = _reduce_sentinel  # builtins.sentinel
    else:
        # cloudpickle gives fields of a class that it loads other instances: they mean the same.
        reducers[type(dataclasses.MISSING)] = lambda _: (getattr, (dataclasses, "MISSING"))
        reducers[type(dataclasses.KW_ONLY)] = lambda _: (getattr, (dataclasses, "KW_ONLY"))
    if sys.version_info >= (3, 14):
        reducers[typing.ForwardRef] = _reduce_forward
        reducers[itertools.count] = _reduce_count
    if sys.version_info >= (3, 12):
        reducers[typing.TypeAliasType] = _reduce_alias
    return reducers


def _reduce_count(counter: itertools.count[Any]) -> Any:
    # Python 3.14 has removed the type's own way. The text is the only place with the origin.
    import ast  # noqa: PLC0415 -- seldom

    try:
        found = ast.literal_eval(repr(counter).removeprefix("count"))
    except ValueError:  # of fractions, say
        raise TypeError("cannot pickle 'itertools.count' object") from None
    return itertools.count, found if isinstance(found, tuple) else (found,)


def _reduce_sentinel(one: Any) -> Any:
    made_of = type(one), (one.__name__,), {"repr": repr(one)}
    return _by_name(one, one.__name__, _make, made_of)


def _reduce_context_variable(variable: contextvars.ContextVar[Any]) -> Any:
    try:
        # A value that was set belongs to the context.
        words = {"default": contextvars.Context().run(variable.get)}
    except LookupError:
        words = {}
    return _numbered(variable, _make, (contextvars.ContextVar, (variable.name,), words))


def _reduce_new_type(new: Any) -> Any:
    return _by_name(new, new.__qualname__, typing.NewType, (new.__name__, new.__supertype__))


_WORDS = {"bound": "__bound__", "covariant": "__covariant__", "contravariant": "__contravariant__"}


def _reduce_variable(variable: Any) -> Any:
    about = _about_variable(variable)
    if "infer_variance" not in about[2]:
        return _by_name(variable, variable.__name__, _make, about)
    # For "class Node[T: Node]": the bound may be the variable's own class.
    key = uuid.uuid4().hex
    made_of = key, _declared(*about, f"{key!r}, 0")
    reduced = _by_name(variable, variable.__name__, _make_declared, made_of)
    return _with_state(reduced, (key, False, None, [about[1:]]))


def _about_variable(variable: Any) -> tuple[type, tuple[Any, ...], dict[str, Any]]:
    """Return the kind of a type variable, its name and constraints, and its other arguments."""
    kind = type(variable)
    words: dict[str, Any] = {}
    if kind is not typing.TypeVarTuple:
        words = {word: _ask(variable, name) for word, name in _WORDS.items()}
        if getattr(variable, "__infer_variance__", False):
            words = {"bound": words["bound"], "infer_variance": True}
    if sys.version_info >= (3, 13) and variable.has_default():
        words["default"] = _ask(variable, "__default__")
    constraints = _ask(variable, "__constraints__") or ()
    return kind, (variable.__name__, *constraints), words


def _make(kind: Any, arguments: tuple[Any, ...], words: dict[str, Any]) -> Any:
    return kind(*arguments, **words)


def _ask(thing: object, name: str) -> Any:
    """Return an attribute that is evaluated on access; ``None`` if that fails."""
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 -- it names what only a type checker knows
        return None


def _reduce_forward(forward: Any) -> Any:
    words = {
        "module": forward.__forward_module__,
        "owner": forward.__owner__,
        "is_argument": forward.__forward_is_argument__,
        "is_class": forward.__forward_is_class__,
    }
    return _make, (typing.ForwardRef, (forward.__forward_arg__,), words)


def _reduce_alias(alias: Any) -> Any:
    name, key = alias.__name__, uuid.uuid4().hex
    about = [_about_variable(one) for one in alias.__type_params__]
    declared = ", ".join(_declared(*one, f"{key!r}, {place}") for place, one in enumerate(about))
    numbers = [_number_of(one) for one in alias.__type_params__]
    reduced = _by_name(alias, name, _make_alias, (name, key, declared, numbers))
    # The value is evaluated only if necessary. It is a state, because an alias may name itself.
    evaluate = getattr(alias, "evaluate_value", None)
    value = evaluate or _ask(alias, "__value__")
    return _with_state(reduced, (key, evaluate is not None, value, [one[1:] for one in about]))


def _with_state(reduced: Any, state: tuple[str, bool, Any, list[Any]]) -> Any:
    return reduced if isinstance(reduced, str) else (*reduced[:2], state, None, None, _fill_later)


def _declared(kind: type, arguments: tuple[Any, ...], words: dict[str, Any], where: str) -> str:
    """Return a type variable in the syntax of a generic alias, evaluated on access."""
    stars = {"ParamSpec": "**", "TypeVarTuple": "*"}.get(kind.__name__, "")
    name, *constraints = arguments
    text = f"{stars}{name}"
    if constraints:
        text += f": ({''.join(f'_part_of({where})[0][{n}], ' for n in range(1, len(arguments)))})"
    elif words.get("bound") is not None and not stars:
        text += f": _part_of({where})[1]['bound']"
    if "default" in words:
        text += f" = _part_of({where})[1]['default']"
    return text


# For each alias or type variable that was made here, by its key: whether the value is a function
# that evaluates it, the value, and constraints and other arguments of the type variables.
_evaluated: dict[str, tuple[bool, Any, list[Any]]] = {}


def _make_alias(name: str, key: str, declared: str, numbers: list[str]) -> Any:
    made = _make_by(f"type {name}{declared and f'[{declared}]'} = _value_of({key!r})", name, key)
    # The alias's value names the same variables.
    for number, variable in zip(numbers, made.__type_params__, strict=True):
        _remember(number, variable)
    return made


def _make_declared(key: str, declared: str) -> Any:
    return _make_by(f"def of[{declared}](): ...", "of", key).__type_params__[0]


def _make_by(statement: str, name: str, key: str) -> Any:
    names = {"_value_of": _value_of, "_part_of": _part_of, "__name__": "__main__"}
    exec(statement, names)  # syntax of Python 3.12
    _evaluated[key] = False, None, []
    return names[name]


def _value_of(key: str) -> Any:
    is_function, value, _ = _evaluated[key]
    return value(1) if is_function else value


def _part_of(key: str, place: int) -> Any:
    return _evaluated[key][2][place]


def _fill_later(_made: object, state: tuple[str, bool, Any, list[Any]]) -> None:
    key, is_function, value, parts = state
    if key in _evaluated:
        _evaluated[key] = is_function, value, parts


def _by_name(obj: Any, name: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Reduce an object that says which name it has, and in which module."""
    if _is_in_its_module(obj, name):
        return name
    if _has(name, obj):
        return _named(name, make, arguments, None)
    return _numbered(obj, make, arguments)  # made in a function


def _is_in_its_module(obj: Any, name: str) -> bool:
    module = getattr(obj, "__module__", None)
    if module in MAIN_NAMES or not isinstance(module, str):
        return False
    return found_as(module, name) is obj


# Objects made from arrived ones, by their name in the other end's ``__main__``.
_named_objects: dict[str, Any] = {}


def _has(name: str, obj: object) -> bool:
    return find_in_main(name) is obj or _named_objects.get(name) is obj


def _named(name: str, make: Callable[..., Any], arguments: Any, state: object) -> tuple[Any, ...]:
    about = name, make, arguments
    return _named_object, about, None if state is None else (name, state), None, None, _fill_named


def _named_object(name: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    known = find_in_main(name)
    if known is None:
        known = _named_objects.get(name)
    if known is None:
        known = _named_objects[name] = make(*arguments)
        _set_module(known)
    return known


def _set_module(made: Any) -> None:
    try:
        made.__module__ = "__main__"
    except (AttributeError, TypeError):
        pass  # it has that of its class


def _fill_named(obj: Any, about: tuple[str, Any]) -> None:
    name, state = about
    if _named_objects.get(name) is not obj:
        return  # the receiver's own
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    if attributes:
        vars(obj).update(attributes)
    for slot, value in (slots or {}).items():
        object.__setattr__(obj, slot, value)


# Both ways: the objects that this process has sent or made, and their numbers.
_numbers: dict[int, str] = {}
_numbered_objects: dict[str, Any] = {}


def _reduce_object(obj: object) -> Any:
    for name, value in [*_named_objects.items(), *vars(sys.modules["__main__"]).items()]:
        if value is obj:
            return _named(name, object, (), None)
    return _numbered(obj, object, ())


def _numbered(obj: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return _numbered_object, (_number_of(obj), make, arguments)


def _number_of(obj: Any) -> str:
    number = _numbers.get(id(obj))
    if number is None:
        number = uuid.uuid4().hex
        _remember(number, obj)
    return number


def _numbered_object(number: str, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if number not in _numbered_objects:
        made = make(*arguments)
        _set_module(made)
        _remember(number, made)
    return _numbered_objects[number]


def _remember(number: str, obj: Any) -> None:
    _numbers[id(obj)] = number
    _numbered_objects[number] = obj
    if len(_numbered_objects) > _MOST_NUMBERED:
        oldest = next(iter(_numbered_objects))
        del _numbers[id(_numbered_objects.pop(oldest))]


def _reduce_module(module: types.ModuleType) -> Any:
    # The module's own __getattribute__ is avoided: it may start a lazy import.
    attributes = object.__getattribute__(module, "__dict__")
    name = attributes.get("__name__")
    found = sys.modules.get(name)
    if found is module or (found is not None and name in sys.modules) or _can_be_found(name):
        return importlib.import_module, (name,)
    state = {key: value for key, value in attributes.items() if key != "__builtins__"}
    return type(module), (name,), state


def _can_be_found(name: Any) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError, ValueError, TypeError):
        return False
