"""All benchmarks: what each asks, and one command that runs them and keeps what they found.

    python -m benchmarks --list                 what there is
    python -m benchmarks --quick                all, few rounds: whether they run, not how fast
    python -m benchmarks latency failure        some
    python -m benchmarks --json --plot          all, kept in benchmarks/results, and written into
                                                README.md and benchmarks/README.md

Each runs its contenders in turns in one run of several rounds, and prints medians with the lowest
and the highest in parentheses, and ratios before them. Contenders that are not installed are left
out: ``pip install 'safepool[bench]'``. Figures are kept as soon as a benchmark ends, and the name
of one measures it again. benchmarks/README.md says how to read each.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.figures import VARIABLE
from benchmarks.picture import as_svg

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Seconds for one that was told to end, to end what it has started.
END_S = 10.0


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One file of this folder.

    Attributes:
        question: Asked by it.
        quick: Arguments with which it takes seconds.
        full: Arguments without ``--quick``.
        limit_s: Seconds after which it is ended: three times what it takes on a machine with two
            CPUs that does nothing else.
        needs: Modules without which it cannot run.
        root: It makes control groups.
        compared: Packages whose versions matter.
    """

    question: str
    quick: str = ""
    full: str = ""
    limit_s: float = 180
    needs: tuple[str, ...] = ()
    root: bool = False
    compared: tuple[str, ...] = ()


PEERS = ("joblib", "loky", "mpire", "pebble", "distributed", "ray")
SCIENCE = ("numpy", "scipy", "scikit-learn")
BENCHMARKS = {
    "demo": Benchmark(
        "What do both pools do with the README's case under a limit of one CPU?",
        needs=("scipy",),
        root=True,
        compared=SCIENCE,
    ),
    "oversubscription": Benchmark(
        "What do defaults do to numeric work in a container of half a CPU to two?",
        "--cpus 1 --rounds 1 --work blas",
        limit_s=900,
        needs=("scipy", "sklearn"),
        root=True,
        compared=(*PEERS, *SCIENCE),
    ),
    "deadlocks": Benchmark(
        "Which programs that hang some pool hang the others?",
        '--only "os._exit in a task"',
        limit_s=500,
        needs=("sklearn",),
        compared=(*PEERS, *SCIENCE),
    ),
    "failure": Benchmark(
        "What does a pool still do while a worker is killed every 100 ms?",
        "--seconds 1 --rounds 1",
        limit_s=500,
        compared=PEERS,
    ),
    "dispatch": Benchmark(
        "What does a call cost by submit and by map, and is a long one in the way?",
        "--rounds 1 --only submit round-trip map",
        limit_s=500,
        compared=PEERS,
    ),
    "latency": Benchmark(
        "How long does one call take to its caller and back, alone and with 8 and 64 at once?",
        "--rounds 1 --calls 50",
        limit_s=300,
        compared=PEERS,
    ),
    "scale": Benchmark(
        "Does a call cost more when there are more calls, more workers, or more that wait?",
        "--rounds 1 --tasks 100 1000 --workers 1 4 --pending 1000",
        limit_s=600,
        compared=PEERS,
    ),
    "startup": Benchmark(
        "How long is it until workers have NumPy and SciPy, and what memory do they take?",
        "--rounds 1 --workers 2",
        limit_s=600,
        needs=("scipy", "matplotlib"),
        compared=(*PEERS, *SCIENCE),
    ),
    "arrays": Benchmark(
        "What does an array cost on its way to a worker, and back?",
        "transfer share memory --rounds 1 --sizes 1",
        "transfer share memory --rounds 5",
        limit_s=400,
        needs=("numpy",),
        compared=(*PEERS, "numpy"),
    ),
    "joblib_backend": Benchmark(
        "How long do joblib and scikit-learn take in a container, by backend?",
        "--rounds 1 --cpus 1 --only few tiny --backends safepool loky",
        "--only few tiny array grid forest-fit --backends safepool loky threading",
        limit_s=600,
        needs=("sklearn",),
        root=True,
        compared=("joblib", "loky", *SCIENCE),
    ),
    "decorator": Benchmark(
        "What does @safepool.worker cost a call?",
        needs=("scipy",),
        compared=("threadpoolctl", *SCIENCE),
    ),
    "caps": Benchmark(
        "What do caps on native threads cost a worker and its tasks?",
        needs=("scipy",),
        compared=("threadpoolctl", *SCIENCE),
    ),
    "rounding": Benchmark(
        "Is a fraction of a CPU worth a worker?",
        "--seconds 1 --rounds 1",
        "--seconds 1 --rounds 5",
        limit_s=300,
        root=True,
    ),
    "service": Benchmark(
        "How long do the clients of an asyncio service wait?", "--rounds 1 --requests 50"
    ),
    "cluster": Benchmark(
        "What does a call over nodes cost, beside Dask's own ways?",
        "--nodes 1 --rounds 1",
        # The first rounds are those in which each way gets its memory.
        "--rounds 11 --kill",
        limit_s=900,
        needs=("distributed",),
        compared=("distributed", "joblib"),
    ),
    "memory_limit": Benchmark(
        "What does memory_limit= cost, and how soon does it act?",
        "--workers 2 --seconds 1",
        "--seconds 5",
    ),
    "names": Benchmark(
        "What do the globals of a script cost?",
        "--mebibytes 4",
        needs=("numpy",),
        compared=("numpy",),
    ),
    "by_value": Benchmark(
        "What does it cost to send functions and classes of a script?", compared=("cloudpickle",)
    ),
    "trace": Benchmark("What does a trace cost?", "--rounds 3", "--rounds 11"),
    "limits": Benchmark("How long does it take to read the limits?", compared=("joblib", "loky")),
    "import_time": Benchmark("How long does the import take?"),
}


