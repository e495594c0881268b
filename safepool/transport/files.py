"""Buffers in unnamed files beside the stream, whose descriptors are sent to the other end.

    sender                                   receiver
    store()  copies buffers into a memfd
    Side.send()  ---- its descriptor ---->   Side.receive() maps it privately, and closes it
    frame        ---- their lengths  ---->   (transport.frames)

The sender of an array makes the only copy; the receiver maps the same memory. Hence the array is
writable, no other process sees the changes, and the kernel frees it with its last user, in every
ending. No name in ``/dev/shm`` or ``/tmp`` can be left behind, raced for or filled.

Descriptors have a separate socket pair, the *side* of a channel. Hence the stream is read without
looking for descriptors. A descriptor that cannot be received now (``EMFILE``) stays in the socket
until a spare descriptor is freed for it: nothing is lost.

If the system refuses a file, buffers use the stream: ``store`` returns them unchanged, or
``Side.send`` returns false. Elsewhere than on Linux this is always so.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from safepool.transport.frames import Segment

__all__ = ["FILE_BYTES", "Side", "Stored", "accept", "invite", "store"]

# A payload of at least so many bytes goes into a file. Below, the stream is faster: the kernel
# hands out a file's memory in small pages, at 2 microseconds each; a large one has 2 MiB.
# Source: benchmarks/arrays.py, threshold.
FILE_BYTES = 2 << 20

if sys.platform == "linux":
    from safepool.transport._memfd import Side, Stored, accept, invite, store
else:  # not Linux
    from safepool.transport.frames import Filed

    class Stored(Filed):
        """Never made here."""

        segments: Any
        close: Any

    Side: TypeAlias = Any

    def invite(_sock: socket.socket) -> Side | None:
        """Return this end of the side of a channel, ``None``: there is none."""
        return None

    def accept(_sock: socket.socket) -> Side | None:
        """Return the other end, ``None``: there is none."""
        return None

    def store(
        segments: Sequence[Segment],
        given_up: Callable[[], bool] = bool,  # noqa: ARG001 -- as on Linux
    ) -> list[Segment]:
        """Return the segments as they are."""
        return list(segments)
