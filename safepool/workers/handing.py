"""Facts and descriptors that this program gives a worker, which is not its child."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import sys
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from safepool.workers import birth, launch
from safepool.workers.safe_path import safe_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

assert sys.platform == "linux"


def details_of(changes: Mapping[str, str | None], *, script: bool) -> dict[str, Any]:
    """Return the state of a child of this process, besides descriptors."""
    me = multiprocessing.current_process()
    return {
        **birth.circumstances(),
        "environ": launch.environment_of(changes),
        "changes": changes,
        "parent": os.getpid(),
        "parent_name": me.name,
        "authkey": bytes(me.authkey),
        "script": script,
    }


@contextmanager
def handing(
    details: Mapping[str, Any], files: Sequence[int]
) -> Iterator[tuple[dict[str, Any], list[int], list[int]]]:
    """Open the descriptors for a worker, for the time of handing them over.

    Yields:
        Its details, its descriptors, and this side of it: for :func:`let_in`.
    """
    me: Any = multiprocessing.current_process()
    # Numbered as multiprocessing numbers the children of a process, over all its pools: no number
    # is used again.
    number = next(multiprocessing.process._process_counter)  # type: ignore[attr-defined]
    identity = (*me._identity, number)
    name = f"safepool-{':'.join(map(str, identity))}"
    opened: list[int] = []
    ours: list[int] = []
    try:
        status, told = os.pipe()
        ours.append(status)
        opened.append(told)
        os.set_blocking(status, False)
        # The worker waits here until it is known: a server that answers too late, or
        # never, may have forked one all the same, and another would share its channel.
        gate, key = os.pipe()
        ours.append(key)
        opened.append(gate)
        folder = open_directory()
        opened.append(folder)
        streams = [_stream(number, opened) for number in (1, 2)]
        given = [told, gate, folder, *streams, tracker(), *files]
        yield {**details, "name": name, "identity": identity, "files": len(given)}, given, ours
    finally:
        for descriptor in (*opened, *ours):
            os.close(descriptor)


def let_in(ours: list[int]) -> tuple[int, int]:
    """Let a worker begin, now that its pid is known; take over its exit-code pipe and its line."""
    status, key = ours
    os.write(key, b"\0")
    ours.clear()
    return status, key


def tracker() -> int:
    """Return the pipe to the resource tracker.

    Workers share the program's tracker: their own would unlink shared memory at their end.
    """
    with safe_path():
        found = resource_tracker.getfd()
    assert found is not None
    return found


def open_directory() -> int:
    """Open the working directory."""
    flags = os.O_RDONLY | getattr(os, "O_PATH", 0)
    try:
        return os.open(".", flags)
    except PermissionError:  # a program that has given up root in a directory of root's
        return os.open("/", flags)


def _stream(number: int, opened: list[int]) -> int:
    """Return the standard stream of that number, or a substitute where the program has none."""
    if not launch.is_stream(number):
        number = os.open(os.devnull, os.O_WRONLY)
        opened.append(number)
    return number
