"""What the caps cost a worker, beside a ``threadpool_limits(1)`` around each task.

    python benchmarks/caps.py

Each figure is the best of several, in fresh processes where it is a process's first cap.
Needs NumPy and SciPy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import timeit

from figures import OURS, show

# The product's aims; the run fails when one is missed.
MOST_MS_FOR_THE_FIRST_CAP = 10.0
MOST_US_FOR_A_CHECK = 1.0

STARTS = 5
IMPORT = "import numpy, scipy.linalg"


def first_cap_ms(imports: str, cap: str) -> float:
    """Return the milliseconds of a process's first cap, what it imports included."""
    code = (
        f"import time\n{imports}\nimport safepool.threads.cap as c\n"
        f"begun = time.perf_counter()\n{cap}\nprint((time.perf_counter() - begun) * 1e3)"
    )
    return min(
        float(subprocess.run([sys.executable, "-c", code], stdout=-1, check=True).stdout)
        for _ in range(STARTS)
    )


def each_us(call: str, setup: str) -> float:
    """Return the microseconds of one call of many in a process that is set up."""
    timer = timeit.Timer(call, setup)
    number, _ = timer.autorange()
    return min(timer.repeat(repeat=3, number=number)) / number * 1e6


def main() -> int:
    """Print the figures; return 1 if an aim is missed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    ours = "c.cap_worker(1)"
    theirs = "from threadpoolctl import threadpool_limits; threadpool_limits(1)"
    empty, first = first_cap_ms("", ours), first_cap_ms(IMPORT, ours)
    empty_beside, first_beside = first_cap_ms("", theirs), first_cap_ms(IMPORT, theirs)

    setup = f"{IMPORT}\nimport safepool.threads.cap as c, threadpoolctl as t\n"
    # In this order: from the first cap_worker() on, this process is a worker.
    block = each_us("with c.capped(1): pass", setup)
    limits = each_us("with t.threadpool_limits(1): pass", setup)
    cached = (
        each_us("with t.get_cached_controller().limit(limits=1): pass", setup)
        if _has_cached_controller()
        else None
    )
    check = each_us("recheck()", setup + "recheck = c.cap_worker(1).recheck")
    inside = each_us("with c.capped(1): pass", setup)

    rows = [
        ("first cap, nothing loaded, ms", empty, empty_beside),
        ("first cap, NumPy and SciPy loaded, ms", first, first_beside),
        ("before each task of a worker, us", check, limits),
        ("@worker inside a worker, us", inside, limits),
        ("@worker elsewhere, us", block, limits),
    ]
    if cached is not None:
        rows.append(("before each task, its cached controller, us", check, cached))
    for name, our, their in rows:
        show(name, [name.rpartition(" ")[2]], {OURS: [(our,)], "threadpoolctl": [(their,)]})

    missed = []
    if first > MOST_MS_FOR_THE_FIRST_CAP:
        missed.append(f"the first cap takes {first:.1f} ms")
    if check > MOST_US_FOR_A_CHECK:
        missed.append(f"the check takes {check:.2f} microseconds")
    print("missed: " + ", ".join(missed) if missed else "every aim is met")
    return bool(missed)


def _has_cached_controller() -> bool:
    import threadpoolctl

    return hasattr(threadpoolctl, "get_cached_controller")  # 3.8


if __name__ == "__main__":
    sys.exit(main())
