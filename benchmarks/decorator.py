"""What ``@safepool.worker`` costs a call, beside ``threadpool_limits`` and the bare function.

    python benchmarks/decorator.py

In a capped worker, where the decorator has nothing to do; in a process that nobody has capped;
and with NumPy's and SciPy's libraries loaded in both. Each figure is the best of several
runs, in a fresh process. Needs NumPy and SciPy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from figures import show

# The product's aim; the run fails when it is missed.
MOST_US_IN_A_WORKER = 3.0

SCRIPT = """
import functools, timeit, sys
import numpy, scipy.linalg, threadpoolctl
import safepool
from safepool.threads.cap import cap_worker

def bare(x):
    return x

def items(x):
    yield x

async def waits(x):
    return x

def run(coroutine):
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value

decorated = safepool.worker()(lambda x: x)
inline = safepool.worker(bare)
generator = safepool.worker(items)
coroutine = safepool.worker(waits)
limited = threadpoolctl.threadpool_limits.wrap(limits=1)(bare)
cached = getattr(threadpoolctl, "get_cached_controller", lambda: None)()

def with_cached(x):
    with cached.limit(limits=1):
        return bare(x)

if {worker}:
    cap_worker(1)

def each_us(call):
    timer = timeit.Timer(call)
    number, _ = timer.autorange()
    return min(timer.repeat(repeat=3, number=number)) / number * 1e6

calls = {{
    "the bare function": lambda: bare(1),
    "@safepool.worker": lambda: decorated(1),
    "safepool.worker(f)": lambda: inline(1),
    "... of a generator, one item": lambda: list(generator(1)),
    "... a bare generator": lambda: list(items(1)),
    "... of a coroutine that does not wait": lambda: run(coroutine(1)),
    "... a bare coroutine": lambda: run(waits(1)),
    "threadpool_limits(1)": lambda: limited(1),
    "threadpoolctl's cached controller": (lambda: with_cached(1)) if cached else None,
}}
for name, call in calls.items():
    if call is not None:
        print(name, each_us(call), sep="\\t")
"""


def measure(*, worker: bool) -> dict[str, float]:
    """Return the microseconds of a call of each kind in a fresh process."""
    code = SCRIPT.format(worker=worker)
    run = subprocess.run([sys.executable, "-c", code], stdout=-1, text=True, check=True)
    rows = (line.split("\t") for line in run.stdout.splitlines())
    return {name: float(us) for name, us in rows}


def main() -> int:
    """Print the figures; return 1 if the aim is missed."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    inside, elsewhere = measure(worker=True), measure(worker=False)
    show(
        "a call",
        ("in a worker us", "elsewhere us"),
        {name: [(us, elsewhere[name])] for name, us in inside.items()},
        base="the bare function",
    )
    bare = inside["the bare function"]
    missed = [
        f"{name} costs {inside[name] - bare:.1f} microseconds"
        for name in ("@safepool.worker", "safepool.worker(f)")
        if inside[name] - bare > MOST_US_IN_A_WORKER
    ]
    print("missed: " + ", ".join(missed) if missed else "the aim is met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
