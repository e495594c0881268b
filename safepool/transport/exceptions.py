"""Exceptions without their constructor: made from class, arguments and attributes.

Pickle calls ``ParseError(*error.args)``. A constructor that takes other arguments than it passes
on fails in that call, or makes another text. An exception is no more than its class, ``args`` and
attributes, so these are sent, and the constructor of the class is not run. If a class has its own
pickling method (``__reduce__`` and others), that method comes first.

This holds for every exception: raised, in a result, in an argument, in another exception.

Not covered:
    * ``__traceback__``, ``__cause__`` and ``__context__``: text for a raised exception, left out
      for others, as with pickle.
    * ``AttributeError.obj``, which pickle leaves out as well.
"""

from __future__ import annotations

import copyreg
import functools
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safepool.errors import text_of
from safepool.transport.marks import is_of_python
from safepool.transport.reductions import by_itself, is_of_program, reduce_once, runs_code

_WAYS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__")
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_NOT_SENT = frozenset({"obj"})
_UNSET: Any = object()


# Types that a table remembers; the others are looked up each time.
_MOST_KINDS = 256


class StandardTable(dict[type, "Callable[[Any], Any]"]):
    """The table of the standard pickler, with exceptions as above.

    All other types have the pickler's default as entry: C code that finds an entry is faster than
    a miss, and than a method of the pickler that is called for each object. An object of a class
    of ``__main__`` ends the pickling: it travels by value. ``special`` are other reducers, which
    may have an entry for a type that they do not contain.
    """

    def __init__(self, special: Mapping[type, Callable[[Any], Any]]) -> None:
        super().__init__(special)
        self._special = special

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        reduce: Callable[[Any], Any]
        try:
            reduce = self._special[kind]
        except KeyError:
            if issubclass(kind, type):  # a class, which is pickled as a name
                raise
        else:
            return _once(reduce) if is_of_program(reduce) else reduce
        reduce = _once(by_itself) if runs_code(kind) else by_itself
        if vars(kind).get("__module__") == "__main__":
            reduce = _refuse
        elif issubclass(kind, BaseException):
            reduce = _reduce_error
        if len(self) < _MOST_KINDS:
            self[kind] = reduce
        return reduce


_once = functools.partial(functools.partial, reduce_once)


def _refuse(_: object) -> Any:
    raise pickle.PicklingError  # whoever asked tries cloudpickle next


def _reduce_error(error: BaseException) -> Any:
    reduced = reduce_exception(error)
    if reduced is not NotImplemented:
        return reduced
    return reduce_once(by_itself, error) if runs_code(type(error)) else by_itself(error)


def reduce_exception(error: BaseException) -> Any:
    """Return how to make an exception again; ``NotImplemented`` if its class says that itself."""
    kind = type(error)
    if kind in copyreg.dispatch_table or any(_is_own(kind, way) for way in _WAYS):
        return NotImplemented
    if _base_of(kind).__module__ != "builtins":
        return NotImplemented  # of C code, which may have invisible state
    try:
        return _reduced(error, error.args, _fields_of(error), _slots_of(error), vars(error))
    except TypeError:
        return NotImplemented  # the same, of a class that was made at run time


def _is_own(kind: type, way: str) -> bool:
    """Tell whether a class has a method that is not the interpreter's own."""
    definer = next((one for one in kind.__mro__ if way in vars(one)), object)
    return definer.__module__ != "builtins"


def _base_of(kind: type) -> type[BaseException]:
    """Return the interpreter's own class that an exception is an extension of."""
    while is_of_python(kind):
        assert kind.__base__ is not None
        kind = kind.__base__
    return kind


def _reduced(
    error: BaseException, args: Any, fields: Any, slots: Any, attributes: Any, group: Any = None
) -> tuple[Any, ...]:
    base = _base_of(type(error))
    start: tuple[Any, ...] = ()
    if isinstance(error, BaseExceptionGroup):
        start = error.message, error.exceptions
    base.__new__(type(error), *start)  # can it be made at all?
    if group is not None:
        start = start[0], group
    return _make, (type(error), base, start), (args, fields, slots, attributes), None, None, _fill


