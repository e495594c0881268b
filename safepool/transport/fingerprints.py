"""Comparison of a value in two processes, by a short hash of its pickle.

The fork server that ran the script, and the program itself, compare the script's globals by it
without sending them. Functions and classes of ``__main__`` count by their name and definition,
because each process has its own objects, in a module of another name. Equal hashes mean equal
values. A set of text has another order in each process. If the value has a set and at most 1 MiB,
it is pickled again with the items of sets in order.

Not covered, so that equal values may have different hashes:
    * Sets of instances.
    * Values of more than 16 MiB: they are sent, equal or not.
"""

from __future__ import annotations

import copyreg
import enum
import pickle
import types
from _blake2 import blake2b  # as in marks
from collections import ChainMap
from typing import Any, Final, cast

from safepool.errors import let_handlers_pass
from safepool.transport import weak
from safepool.transport.marks import (
    DESCRIPTORS,
    LRU_CACHE,
    PLAIN,
    attribute_of,
    found_as,
    is_full,
    is_of_main,
    mark_of,
    parts_of,
)
from safepool.transport.sharing import Shared

UNKNOWN: Final = b""
"""Hash of a value that is too large, or shared: whether it is equal is unknown."""

# Decorators have put attributes on them that no type checker knows.
_LOOKED_INTO: tuple[Any, ...] = (type, types.FunctionType, LRU_CACHE)
_WRAPPERS = frozenset({*DESCRIPTORS, types.MethodType})
ABSENT: Final = b"absent"
"""Hash of a name that does not exist."""

# This many bytes are hashed in some tens of milliseconds.
_MOST_BYTES = 16 << 20
# Finding the sets takes six times as long, even if a number only looks like a set.
_MOST_ORDERED_BYTES = 1 << 20


class _TooLargeError(Exception):
    """The value is too large for a fingerprint."""


def fingerprint(value: object) -> bytes | None:
    """Return a hash that distinguishes values, also between processes.

    Args:
        value: Anything. Only its own pickling methods are called.

    Returns:
        A hash; :data:`UNKNOWN` if it is larger than 16 MiB, or shared; ``None`` if it cannot be
        pickled, as a lock or a connection.

    Example:
        >>> fingerprint([1, 2]) == fingerprint([1, 2]) != fingerprint([1, 3])
        True
        >>> import threading
        >>> fingerprint(threading.Lock()) is None
        True
    """
    sink = _Sink()
    try:
        _Pickler(sink, protocol=5, buffer_callback=sink.add_buffer).dump(value)
        if sink.may_have_sets and sink.size <= _MOST_ORDERED_BYTES:
            sink = _Sink()
            _OrderedPickler(sink, protocol=5, buffer_callback=sink.add_buffer).dump(value)
    except _TooLargeError:
        return UNKNOWN
    except Exception as error:  # noqa: BLE001 -- user code; a pickler may raise anything
        let_handlers_pass(error)
        return None
    return sink.hash.digest()


class _Sink:
    """A file that keeps only the hash of the written bytes."""

    def __init__(self) -> None:
        self.hash = blake2b(digest_size=16)
        self.may_have_sets = False
        self.size = 0

    def write(self, data: Any) -> int:
        """Add bytes to the hash."""
        size = memoryview(data).nbytes
        self.size += size
        if type(data) is bytes and not self.may_have_sets:
            self.may_have_sets = pickle.EMPTY_SET in data or pickle.FROZENSET in data
        if self.size > _MOST_BYTES:
            raise _TooLargeError
        self.hash.update(data)
        return size

    def add_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Add a buffer that the pickle refers to; ``False`` keeps it out of the pickle."""
        self.write(buffer.raw())  # contiguous: the pickler refuses others
        return False


class _Pickler(pickle.Pickler):
    """Accepts objects that travel by value as well; its pickle is never read."""

    dispatch_table = ChainMap(  # noqa: RUF012 -- the C pickler reads it from the class
        weak.containers(), cast("dict[type, Any]", copyreg.dispatch_table)
    )

    def reducer_override(self, obj: Any) -> Any:  # noqa: PLR0911 -- one for each kind
        if isinstance(obj, types.ModuleType):
            return str, (attribute_of(obj, "__name__"),)  # an attribute may be loaded on reading
        if isinstance(obj, Shared):
            raise _TooLargeError  # the program's own, of any content
        if type(obj) in _WRAPPERS:
            return tuple, ((type(obj).__qualname__, *parts_of(obj).items()),)
        if not isinstance(obj, _LOOKED_INTO):
            return NotImplemented
        name = f"{obj.__module__}.{obj.__qualname__}"
        if is_of_main(obj):
            name = f"__main__.{obj.__qualname__}"
        elif found_as(obj.__module__, obj.__qualname__) is obj:
            return NotImplemented
        if isinstance(obj, type):
            return tuple, ((name, mark_of(obj)),)
        if isinstance(obj, LRU_CACHE):
            return tuple, ((name, obj.__wrapped__),)
        if hasattr(obj, "registry") and hasattr(obj, "__wrapped__"):  # of singledispatch
            return tuple, ((name, obj.__wrapped__, dict(obj.registry)),)
        held = [cell.cell_contents for cell in obj.__closure__ or () if is_full(cell)]
        return tuple, ((name, mark_of(obj), obj.__defaults__, obj.__kwdefaults__, held),)


class _OrderedPickler(_Pickler):
    """Pickles the items of sets in an order that is the same in each process."""

    def persistent_id(self, obj: Any) -> tuple[str, list[str]] | None:
        kind = type(obj)
        if kind is not set and kind is not frozenset:
            return None
        try:
            if {*map(type, obj)} == {str}:
                return f"{kind.__name__} of text", sorted(obj)
            return kind.__name__, sorted(map(_key, obj))
        except (TypeError, ValueError):  # an instance; an integer of too many digits
            return None


def _key(item: Any) -> str:
    """Return a key that distinguishes the items of a set, in any process."""
    kind = type(item)
    if kind in PLAIN:
        return repr(item)
    if kind is tuple:
        return f"({','.join(map(_key, item))})"
    if kind is frozenset:
        return f"{{{','.join(sorted(map(_key, item)))}}}"
    if issubclass(kind, enum.Enum):
        return f"{_key(kind)}.{item._name_}"
    if kind is type or kind is enum.EnumMeta:
        return f"{'__main__' if is_of_main(item) else item.__module__}.{item.__qualname__}"
    raise TypeError
