"""Floor 1, limits: the control groups of this process, and the mounts.

The module reads two files of ``/proc``, opens no other file, and returns their meaning.

Sources: cgroups(7), cgroup_namespaces(7); Linux, Documentation/admin-guide/cgroup-v2.rst.

Not covered:
    * A thread with separate mounts (``unshare(CLONE_NEWNS)`` in one thread): the process's mounts
      are read.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from safepool.limits.mounts import Mount, around_control_groups, parse_mountinfo, reachable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.limits.files import Machine

GroupPath = tuple[str, ...]
"""A group as the components of its path, leading ``..`` included."""


class Place(NamedTuple):
    """Place of this process in a machine's groups and mounts.

    Attributes:
        own: Group of the process for each controller of version 1, and for version 2 under ``""``.
            Empty if the machine does not say.
        mounts: The mounts that can be reached; ``None`` if the machine does not say.
    """

    own: Mapping[str, GroupPath]
    mounts: tuple[Mount, ...] | None


# The thread's file comes first: threads of one process may be in different groups (version 1
# `tasks`, version 2 threaded groups), and a child is born in the group of the thread that starts
# it. The process's file shows the group of its first thread.
OWN_GROUP_FILES = ("/proc/thread-self/cgroup", "/proc/self/cgroup")
MOUNTINFO = "/proc/self/mountinfo"

# PATH_MAX, the size of the kernel's buffer for a group's path (cgroup.c, proc_cgroup_show).
_PATH_MAX = 4096


def parse_own_groups(text: str) -> dict[str, GroupPath]:
    r"""Parse the text of a ``/proc/<pid>/cgroup`` file.

    Args:
        text: Lines ``ID:CONTROLLERS:PATH``. The path is raw: it may hold blanks, colons
            and backslashes, so only the first two colons separate.

    Returns:
        The group of every controller of version 1, and of version 2 under ``""``. A line
        of another shape is left out; hierarchies without a controller (``name=systemd``) too.

    Source:
        cgroups(7), "/proc/[pid]/cgroup".

    Example:
        >>> parse_own_groups("4:cpu,cpuacct:/a b:c\n1:name=cpu:/x\n0::/../d\n")
        {'cpu': ('a b:c',), 'cpuacct': ('a b:c',), '': ('..', 'd')}
    """
    own: dict[str, GroupPath] = {}
    for line in text.split("\n"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = components(path)
        if group is None or not (number.isascii() and number.isdigit()):
            continue
        if number == "0" and not controllers:
            own.setdefault("", group)
            continue
        for controller in controllers.split(","):
            if controller and not controller.startswith("name="):
                own.setdefault(controller, group)
    return own


def read_own_groups_text(machine: Machine) -> str | None:
    """Read the text with this process's groups. It changes if the process is moved."""
    for path in OWN_GROUP_FILES:
        text = machine.read(path)
        if text:
            return text
    return None


def read_place(machine: Machine) -> Place:
    """Read the groups of this process, and the mounts."""
    own: dict[str, GroupPath] = {}
    for path in OWN_GROUP_FILES:
        # The thread's file exists since Linux 3.17 and in few captures: no note without it.
        text = machine.read(path, expected=path == OWN_GROUP_FILES[-1])
        own = parse_own_groups(text) if text is not None else {}
        if own:
            break
        if text is not None:
            machine.note(path, f"no line of the form ID:CONTROLLERS:PATH in {text[:80]!r}")
    text = machine.read(MOUNTINFO, expected=True)
    mounts = None if text is None else _mounts_in(text)
    if text is not None and mounts is None:
        machine.note(MOUNTINFO, f"no line that describes a mount in {text[:80]!r}")
    return Place(own=own, mounts=mounts)


@functools.lru_cache(maxsize=1)  # of the text, which is read each time and seldom changes
def _mounts_in(text: str) -> tuple[Mount, ...] | None:
    mounts = parse_mountinfo(text)
    return tuple(reachable(around_control_groups(mounts))) if mounts else None


def components(path: str) -> GroupPath | None:
    """Split the path of a group; ``None`` for one that the kernel does not write.

    Example:
        >>> components("/../system.slice/a b"), components("/a/../b")
        (('..', 'system.slice', 'a b'), None)
    """
    if not path.startswith("/") or len(path) > _PATH_MAX:
        return None
    components = tuple(name for name in path.split("/") if name)
    ups = leading_ups(components)
    if "." in components or ".." in components[ups:]:
        return None
    return components


def leading_ups(group: GroupPath) -> int:
    """Return the number of leading ``..``: levels above the namespace's root."""
    for count, name in enumerate(group):
        if name != "..":
            return count
    return len(group)