def _make(kind: type[BaseException], base: Any, start: tuple[Any, ...]) -> BaseException:
    made: BaseException = base.__new__(kind, *start)
    return made


def _fill(error: BaseException, state: tuple[Any, ...]) -> None:
    args, fields, slots, attributes = state
    # By the base class in each case: a frozen dataclass forbids to set an attribute, and a
    # property may have the name of one.
    BaseException.args.__set__(error, args)  # type: ignore[attr-defined]
    base = _base_of(type(error))
    for name, value in fields.items():
        getattr(base, name).__set__(error, value)
    for name, value in slots.items():
        BaseException.__setattr__(error, name, value)
    vars(error).update(attributes)


def _fields_of(error: BaseException) -> dict[str, Any]:
    """Return fields of the interpreter's own class besides ``args``: ``errno``, ``value``, ..."""
    base = _base_of(type(error))
    names = [] if issubclass(base, BaseExceptionGroup) else _descriptors(base)
    values = {name: _get(getattr(base, name), error) for name in names if name not in _NOT_SENT}
    return {
        name: value for name, value in values.items() if not (value is None or value is _UNSET)
    }


def _slots_of(error: BaseException) -> dict[str, Any]:
    names = [name for one in type(error).__mro__ if is_of_python(one) for name in _own(one)]
    values = {name: _get(getattr(type(error), name), error) for name in names}
    return {name: value for name, value in values.items() if value is not _UNSET}


def _descriptors(base: type) -> Iterator[str]:
    for one in base.__mro__[: base.__mro__.index(BaseException)]:
        yield from _own(one)


def _own(kind: type) -> Iterator[str]:
    for name, value in vars(kind).items():
        if isinstance(value, _DESCRIPTORS) and not name.startswith("__"):
            yield name


def _get(descriptor: Any, error: BaseException) -> Any:
    try:
        return descriptor.__get__(error, type(error))
    except (AttributeError, TypeError):
        return _UNSET  # a slot, characters_written, the text of a UnicodeError


class Unsent:
    """Stands in an exception's ``args`` for an object that cannot be pickled, in its words."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


class Sendable:
    """Replacement in a pickle for an exception with a part that cannot be pickled.

    An argument of that kind is replaced by :class:`Unsent`, an attribute is left out.
    """

    def __init__(
        self, error: BaseException, dumps: Callable[[object], object], left: list[str]
    ) -> None:
        self.error = error
        self._dumps = dumps
        self._left = left

    def __reduce__(self) -> tuple[Any, ...]:
        error = self.error
        args = tuple(self._checked(f"argument {at}", one) for at, one in enumerate(error.args))
        group = (
            [Sendable(one, self._dumps, self._left) for one in error.exceptions]
            if isinstance(error, BaseExceptionGroup)
            else None
        )
        if group is not None:
            args = (args[0], group)
        fields, slots, attributes = map(
            self._without, (_fields_of(error), _slots_of(error), vars(error))
        )
        return _reduced(error, args, fields, slots, attributes, group)

    def _checked(self, what: str, value: object) -> object:
        if isinstance(value, BaseException):
            return Sendable(value, self._dumps, self._left)
        try:
            self._dumps(value)
        except Exception as problem:  # noqa: BLE001 -- user code
            self._left.append(f"{what} of {type(self.error).__qualname__}: {text_of(problem)}")
            return Unsent(_repr(value))
        return value

    def _without(self, values: dict[str, Any]) -> dict[str, Any]:
        checked = {name: self._checked(f"attribute {name!r}", one) for name, one in values.items()}
        return {name: one for name, one in checked.items() if not isinstance(one, Unsent)}


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 -- user code
        return object.__repr__(value)
