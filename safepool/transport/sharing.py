"""Objects that are placed once, mapped once by each worker, and handed to any number of tasks.

Not covered:
    * Workers of ``mp_context="fork"`` inherit the handles that there are when they are
      started, and keep that memory until they end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from safepool.arguments import checked
from safepool.transport import references
from safepool.transport.files import Stored, store
from safepool.transport.frames import Buffer, Filed, Missing, Segment
from safepool.transport.memmaps import read_only_reducers
from safepool.transport.payloads import dumps, loads

_T = TypeVar("_T")
_numbers = itertools.count(1)


@checked("share")
def share(obj: _T, *, writable: bool = False) -> _T:
    """Place an object once for all workers of all pools, instead of sending it with each task.

    The object is copied into unnamed memory. Each worker maps that memory for its first task
    that needs it. Pass the handle in place of the object, and the task gets the object itself.
    The handle may be an argument of ``submit``, ``map``, ``initargs`` or a joblib call inside
    ``parallel_backend``; it may be in a list, a dictionary, a ``functools.partial`` or a closure.
    The kernel frees the memory when the handle is dropped and the last task that uses it has
    ended, or with this process, even after ``kill -9``.

    Args:
        obj: Anything that can be pickled. Workers share the buffers of its arrays (those of NumPy,
            pandas, Arrow and others that support pickle protocol 5). Each worker unpickles the
            other parts once.
        writable: ``True`` gives each task its own writable view of the arrays: pages that a task
            writes to are copied, and no other process sees the change. ``False`` makes arrays
            read-only, and all tasks of a worker get the same object.

    Returns:
        A handle. Keep it as long as new tasks need the object. ``handle.value`` is the object as
        a task gets it; its arrays and their views are sent without a copy too. For a type checker
        the handle has the type of the object: write ``cast(Any, handle).value``.

    Raises:
        MemoryError: The system has no memory for the copy.
        Exception: The exception of the pickler.

    Another pickler than a safepool pool's, such as the standard pool's, pickles a handle as a copy
    of the object. A handle costs one descriptor in this process and in each worker that maps it,
    and one more for each array of at least 8 MiB. If no descriptor is left, and elsewhere than on
    Linux, each worker is sent one copy.

    Example:
        >>> from safepool import ProcessPool, share
        >>> table = share(list(range(1000)))
        >>> with ProcessPool(1) as pool:
        ...     list(pool.map(lambda n, table: table[n], [1, 10, 100], [table] * 3))
        [1, 10, 100]
    """
    # Small arrays are in the pickle, and would be made anew to be written to.
    reducers = None if writable else read_only_reducers()
    shared: Any = placed(dumps(obj, into_main=True, reducers=reducers), writable=writable)
    handle: _T = shared
    return handle


def placed(segments: Sequence[Segment], *, writable: bool) -> Shared[Any]:
    """Place a pickle and its buffers in unnamed memory; return the handle."""
    # What could not be stored is a view of the object's own memory.
    parts = [part if isinstance(part, (Filed, bytes)) else bytes(part) for part in store(segments)]
    return Shared(parts, writable=writable)


def received(segments: Sequence[Buffer | Stored]) -> Shared[Any]:
    """Return the object in a pool's message, from the segments of :meth:`Shared.message`."""
    flag, *parts = segments
    return Shared(parts, writable=flag == _WRITABLE)


_WRITABLE, _READ_ONLY = b"w", b"r"


class Shared(Generic[_T]):
    """The handle of a shared object: its number in this process, and its pickle and buffers."""

    def __init__(self, segments: Sequence[Buffer | Filed], *, writable: bool) -> None:
        self.number: int = next(_numbers)
        self.writable = writable
        self._segments = segments
        self._value: _T | None = None
        self._loaded = False
        self._key = 0
        references.made(self)  # also in a worker: a pool inside of a task shares it further

    @property
    def value(self) -> _T:
        """The object; with ``writable`` a new one each time.

        Raises:
            MemoryError: The process has no memory to map or to unpickle the object.
            Exception: The exception of unpickling.
        """
        if self.writable:
            value: _T = loads(self._parts())
            return value
        if not self._loaded:
            self._value = loads([_read_only(part) for part in self._parts()])
            self._loaded = True
            self._key = references.value_of(self, self._value)
        return self._value  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Number of bytes that were placed."""
        parts = self._segments
        return sum(len(p) if isinstance(p, Filed) else memoryview(p).nbytes for p in parts)

    def message(self) -> list[Segment]:
        """Return the message for a worker, which is sent once."""
        head = _WRITABLE if self.writable else _READ_ONLY
        parts = self._segments
        return [head, *(memoryview(p) if isinstance(p, bytearray) else p for p in parts)]

    def _parts(self) -> list[Buffer]:
        found: list[Buffer] = []
        for part in self._segments:
            if isinstance(part, Stored):
                found += part.segments()
            elif self.writable and found and not isinstance(part, Filed):
                found.append(bytearray(part))  # a writable copy
            else:
                assert not isinstance(part, Filed)
                found.append(part)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return references.reduce(self)

    def __del__(self, gone: Callable[..., object] = references.value_gone) -> None:
        gone(self._key, None)

    def __repr__(self) -> str:
        how = "writable" if self.writable else "read-only"
        return f"<shared object {self.number}, {how}, {self.nbytes:,} bytes>"


def _read_only(part: Buffer) -> Buffer:
    return part if isinstance(part, Missing) else memoryview(part).toreadonly()
