"""Floor 1, limits on Windows: the number of CPUs and the environment. It decides nothing.

Not covered:
    * Job objects with a CPU rate, and masks over several processor groups.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from safepool.limits._no_groups import limits_without_groups
from safepool.limits._types import Limit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.limits._types import Limits, OutOfMemoryCount, Throttling

assert sys.platform == "win32"

__all__ = ["QuotaWatch", "read_cpu_limits", "read_limits", "read_oom_counts", "read_throttling"]


def read_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read every limit; see `safepool.limits.read_limits`."""
    return limits_without_groups(_affinity, root, environ)


def read_cpu_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read the limits on CPU time only; here there are no others."""
    return limits_without_groups(_affinity, root, environ)


def read_throttling(root: str | os.PathLike[str] = "/") -> Throttling | None:  # noqa: ARG001
    """Return ``None``: without control groups no process is throttled."""
    return None


def read_oom_counts(
    root: str | os.PathLike[str] = "/",  # noqa: ARG001
) -> tuple[OutOfMemoryCount, ...]:
    """Return nothing: without control groups there are no counts."""
    return ()


def _affinity() -> Limit:
    cpus = os.cpu_count()
    mask = _restricted_mask()
    if mask is None:
        return Limit(
            name="affinity",
            cpus=None if cpus is None else float(cpus),
            source="os.cpu_count()",
            raw=str(cpus),
        )
    return Limit(
        name="affinity",
        cpus=float(mask.bit_count()),
        source="GetProcessAffinityMask",
        raw=f"{mask:#x}",
    )


def _restricted_mask() -> int | None:
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
    if not told or not process.value or process.value == system.value:
        return None
    return process.value


class QuotaWatch:
    """Reads the limits on CPU time again; see `safepool.limits.QuotaWatch`."""

    __slots__ = ("_root",)

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = root

    def read(self, *, environ: Mapping[str, str] | None = None) -> Limits:
        """Read the limits as they are now."""
        return limits_without_groups(_affinity, self._root, environ)
