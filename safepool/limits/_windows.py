"""Floor 1, limits on Windows: the CPUs that a process is restricted to.

The module decides nothing.

Not covered:
    * Job objects with a CPU rate, and masks over several processor groups.
"""

from __future__ import annotations

import sys

from safepool.limits._types import Limit

assert sys.platform == "win32"


def restricted_affinity() -> Limit | None:
    """Ask for this process's mask; ``None`` if it is not restricted or unknown.

    Source:
        Microsoft, Win32, winbase.h, GetProcessAffinityMask: both masks are of one processor
        group (up to 64 CPUs) and are 0 for a process whose threads are in several.
    """
    import ctypes  # noqa: PLC0415 -- heavy, and only Windows needs it

    process, system = ctypes.c_size_t(), ctypes.c_size_t()
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    told = kernel32.GetProcessAffinityMask(
        ctypes.c_void_p(kernel32.GetCurrentProcess()),
        ctypes.byref(process),
        ctypes.byref(system),
    )
    mask = process.value
    if not told or not mask or mask == system.value:
        return None
    return Limit(
        name="affinity",
        cpus=float(mask.bit_count()),
        source="GetProcessAffinityMask",
        raw=f"{mask:#x}",
    )
