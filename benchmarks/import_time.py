"""How long `import safepool` takes, beside the standard pool's import and no import at all.

Run it: ``python benchmarks/import_time.py``. Each statement runs in a fresh interpreter; the
runs of all statements take turns, so that a slow moment of the machine meets each of them.
"""

from __future__ import annotations

import subprocess
import sys
import time

from figures import show

RUNS = 15

# The first row is what the others are compared with.
STATEMENTS = {
    "bare python": "pass",
    "import concurrent.futures.process": "import concurrent.futures.process",
    "import safepool": "import safepool",
    "safepool.ProcessPool": "import safepool; safepool.ProcessPool",
}


def run_time_s(statement: str) -> float:
    """Start an interpreter, run a statement, and time both.

    Args:
        statement: Python source.

    Returns:
        Seconds of wall time from start to exit.
    """
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print one row per statement: its median, and what it adds to the bare interpreter."""
    times_s: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for statement in STATEMENTS.values():
        run_time_s(statement)  # the first run writes byte code
    for _ in range(RUNS):
        for name, statement in STATEMENTS.items():
            times_s[name].append(run_time_s(statement))
    print(f"Python {sys.version.split()[0]}, {RUNS} runs, taking turns")
    rows = {name: [(time_s * 1e3,) for time_s in values] for name, values in times_s.items()}
    show("a fresh interpreter", ["ms"], rows, base="bare python")


if __name__ == "__main__":
    main()
