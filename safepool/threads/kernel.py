"""What the kernel says of this process's threads and libraries: their names, no more.

Empty elsewhere than on Linux.
"""

from __future__ import annotations

import os

__all__ = ["loaded_files", "native_threads"]


def native_threads() -> list[tuple[int, str]]:
    """Return number and name of every thread that the system counts in this process.

    Source: proc(5), ``/proc/pid/task/tid/comm``. Empty elsewhere than on Linux.
    """
    found = []
    try:
        tasks = os.listdir("/proc/self/task")
    except OSError:
        return []
    for task in tasks:
        try:
            with open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
                found.append((int(task), file.read().strip()))
        except OSError:
            pass  # it has ended
    return found


def loaded_files() -> list[str]:
    """Return the files that are mapped into this process, each once, in the map's order.

    Source: proc_pid_maps(5), last field. Empty elsewhere than on Linux.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count(" /"))
    return list(dict.fromkeys(path for path in paths if path.startswith("/")))
