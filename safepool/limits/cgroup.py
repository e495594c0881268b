r"""Floor 1, limits: which control-group directories hold this process, innermost first.

The module finds directories and reads no limit. Own group (``/proc/thread-self/cgroup``) x mounts
(``/proc/self/mountinfo``) x every ancestor:

    4:cpu,cpuacct:/kubepods/pod1/c1   the group, relative to the namespace's root
    44 31 0:39 /kubepods/pod1 /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct
               what the mount shows of that same tree, and where
    -> /sys/fs/cgroup/cpu,cpuacct/c1, /sys/fs/cgroup/cpu,cpuacct

Sources: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/cgroups.rst;
cgroups(7) and cgroup_namespaces(7).

Not covered:
    * Ancestors that no mount shows: the kernel reports nothing about them.
    * Version 1 mounted with ``noprefix`` (file names without ``cpu.``).
    * Version 1 emulated by a file system other than the kernel's.
    * A tree with more directories than the search for a group without a name reads: the limits of
      the mount point count.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from safepool.limits.mounts import GROUP_TYPES, Mount, covering, is_inside
from safepool.limits.place import OWN_GROUP_FILES, GroupPath, Place, components, leading_ups
from safepool.procfs import parse_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.limits.files import Machine


class Level(NamedTuple):
    """A control group that contains this process, directly or in a group below.

    Attributes:
        directories: One directory for every mount that shows the group.
    """

    version: int
    directories: tuple[str, ...]


# Where to look if there is no usable mountinfo: systemd's and docker's names, of which the
# first that exists counts. Source: systemd, docs/CGROUP_DELEGATION.md, "Three Different
# Tree Setups".
CONVENTIONAL_V2 = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
CONVENTIONAL_V1: dict[str, tuple[str, ...]] = {
    "cpu": (
        "/sys/fs/cgroup/cpu",
        "/sys/fs/cgroup/cpu,cpuacct",
        "/sys/fs/cgroup/cpuacct,cpu",
    ),
    "memory": ("/sys/fs/cgroup/memory",),
    "pids": ("/sys/fs/cgroup/pids",),
}

# A desktop has some hundred groups, a full Kubernetes node about 2,000; each costs about 30
# microseconds. The caller waits no longer than this, on any machine.
SCAN_DIRECTORIES = 4096
SCAN_SECONDS = 0.1

# Files that list threads. cgroup.procs is last: a threaded group refuses to show it, and it
# knows processes only. Sources: cgroup-v1/cgroups.rst and cgroup-v2.rst, "Core Interface Files".
_MEMBERS = {1: ("tasks",), 2: ("cgroup.threads", "cgroup.procs")}

# cgroup-v2.rst, "Processes": appended to the path of a group that was removed.
_DELETED = " (deleted)"


def find_levels(machine: Machine, place: Place, controller: str) -> tuple[Level, ...]:
    """Find every directory that can hold a limit of one controller for this process.

    Returns:
        This process's group first, then its ancestors up to the mount point. Empty if no mount
        shows the process's groups.
    """
    if place.mounts is None:
        return _conventional_levels(machine, place.own, controller)
    version = _version(place, controller)
    mounts = [mount for mount in place.mounts if _holds(mount, version, controller)]
    own = place.own.get(controller if version == 1 else "")
    seen: dict[GroupPath, list[str]] = {}
    if own is not None:
        own = _undeleted(machine, mounts, own) if version == 2 else own
        _show_ancestors(seen, mounts, own)
        if seen and len({_depth(group) for group in seen}) <= _depth(own) - min(map(_depth, seen)):
            _show_hidden(machine, seen, mounts, version)
        if mounts and not seen:
            machine.note(
                OWN_GROUP_FILES[-1],
                f"no mount shows the group /{'/'.join(own)}: the limits of the mount points count",
            )
    # The process's own place is unknown: the mount of a container's runtime is most likely the
    # container's own group, and a limit too small is better than one too big.
    if not seen:
        for mount in mounts:
            seen.setdefault(components(mount.root) or (), []).append(mount.point)
    # Hosts of containers have thousands of mounts; few lie below a control group's.
    below = [m for m in place.mounts if any(is_inside(m.point, other.point) for other in mounts)]
    levels = []
    for group in sorted(seen, key=_depth, reverse=True):
        directories = tuple(path for path in seen[group] if _leads_to(below, mounts, path, group))
        if directories:
            levels.append(Level(version=version, directories=directories))
    return tuple(levels)


def _version(place: Place, controller: str) -> int:
    """Return the version of the hierarchy that has the controller; only one has it at a time."""
    if controller in place.own:
        return 1
    if "" in place.own:
        return 2
    mounted = any(_holds(mount, 1, controller) for mount in place.mounts or ())
    return 1 if mounted else 2


def _holds(mount: Mount, version: int, controller: str) -> bool:
    if mount.type != GROUP_TYPES[version - 1]:
        return False
    # Whole words: cpuset, cpuacct and name=cpu are other controllers.
    return version == 2 or controller in mount.options.split(",")


def _shows(mount: Mount, group: GroupPath) -> bool:
    """Return whether a mount shows a group, by whole components of the path."""
    root = components(mount.root)
    return (
        root is not None and leading_ups(root) == leading_ups(group) and group[: len(root)] == root
    )


def _show_ancestors(seen: dict[GroupPath, list[str]], mounts: list[Mount], own: GroupPath) -> None:
    for mount in mounts:
        root = components(mount.root)
        if root is None:
            continue
        if _shows(mount, own):
            for length in range(len(own), len(root) - 1, -1):
                path = "/".join((mount.point.rstrip("/"), *own[len(root) : length]))
                seen.setdefault(own[:length], []).append(path or "/")
        elif leading_ups(root) > leading_ups(own) and leading_ups(root) == len(root):
            # Above the namespace's root: certainly an ancestor, but the names in between are
            # unknown.
            seen.setdefault(root, []).append(mount.point)


def _show_hidden(
    machine: Machine, seen: dict[GroupPath, list[str]], mounts: list[Mount], version: int
) -> None:
    """Add the nameless groups between this process and a mount above its namespace.

    Needed if `_show_ancestors` left a gap: a mount's root is several levels above this process,
    and some of the levels between were not shown.
    """
    shown = {_depth(group) for group in seen}
    outermost = min(seen, key=_depth)
    for mount in mounts:
        if components(mount.root) != outermost:
            continue
        found = _find_own_directory(machine, mount.point, version)
        if found is None:
            continue
        below = found[len(mount.point.rstrip("/")) :].strip("/").split("/")
        for length in range(1, len(below) + 1):
            # No name that the kernel uses: the part below the mount is relative to it.
            group = (*outermost, *below[:length])
            if _depth(group) not in shown:
                path = "/".join((mount.point.rstrip("/"), *below[:length]))
                seen.setdefault(group, []).append(path)
        return


def _find_own_directory(machine: Machine, point: str, version: int) -> str | None:
    """Look below a mount point for the group that lists this thread.

    Needed in one situation: a separate cgroup namespace over the old mounts (``unshare -C``
    without a remount; some sandboxes). The kernel then calls the own group ``/`` and the mount's
    root ``/..``, and gives no name for the groups between.

    Args:
        machine: The machine to read. On a captured machine, the thread is the process whose
            ``/proc/self/status`` was captured.
        point: The mount point. The search leaves it out, because it is above our namespace.
        version: Version of the control groups, 1 or 2.

    Returns:
        The directory, or ``None``, with a note, if the search ended without it.
    """
    own = _own_number(machine)
    if own is None:
        return None
    waiting = deque(machine.subdirectories(point))
    deadline = time.monotonic() + SCAN_SECONDS
    for _ in range(SCAN_DIRECTORIES):
        if not waiting or time.monotonic() > deadline:
            break
        directory = waiting.popleft()
        if _lists(machine, directory, version, own):
            return directory
        waiting.extend(machine.subdirectories(directory))
    machine.note(
        point,
        "this process's own group is below it, but the kernel does not show its name (a cgroup "
        "namespace without a remount), and a search has not found it",
    )
    return None


def _lists(machine: Machine, directory: str, version: int, own: str) -> bool:
    for name in _MEMBERS[version]:
        before = len(machine.skipped)
        text = machine.read(f"{directory}/{name}")
        # Files of other groups are no limits of this process: a refused access is not reported.
        del machine.skipped[before:]
        if text:
            return own in text.split()
    return False


def _own_number(machine: Machine) -> str | None:
    if machine.is_this_one:
        return str(threading.get_native_id())
    return parse_fields(machine.read("/proc/self/status") or "").get("Pid")


def _undeleted(machine: Machine, mounts: list[Mount], own: GroupPath) -> GroupPath:
    """Remove the kernel's " (deleted)", unless it is part of the group's name."""
    if not own or not own[-1].endswith(_DELETED):
        return own
    for mount in mounts:
        if _shows(mount, own):
            below = own[len(components(mount.root) or ()) :]
            if machine.is_directory("/".join((mount.point.rstrip("/"), *below))):
                return own
    return (*own[:-1], own[-1].removesuffix(_DELETED))


def _leads_to(candidates: list[Mount], mounts: list[Mount], path: str, group: GroupPath) -> bool:
    """Return whether no other mount hides a directory below a mount point."""
    mount = covering(candidates, path)
    if mount is None or mount not in mounts:
        return False
    root = components(mount.root) or ()
    below = path[len(mount.point.rstrip("/")) :].strip("/")
    return (*root, *(below.split("/") if below else ())) == group


def _conventional_levels(
    machine: Machine, own: Mapping[str, GroupPath], controller: str
) -> tuple[Level, ...]:
    """Find the directories by their usual names, without a list of mounts."""
    # If the process's own group is unknown, either version is possible.
    tries: list[tuple[int, tuple[str, ...], GroupPath]] = []
    if controller not in own:
        tries.append((2, CONVENTIONAL_V2, own.get("", ())))
    if controller in own or "" not in own:
        tries.append((1, CONVENTIONAL_V1[controller], own.get(controller, ())))
    levels: list[Level] = []
    for version, points, group in tries:
        point = next((point for point in points if machine.is_directory(point)), None)
        if point is None:
            continue
        # A path that leaves the namespace cannot be followed by name.
        known = () if leading_ups(group) else group
        levels.extend(
            Level(version=version, directories=("/".join((point, *known[:length])),))
            for length in range(len(known), -1, -1)
        )
    return tuple(levels)


def _depth(group: GroupPath) -> int:
    return len(group) - 2 * leading_ups(group)
