"""The machine that both pools are compared on: a quota made for it, a pretended larger host.

For ``safepool demo`` with ``--cpus``, ``--pretend-host-cpus`` or ``--plot``, and for the
benchmarks. The wheel has this folder as ``safepool/cli/host``.

    groups    a control group with a CPU quota
    pretend   a larger machine, in the eyes of a child process
    plot      the picture
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from safepool.cli.demo import Setting
from safepool.limits import read_limits

from .groups import NoGroupError, quota_group
from .plot import check_plot, draw
from .pretend import PretendError, check_room, environment, seen_from_inside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from safepool.limits import Limits

__all__ = ["check_plot", "draw", "setting"]


@contextmanager
def setting(
    *, cpus: float | None, pretend_host_cpus: int | None, points: int, folder: Path
) -> Iterator[Setting]:
    """Make the quota and the pretended host of a demo, for the ``with`` block.

    Args:
        cpus: Quota to run under; ``None`` for the limits there are, or for what a pretended host
            needs.
        pretend_host_cpus: CPUs that children believe in; ``None`` for those that there are.
        points: Size of a task.
        folder: Where to compile what pretends.

    Yields:
        Surroundings of the halves. Where no group can be made, they say why.

    Raises:
        PretendError: A larger machine cannot be pretended.
        GroupLeftError: The control group could not be removed.
    """
    limits = read_limits()
    variables = {}
    if pretend_host_cpus is not None:
        check_room(limits, pretend_host_cpus, points)
        variables = environment(pretend_host_cpus, folder)
        cpus = _quota(limits, cpus)
    group = no_group = None
    with ExitStack() as stack:
        if cpus is not None:
            try:
                group = stack.enter_context(quota_group(cpus))
            except NoGroupError as error:
                no_group = error.reason
        if pretend_host_cpus is not None:
            inside = () if group is None else (group.limit,)
            limits = replace(limits, quotas=(*inside, *limits.quotas))
            limits = seen_from_inside(limits, pretend_host_cpus)
        made = Setting(limit=limits.binding, no_group=no_group, variables=variables)
        if group is not None:
            tighter = (made.limit.cpus or math.inf) < (group.limit.cpus or math.inf)
            made = replace(
                made,
                limit=made.limit if tighter else group.limit,
                members_file=group.members_file,
                throttling=group.throttling,
                empty=group.empty,
            )
        yield made


def _quota(limits: Limits, cpus: float | None) -> float | None:
    """Return the quota that a pretended host needs."""
    real = limits.affinity.cpus
    if cpus is None:
        # The CPUs that there are, unless a quota that is there already says as much.
        enough = limits.cpu_quota is not None and limits.cpu_quota <= (real or math.inf)
        return None if enough else real
    if real is not None and cpus > real:
        raise PretendError(f"--cpus {cpus:g} is more than the {real:g} real CPUs of this process")
    return cpus
