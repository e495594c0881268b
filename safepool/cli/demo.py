"""Floor 7: ``safepool demo``: one batch of SciPy and NumPy work in both pools, compared.

First ``concurrent.futures.ProcessPoolExecutor()`` as people write it, then
``safepool.ProcessPool()``: the same tasks, each half in a fresh child process, under this
process's own limits or (``--cpus``) under a real quota. It computes none of the numbers that
it prints, and changes nothing of the environment that the halves run in, unless both are to
believe in a larger machine (``--pretend-host-cpus``).

    demo_options    what can be asked for
    demo_tasks      the work
    demo_half       the child process: one pool, the whole batch
    demo_measure    runs a child, counts its threads from outside, cuts it off
    demo_processes  counting and ending other processes
    demo_group      the control group with the quota
    demo_pretend    the larger machine, with --pretend-host-cpus
    demo_report     the table, the sentence below it, and JSON
    demo_plot       the picture, with --plot

``--json`` prints one object; keys are added, and none is renamed or removed within a ``schema``:

    schema                               1
    tasks, points, cpus_asked, bound_s   the options; cpus_asked is null without --cpus
    versions                             of Python, numpy and scipy, by name
    pretend_host_cpus                    CPUs that both halves believed in, or null: the machine's
    machine_cpus                         CPUs of the machine, whoever may use them
    limit                                what binds: name, cpus, source, raw
    no_group                             why --cpus was left out, or null
    standard, safepool                   the two halves, each with
        pool, start_method               how it was made; how multiprocessing starts here
        workers, threads                 most at once; threads is null if not counted
        seconds, tasks_done, cut_off     seconds is null if it failed, the bound if cut off
        error                            what it said as it failed, or null
        throttling                       periods, throttled_periods, throttled_us, source; or
                                         null without a quota
    ratio, ratio_is_lower_bound          seconds of standard by seconds of safepool, or null
    oversubscribed                       standard had more threads than CPUs, or null
    nothing_to_win                       not oversubscribed, or the ratio is below 1.1
    comparison                           compared, equal, largest_difference, rtol, atol
    failed                               safepool's half did not end, or the results differ
    verdict                              the sentence
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safepool.cli.colour import paint_for
from safepool.cli.demo_group import NoGroupError, QuotaGroup, quota_group
from safepool.cli.demo_measure import POOLS, measure
from safepool.cli.demo_plot import check_plot, draw
from safepool.cli.demo_pretend import PretendError, check_room, environment, seen_from_inside
from safepool.cli.demo_report import ATOL, RTOL, Comparison, Conditions, Report, table_row
from safepool.errors import MissingExtraError
from safepool.limits import read_limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from safepool.cli.demo_options import Options
    from safepool.limits import Limit

__all__ = ["compare", "run"]

_NEEDED = ("numpy", "scipy")
_REMEDY = "pip install 'safepool[demo]'"
_PREFIX = "safepool-demo-"
# Python's fork server makes a socket in a folder of its own in the demo's, and no socket's path
# has more than 107 bytes (unix(7)). With a longer one it uses /tmp, and when it is killed it
# leaves its folder there.
_LONGEST = 107 - len(f"/{_PREFIX}12345678/pymp-12345678/sock-123456789012")


def run(options: Options, *, as_json: bool, plot: Path | None = None) -> int:
    """Run both halves, print what was measured, and leave nothing behind.

    Args:
        options: The parsed command line.
        as_json: Print one JSON object in place of the table.
        plot: Where to draw a picture.

    Returns:
        Exit code: 0, or 1 if the comparison failed.

    Raises:
        MissingExtraError: NumPy or SciPy is not installed, or matplotlib for a picture.
        PlotError: The picture cannot be written.
        PretendError: A larger machine cannot be pretended.
        GroupLeftError: The control group could not be removed.
    """
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, _REMEDY)
    if plot is not None:
        check_plot(plot)
    with ExitStack() as stack:
        stack.enter_context(_endings_clean_up())
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_short_folder())
        folder = Path(stack.enter_context(made))
        variables = _pretended(options, folder)
        group, no_group = _enter_group(stack, _quota(options))
        conditions = Conditions(
            options=options,
            limit=_binding(group, options.pretend_host_cpus),
            machine_cpus=os.cpu_count() or 1,
            no_group=no_group,
            versions=_versions(),
        )
        report = _run_halves(
            conditions, group=group, variables=variables, folder=folder, quiet=as_json
        )
    if as_json:
        print(report.as_json(), flush=True)
    else:
        paint = paint_for(sys.stdout, os.environ)
        print(*report.closing_lines(paint), sep="\n", flush=True)
    if plot is not None:
        draw(report, plot)
    return 1 if report.failed else 0


def _run_halves(
    conditions: Conditions,
    *,
    group: QuotaGroup | None,
    variables: Mapping[str, str],
    folder: Path,
    quiet: bool,
) -> Report:
    """Run one half after the other; each row is printed as soon as it is known."""
    options = conditions.options
    halves = {}
    if not quiet:
        print(*conditions.lines(), sep="\n", flush=True)
    for name in POOLS:
        halves[name] = measure(
            name,
            tasks=options.tasks,
            points=options.points,
            bound_s=options.bound_s,
            results_file=folder / f"{name}.npy",
            group=group,
            variables=variables,
        )
        if not quiet and name == "standard":
            print(table_row(halves[name], options.tasks, None, bound=False), flush=True)
    report = Report(
        conditions=conditions,
        **halves,
        comparison=compare(folder / "standard.npy", folder / "safepool.npy"),
    )
    if not quiet:
        print(report.row(report.safepool, paint_for(sys.stdout, os.environ)), flush=True)
    return report


def compare(standard: Path, safepool: Path) -> Comparison:
    """Compare the results of the tasks that both halves had done.

    Args:
        standard: The file that one half made, if it got so far.
        safepool: The file that the other half made, if it got so far.
    """
    nothing = Comparison(compared=0, equal=True, largest_difference=None)
    if not (standard.exists() and safepool.exists()):
        return nothing
    # Optional, so imported where it is used; and after the halves, which it cannot disturb.
    import numpy as np  # noqa: PLC0415

    ours, theirs = np.load(safepool), np.load(standard)
    done = (ours[:, 0] == 1.0) & (theirs[:, 0] == 1.0)
    if not done.any():
        return nothing
    ours, theirs = ours[done], theirs[done]
    return Comparison(
        compared=int(done.sum()),
        equal=bool(np.allclose(ours, theirs, rtol=RTOL, atol=ATOL)),
        largest_difference=float(np.abs(ours - theirs).max()),
    )


def _short_folder() -> str | None:
    """Return where the demo's own folder is made; ``None`` is where the user wants it."""
    too_long = len(os.fsencode(tempfile.gettempdir())) > _LONGEST
    return "/tmp" if too_long and os.access("/tmp", os.W_OK) else None


