"""All benchmarks: what each asks, and one command that runs them and keeps what they found.

    python -m benchmarks --list                 what there is
    python -m benchmarks --quick                all, few rounds: whether they run, not how fast
    python -m benchmarks latency failure        some
    python -m benchmarks --json --plot          all, kept in benchmarks/results, and written into
                                                benchmarks/README.md

Each runs its contenders in turns in one run of several rounds, and prints medians with the lowest
and the highest in parentheses, and ratios before them. Contenders that are not installed are left
out: ``pip install 'safepool[bench]'``. benchmarks/README.md says how to read each.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# benchmarks/figures.py has it, too.
VARIABLE = "SAFEPOOL_FIGURES"
_BEGIN, _END = "<!-- results: begin -->\n", "<!-- results: end -->"
PEERS = (
    "joblib", "loky", "mpire", "pebble", "distributed", "ray",
    "numpy", "scipy", "scikit-learn", "threadpoolctl",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One file of this folder.

    Attributes:
        question: Asked by it.
        quick: Arguments with which it takes seconds.
        full: Arguments without ``--quick``.
        needs: Modules without which it cannot run.
        root: It makes control groups.
    """

    question: str
    quick: str = ""
    full: str = ""
    needs: tuple[str, ...] = ()
    root: bool = False


BENCHMARKS = {
    "oversubscription": Benchmark(
        "What do defaults do to numeric work in a container of half a CPU to two?",
        "--cpus 1 --rounds 1 --work blas",
        needs=("scipy", "sklearn"),
        root=True,
    ),
    "deadlocks": Benchmark(
        "Which programs that hang some pool hang the others?",
        '--limit 20 --only "os._exit in a task"',
        needs=("sklearn",),
    ),
    "failure": Benchmark(
        "What does a pool still do while a worker is killed every 100 ms?",
        "--seconds 1 --rounds 1",
    ),
    "dispatch": Benchmark(
        "What does a call cost by submit and by map, and is a long one in the way?",
        "--rounds 1 --only submit round-trip map",
    ),
    "latency": Benchmark(
        "How long does one call take to its caller and back, alone and with 8 and 64 at once?",
        "--rounds 1 --calls 50",
    ),
    "scale": Benchmark(
        "Does a call cost more when there are more calls, or more workers?",
        "--rounds 1 --tasks 100 1000 --workers 1 4",
    ),
    "startup": Benchmark(
        "How long is it until workers have NumPy and SciPy, and what memory do they take?",
        "--rounds 1 --workers 2",
        needs=("scipy", "matplotlib"),
    ),
    "arrays": Benchmark(
        "What does an array cost on its way to a worker, and back?",
        "transfer share memory --rounds 1 --sizes 1",
        needs=("numpy",),
    ),
    "joblib_backend": Benchmark(
        "How long do joblib and scikit-learn take in a container, by backend?",
        "--rounds 1 --cpus 1 --only few tiny",
        needs=("sklearn",),
        root=True,
    ),
    "decorator": Benchmark("What does @safepool.worker cost a call?", needs=("scipy",)),
    "caps": Benchmark(
        "What do caps on native threads cost a worker and its tasks?", needs=("scipy",)
    ),
    "rounding": Benchmark(
        "Is a fraction of a CPU worth a worker?", "--seconds 1 --rounds 1", root=True
    ),
    "service": Benchmark(
        "How long do the clients of an asyncio service wait?", "--rounds 1 --requests 50"
    ),
    "cluster": Benchmark(
        "What does a call over nodes cost, beside Dask's own ways?",
        "--nodes 1 --rounds 1",
        needs=("distributed",),
    ),
    "memory_limit": Benchmark(
        "What does memory_limit= cost, and how soon does it act?", "--workers 2 --seconds 1"
    ),
    "names": Benchmark("What do the globals of a script cost?", "--mebibytes 4"),
    "by_value": Benchmark("What does it cost to send functions and classes of a script?"),
    "trace": Benchmark("What does a trace cost?", "--rounds 3", "--rounds 31"),
    "limits": Benchmark("How long does it take to read the limits?"),
    "import_time": Benchmark("How long does the import take?"),
}


def run(name: str, *, quick: bool) -> dict[str, Any] | None:
    """Run one, with its output on this screen.

    Returns:
        All that is kept of it; ``None`` if it failed.
    """
    benchmark = BENCHMARKS[name]
    arguments = shlex.split(benchmark.quick if quick else benchmark.full)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures")
        figures.touch()
        load, begun = os.getloadavg()[0], time.monotonic()
        done = subprocess.run(
            command, env={**os.environ, VARIABLE: str(figures)}, cwd=ROOT, check=False
        )
        took_s = time.monotonic() - begun
        tables = [json.loads(line) for line in figures.read_text().splitlines()]
    # 1 says that an aim was missed: the figures are there all the same.
    if done.returncode not in (0, 1) or not tables:
        return None
    return {
        "benchmark": name,
        "question": benchmark.question,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *arguments]),
        "quick": quick,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "took_s": round(took_s, 1),
        "machine": machine(load),
        "versions": versions(),
        "tables": tables,
    }


def machine(load: float) -> dict[str, Any]:
    """Return what it ran on."""
    import safepool

    limits = safepool.read_limits()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "host_cpus": os.cpu_count(),
        "binding_limit": f"{limits.binding.cpus} CPUs by {limits.binding.name}",
        "load_before": round(load, 1),
    }


