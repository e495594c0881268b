"""Writes all figures of the two READMEs from ``benchmarks/results``.

None of them is typed by hand. A block is between ``<!-- NAME: begin -->`` and
``<!-- NAME: end -->``. The README has the demo's screen and a table of the questions that most
people ask, benchmarks/README.md has every table. `python -m benchmarks --json` writes both after
each benchmark.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["as_markdown", "blocks", "write", "written"]

# Columns of the README's table, each with the names that it has in the tables.
_COLUMNS = {
    "safepool": "safepool",
    "stdlib": "stdlib fork",
    "`Pool`": "multiprocessing fork",
    "loky": "loky",
    "joblib": "joblib",
    "mpire": "mpire",
    "pebble": "pebble",
    "Dask": "dask",
    "Ray": "ray",
}
# Its rows: the question, and where the answer is: benchmark, beginning of a title, column.
_ROWS = (
    ("12 SciPy tasks, 1 CPU of 48, s", "oversubscription", "scipy, 12 tasks, a quota of 1 C", 0),
    ("a call that does nothing, µs: `submit`", "dispatch", "2000 tasks that do nothing", 0),
    ("`map`", "dispatch", "tasks that do nothing, by map", 0),
    ("there and back", "latency", "submit(f, n).result(), a function of a module", 0),
    ("first results of 2 workers, s", "startup", "NumPy and SciPy", 0),
    ("results/s while workers are killed", "failure", "tasks of 5 ms", 0),
)


def blocks(folder: Path) -> dict[str, dict[str, str]]:
    """Return what the results say, by the name of a block, by the path of a file.

    Args:
        folder: Has a file for each result, named as its benchmark.
    """
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    texts = [
        as_markdown(one, drawn=(folder / f"{name}.svg").exists()) for name, one in found.items()
    ]
    readme = {"figures": _overview(found)}
    if "demo" in found:
        shown = found["demo"]["tables"][0]
        readme["demo-output"] = f"```console\n$ {shown['title']}\n{_core(shown['screen'])}\n```\n"
    return {"README.md": readme, "benchmarks/README.md": {"results": "\n".join(texts)}}


def written(text: str, name: str, block: str) -> str:
    """Return a file's text with another block.

    Args:
        text: Has the block's two marks.
        name: The block's.
        block: What is between them.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return before + begin + block + end + rest.partition(end)[2]


def write(root: Path) -> None:
    """Write every block of the files below a folder."""
    for path, texts in blocks(root / "benchmarks" / "results").items():
        text = (root / path).read_text(encoding="utf-8")
        for name, block in texts.items():
            text = written(text, name, block)
        (root / path).write_text(text, encoding="utf-8")


def _core(screen: str) -> str:
    """Return the demo's table, and dots for what is above it."""
    lines = screen.splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("pool "))
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    return "\n".join(["...", *lines[begin:end]])


def _overview(found: dict[str, Any]) -> str:
    """Return the README's table; "" as long as nothing was measured."""
    lines = []
    for question, benchmark, title, column in _ROWS:
        tables = found.get(benchmark, {"tables": ()})["tables"]
        for table in tables:
            if table["title"].startswith(title):
                cells = [table["rows"].get(name) for name in _COLUMNS.values()]
                shown = ["-" if cell is None else _ratio(cell[column]) for cell in cells]
                lines.append(
                    f"| [{question}](benchmarks/README.md#{benchmark}) | {' | '.join(shown)} |"
                )
                break
    if not lines:
        return ""
    heads = ["", *_COLUMNS]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]) + "\n"


def _ratio(cell: dict[str, Any]) -> str:
    median, ratio = cell["median"], cell["ratio"]
    if not _is_number(median):
        return median or "-"
    if ratio in (1, None):
        return _short(median)
    return f"{ratio:.2g} x" if ratio < 100 else f"{ratio:,.0f} x"


def as_markdown(result: dict[str, Any], *, drawn: bool) -> str:
    """Return a result for a reader: its question, where it comes from, and its tables.

    Args:
        result: One of ``benchmarks/results``.
        drawn: It has a picture.
    """
    name, on = result["benchmark"], result["machine"]
    versions = ", ".join(f"{of} {version}" for of, version in result["versions"].items())
    where = (
        f"`{result['command']}`, {result['date']}, {result['took_s']:.0f} s, Python "
        f"{on['python']}, {on['host_cpus']} CPUs, load before {on['load_before']}; {versions}"
    )
    lines = [f"### {name}", "", result["question"], "", where]
    if result.get("ended_after_s"):
        lines += ["", f"Ended after {result['ended_after_s']} s: what follows is not all."]
    if drawn:
        lines += ["", f"![{result['question']}](results/{name}.svg)"]
    for table in result["tables"]:
        lines += ["", *_table(table)]
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any]) -> list[str]:
    if "screen" in table:
        return ["```console", f"$ {table['title']}", table["screen"], "```"]
    # What ends a cell in Markdown.
    heads = [column.replace("|", "\\|") for column in ("", *table["columns"])]
    title = table["title"]
    if rounds := table.get("rounds"):
        title += f" ({max(rounds.values())} rounds)"
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows: list[tuple[str, list[Any]]] = [*(table.get("rows") or table["outcomes"]).items()]
    if "rows" in table:  # who is ahead comes first
        rows.sort(key=lambda row: _or_inf(row[1][0]["median"]))
    for name, cells in rows:
        shown = [cell if isinstance(cell, str) else _cell(cell) for cell in cells]
        lines.append(f"| {' | '.join([name, *shown])} |")
    return lines


def _cell(cell: dict[str, Any]) -> str:
    median, low, high, ratio = (cell[key] for key in ("median", "low", "high", "ratio"))
    if not _is_number(median):
        return median or "-"
    begin = f"{ratio:.2f} x: " if _is_number(ratio) else ""
    spread = "" if low == high else f" ({_short(low)} to {_short(high)})"
    return f"{begin}{_short(median)}{spread}"


def _short(figure: Any) -> str:
    if not _is_number(figure):
        return str(figure)
    return f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:,.0f}"


def _or_inf(figure: Any) -> float:
    return figure if _is_number(figure) else float("inf")


def _is_number(figure: object) -> bool:
    return isinstance(figure, float | int)
