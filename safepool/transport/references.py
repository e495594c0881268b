"""References to shared objects in a pickle, and the objects of this process behind them.

    program   share() --> Shared[Any], number 7      pickled while a pool collects: attach(7)
    worker    Kind.SHARE brings it once         unpickled: attach(7) is the object itself

Outside of a message to a pool's worker, a shared object is pickled as a copy of itself.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol, Self

    class Handle(Protocol):
        """Part of :class:`~safepool.transport.sharing.Shared` that is used here."""

        number: int

        @property
        def value(self) -> Any:
            """The object."""


_thread = threading.local()
# Shared objects of this process that are alive, by number.
_made: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
# Shared objects that a pool has sent to this worker, by the pool's number.
_kept: dict[int, Handle] = {}
# The arrays that are the values of both, by id() of what they and their views are views of: to be
# recognized when they are sent on.
_arrays: dict[int, weakref.ref[Handle]] = {}


class Collected:
    """Collects the shared objects that a pickler of this thread meets, inside a ``with`` block."""

    __slots__ = ("_before", "_by_number")

    def __init__(self) -> None:
        self._by_number: dict[int, Handle] = {}

    @property
    def found(self) -> tuple[Any, ...]:
        """Shared objects that were met."""
        return tuple(self._by_number.values())

    def add(self, shared: Handle) -> None:
        """Note one."""
        self._by_number[shared.number] = shared

    def __enter__(self) -> Self:
        self._before = getattr(_thread, "collected", None)
        _thread.collected = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.collected = self._before


class Given:
    """Objects that this thread finds by these numbers, inside a ``with`` block."""

    __slots__ = ("_objects",)

    def __init__(self, objects: Mapping[int, Any]) -> None:
        self._objects = objects

    def __enter__(self) -> Self:
        _thread.given = self._objects
        return self

    def __exit__(self, *_: object) -> None:
        del _thread.given


def made(shared: Handle) -> None:
    """Note what this process has shared."""
    _made[shared.number] = shared


def known() -> bool:
    """Tell whether a pickler can meet anything that is shared."""
    return bool(_made)


def value_of(shared: Handle, value: object) -> int:
    """Note the object that is shared, so that it is known where it is met; return its key."""
    if type(value).__module__ != "numpy" or type(value).__name__ != "ndarray":
        return 0
    key = id(_owner(value))
    _arrays[key] = weakref.ref(shared)
    return key


def _owner(array: Any) -> Any:
    """Return the array that NumPy notes as base of an array's views.

    An array that was unpickled is mostly a view itself, of one that has another shape.
    """
    return array.base if type(array.base) is type(array) else array


# Called with the key of a value that can no longer be attached to, and None. A bound method,
# because the last handles go when the interpreter has cleared this module.
value_gone: Callable[..., object] = _arrays.pop


def reduce(shared: Handle) -> tuple[Any, ...]:
    """Return the pickled form of a shared object."""
    collected: Collected | None = getattr(_thread, "collected", None)
    if collected is None:
        return _itself, (shared.value,)
    collected.add(shared)
    return attach, (shared.number,)


def reference_to(array: Any) -> tuple[Any, ...] | None:
    """Return the pickled form of a shared array or a view of one; ``None`` for others."""
    if not _arrays or getattr(_thread, "collected", None) is None:
        return None
    owner = _owner(array)
    reference = _arrays.get(id(owner))
    shared = None if reference is None else reference()
    # Two threads may have loaded the object: only the value of one of them is kept.
    if shared is None or _owner(shared.value) is not owner:
        return None
    if shared.value is array:
        return reduce(shared)
    if array.dtype.hasobject:
        return None
    begin = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    return _view_of, (shared, begin, array.dtype, array.shape, array.strides)


def attach(number: int) -> Any:
    """Return the shared object of a number. Pickles call this function."""
    given: Mapping[int, Any] | None = getattr(_thread, "given", None)
    if given is not None:
        return given[number]
    shared = _kept.get(number) or _made.get(number)
    if shared is None:
        raise LookupError(
            f"shared object {number} cannot be unpickled here: only workers of a pool have shared "
            "objects"
        )
    return shared.value


def _itself(value: object) -> object:
    return value


def _view_of(array: Any, begin: int, dtype: Any, shape: Any, strides: Any) -> Any:
    numpy: Any = sys.modules["numpy"]  # the array has brought it
    buffer = array if array.flags.c_contiguous else array.T
    view: Any = numpy.ndarray(shape, dtype, buffer=buffer, offset=begin, strides=strides)
    return view


def keep(number: int, shared: Handle) -> None:
    """Keep in a worker what its pool has sent."""
    _kept[number] = shared


def drop(number: int) -> None:
    """Drop it; present users of the object keep it."""
    _kept.pop(number, None)


def restart() -> None:
    """Forget objects that a fork of a worker has inherited: its own pool has other numbers."""
    _kept.clear()
