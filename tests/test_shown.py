"""How values are shown to people: units, and tables in a notebook."""

from __future__ import annotations

import os
from html.parser import HTMLParser

import pytest

import safepool
from safepool.limits import Limit, Limits, MemoryLimit, Skipped
from safepool.shown import html_table, size


class Cells(HTMLParser):
    """Reads a table back."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.unit
@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_a_size_has_a_unit(number: int, shown: str) -> None:
    assert size(number) == shown


@pytest.mark.unit
def test_a_cell_may_hold_anything() -> None:
    texts = ["<script>&amp;\"'", "\u2192\n", ""]
    shown = ["<script>&amp;\"'", "\u2192\\n", ""]  # a line's end is none of the screen's
    assert Cells(html_table("<b>", ["a", "b", "c"], [texts])).rows == [["a", "b", "c"], shown]


@pytest.mark.unit
def test_limits_are_a_table_in_a_notebook() -> None:
    """Each limit is a row, with its value, source and text; a hostile path is text."""
    limits = Limits(
        affinity=Limit(name="affinity", cpus=8.0, source="os.sched_getaffinity(0)", raw="0-7"),
        quotas=(Limit(name="cpu.max", cpus=2.5, source="/a<b/cpu.max", raw="250000 100000"),),
        memory=(
            MemoryLimit(
                name="memory.max",
                bytes=None,
                used_bytes=None,
                reclaimable_bytes=None,
                source="/a/memory.max",
                raw="max",
            ),
        ),
        skipped=(Skipped(source="OMP_NUM_THREADS", reason="no number"),),
    )

    assert Cells(limits._repr_html_()).rows == [
        ["limit", "value", "source", "text"],
        ["affinity", "8 CPUs", "os.sched_getaffinity(0)", "0-7"],
        ["cpu.max", "2.5 CPUs", "/a<b/cpu.max", "250000 100000"],
        ["memory.max", "no limit", "/a/memory.max", "max"],
        ["skipped", "", "OMP_NUM_THREADS", "no number"],
    ]


def test_every_limit_of_this_machine_is_a_row() -> None:
    limits = safepool.read_limits(environ={"SAFEPOOL_MAX_WORKERS": "3"})
    head, *rows = Cells(limits._repr_html_()).rows
    names = [limits.affinity.name, *(limit.name for limit in (*limits.quotas, *limits.memory))]

    assert {row[0] for row in rows} >= {*names, "SAFEPOOL_MAX_WORKERS"}
    assert {len(row) for row in rows} == {len(head)}


def test_a_pool_is_a_table_in_a_notebook_and_says_when_it_is_closed() -> None:
    with safepool.ProcessPool(1) as pool:
        assert repr(pool).startswith("<ProcessPool of at most 1 worker, ")
        assert len(Cells(pool._repr_html_()).rows) == 1
        worker = pool.submit(os.getpid).result()
        head, row = Cells(pool._repr_html_()).rows
        assert row[:2] == [str(worker), "idle"]
        assert len(row) == len(head)
    assert repr(pool).startswith("<closed ProcessPool of at most 1 worker, ")
    assert pool._repr_html_().startswith("<table><caption>closed ProcessPool of at most")


def test_a_broken_pool_says_so() -> None:
    with safepool.ProcessPool(1, on_worker_death="break") as pool:
        with pytest.raises(safepool.WorkerDiedError):
            pool.submit(os._exit, 1).result()
        assert repr(pool).startswith("<broken ProcessPool of at most 1 worker, ")
