"""No unnamed files whose descriptors can be sent: every buffer goes through the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safepool.transport.frames import Filed

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from safepool.transport.descriptors import Handed
    from safepool.transport.frames import Segment


class Stored(Filed):
    """Never made here."""

    def segments(self) -> list[memoryview]:
        """Return the buffers."""
        return []

    def close(self) -> None:
        """Close the file: nothing to do."""


class Side:
    """Never made here."""

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return -1

    def send(self, stored: Stored | Handed) -> bool:  # noqa: ARG002 -- as on Linux
        """Send a file's descriptor; return whether it went."""
        return False

    def receive(self, lengths: tuple[int, ...], *, mapped: bool = True) -> list[Any]:
        """Return the buffers of a file that was sent."""
        raise NotImplementedError(lengths, mapped)

    def close(self) -> None:
        """Close the socket."""


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
