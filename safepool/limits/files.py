"""Floor 1, limits: one machine's files, read as text.

A file that cannot be read is noted, and raises nothing.

A machine is a folder: ``/`` for this one, or a folder with files captured on another one. The
module knows no format and no limit.

Not covered:
    * A captured machine that changes while it is read.
    * Files over 16 MiB: only their beginning is read (``mountinfo`` of a host with
      thousands of containers has about one).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from safepool.limits._types import Skipped

if TYPE_CHECKING:
    from io import FileIO

    from safepool.errors import UnreadableLimitError

_READ_MAX_BYTES = 16 << 20

# The kernel's own number of symbolic links in one path (path_resolution(7)).
_LINKS_MAX = 40


class Machine:
    """The files of one machine, and the ones that could not be used.

    Attributes:
        root: Folder that holds the tree; ``"/"`` is this machine.
        is_this_one: Whether it is this machine: only then may the system be asked.
        skipped: Sources that could not be used so far, in the order in which they were met.
    """

    __slots__ = ("is_this_one", "root", "skipped")

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self.root: str = os.path.abspath(os.fsdecode(root))
        self.is_this_one: bool = self.root == "/"
        self.skipped: list[Skipped] = []

    def read(self, path: str, *, expected: bool = False) -> str | None:
        """Read one file as text.

        Args:
            path: Absolute path on that machine.
            expected: Whether its absence is worth a note. Most limit files are absent
                on most machines, and that says nothing.

        Returns:
            Its text: UTF-8, where any other byte becomes a surrogate, as in ``os.fsdecode``.
            ``None`` if the file does not exist or cannot be read; the latter is noted.
        """
        try:
            actual = self._actual(path)
            # Checked before opening: opening a named pipe in a captured folder would wait.
            if not stat.S_ISREG(os.stat(actual).st_mode):
                self.note(path, "not a regular file")
                return None
            # Closes itself when a signal's handler raises between here and there.
            with open(actual, "rb", buffering=0) as file:
                data = _read_all(file)
        except FileNotFoundError as error:
            if expected:
                self.note(path, error.strerror or str(error))
            return None
        except OSError as error:
            self.note(path, error.strerror or str(error))
            return None
        except ValueError as error:
            self.note(path, str(error))  # a NUL byte in the path
            return None
        return data.decode("utf-8", "surrogateescape")

    def is_directory(self, path: str) -> bool:
        """Return whether a directory of that name exists."""
        try:
            return stat.S_ISDIR(os.stat(self._actual(path)).st_mode)
        except (OSError, ValueError):
            return False

    def subdirectories(self, path: str) -> list[str]:
        """List the directories in one directory, without following links; none if unreadable."""
        try:
            with os.scandir(self._actual(path)) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except (OSError, ValueError):
            return []
        return [f"{path.rstrip('/')}/{name}" for name in sorted(names)]

    def note(self, source: str, reason: str) -> None:
        """Remember that a source was not usable, once."""
        skipped = Skipped(source=source, reason=reason)
        if skipped not in self.skipped:
            self.skipped.append(skipped)

    def note_unreadable(self, error: UnreadableLimitError) -> None:
        """Remember that a source's text had another shape than documented."""
        found = error.found if len(error.found) <= 80 else error.found[:77] + "..."
        self.note(error.source, f"expected {error.expected}, found {found!r}")

    def _actual(self, path: str) -> str:
        """Return the place of a path of that machine on this one, with links kept in the root."""
        if self.is_this_one:
            return path
        # Resolved by hand: an absolute link of the captured machine (/proc/self, or
        # /sys/fs/cgroup/cpu) means a place in the capture, and open() would leave it.
        todo = path.split("/")[::-1]
        done: list[str] = []
        links = 0
        while todo:
            name = todo.pop()
            if name in {"", "."}:
                continue
            if name == "..":
                del done[-1:]
                continue
            try:
                target = os.readlink("/".join((self.root, *done, name)))
            except (OSError, ValueError):
                done.append(name)
                continue
            links += 1
            if links > _LINKS_MAX:
                raise OSError(f"more than {_LINKS_MAX} symbolic links")
            if target.startswith("/"):
                done.clear()
            todo.extend(target.split("/")[::-1])
        return "/".join((self.root, *done))


def _read_all(file: FileIO) -> bytes:
    # Files under /proc and /sys/fs/cgroup have no size, and a short read is not their end.
    parts: list[bytes] = []
    size = 0
    while size < _READ_MAX_BYTES:
        part = file.read(1 << 16)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)
