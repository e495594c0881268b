"""Room for a copy, compared with the memory that is left before the kernel must act.

A copy in transit between pool and worker counts for the control group, and a memory file for no
process: out of memory, the kernel would end an innocent process. A copy that does not fit is
refused instead, and only its own call fails.

A check costs about 0.1 ms. Hence not every copy is checked: after a check, a part of the remaining
memory may be copied without another check, for a second. Each process checks separately, and
repeats the check at each step of a long copy, so that two copies which begin at the same time do
not both count on the same memory.

Not covered:
    * Copies of many workers between two checks, and memory that tasks use meanwhile: then the
      kernel takes a worker (``workers.main``).
    * Other systems than Linux: nothing is known of the memory that is left, and nothing refused.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

from safepool.errors import MemoryLimitError

if TYPE_CHECKING:
    from collections.abc import Iterable

    if sys.platform == "linux":
        from safepool.limits.left import MemoryLeft, MemoryWatch
    else:  # not Linux
        MemoryLeft: TypeAlias = Any
        MemoryWatch: TypeAlias = Any

# Bytes that may be copied without a check: before the first one, and afterwards this part (a
# sixteenth) of the memory that was left.
_FIRST_BYTES = 4 << 20
_PART_WITHOUT_LOOK = 16
_LOOK_S = 1.0
# Part of the ceiling that is kept free for page tables and for the objects of a result.
_PART_KEPT = 32
_MOST_KEPT_BYTES = 64 << 20
# Pause between two attempts to give memory back, as a multiple of the time of the first.
_PAUSES = 20
# A refusal holds for so long: at the limit, a check for each copy would take most of the time.
_REFUSED_S = 0.02
# Both pauses end early when Python has freed this many blocks.
_FREED_BLOCKS = 100
# Part of the remaining memory for results that have arrived and were not taken.
_PART_HELD = 4
# Types that are pickled in one piece, which takes their size once more.
_FLAT = frozenset({bytes, bytearray, str})
# A larger one is checked separately.
_LARGE_BYTES = 1 << 20
# Characters of a text that are sampled for its bytes per character.
_SAMPLE = 1 << 12
# Containers of at most so many entries are searched for them.
_MOST_ENTRIES = 16
_CONTAINERS = frozenset({tuple, list, dict})


if sys.platform == "linux":

    def _new_watch() -> MemoryWatch:
        # Here: most workers never copy as much, and it takes 10 ms.
        from safepool.limits.left import MemoryWatch  # noqa: PLC0415

        return MemoryWatch()

else:  # not Linux

    def _new_watch() -> MemoryWatch:
        raise NotImplementedError


class _Pause:
    """A time in which the room is not read again, unless much memory was freed."""

    def __init__(self) -> None:
        self._until = 0.0
        self._blocks = 0

    def lasts(self, now: float, blocks: int) -> bool:
        return now < self._until and self._blocks - blocks < _FREED_BLOCKS

    def begin(self, until: float, blocks: int) -> None:
        self._until, self._blocks = until, blocks


class _Room:
    def __init__(self) -> None:
        self._watch: MemoryWatch | None = None
        self._unlooked = _FIRST_BYTES
        self._until = float("inf")
        self._futile, self._refuses = _Pause(), _Pause()
        self._refused: tuple[Any, ...] = ()
        # Whether a copy was refused, here or in another process, and nothing was given back since.
        self.full = False

    def require(self, size_bytes: int, done_bytes: int, whole_bytes: int) -> None:
        if whole_bytes - done_bytes > self._unlooked or time.monotonic() >= self._until:
            self._unlooked = 0  # also if it is refused
            self._unlooked = self._check(done_bytes, whole_bytes)
        self._unlooked -= size_bytes

    def _check(self, done_bytes: int, whole_bytes: int) -> int:
        """Return how much may be copied without another look."""
        found, wanted = self.look(), whole_bytes - done_bytes
        if found is not None and wanted > _usable(found) and self._gives_back():
            found = self.look()
        if found is None:
            return sys.maxsize
        left = _usable(found)
        if wanted > left:
            before = left + done_bytes
            self.full = True
            raise MemoryLimitError(whole_bytes, before, found.limit_bytes, found.source)
        return left // _PART_WITHOUT_LOOK

    def _gives_back(self) -> bool:
        """Return free memory to the system, unless nothing was freed since the last attempt.

        This takes long if much memory is in use.
        """
        began, blocks = time.monotonic(), sys.getallocatedblocks()  # others free meanwhile
        if self._futile.lasts(began, blocks):
            return False
        _give_back()
        now = time.monotonic()
        self._futile.begin(now + _PAUSES * (now - began), blocks)
        return True

    def refusal(self, size_bytes: int) -> MemoryLimitError | None:
        blocks = sys.getallocatedblocks()  # before the look: others free meanwhile
        if self._refuses.lasts(time.monotonic(), blocks):
            return MemoryLimitError(*self._refused)
        try:
            self.require(size_bytes, 0, size_bytes)
        except MemoryLimitError as error:
            self._refused = error.args
            self._refuses.begin(time.monotonic() + _REFUSED_S, blocks)
            return error.with_traceback(None)
        return None

    def make(self) -> None:
        """Give back memory that was freed since a copy was refused."""
        if self.full and self._gives_back():
            found = self.look()
            self.full = found is not None and _usable(found) < _FIRST_BYTES

    def look(self) -> MemoryLeft | None:
        """Return the remaining memory; ``None`` if unknown."""
        self._until = time.monotonic() + _LOOK_S
        try:
            watch = self._watch
            if watch is None:
                watch = self._watch = _new_watch()
            return watch.read()
        except Exception:  # noqa: BLE001 -- a check that cannot be made must not cost a result
            return None


def require(size_bytes: int, done_bytes: int = 0, whole_bytes: int = 0) -> None:
    """Return if the memory limits leave room for a copy, or for this step of a larger one.

    Raises:
        MemoryLimitError: Without room, the kernel would have to end a process.
    """
    _room.require(size_bytes, done_bytes, whole_bytes or size_bytes)


def refusal(size_bytes: int) -> MemoryLimitError | None:
    """Return what :func:`require` raises, or has raised just before; ``None`` if there is room."""
    return _room.refusal(size_bytes)


def be_full() -> None:
    """Take note that another process has refused a copy."""
    _room.full = True


def make_room() -> None:
    """Give back what this process has freed since a copy was refused: others need it as well."""
    _room.make()


def require_to_pickle(values: Iterable[Any]) -> None:
    """Return if there is room for the pickle of values of which some are large in one piece.

    They may be in a small container.
    """
    for value in values:
        kind = type(value)
        if kind in _FLAT:
            if len(value) > _LARGE_BYTES:
                require(_needed_to_pickle(value))
        elif kind in _CONTAINERS and len(value) <= _MOST_ENTRIES:
            parts = value.values() if kind is dict else value
            if not _FLAT.isdisjoint(map(type, parts)):
                require_to_pickle([part for part in parts if type(part) in _FLAT])


def _needed_to_pickle(flat: Any) -> int:
    if type(flat) is not str:
        return len(flat)
    # Text is copied once more on its way. Beside ASCII it keeps a copy, in UTF-8, as well.
    if flat.isascii():
        return 2 * len(flat)
    sample = flat[:: len(flat) // _SAMPLE]
    return 3 * len(flat) * len(sample.encode(errors="surrogatepass")) // len(sample)


def held_at_most(most_bytes: int) -> int:
    """Return how many bytes of results may wait to be taken, this many at most."""
    found = _room.look()
    return most_bytes if found is None else min(most_bytes, found.bytes // _PART_HELD)


def _usable(found: MemoryLeft) -> int:
    left: int = found.bytes
    kept: int = min(found.limit_bytes // _PART_KEPT, _MOST_KEPT_BYTES)
    return max(0, left - kept)


def _give_back() -> None:
    """Give the system memory that this process has freed: glibc keeps it between used blocks."""
    import ctypes  # noqa: PLC0415 -- seldom

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library, or a system without one for all programs (Windows)


_room = _Room()
