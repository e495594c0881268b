"""Floor 1, limits on macOS: the number of CPUs and the environment. It decides nothing.

Not covered:
    * Quality-of-service classes and the slower cores: the scheduler moves freely between all.
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

assert sys.platform == "darwin"

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
    # The system offers no mask to restrict a process with: all CPUs that are online.
    cpus = os.cpu_count()
    return Limit(
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
        return limits_without_groups(_affinity, self._root, environ)
