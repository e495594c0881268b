"""Floor 1, limits on systems without control groups: number of CPUs and environment.

macOS has no mask to restrict a process with: all CPUs that are online count. Windows has one
(``_windows``).

Not covered:
    * Captured machines: their trees are Linux's, and are read on Linux.
    * macOS: quality-of-service classes and slower cores. The scheduler moves freely between all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from safepool.limits._types import Limit, Limits, OutOfMemoryCount, Skipped, Throttling
from safepool.limits.environment import read_environment

if sys.platform == "win32":
    from safepool.limits._windows import restricted_affinity
else:

    def restricted_affinity() -> Limit | None:
        """Return ``None``: the system offers no mask."""
        return None


def read_limits(
    root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
) -> Limits:
    """Read affinity and the environment's bounds; see `safepool.limits.read_limits`."""
    if os.fspath(root) != "/":
        name = os.fspath(root)
        note = Skipped(source=name, reason="captured machines are read on Linux only")
        nothing = Limit(name="affinity", cpus=None, source=name, raw="")
        return Limits(affinity=nothing, quotas=(), skipped=(note,))
    bounds, exact, skipped = read_environment(
        os.environ if environ is None else environ, sys._xoptions
    )
    return Limits(
        affinity=_affinity(), quotas=(), bounds=bounds, exact_workers=exact, skipped=skipped
    )


# This system has no other limits.
read_cpu_limits = read_limits


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
    return restricted_affinity() or Limit(
        name="affinity",
        cpus=None if cpus is None else float(cpus),
        source="os.cpu_count()",
        raw=str(cpus),
    )


class QuotaWatch:
    """Reads the limits on CPU time again; see `safepool.limits.QuotaWatch`."""

    __slots__ = ("_root",)

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = root

    def read(self, *, environ: Mapping[str, str] | None = None) -> Limits:
        """Read the limits as they are now."""
        return read_limits(self._root, environ=environ)
