"""Prints of the program's data when they were pickled, for a later comparison.

A pickle is compared with a pickle, and the memory of arrays with the copy that workers were sent.
A hash would be slower: comparing 40 MiB takes 3 ms, the fastest hash of the standard library 16 ms
(benchmarks/names.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from safepool.errors import text_of
from safepool.transport import payloads
from safepool.transport.channel import store_large
from safepool.transport.files import Stored
from safepool.transport.frames import Filed, Segment
from safepool.transport.lazy import loaded
from safepool.transport.names import Met
from safepool.transport.references import Collected

_T = TypeVar("_T")

# Another thread may change the object during pickling; it is tried this often.
_ATTEMPTS = 20
# A longer pickle is compared by its digest.
_COMPARED_BYTES = 64 * 1024
# The step of a comparison, so that both sides stay in the processor's cache.
_STEP_BYTES = 1 << 20


class Print:
    """Print of a pickle, to be compared with a later one. The program may change its segments.

    The same buffers may be stored for workers; without ``stored`` copies are kept here.
    """

    __slots__ = ("_buffers", "_digest", "_stored")

    def __init__(
        self, segments: Sequence[bytes | memoryview], stored: Sequence[Segment] | None
    ) -> None:
        self._digest = _digest(segments[0])
        self._stored = stored or [b"", *placed(segments[1:])]
        self._buffers: list[memoryview] | None = None

    def is_of(self, segments: Sequence[bytes | memoryview]) -> bool:
        """Tell whether this is the pickle, and these are the buffers."""
        if _digest(segments[0]) != self._digest:
            return False
        if self._buffers is None:
            self._buffers = _buffers_of(self._stored)
        buffers = segments[1:]
        return len(buffers) == len(self._buffers) and all(map(is_equal, buffers, self._buffers))


def print_of(values: list[object]) -> tuple[list[bytes | memoryview], bool]:
    """Return a pickle of values for comparison, and whether the values always have the same one.

    Buffers are out of band that are a part of the pickle otherwise.
    """

    def attempt() -> tuple[list[bytes | memoryview], bool]:
        with Met(prints=True) as met, Collected():
            return payloads.dumps(exposed(values), into_main=True), met.replaced

    return steadily(attempt)


def exposed(values: list[object]) -> list[object]:
    """Return values to be pickled in their place, which hand over their memory."""
    return [_exposed(value) if type(value).__name__ in _BUFFERS else value for value in values]


# Their pickle is a copy.
_BUFFERS = frozenset({"bytearray", "array"})


def _exposed(value: Any) -> object:
    if type(value) is bytearray:
        return pickle.PickleBuffer(value)
    if type(value).__module__ == "array":
        return value.typecode, pickle.PickleBuffer(value)
    return value


def steadily(attempt: Callable[[], _T]) -> _T:
    """Pickle again what another thread has changed meanwhile."""
    for _ in range(1, _ATTEMPTS):
        try:
            return attempt()
        except RuntimeError as error:
            if "during iteration" not in text_of(error):
                raise
    return attempt()


def placed(segments: Sequence[bytes | memoryview]) -> list[Segment]:
    """Return copies of buffers, that the program cannot change."""
    placed = store_large(segments)
    return [part if isinstance(part, (Filed, bytes)) else bytes(part) for part in placed]


def _buffers_of(segments: Sequence[Segment]) -> list[memoryview]:
    found: list[memoryview] = []
    for part in segments:
        if isinstance(part, Stored):
            found += part.segments()
        elif not isinstance(part, Filed):
            found.append(memoryview(part))
    return found[1:]


def _digest(pickled: bytes | memoryview) -> bytes:
    if len(pickled) < _COMPARED_BYTES:
        return bytes(pickled)
    import hashlib  # noqa: PLC0415 -- OpenSSL, for large data alone

    return hashlib.sha256(pickled).digest()  # by one instruction, on most processors


def is_equal(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Tell whether two buffers hold the same; of 40 MiB in 3 ms (benchmarks/names.py)."""
    mine, theirs = memoryview(one).cast("B"), memoryview(other).cast("B")
    if len(mine) != len(theirs):
        return False
    numpy = loaded("numpy", "frombuffer")
    if numpy is None:
        return mine == theirs
    whole = len(mine) // 8 * 8
    for begin in range(0, whole, _STEP_BYTES):
        end = min(begin + _STEP_BYTES, whole)
        part = numpy.frombuffer(mine[begin:end], "u8")
        if not (part == numpy.frombuffer(theirs[begin:end], "u8")).all():
            return False
    return mine[whole:] == theirs[whole:]
