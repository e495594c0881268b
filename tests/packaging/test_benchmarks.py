"""One command knows all benchmarks, keeps what they find, and writes it where people read it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks"
# What the others import, and what writes the README.
PARTS = {
    "__main__", "asyncio_service", "contenders", "figures", "picture", "readme", "tasks",
}  # fmt: skip
README = runpy.run_path(str(FOLDER / "readme.py"))
AS_SVG = runpy.run_path(str(FOLDER / "picture.py"))["as_svg"]
# Bytes: GitHub shows larger ones, too, but a README of them is slow.
LARGEST_PICTURE = 60_000


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_file_is_listed_with_its_question() -> None:
    listed = [line.split(maxsplit=1) for line in ask("--list").stdout.splitlines()]

    assert {name for name, _ in listed} == {file.stem for file in FOLDER.glob("*.py")} - PARTS
    assert all(question.endswith("?") for _, question in listed)
    for name, _ in listed:
        assert f"`{name}`" in (FOLDER / "README.md").read_text(), "says how to read it"


def test_a_name_that_is_none_is_told() -> None:
    done = ask("latencies")

    assert done.returncode == 2
    assert "no benchmark is called latencies: see --list" in done.stderr


def test_figures_are_kept_with_what_they_come_from(tmp_path: Path) -> None:
    done = ask("limits", "--quick", "--json", "--plot", "--into", str(tmp_path))

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "limits.json").read_text())
    check(found)
    assert found["quick"]
    assert (tmp_path / "limits.svg").read_text() == AS_SVG(found)


def test_modules_are_compiled_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text("value = 1")
    (tmp_path / "other.py").write_text("value = ")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    runpy.run_path(str(FOLDER / "__main__.py"))["compile_modules"](tmp_path)

    assert [file.name.split(".")[0] for file in tmp_path.glob("*/*.pyc")] == ["module"]
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ


def test_results_are_whole_runs() -> None:
    for file in FOLDER.glob("results/*.json"):
        kept = json.loads(file.read_text())
        check(kept)
        assert not kept["quick"]
        assert kept["benchmark"] == file.stem


def test_pictures_are_those_of_the_results() -> None:
    for file in FOLDER.glob("results/*.svg"):
        assert file.read_text() == AS_SVG(json.loads(file.with_suffix(".json").read_text()))
        assert file.stat().st_size < LARGEST_PICTURE


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_readme_has_the_figures_of_the_results(path: str) -> None:
    """What differs was typed by hand, or not written: ``python -m benchmarks --json --plot``."""
    text = (ROOT / path).read_text()
    for name, block in README["blocks"](FOLDER / "results")[path].items():
        assert README["written"](text, name, block) == text


def cell(median: Any, ratio: float | None = None) -> dict[str, Any]:
    return {"median": median, "low": 0.5, "high": median, "ratio": ratio}


RESULT: dict[str, Any] = {
    "benchmark": "latency",
    "question": "How long?",
    "command": "python benchmarks/latency.py",
    "date": "2026-01-02",
    "took_s": 61.5,
    "ended_after_s": None,
    "machine": {"python": "3.14.0", "host_cpus": 2, "load_before": 0.1},
    "versions": {"safepool": "1", "loky": "3.7"},
    "tables": [
        {
            "title": "submit(f, n).result(), a function of a module",
            "base": "safepool",
            "columns": ["us", "a|b"],
            "rounds": {"loky": 9, "safepool": 9},
            "rows": {
                "loky": [cell(1234.5, 2.0), cell("not done after 9 s")],
                "safepool": [cell(617.25, 1.0), cell(None)],
            },
        },
        {"title": "then", "columns": ["it"], "outcomes": {"loky": ["hangs"]}},
    ],
}
WRITTEN = """\
### latency

How long?

`python benchmarks/latency.py`, 2026-01-02, 62 s, Python 3.14.0, 2 CPUs, load before 0.1; \
safepool 1, loky 3.7

![How long?](results/latency.svg)

**submit(f, n).result(), a function of a module (9 rounds)**

