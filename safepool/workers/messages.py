"""Messages between a pool and its worker about calls: several travel in one frame.

A call is the number of a function and a pickle of its arguments. A function that was sent once
(``Kind.FUNCTION``) is called by that number; 0 stands for one that travels with its arguments.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator, Sequence

from safepool.transport.frames import Buffer, CorruptFrameError, Kind, Segment, encode
from safepool.workers.board import RECORD, numbers_of, records_of

_FUNCTION = struct.Struct("<I")
# Of each call in a frame of several: the function's number and the length of the pickle.
_CALL = struct.Struct("<II")
# Head of a batch: the function's number; whether each item is the tuple of all arguments; whether
# the calls have a timeout; whether each item is a pickle.
_BATCH = struct.Struct("<I???")
# Of values: the microseconds that they took, and in which kind of lane they were, 0 for none.
_VALUES = struct.Struct("<IB")
# Whole head of a frame of one call with one record, as `encode` makes it: the head of any frame up
# to its position, the position, and the lengths of the segments.
_CALL_HEAD = struct.Struct("!8sQQQ")
_CALL_BEGIN = encode(Kind.TASKS, 0, [b"", b""])[0][:8]
_CALL_BYTES = _CALL_HEAD.size + _CALL.size
_ANSWER_HEAD = struct.Struct("!8sQQ")
_ANSWER_BEGIN = encode(Kind.RESULTS, 0, [b""])[0][:8]
_ANSWER_HEAD_BYTES, _RECORD_BYTES, _RESULT = _ANSWER_HEAD.size, RECORD.size, int(Kind.RESULT)
_VALUES_BEGIN = encode(Kind.VALUES, 0, [b"", b""])[0][:8]

Pieces = list[bytes | memoryview]


def task_frame(position: int, function: int, segments: Sequence[Segment]) -> Pieces:
    """Return the frame of one call whose pickle has buffers, or is large."""
    return encode(Kind.TASK, position, [_FUNCTION.pack(function), *segments])


def tasks_frame(position: int, calls: Sequence[tuple[int, bytes | memoryview]]) -> Pieces:
    """Return the frame of several small calls, numbered upwards from the position."""
    table = b"".join([_CALL.pack(function, len(pickled)) for function, pickled in calls])
    return encode(Kind.TASKS, position, [table, b"".join([pickled for _, pickled in calls])])


def call_frame(position: int, function: int, pickled: bytes | memoryview) -> bytes:
    """Return the frame of :func:`tasks_frame` for one call, in one piece.

    Example:
        >>> call_frame(7, 1, b"abc") == tasks_frame(7, [(1, b"abc")])[0]
        True
    """
    head = _CALL_HEAD.pack(_CALL_BEGIN, position, _CALL.size, len(pickled))
    return b"".join((head, _CALL.pack(function, len(pickled)), pickled))


def read_call(data: bytes) -> tuple[int, int, memoryview] | None:
    """Return position, function and pickle of one call; ``None`` if these bytes are another thing.

    Example:
        >>> position, function, pickled = read_call(call_frame(7, 1, b"abc"))
        >>> position, function, bytes(pickled)
        (7, 1, b'abc')
        >>> read_call(call_frame(7, 1, b"abc")[:-1])
    """
    if len(data) < _CALL_BYTES:
        return None
    begin, position, table, length = _CALL_HEAD.unpack_from(data)
    if begin != _CALL_BEGIN or table != _CALL.size or length != len(data) - _CALL_BYTES:
        return None
    function, size = _CALL.unpack_from(data, _CALL_HEAD.size)
    return (position, function, memoryview(data)[_CALL_BYTES:]) if size == length else None


def answer_frame(
    position: int, microseconds: int, kind: int, pickled: bytes | memoryview
) -> bytes:
    """Return the frame of one record, in one piece, in the form of a record on the board."""
    length = len(pickled)
    head = _ANSWER_HEAD.pack(_ANSWER_BEGIN, 0, RECORD.size + length)
    return b"".join((head, RECORD.pack(position, microseconds, length, kind), pickled))


def read_answer(data: bytes, position: int) -> tuple[int, bytes] | None:
    """Return microseconds and pickle of a result; ``None`` if these bytes are another thing.

    Example:
        >>> read_answer(answer_frame(7, 5, Kind.RESULT, b"abc"), 7)
        (5, b'abc')
        >>> read_answer(answer_frame(7, 5, Kind.EXCEPTION, b"abc"), 7)
    """
    size = len(data) - _ANSWER_HEAD_BYTES
    if size < _RECORD_BYTES or _ANSWER_HEAD.unpack_from(data) != (_ANSWER_BEGIN, 0, size):
        return None
    at, microseconds, length, kind = RECORD.unpack_from(data, _ANSWER_HEAD_BYTES)
    if at != position or length != size - _RECORD_BYTES or kind != _RESULT:
        return None
    return microseconds, data[_ANSWER_HEAD_BYTES + _RECORD_BYTES :]


def read_answers(
    data: bytes, position: int, count: int, loads: Callable[[Sequence[memoryview]], object]
) -> tuple[int, list[object]] | None:
    """Return microseconds and results of several calls; ``None`` if these bytes are another thing.

    Example:
        >>> read_answers(b"".join(values_frame(7, 5, [1, None])), 7, 2, pickle.loads)
        (5, [1, None])
        >>> read_answers(b"".join(values_frame(7, 5, [1, None])), 7, 3, pickle.loads)
    """
    if len(data) < _CALL_HEAD.size:
        return None
    begin, at, size, length = _CALL_HEAD.unpack_from(data)
    if begin == _ANSWER_BEGIN and size == len(data) - _ANSWER_HEAD.size:
        found = [*records_of(data[_ANSWER_HEAD.size :])]
        wanted = [(position + place, Kind.RESULT) for place in range(count)]
        if [(one, kind) for one, _, kind, _ in found] == wanted:
            spent = sum(microseconds for _, microseconds, _, _ in found)
            return spent, [loads([pickled]) for *_, pickled in found]
    elif begin == _VALUES_BEGIN and _CALL_HEAD.size + size + length == len(data):
        parts = memoryview(data)[_CALL_HEAD.size :]
        spent, values = read_values([parts[:size], parts[size:]])
        if at == position and len(values) == count:
            return spent, values
    return None


def batch_frame(
    position: int,
    function: int,
    segments: Sequence[Segment],
    *,
    starred: bool,
    timed: bool,
    apart: bool = False,
) -> Pieces:
    """Return the frame of calls of one function.

    Args:
        position: Position of the first call.
        function: Number of the function.
        segments: A pickle of the list of items, one for each call.
        starred: An item is the tuple of the call's arguments, not the only one itself.
        timed: The worker is to say exactly when each begins.
        apart: ``True`` if each item is a separate pickle.
    """
    return encode(Kind.BATCH, position, [_BATCH.pack(function, starred, timed, apart), *segments])


def read_batch(segments: Sequence[Buffer]) -> tuple[int, bool, bool, bool]:
    """Return number, ``starred``, ``timed`` and ``apart`` of a frame of :func:`batch_frame`."""
    number, starred, timed, apart = _BATCH.unpack(segments[0])
    return number, starred, timed, apart


def function_of(segments: Sequence[Buffer]) -> int:
    """Return the function's number in a frame of :func:`task_frame`."""
    number: int = _FUNCTION.unpack(segments[0])[0]
    return number


