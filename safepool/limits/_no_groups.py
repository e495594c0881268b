"""Floor 1, limits on systems without control groups: number of CPUs and environment.

Shared by the modules of platforms, which add the calls of their system.

Not covered:
    * Captured machines: their trees are Linux's, and are read on Linux.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from safepool.limits._types import Limit, Limits, Skipped
from safepool.limits.environment import read_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["limits_without_groups"]


def limits_without_groups(
    ask_affinity: Callable[[], Limit],
    root: str | os.PathLike[str],
    environ: Mapping[str, str] | None,
) -> Limits:
    """Put together what there is.

    Args:
        ask_affinity: Asks the system for the number of CPUs.
        root: ``"/"``; any other machine is noted as skipped.
        environ: The environment; ``None`` is this process's.

    Returns:
        Affinity and the environment's bounds; everything else is empty.
    """
    if os.fspath(root) != "/":
        name = os.fspath(root)
        note = Skipped(source=name, reason="captured machines are read on Linux only")
        nothing = Limit(name="affinity", cpus=None, source=name, raw="")
        return Limits(affinity=nothing, quotas=(), skipped=(note,))
    bounds, exact, skipped = read_environment(
        os.environ if environ is None else environ, sys._xoptions
    )
    return Limits(
        affinity=ask_affinity(), quotas=(), bounds=bounds, exact_workers=exact, skipped=skipped
    )