|  | us | a\\|b |
|---|---|---|
| safepool | 1.00 x: 617 (0.5 to 617) | - |
| loky | 2.00 x: 1,234 (0.5 to 1,234) | not done after 9 s |

**then**

|  | it |
|---|---|
| loky | hangs |
"""


def test_results_are_written_for_a_reader(tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(json.dumps(RESULT))
    (tmp_path / "latency.svg").touch()
    screen = {"title": "safepool demo", "screen": "192 tasks\n\npool  seconds\nours  1.1\n\nequal"}
    (tmp_path / "demo.json").write_text(json.dumps({**RESULT, "tables": [screen]}))

    found = README["blocks"](tmp_path)

    assert found["benchmarks/README.md"]["results"].endswith(WRITTEN)
    demo = "```console\n$ safepool demo\n...\npool  seconds\nours  1.1\n```\n"
    assert found["README.md"]["demo-output"] == demo
    row = found["README.md"]["figures"].splitlines()[-1]
    assert row.startswith("| [there and back](benchmarks/README.md#latency) | 617 | - | - | 2 x |")


def test_a_block_is_written_again_and_again() -> None:
    around = "before\n<!-- results: begin -->\n", "<!-- results: end -->\nafter\n"

    once = README["written"]("old\n".join(around), "results", "new\n")

    assert once == "new\n".join(around)
    assert README["written"](once, "results", "new\n") == once


def test_a_picture_is_the_same_each_time_and_well_formed() -> None:
    drawn = AS_SVG(RESULT)

    assert drawn == AS_SVG(json.loads(json.dumps(RESULT)))
    shown = [text.text for text in ET.fromstring(drawn).iter() if text.tag.endswith("text")]
    assert shown == [
        "How long?",
        "submit(f, n).result(), a function of a module: us",
        *("safepool", "617 (1.00 x)", "loky", "1,234 (2.00 x)"),
    ]
    assert AS_SVG({**RESULT, "tables": RESULT["tables"][1:]}) is None


# A contender that returns, one that hangs, one that raises, and one that is slower.
TURNS = """
import math, time
import figures
figures.MORE_S = 0.0

def hang():
    try:
        time.sleep(600)
    except Exception:  # a pool's
        print("swallowed")

def fail():
    raise ValueError("not today")

turns = dict(safepool=lambda: [2.0, 1.0], hangs=hang, fails=fail, slow=lambda: [4.0, 1.0])
share_s = 0.0 if {once} else 60.0
figures.compare("?", ["s", "n"], turns, 3, turn_s=0.05, share_s=share_s)
"""


@pytest.mark.parametrize("once", [False, True])
def test_contenders_take_turns_as_long_as_they_have_time(*, once: bool, tmp_path: Path) -> None:
    found = tmp_path / "figures"
    subprocess.run(
        [sys.executable, "-c", TURNS.format(once=once)],
        env={"PYTHONPATH": str(FOLDER), "SAFEPOOL_FIGURES": str(found)},
        check=True,
        capture_output=True,
    )

    table = json.loads(found.read_text())
    rounds = 1 if once else 3
    assert table["rounds"] == {"safepool": rounds, "hangs": 1, "fails": rounds, "slow": rounds}
    first = {name: (row[0]["median"], row[0]["ratio"]) for name, row in table["rows"].items()}
    assert first == {
        "safepool": (2.0, 1.0),
        "hangs": ("not done after 0.05 s", None),
        "fails": (None, None),
        "slow": (4.0, 2.0),
    }


def check(found: dict[str, Any]) -> None:
    """Look that a result says all that a reader needs."""
    assert found["question"].endswith("?")
    assert found["command"].startswith(f"python benchmarks/{found['benchmark']}.py")
    assert {"python", "system", "host_cpus", "binding_limit", "load_before"} == set(
        found["machine"]
    )
    assert found["versions"]["safepool"]
    assert found["tables"]
    assert len({table["title"] for table in found["tables"]}) == len(found["tables"])
    for table in found["tables"]:
        for cells in table.get("rows", {}).values():
            assert len(cells) == len(table["columns"])
            assert all({"median", "low", "high", "ratio"} == set(cell) for cell in cells)
            assert table["rounds"].keys() == table["rows"].keys()