def values_frame(position: int, microseconds: int, values: list[object]) -> Pieces:
    """Return the frame of results of several calls, from this position on.

    The values are of types that are immutable and hold nothing: pickled as one list, they arrive
    as they would one by one.
    """
    head = _VALUES.pack(min(microseconds, 0xFFFF_FFFF), 0)
    return encode(Kind.VALUES, position, [head, pickle.dumps(values, 5)])


def numbers_frame(position: int, microseconds: int, kind: int, numbers: bytes) -> Pieces:
    """Return the frame of results of several calls, in the form of a board's lane."""
    head = _VALUES.pack(min(microseconds, 0xFFFF_FFFF), kind)
    return encode(Kind.VALUES, position, [head, numbers])


def read_values(segments: Sequence[Buffer]) -> tuple[int, list[object]]:
    """Return microseconds and values of a frame of values; `CorruptFrameError` if it is none."""
    try:
        head, data = segments
        spent, kind = _VALUES.unpack(head)
        values = numbers_of(kind, data) if kind else pickle.loads(data)
    except Exception as error:
        raise CorruptFrameError(f"cannot read a frame of values: {error!r}") from error
    if not isinstance(values, list) or not values:
        raise CorruptFrameError(f"expected a list of values, found {values!r}")
    return spent, values


def read_tasks(
    segments: Sequence[Buffer],
) -> Iterator[tuple[int, memoryview]]:
    """Yield function and pickle of each call in a frame of :func:`tasks_frame`."""
    if len(segments) != 2 or len(segments[0]) % _CALL.size:
        raise CorruptFrameError("a frame of calls without a valid table of calls")
    pickles = memoryview(segments[1])
    at = 0
    for function, length in _CALL.iter_unpack(segments[0]):
        yield function, pickles[at : at + length]
        at += length
    if at != len(pickles):
        raise CorruptFrameError(f"expected {at} bytes of calls, found {len(pickles)}")