def versions() -> dict[str, str]:
    """Return the versions of those that are installed."""
    import safepool

    found = {"safepool": safepool.__version__}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the first figure of each table as bars, and write the picture.

    Args:
        result: Of `run`.
        path: File of the picture; the end of its name says which format.
    """
    import matplotlib.pyplot as plt

    tables = [table for table in result["tables"] if "rows" in table]
    if not tables:
        return
    heights = [0.3 * len(table["rows"]) + 0.9 for table in tables]
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(7, sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        rows = {
            name: cells[0]
            for name, cells in table["rows"].items()
            if isinstance(cells[0]["median"], float | int)
        }
        names = sorted(rows, key=lambda name: rows[name]["median"], reverse=True)
        medians = [rows[name]["median"] for name in names]
        spread = [
            [middle - rows[name]["low"] for middle, name in zip(medians, names, strict=True)],
            [rows[name]["high"] - middle for middle, name in zip(medians, names, strict=True)],
        ]
        colours = ["#1f77b4" if name == table["base"] else "#bbbbbb" for name in names]
        axis.barh(names, medians, color=colours, xerr=spread, ecolor="#555555", height=0.6)
        axis.set_title(table["title"], fontsize=9, loc="left")
        axis.set_xlabel(table["columns"][0], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['question']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": result["date"]})
    plt.close(figure)


def lacking(benchmark: Benchmark) -> str | None:
    """Return why one cannot run here; ``None`` if it can."""
    missing = [name for name in benchmark.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'safepool[bench]'"
    if benchmark.root and (sys.platform != "linux" or os.geteuid() != 0):
        return "needs root on Linux, for control groups"
    return None


def as_markdown(result: dict[str, Any], picture: Path) -> str:
    """Return a result for a reader: its question, where it comes from, and its tables.

    Args:
        result: Of `run`.
        picture: Drawn by `draw`, if it was.
    """
    on, of = result["machine"], result["versions"]
    lines = [f"### {result['benchmark']}", "", result["question"], ""]
    lines += [
        f"`{result['command']}`, {result['date']}, Python {on['python']}, {on['host_cpus']} CPUs, "
        f"load before {on['load_before']}; "
        + ", ".join(f"{name} {version}" for name, version in of.items() if name in PEERS)
    ]
    if picture.exists():
        lines += ["", f"![{result['question']}]({picture.parent.name}/{picture.name})"]
    for table in result["tables"]:
        # What ends a cell in Markdown.
        heads = [column.replace("|", "\\|") for column in ("", *table["columns"])]
        lines += ["", f"**{table['title']}**", "", f"| {' | '.join(heads)} |"]
        lines += ["|---" * len(heads) + "|"]
        rows: dict[str, list[Any]] = table.get("rows") or table["outcomes"]
        for name, cells in rows.items():
            shown = [cell if isinstance(cell, str) else _cell(cell) for cell in cells]
            lines += [f"| {' | '.join([name, *shown])} |"]
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    median, low, high, ratio = (cell[key] for key in ("median", "low", "high", "ratio"))
    if median is None:
        return "-"
    if not isinstance(median, float | int):
        return str(median)
    begin = "" if not isinstance(ratio, float | int) else f"{ratio:.2f} x: "
    return f"{begin}{_short(median)} ({_short(low)} to {_short(high)})"


def _short(figure: Any) -> str:
    if not isinstance(figure, float | int):
        return str(figure)
    return f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:,.0f}"


def write_readme(folder: Path, file: Path) -> None:
    """Write all results of a folder into the block of a file that is for them.

    Args:
        folder: Has a file for each result.
        file: Has ``<!-- results: begin -->`` and ``<!-- results: end -->``.
    """
    found = [folder / f"{name}.json" for name in BENCHMARKS]
    texts = [
        as_markdown(json.loads(one.read_text(encoding="utf-8")), one.with_suffix(".svg"))
        for one in found
        if one.exists()
    ]
    before, rest = file.read_text(encoding="utf-8").split(_BEGIN)
    after = rest.partition(_END)[2]
    file.write_text("".join([before, _BEGIN, *texts, _END, after]), encoding="utf-8")


def _run_and_keep(name: str, asked: argparse.Namespace) -> bool:
    print(f"\n===== {name}: {BENCHMARKS[name].question}", flush=True)
    if reason := lacking(BENCHMARKS[name]):
        print(f"skipped: {reason}")
        return True
    result = run(name, quick=asked.quick)
    if result is None:
        return False
    if asked.json or asked.plot:
        asked.into.mkdir(parents=True, exist_ok=True)
    if asked.json:
        text = json.dumps(result, indent=1) + "\n"
        (asked.into / f"{name}.json").write_text(text, encoding="utf-8")
    if asked.plot:
        draw(result, asked.into / f"{name}.svg")
    return True


def main() -> int:
    """Run what is asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="benchmarks; all if none is named"
    )
    parser.add_argument("--list", action="store_true", help="print their names and questions")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", action="store_true", help="keep the figures")
    parser.add_argument("--plot", action="store_true", help="draw them as SVG; needs matplotlib")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="for both")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}: see --list")
    names = asked.names or list(BENCHMARKS)
    if asked.list:
        for name in names:
            print(f"{name:18}{BENCHMARKS[name].question}")
        return 0
    failed = [name for name in names if not _run_and_keep(name, asked)]
    if asked.json and not asked.quick and asked.into == RESULTS:
        write_readme(RESULTS, RESULTS.parent / "README.md")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
