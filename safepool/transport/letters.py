"""Letters: rare messages with open descriptors, between this process and a fork server.

    0           8
    | length    | pickle ...
    | u64       |

The descriptors travel with the first bytes (unix(7), ``SCM_RIGHTS``) and arrive closed on exec.
Both ends are the same program and user, on an unnamed socket pair, so a pickle may be trusted.
"""

from __future__ import annotations

import pickle
import socket
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

from safepool import linux
from safepool.errors import naming
from safepool.transport.descriptors import close_all

assert sys.platform == "linux"

_HEADER = struct.Struct("!Q")
# SCM_MAX_FD, unix(7).
_MOST_DESCRIPTORS = 253
_READ_BYTES = 1 << 20


def send(sock: socket.socket, message: object, descriptors: Sequence[int] = ()) -> None:
    """Send a message and duplicates of at most 253 descriptors.

    The socket is a stream socket of the family ``AF_UNIX``; blocking, or with a time limit.

    Example:
        >>> here, there = socket.socketpair()
        >>> send(here, ("fork", 3))
        >>> receive(there)
        (('fork', 3), [])
        >>> here.close()
        >>> receive(there) is None
        True
        >>> there.close()
    """
    if len(descriptors) > _MOST_DESCRIPTORS:
        raise ValueError(
            f"cannot send {len(descriptors)} descriptors to a worker: at most {_MOST_DESCRIPTORS} "
            "fit one message. Pass fewer locks, queues and pipes"
        )
    pickled = pickle.dumps(message, protocol=5)
    data = memoryview(_HEADER.pack(len(pickled)) + pickled)
    if descriptors:
        with naming("sendmsg()"):
            sent = socket.send_fds(sock, [data], descriptors)
    else:
        sent = sock.send(data)
    # Whoever has read the whole of it may have closed the other end: no empty rest is sent.
    if sent < len(data):
        sock.sendall(data[sent:])


def receive(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """Return a message and the descriptors that came with it; ``None`` if there will be none."""
    descriptors = array("i")
    # socket.recv_fds() is not used: it drops the flag (Python 3.11 to 3.13).
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * descriptors.itemsize)
    header, ancillary, _, _ = sock.recvmsg(_HEADER.size, room, linux.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    try:
        pickled = _receive_body(sock, header) if header else None
        if pickled is not None:
            return pickle.loads(pickled), list(descriptors)
    except BaseException:
        close_all(descriptors)
        raise
    close_all(descriptors)
    return None


def _receive_body(sock: socket.socket, begun: bytes) -> bytes | None:
    rest = _receive_all(sock, _HEADER.size - len(begun))
    return None if rest is None else _receive_all(sock, _HEADER.unpack(begun + rest)[0])


def _receive_all(sock: socket.socket, left: int) -> bytes | None:
    parts = []
    while left:
        part = sock.recv(min(left, _READ_BYTES))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
