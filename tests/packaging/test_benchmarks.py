"""One command knows all benchmarks, and keeps what they find."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "benchmarks"
# What the others import, and what writes the README.
PARTS = {"__main__", "asyncio_service", "contenders", "figures", "readme", "tasks"}


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


def test_a_name_that_is_none_is_told() -> None:
    done = ask("latencies")

    assert done.returncode == 2
    assert "no benchmark is called latencies: see --list" in done.stderr


def test_figures_are_kept_with_what_they_come_from(tmp_path: Path) -> None:
    done = ask("limits", "--quick", "--json", "--into", str(tmp_path))

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "limits.json").read_text())
    check(found)
    assert found["quick"]
    for file in FOLDER.glob("results/*.json"):
        kept = json.loads(file.read_text())
        check(kept)
        assert not kept["quick"]
        assert kept["benchmark"] == file.stem


def test_results_are_written_for_a_reader(tmp_path: Path) -> None:
    write_readme = runpy.run_path(str(FOLDER / "__main__.py"))["write_readme"]
    cell = {"median": 1234.5, "low": 0.5, "high": "never", "ratio": 2.0}
    missing = dict.fromkeys(cell)
    result = {
        "benchmark": "latency",
        "question": "How long?",
        "command": "python benchmarks/latency.py",
        "date": "2026-01-02",
        "machine": {"python": "3.14.0", "host_cpus": 2, "load_before": 0.1},
        "versions": {"safepool": "1", "loky": "3.7"},
        "tables": [
            {"title": "each", "columns": ["us", "a|b"], "rows": {"loky": [cell, missing]}},
            {"title": "then", "columns": ["it"], "outcomes": {"loky": ["hangs"]}},
        ],
    }
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    (folder / "latency.json").write_text(json.dumps(result))
    (folder / "latency.svg").touch()
    around = "before\n<!-- results: begin -->\n", "<!-- results: end -->\nafter\n"
    readme.write_text("old\n".join(around))

    write_readme(folder, readme)
    write_readme(folder, readme)

    assert readme.read_text() == around[0] + WRITTEN + around[1]
    assert "<!-- results: begin -->" in (FOLDER / "README.md").read_text()


WRITTEN = """\
### latency

How long?

`python benchmarks/latency.py`, 2026-01-02, Python 3.14.0, 2 CPUs, load before 0.1; loky 3.7

![How long?](results/latency.svg)

**each**

|  | us | a\\|b |
|---|---|---|
| loky | 2.00 x: 1,234 (0.5 to never) | - |

**then**

|  | it |
|---|---|
| loky | hangs |
"""


def check(found: dict[str, Any]) -> None:
    """Look that a result says all that a reader needs."""
    assert found["question"].endswith("?")
    assert found["command"].startswith(f"python benchmarks/{found['benchmark']}.py")
    assert {"python", "system", "host_cpus", "binding_limit", "load_before"} == set(
        found["machine"]
    )
    assert found["versions"]["safepool"]
    assert found["tables"]
    for table in found["tables"]:
        for cells in table.get("rows", {}).values():
            assert len(cells) == len(table["columns"])
            assert all({"median", "low", "high", "ratio"} == set(cell) for cell in cells)
