"""A picture of what the demo measured: time, threads and frozen periods of both pools.

Drawn by matplotlib without a display, in a file whose ending says the format. What was not
measured is left out and said to be.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safepool.errors import MissingExtraError, SafepoolError
from safepool.named_file import open_named

if TYPE_CHECKING:
    from pathlib import Path

    from safepool.cli.demo_report import Half, Report

__all__ = ["PlotError", "check_plot", "draw", "panels"]

_FLAGS = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class PlotError(SafepoolError):
    """The picture could not be written.

    Attributes:
        path: Where to.
        reason: Why.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot write {self.path}: {self.reason}"


def check_plot(path: Path) -> None:
    """Say before the demo runs for a minute that its picture cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        PlotError: There is no such folder, or matplotlib does not take its configuration.
    """
    try:
        import matplotlib as mpl  # noqa: F401 -- optional, so imported where it is used
    except ImportError as error:
        raise MissingExtraError("matplotlib", "pip install 'safepool[plot]'") from error
    except ValueError as error:  # of MPLBACKEND, or of its configuration file
        raise PlotError(str(path), f"matplotlib says: {error}") from error
    if not path.parent.is_dir():
        raise PlotError(str(path), "there is no such folder")


def panels(report: Report) -> dict[str, tuple[float | None, float | None]]:
    """Return what is drawn: each panel's title, and both pools' values, ``None`` if unknown."""
    standard, ours = report.standard, report.safepool
    return {
        "seconds": (standard.seconds, ours.seconds),
        "threads": (standard.threads, ours.threads),
        "frozen periods, %": (_frozen(standard), _frozen(ours)),
    }


def draw(report: Report, path: Path) -> None:
    """Write the picture.

    Args:
        report: The measurements to draw.
        path: Ends in ``.svg`` or ``.png``.

    Raises:
        PlotError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(report)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = ["standard pool", "safepool"]
    for axes, (title, values) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        bars = axes.bar(names, [value or 0.0 for value in values], color=["#b8564b", "#3c7a89"])
        labels = ["not known" if v is None else f"{v:.3g}" for v in values]
        if title == "seconds":
            halves = (report.standard, report.safepool)
            labels = [
                f"> {label}" if half.cut_off else label
                for label, half in zip(labels, halves, strict=True)
            ]
        axes.bar_label(bars, labels)
        axes.set_title(title)
        axes.margins(y=0.15)
        # Where nothing was measured but 0, the axis would be half a millionth around it.
        axes.set_ylim(0, None if any(values) else 1)
    cut = f", cut off at {report.bound_s:g} s" if report.standard.cut_off else ""
    figure.suptitle(f"{report.tasks} tasks on {_where(report)}{cut}")
    try:
        with os.fdopen(open_named(os.path.abspath(path), _FLAGS), "wb") as file:
            os.ftruncate(file.fileno(), 0)
            figure.savefig(file, format=path.suffix[1:].lower())
    except OSError as error:
        raise PlotError(str(path), error.strerror or str(error)) from error


def _where(report: Report) -> str:
    if report.pretend_host_cpus is not None:
        return report.where
    return f"{report.cpus:g} of {report.machine_cpus} CPUs"


def _frozen(half: Half) -> float | None:
    throttling = half.throttling
    if throttling is None or throttling.periods <= 0:
        return None
    return 100 * throttling.throttled_periods / throttling.periods