def run(name: str, *, quick: bool, most_s: float = math.inf) -> dict[str, Any] | None:
    """Run one, with its output on this screen.

    Args:
        name: In BENCHMARKS.
        quick: With few rounds.
        most_s: Seconds after which it is ended, if its own limit is not shorter.

    Returns:
        All that is kept of it; ``None`` if it failed.
    """
    benchmark = BENCHMARKS[name]
    limit_s = round(min(benchmark.limit_s, most_s), 1)
    arguments = shlex.split(benchmark.quick if quick else benchmark.full)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures")
        figures.touch()
        load, begun = os.getloadavg()[0], time.monotonic()
        environ = {**os.environ, VARIABLE: str(figures)}
        with subprocess.Popen(command, env=environ, cwd=ROOT, start_new_session=True) as program:
            code = _wait(program, limit_s)
        took_s = time.monotonic() - begun
        tables = merged([json.loads(line) for line in figures.read_text().splitlines()])
    # 1 says that an aim was missed: the figures are there all the same.
    if code not in (0, 1, None) or not tables:
        return None
    return {
        "benchmark": name,
        "question": benchmark.question,
        "command": shlex.join(["python", f"benchmarks/{name}.py", *arguments]),
        "quick": quick,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "took_s": round(took_s, 1),
        "ended_after_s": None if code is not None else limit_s,
        "machine": machine(load),
        "versions": versions(benchmark.compared),
        "tables": tables,
    }


def _wait(program: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Return its exit code; ``None`` if its time was up. Nothing of its session is left."""
    try:
        return program.wait(limit_s)
    except subprocess.TimeoutExpired:
        print(f"not done after {limit_s:g} s", file=sys.stderr)
        # As by Ctrl-C: it ends what it has started, and takes its control groups away.
        program.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(END_S)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def merged(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tables of which none has another's title.

    Those of one title have ours in common: the others' ratios are to ours in their own run.
    """
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        first = found.setdefault(table["title"], table)
        if first is not table:
            for part in ("rows", "rounds"):
                first[part] = {**first[part], **table[part], **first[part]}
    return [*found.values()]


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


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of ours and of those that are installed."""
    import safepool

    found = {"safepool": safepool.__version__}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def compile_modules(*folders: Path) -> None:
    """Compile what is in folders, as the first import does, and have later imports do so, too.

    ``pip install --no-compile`` and ``PYTHONDONTWRITEBYTECODE`` leave it out. Each process would
    compile SciPy anew: all pools would take two to three times as long.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compiler = [sys.executable, "-m", "compileall", "-qq", "-j0", *map(str, folders)]
    subprocess.run(compiler, check=False)  # some packages have files for other Pythons only


def lacking(benchmark: Benchmark) -> str | None:
    """Return why one cannot run here; ``None`` if it can."""
    missing = [name for name in benchmark.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'safepool[bench]'"
    if benchmark.root and (sys.platform != "linux" or os.geteuid() != 0):
        return "needs root on Linux, for control groups"
    return None


def _run_and_keep(name: str, asked: argparse.Namespace, most_s: float) -> bool:
    print(f"\n===== {name}: {BENCHMARKS[name].question}", flush=True)
    if reason := lacking(BENCHMARKS[name]):
        print(f"skipped: {reason}")
        return True
    if most_s <= 0:
        print("skipped: no time is left")
        return True
    result = run(name, quick=asked.quick, most_s=most_s)
    if result is None:
        return False
    if asked.json or asked.plot:
        asked.into.mkdir(parents=True, exist_ok=True)
    picture = asked.into / f"{name}.svg"
    if asked.json:
        text = json.dumps(result, indent=1) + "\n"
        (asked.into / f"{name}.json").write_text(text, encoding="utf-8")
        picture.unlink(missing_ok=True)  # of other figures
    if asked.plot and (drawn := as_svg(result)):
        picture.write_text(drawn, encoding="utf-8")
    if asked.json and not asked.quick and asked.into == RESULTS:
        readme.write(ROOT)
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
    parser.add_argument("--plot", action="store_true", help="draw them as SVG")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end what is not done by then"
    )
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="for both")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}: see --list")
    names = asked.names or list(BENCHMARKS)
    if asked.list:
        for name in names:
            print(f"{name:18}{BENCHMARKS[name].question}")
        return 0
    # Ignored in what a shell has started in the background, and then by benchmarks, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not asked.quick:
        installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
        compile_modules(*installed, ROOT / "safepool", ROOT / "benchmarks")
    begun = time.monotonic()
    end = begun + 60 * asked.minutes
    failed = [name for name in names if not _run_and_keep(name, asked, end - time.monotonic())]
    print(f"\n{len(names)} benchmarks, {time.monotonic() - begun:.0f} s")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
