"""The demo's picture: what is in it, and that it is said early when it cannot be drawn."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from safepool.cli import demo
from safepool.cli.demo_report import Half, Report
from safepool.limits import Limit, Throttling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("matplotlib")

plot = demo.host().plot
PlotError, check_plot, draw, panels = plot.PlotError, plot.check_plot, plot.draw, plot.panels


@pytest.fixture(autouse=True)
def _fonts_are_closed() -> Iterator[None]:
    """Fonts that were read are kept open for the next picture."""
    yield
    from matplotlib import font_manager

    font_manager._get_font.cache_clear()
    gc.collect()


def half(
    pool: str, threads: int | None, seconds: float | None, throttling: Throttling | None
) -> Half:
    return Half(
        pool=pool,
        start_method="fork",
        workers=4,
        threads=threads,
        seconds=seconds,
        tasks_done=192,
        cut_off=pool != "safepool",
        throttling=throttling,
    )


FROZEN = Throttling(periods=200, throttled_periods=150, throttled_us=1, source="cpu.stat")
REPORT = Report(
    tasks=192,
    points=150,
    bound_s=20.0,
    versions={},
    machine_cpus=48,
    limit=Limit(name="cpu.max", cpus=2.5, source="cpu.max", raw="250000 100000"),
    standard=half("standard", 2304, 20.0, FROZEN),
    safepool=half("safepool", None, None, None),
)


def test_a_panel_holds_what_was_measured_and_nothing_for_what_was_not() -> None:
    assert panels(REPORT) == {
        "seconds": (20.0, None),
        "threads": (2304, None),
        "frozen periods, %": (75.0, None),
    }


@pytest.mark.parametrize("ending", [".svg", ".PNG"])
def test_a_picture_is_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{ending}"

    draw(REPORT, path)

    magic = {".svg": b"<?xml", ".PNG": b"\x89PNG"}[ending]
    assert path.read_bytes().startswith(magic)


def test_an_axis_begins_at_zero_also_where_nothing_was_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    never = Throttling(periods=200, throttled_periods=0, throttled_us=0, source="cpu.stat")
    halves = [half(pool, 4, 2.0, never) for pool in ("standard", "safepool")]

    draw(replace(REPORT, standard=halves[0], safepool=halves[1]), tmp_path / "x.svg")

    limits = {axes.get_title(): axes.get_ylim() for axes in drawn[0].axes}
    assert limits.pop("frozen periods, %") == (0, 1)
    for bottom, top in limits.values():
        assert bottom == 0
        assert top >= 2


def test_a_folder_that_is_not_there_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="there is no such folder"):
        check_plot(tmp_path / "none" / "x.svg")


def test_a_picture_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "x.svg").mkdir()

    with pytest.raises(PlotError, match=r"cannot write .*x\.svg: Is a directory"):
        draw(REPORT, tmp_path / "x.svg")


def test_what_matplotlib_does_not_take_is_one_line(tmp_path: Path) -> None:
    environ = {**os.environ, "MPLBACKEND": "nonsense"}
    command = [sys.executable, "-m", "safepool", "demo", "--plot", str(tmp_path / "demo.svg")]

    ended = subprocess.run(
        command, capture_output=True, text=True, env=environ, timeout=60, check=False
    )

    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert "matplotlib says: " in ended.stderr