def _pretended(options: Options, folder: Path) -> dict[str, str]:
    """Return what makes a child believe in another machine; nothing if it is to see this one."""
    cpus = options.pretend_host_cpus
    if cpus is None:
        return {}
    check_room(read_limits(), cpus, options.points)
    return environment(cpus, folder)


def _quota(options: Options) -> float | None:
    """Return the quota to make: what was asked for, or what a pretended host needs."""
    if options.pretend_host_cpus is None:
        return options.cpus
    limits = read_limits()
    real = limits.affinity.cpus
    if options.cpus is None:
        # The CPUs that there are, unless a quota that is there already says as much.
        enough = limits.cpu_quota is not None and limits.cpu_quota <= (real or math.inf)
        return None if enough else real
    if real is not None and options.cpus > real:
        raise PretendError(
            f"--cpus {options.cpus:g} is more than the {real:g} CPUs that there really are"
        )
    return options.cpus


def _enter_group(stack: ExitStack, cpus: float | None) -> tuple[QuotaGroup | None, str | None]:
    """Make the group that was asked for, or say why there is none."""
    if cpus is None:
        return None, None
    try:
        return stack.enter_context(quota_group(cpus)), None
    except NoGroupError as error:
        return None, error.reason


def _binding(group: QuotaGroup | None, pretended: int | None) -> Limit:
    """Return what binds inside the group: its own quota, or something tighter outside it."""
    limits = read_limits()
    if pretended is not None:
        inside = () if group is None else (group.limit,)
        limits = seen_from_inside(replace(limits, quotas=(*inside, *limits.quotas)), pretended)
    outside = limits.binding
    if group is None or (outside.cpus or math.inf) < (group.limit.cpus or math.inf):
        return outside
    return group.limit


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _NEEDED}
    return {"Python": platform.python_version(), **packages}


@contextmanager
def _endings_clean_up() -> Iterator[None]:
    """Let ``kill`` and a closed terminal unwind as Ctrl-C does, so that the group goes too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup has them ignored, and a program that runs us may handle them itself: left alone.
    ours = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, _frame: FrameType | None) -> None:
    # As a shell reports a program that a signal has ended.
    raise SystemExit(128 + number)
