"""Another user of the machine, who tries to reach what a program holds.

    python support_other_user.py UID < what.json > reached.json

Both are JSON: ``processes`` and ``names`` are lists of process ids and of paths to try, and so
are ``sockets``: type and name of each, as ``/proc/net/unix`` has them (``1 @name`` is an abstract
one). The answer is a list of what could be read, entered or connected to.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# proc(5). Who may open one of these can read memory, variables or open files of the process.
PRIVATE = ("environ", "mem", "maps", "auxv", "fd/0", "fd/1", "fd/3", "cwd", "map_files")


def reached(processes: list[int], names: list[str], sockets: list[str]) -> Iterator[str]:
    """Yield what this user can get at."""
    for pid in processes:
        yield from filter(can_open, (f"/proc/{pid}/{name}" for name in (*PRIVATE, "fd")))
        try:
            os.kill(pid, 0)
        except PermissionError:
            continue
        yield f"kill {pid}"
    yield from filter(can_open, names)
    yield from filter(can_connect, sockets)


def can_open(name: str) -> bool:
    """Tell whether this user can read a file or list a directory, or write to it."""
    for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK):
        try:
            os.close(os.open(name, flags))
        except OSError:
            continue
        return True
    return False


def can_connect(address: str) -> bool:
    """Tell whether this user can connect to a socket of the file system, or an abstract one."""
    kind, _, name = address.partition(" ")
    with socket.socket(socket.AF_UNIX, int(kind)) as tried:
        try:
            tried.connect(name.replace("@", "\0"))
        except OSError:
            return False
    return True


def be(user: int) -> None:
    """Give up root, its groups and its capabilities."""
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


if __name__ == "__main__":
    what = json.load(sys.stdin)
    be(int(sys.argv[1]))
    json.dump([*reached(**what)], sys.stdout)
