"""Effects of an import on a process beside its modules, and files that the import has read.

A worker that is forked afterwards has these effects as well, but no threads; all workers would
share descriptors and children. Some states are set anew in each worker to the
program's (``birth``), which would undo the import's change. Hence the tasks import such a module,
in each worker.

The environment is that of the program at the time of the import. Reads of variables are recorded:
the server is useless after such a variable has changed in the program.

Not covered:
    * Variables that native code reads by getenv(3); variables that bound threads belong to the
      server.
    * Threads: ``server`` counts threads before each fork as well.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from safepool import procfs

assert sys.platform == "linux"

# Signals 32 and 33: handled as soon as there has been a thread (nptl(7)).
_OF_THE_C_LIBRARY = 3 << 31


class Traces(NamedTuple):
    """State of the process at one moment: what an import may change, or a worker resets."""

    files: dict[str, str]
    children: frozenset[int]
    signals: tuple[int, ...]
    states: tuple[object, ...]

    @classmethod
    def look(cls) -> Traces:
        """Return the present state."""
        status = procfs.fields("thread-self")
        return cls(
            files=_files(),
            children=frozenset(procfs.children("thread-self")),
            signals=tuple(
                int(status.get(name, "0"), 16) & ~_OF_THE_C_LIBRARY
                for name in ("SigBlk", "SigIgn", "SigCgt")
            ),
            states=(tuple(sys.path), sys.getrecursionlimit(), _directory()),
        )

    def new_children(self) -> list[int]:
        """Return the numbers of the processes that were started since then."""
        return [*(Traces.look().children - self.children)]

    def new(self) -> str:
        """Return the changes since then, as the end of a sentence; empty if there are none."""
        now = Traces.look()
        if now.files.items() - self.files.items():
            gc.collect()  # files that were not closed, and are closed with their object
            now = Traces.look()
        files = now.files.items() - self.files.items()
        if files:
            return f"opens {', '.join(sorted(target for _, target in files))}"
        if now.children - self.children:
            return "starts a process"
        if now.signals != self.signals:
            return "changes what signals do"
        if now.states != self.states:
            return "changes the path, the recursion limit or the directory"
        return ""


@contextmanager
def recorded_environment() -> Iterator[set[str]]:
    """Record the names of variables that are read inside the block."""
    read: set[str] = set()
    kind = type(os.environ)

    class Recording(kind):  # type: ignore[valid-type, misc]
        def __getitem__(self, key: str) -> str:
            if isinstance(key, str):  # some libraries expect the error of others
                read.add(key)
            value: str = super().__getitem__(key)
            return value

    os.environ.__class__ = Recording
    try:
        yield read
    finally:
        os.environ.__class__ = kind


def _files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass  # the listing's own
    return found


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""
