"""Room for a copy: held against the memory that is left, before the kernel must act.

What is copied on its way between pool and worker counts for the control group, and a file in
memory for no process: out of memory, the kernel would end one that is not to blame. A copy that
does not fit is refused instead, and costs the one call that it belongs to.

A look costs about 0.1 ms. So it is not taken for each copy: after a look a part of what was left
may be copied without another, for a second. Several processes look by themselves, and at each step
of a long copy again, so that two that begin at the same time do not both count on the same memory.

Not covered:
    * What is copied between two looks by many workers at once, or used by tasks meanwhile: then
      the kernel takes a worker (``workers.main``).
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from safepool.errors import MemoryLimitError

assert sys.platform == "linux"

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safepool.limits.left import MemoryLeft, MemoryWatch
    from safepool.transport.frames import Buffer

__all__ = ["held_at_most", "require", "require_to_load", "require_to_pickle"]

# Copied without a look: in the beginning, and of what was left after one.
_FIRST_BYTES = 4 << 20
_PART_WITHOUT_LOOK = 16
_LOOK_S = 1.0
# Kept free: for the page tables, and the objects that a result is made of.
_PART_KEPT = 32
_MOST_KEPT_BYTES = 64 << 20
# Of what is left, for results that are there and that nobody has taken.
_PART_HELD = 4
# What is pickled in one piece: as much again.
_FLAT = frozenset({bytes, bytearray, str})
# Worth a look at each.
_LARGE_BYTES = 1 << 20
# Objects take so many times as much as their pickle, at the least: 3.6 times a list of floats,
# 10 times one of small dictionaries.
_OBJECTS = 4
# Opcodes of pickle's protocols 4 and 5 that a length follows, of so many bytes: objects are in
# frames, and beside them is what is large in one piece. Less than 4 bytes have no frame.
# Source: Python, Lib/pickletools.py and Modules/_pickle.c, FRAME_SIZE_MIN.
_FRAME = 0x95
_LENGTHS = {_FRAME: 8, 0x42: 4, 0x58: 4, 0x8D: 8, 0x8E: 8, 0x96: 8}
_LEAST_FRAMED = 4
# Frames that are looked into, of 64 KiB each; and text or bytes that take little more than there.
_MOST_LOOKED_AT = 8
_SHORT = 100


class _Room:
    def __init__(self) -> None:
        self._watch: MemoryWatch | None = None
        self._unlooked = _FIRST_BYTES
        self._until = float("inf")

    def require(self, size_bytes: int, done_bytes: int, whole_bytes: int) -> None:
        if whole_bytes - done_bytes > self._unlooked or time.monotonic() >= self._until:
            self._unlooked = 0  # also if it is refused
            self._unlooked = self._check(done_bytes, whole_bytes)
        self._unlooked -= size_bytes

    def _check(self, done_bytes: int, whole_bytes: int) -> int:
        """Return how much may be copied without another look."""
        found = self.look()
        if found is None:
            return sys.maxsize
        kept = min(found.limit_bytes // _PART_KEPT, _MOST_KEPT_BYTES)
        left = max(0, found.bytes - kept)
        if whole_bytes - done_bytes > left:
            before = left + done_bytes
            raise MemoryLimitError(whole_bytes, before, found.limit_bytes, found.source)
        return left // _PART_WITHOUT_LOOK

    def look(self) -> MemoryLeft | None:
        """Return what is left; ``None`` where that cannot be told."""
        self._until = time.monotonic() + _LOOK_S
        try:
            if self._watch is None:
                # Here: most workers never copy as much, and it takes 10 ms.
                from safepool.limits.left import MemoryWatch  # noqa: PLC0415

                self._watch = MemoryWatch()
            return self._watch.read()
        except Exception:  # noqa: BLE001 -- a check that cannot be made must not cost a result
            return None


def require(size_bytes: int, done_bytes: int = 0, whole_bytes: int = 0) -> None:
    """Return if there is room for a copy.

    Args:
        size_bytes: What is copied now.
        done_bytes: Of a copy that is made in steps, what was copied before.
        whole_bytes: And what it will be at its end.

    Raises:
        MemoryLimitError: There is not, and the kernel would have to end a process.
    """
    _room.require(size_bytes, done_bytes, whole_bytes or size_bytes)


def require_to_pickle(values: Iterable[object]) -> None:
    """Return if there is room for the pickle of values of which some are large in one piece.

    Raises:
        MemoryLimitError: As :func:`require`.
    """
    for value in values:
        if type(value) in _FLAT:
            size_bytes = len(value)  # type: ignore[arg-type]
            if size_bytes > _LARGE_BYTES:
                require(size_bytes)


def require_to_load(pickled: Buffer) -> None:
    """Return if there is room for what a pickle is unpickled to.

    Raises:
        MemoryLimitError: As :func:`require`.
    """
    size_bytes = len(pickled)
    if size_bytes < _LARGE_BYTES:
        require(size_bytes)
        return
    frames = _frames(pickled)
    objects = (_OBJECTS - 1) * sum(map(len, frames))
    try:
        require(size_bytes + objects)
    except MemoryLimitError:
        # It takes milliseconds to look into them.
        require(size_bytes + int(objects * _part_of_objects(frames)))


def _frames(pickled: Buffer) -> list[memoryview]:
    """Return the frames of a pickle, as far as they can be found."""
    found, view, at, unknown = [], memoryview(pickled), 2, 0
    while at < len(view) and unknown <= _LEAST_FRAMED:
        code = view[at]
        begin = at + 1 + _LENGTHS.get(code, 0)
        end = begin + int.from_bytes(view[at + 1 : begin], "little")
        if code in _LENGTHS and end <= len(view):
            if code == _FRAME:
                found.append(view[begin:end])
            at, unknown = end, 0
        else:
            at, unknown = at + 1, unknown + 1
    return found


def _part_of_objects(frames: Sequence[memoryview]) -> float:
    """Return, from some of them, what part of the frames is no text or bytes of some length."""
    import pickletools  # noqa: PLC0415 -- seldom

    whole = flat = 0
    for frame in frames[:: len(frames) // _MOST_LOOKED_AT + 1]:
        whole += len(frame)
        try:
            for _, argument, _ in pickletools.genops(bytes(frame)):
                if isinstance(argument, (bytes, bytearray, str)) and len(argument) > _SHORT:
                    flat += len(argument)
        except ValueError:  # the end of a frame is none of the pickle
            pass
    return 1 - flat / whole if whole else 0.0


def held_at_most(most_bytes: int) -> int:
    """Return how many bytes of results may wait to be taken.

    Args:
        most_bytes: Where there is room for everything.
    """
    found = _room.look()
    return most_bytes if found is None else min(most_bytes, found.bytes // _PART_HELD)


_room = _Room()
