"""What workers do with sockets and connections. Importable in a worker."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection


def answer(connection: Connection) -> str:
    connection.send(connection.recv() * 2)
    return "answered"


def say(sock: socket.socket, text: bytes = b"hello") -> tuple[int, bool]:
    sock.sendall(text)
    return sock.type, sock.get_inheritable()


def say_all(socks: list[socket.socket]) -> int:
    for place, sock in enumerate(socks):
        sock.sendall(b"%d" % place)
    return len(socks)


def two_ends() -> list[Connection]:
    return list(multiprocessing.Pipe())


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def pairs(_number: int) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def pair_and_array() -> tuple[Any, ...]:
    import numpy as np

    return (*socket.socketpair(), np.arange(1_000_000))


def back(value: Any) -> Any:
    return value


def die_at_first(marker: str, sock: socket.socket) -> None:
    if not os.path.exists(marker):
        with open(marker, "w", encoding="utf-8"):
            os.kill(os.getpid(), 9)
    sock.sendall(b"again")


def wait_for(path: str, mark: str) -> None:
    with open(mark, "w", encoding="utf-8"):
        pass
    while not os.path.exists(path):
        time.sleep(0.01)


def wait_and_say(path: str, sock: socket.socket) -> None:
    wait_for(path, f"{path}.begun")
    sock.sendall(b"said")
    sock.close()


def raise_with(sock: socket.socket) -> None:
    raise ConnectionError("refused", sock.family)


def count_descriptors() -> int:
    """Return how many descriptors this process has, its eventfds apart.

    A pool makes an eventfd for each worker that was idle when it waited for calls, and keeps them
    until it is closed. How many were idle at once is chance.
    """
    return sum("[eventfd]" not in target for target in _targets())


def count_eventfds() -> int:
    return sum("[eventfd]" in target for target in _targets())


def _targets() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the listing's own


def open_descriptors() -> set[int]:
    """Return the descriptors of this process that are sockets or pipes."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "pipe:")):
                found.add(int(name))
        except OSError:
            pass
    return found


def sharers_and_listeners() -> tuple[int, int]:
    """Return how many threads there are of the standard library's, and sockets that listen."""
    listening = 0
    for number in open_descriptors():
        if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
            with socket.socket(fileno=os.dup(number)) as sock:
                listening += sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return sum("_serve" in thread.name for thread in threading.enumerate()), listening


class Own:
    """A program's own class that has a descriptor."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self) -> bytes:
        return os.read(self.number, 100)

    def close(self) -> None:
        os.close(self.number)


class Plain:
    """Pickle takes it, and the registered reducer makes something else of it."""

    def __init__(self, way: str) -> None:
        self.way = way


def reduce_own(own: Own) -> tuple[Any, ...]:
    return rebuild_own, (DupFd(own.number),)


def rebuild_own(descriptor: Any) -> Own:
    return Own(descriptor.detach())


def reduce_plain(_plain: Plain) -> tuple[Any, ...]:
    return Plain, ("registered",)


def register() -> None:
    ForkingPickler.register(Own, reduce_own)
    ForkingPickler.register(Plain, reduce_plain)


def read_own(own: Own) -> bytes:
    text = own.read()
    own.close()
    return text


def make_own() -> Own:
    register()
    reading, writing = os.pipe()
    os.write(writing, b"from the worker")
    os.close(writing)
    return Own(reading)


def way_of(plain: Plain) -> str:
    return plain.way
