r"""Floor 1, limits: the text of ``/proc/<pid>/mountinfo`` in, the mounts that can be reached out.

The module opens no file and knows no limit. A line:

    36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    (1)(2)(3)  (4)   (5)       (6)        (7)    (8) (9)  (10)      (11)

1 mount id, 2 parent's id, 3 device, 4 root: the directory of the file system that is
mounted, 5 mount point, 6 options, 7 any number of optional fields, 8 separator, 9 type,
10 source, 11 options of the file system.

Format: proc_pid_mountinfo(5); Linux, fs/proc_namespace.c, ``show_mountinfo``.

Not covered:
    * Mounts moved (``mount --move``) below an older mount: the module takes the order of the lines
      for the order of mounting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Type of the file system, by version of the control groups.
GROUP_TYPES = ("cgroup", "cgroup2")


class Mount(NamedTuple):
    """A line of ``mountinfo``, unescaped.

    Attributes:
        id: Number of this mount.
        parent: Number of the parent mount, which may be missing in the text.
        root: Directory of the file system that appears at the mount point. For control
            groups it is relative to the reader's namespace and may begin with ``/..``.
        point: Directory at which the file system appears.
        type: Type of the file system: ``cgroup``, ``cgroup2``, ``tmpfs``, ...
        options: Options of the file system: for version 1 they name the controllers.
    """

    id: int
    parent: int
    root: str
    point: str
    type: str
    options: str


def parse_mountinfo(text: str) -> list[Mount]:
    r"""Parse the text of a ``mountinfo`` file.

    Args:
        text: Lines as above; a line may be as long as it likes (an overlay's has every layer).

    Returns:
        The mounts in the order of their lines. A line of another shape is left out: one
        broken line must not hide the others.

    Source:
        proc_pid_mountinfo(5).

    Example:
        >>> [mount] = parse_mountinfo(r"30 23 0:26 / /sys/a\040b rw shared:4 - cgroup2 none rw")
        >>> mount.point, mount.type
        ('/sys/a b', 'cgroup2')
    """
    mounts = []
    # splitlines() is not used: it also splits at characters that a path may contain.
    for line in text.split("\n"):
        # Blanks in paths are escaped, so the first lone hyphen is the separator.
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        rest = tail.split(" ", 2)
        if len(fields) < 6 or len(rest) < 3 or not (_is_id(fields[0]) and _is_id(fields[1])):
            continue
        mounts.append(
            Mount(
                id=int(fields[0]),
                parent=int(fields[1]),
                root=unescape(fields[3]),
                point=unescape(fields[4]),
                type=rest[0],
                options=rest[2],
            )
        )
    return mounts


def unescape(field: str) -> str:
    r"""Turn a field's octal escapes into the bytes they stand for.

    Args:
        field: Text as the kernel wrote it: blank, tab, newline and backslash as ``\ooo``.

    Returns:
        The path, in the coding of ``os.fsdecode``.

    Source:
        Linux, fs/seq_file.c, ``mangle_path``.

    Example:
        >>> unescape(r"/system.slice/my\134x2dapp\040one")
        '/system.slice/my\\x2dapp one'
    """
    if "\\" not in field:
        return field
    data = _OCTAL.sub(
        lambda match: bytes([int(match[1], 8)]), field.encode("utf-8", "surrogateescape")
    )
    return data.decode("utf-8", "surrogateescape")


def reachable(mounts: Sequence[Mount]) -> list[Mount]:
    """Leave out the mounts that another mount hides.

    A mount stays in ``mountinfo`` when something is mounted over it, or over a directory
    above its mount point; its path then leads to the other one.

    Returns:
        Mounts whose mount point leads to them, in the same order.

    Source:
        Linux, Documentation/filesystems/sharedsubtree.rst; fs/namei.c, ``follow_mount``: a
        lookup crosses, at every directory, into the mount whose parent is the mount it is in.
    """
    on: dict[int, list[int]] = {}
    by_id: dict[int, int] = {}
    for index, mount in enumerate(mounts):
        on.setdefault(mount.parent, []).append(index)
        by_id[mount.id] = index

    def is_covered(index: int) -> bool:
        mount = mounts[index]
        return any(
            mounts[other].point == mount.point for other in on.get(mount.id, ()) if other != index
        )

    def is_attached(index: int) -> bool:
        # Upwards through the parents. `chain` also ends the loop: a captured text may have
        # cycles, and the first mount of a kernel is its own parent.
        chain = [index]
        while True:
            mount = mounts[index]
            parent = by_id.get(mount.parent)
            if any(
                hides(other, index, parent) for other in on[mount.parent] if other not in chain
            ):
                return False
            if parent is None or parent in chain:
                return True
            chain.append(parent)
            index = parent

    def hides(other: int, index: int, parent: int | None) -> bool:
        point = mounts[index].point
        if not is_inside(point, mounts[other].point):
            return False
        # It covers the whole parent: no other mount on the parent is visible. It covers a
        # directory of the parent: only earlier mounts there, which have an earlier line.
        over_parent = parent is not None and mounts[other].point == mounts[parent].point != point
        return over_parent or other > index

    # Two mounts with one mount point are left only where the parents are not in the text;
    # the later one lies above.
    at = {
        mount.point: mount
        for index, mount in enumerate(mounts)
        if not is_covered(index) and is_attached(index)
    }
    return list(at.values())


def around_control_groups(mounts: Iterable[Mount]) -> list[Mount]:
    r"""Keep the control groups' mounts and those that can hide them or lie below them.

    A host of containers has thousands of other mounts, most of them with one parent.

    Example:
        >>> text = "1 0 0:1 / / rw - ext4 none rw\n2 1 0:2 / /a rw - ext4 none rw"
        >>> around_control_groups(parse_mountinfo(text))
        []
    """
    mounts = list(mounts)
    points = {mount.point for mount in mounts if mount.type in GROUP_TYPES}
    above = {directory for point in points for directory in (point, *_directories_above(point))}
    below = tuple(point.rstrip("/") + "/" for point in points)
    return [mount for mount in mounts if mount.point in above or mount.point.startswith(below)]


def _directories_above(path: str) -> Iterable[str]:
    end = path.rfind("/")
    while end > 0:
        yield path[:end]
        end = path.rfind("/", 0, end)
    yield "/"


def is_inside(path: str, directory: str) -> bool:
    """Return whether a path is a directory or is below it, by whole components.

    Example:
        >>> is_inside("/a/b", "/a"), is_inside("/a", "/a"), is_inside("/ab", "/a")
        (True, True, False)
    """
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def covering(mounts: Iterable[Mount], path: str) -> Mount | None:
    """Return the reachable mount that a path is in: the one with the longest mount point."""
    inside = (mount for mount in mounts if is_inside(path, mount.point))
    return max(inside, key=lambda mount: len(mount.point), default=None)


def _is_id(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) < 20


# Three digits of which the first is at most 3: one byte.
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
