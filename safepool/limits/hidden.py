"""Floor 1, limits: search for the directory of this thread's own control group.

One situation needs the search: a separate cgroup namespace over the old mounts (``unshare -C``
without a remount; some sandboxes). The kernel then calls the own group ``/`` and the mount's root
``/..``, and gives no name for the groups between.

Not covered:
    * A tree with more directories than the search reads: the limits of the mount point count.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from safepool.procfs import parse_fields

if TYPE_CHECKING:
    from safepool.limits.files import Machine

# A desktop has some hundred groups, a full Kubernetes node about 2,000; each costs about 30
# microseconds. The caller waits no longer than this, on any machine.
SCAN_DIRECTORIES = 4096
SCAN_SECONDS = 0.1

# Files that list threads. cgroup.procs is last: a threaded group refuses to show it, and it
# knows processes only. Sources: cgroup-v1/cgroups.rst and cgroup-v2.rst, "Core Interface Files".
_MEMBERS = {1: ("tasks",), 2: ("cgroup.threads", "cgroup.procs")}


def find_own_directory(machine: Machine, point: str, version: int) -> str | None:
    """Look below a mount point for the group that lists this thread.

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
