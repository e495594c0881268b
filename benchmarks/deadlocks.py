"""Programs that are known to hang a pool: what each of them does under every pool.

    python benchmarks/deadlocks.py [--limit 25] [--only NAME ...]

Each pair of program and pool is a script of its own, which is ended after some seconds: "hangs".
"right" is the result that the program without a pool has. Everything else is the error that the
program gets, and can handle.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contenders import last_line
from figures import show_outcomes

POOLS = {
    "safepool": ("safepool", "safepool.ProcessPool({n})"),
    "stdlib fork": ("concurrent.futures", "executor({n}, mp_context=context('fork'))"),
    "stdlib forkserver": ("concurrent.futures", "executor({n}, mp_context=context('forkserver'))"),
    "multiprocessing fork": ("multiprocessing", "Applied(context('fork').Pool({n}))"),
    "multiprocessing spawn": ("multiprocessing", "Applied(context('spawn').Pool({n}))"),
    "loky": ("loky", "loky.ProcessPoolExecutor({n})"),
    "pebble": ("pebble", "Scheduled(pebble.ProcessPool({n}))"),
    "mpire": ("mpire", "Applied(mpire.WorkerPool({n}))"),
    "dask": (
        "distributed",
        "distributed.Client(n_workers=1, dashboard_address=':0').get_executor(pure=False)",
    ),
    "ray": ("ray", "Remote()"),
}
# An initializer is another thing there, or none.
WITHOUT_INITIALIZER = {"mpire", "dask", "ray"}
# Programs at the same time: most of them wait, and none is timed.
AT_ONCE = 6
HEAD = """
import os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor as executor
from multiprocessing import get_context as context
import {module}
class Later:
    def __init__(self, result):
        self.result = result
class Applied:
    def __init__(self, pool):
        self.pool = pool
    def submit(self, function, *args):
        return Later(self.pool.apply_async(function, args).get)
class Scheduled(Applied):
    def submit(self, function, *args):
        return self.pool.schedule(function, args=args)
class Remote:
    def __init__(self):
        quiet = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.init(num_cpus=1, ignore_reinit_error=True, **quiet)
    def submit(self, function, *args):
        return ray.remote(function).remote(*args).future()
"""
# By what is deadly in it: what a script says before its guard and behind it, and what it needs.
PROGRAMS: dict[str, tuple[str, str, str]] = {
    "killed worker": (
        """
        def die():
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        """
        pool.submit(die).result()
        """,
        "os",
    ),
    "os._exit in a task": (
        """
        def leave():
            os._exit(3)
        """,
        """
        pool.submit(leave).result()
        """,
        "os",
    ),
    "exception that cannot be read": (
        """
        class TwoPartError(Exception):
            def __init__(self, code, text):
                super().__init__(text)
        def fail():
            raise TwoPartError(1, "text")
        """,
        """
        pool.submit(fail).result()
        """,
        "os",
    ),
    "failing initializer": (
        """
        def fail():
            raise ValueError("not today")
        """,
        """
        with make(initializer=fail) as pool:
            pool.submit(abs, -1).result()
        """,
        "os",
    ),
    "lock of another thread": (
        """
        LOCK = threading.Lock()
        def use():
            with LOCK:
                return 1
        """,
        """
        held = threading.Event()
        def hold():
            with LOCK:
                held.set()
                time.sleep(3)
        threading.Thread(target=hold).start()
        held.wait()
        with make() as pool:
            assert pool.submit(use).result() == 1
        """,
        "os",
    ),
    "OpenMP before the pool": (
        """
        import numpy as np
        from sklearn.ensemble import HistGradientBoostingClassifier
        data = np.random.default_rng(0).random((2000, 5))
        def fit():
            labels = data[:, 0] > 0.5
            return HistGradientBoostingClassifier(max_iter=3).fit(data, labels).n_iter_
        """,
        """
        fit()
        with make() as pool:
            assert pool.submit(fit).result() == 3
        """,
        "sklearn",
    ),
    "pool in a task": (
        """
        def inner():
            with make() as pool:
                return pool.submit(abs, -1).result()
        """,
        """
        assert pool.submit(inner).result() == 1
        """,
        "os",
    ),
}


def script(pool: str, program: str) -> str:
    """Return a script's text."""
    module, make = POOLS[pool]
    before, behind, _ = PROGRAMS[program]
    call = make.format(n="1, **options")
    lines = [HEAD.format(module=module), textwrap.dedent(before)]
    lines.append(f"def make(**options):\n    return Block({call})")
    lines.append(
        "class Block:\n"
        "    def __init__(self, pool):\n        self.pool = pool\n"
        "    def __enter__(self):\n        return self.pool\n"
        "    def __exit__(self, *_):\n        pass\n"
    )
    body = textwrap.dedent(behind)
    if "make(" not in body:
        body = "with make() as pool:\n" + textwrap.indent(body, "    ")
    lines.append("def run():\n" + textwrap.indent(body, "    "))
    lines.append(
        "if __name__ == '__main__':\n"
        "    try:\n        run()\n"
        "    except Exception as error:\n        print(type(error).__name__)\n"
        "    else:\n        print('right')\n"
        "    sys.stdout.flush()\n"
        "    os.killpg(0, signal.SIGKILL)\n"
    )
    return "\n".join(lines)


def outcome(pool: str, program: str, limit_s: float) -> str:
    """Return what a program did."""
    module, needed = POOLS[pool][0], PROGRAMS[program][2]
    if any(importlib.util.find_spec(name) is None for name in (module, needed)):
        return "not installed"
    if program == "failing initializer" and pool in WITHOUT_INITIALIZER:
        return "has none"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(script(pool, program))
        said = last_line([sys.executable, str(path)], limit_s=limit_s)
        return "hangs" if said is None else said or "ends without a word"


def main() -> None:
    """Run every program under every pool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=25.0, help="seconds")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    options = parser.parse_args()
    pairs = [(pool, program) for pool in POOLS for program in options.only]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(lambda pair: outcome(*pair, options.limit), pairs))
    rows: dict[str, list[str]] = {pool: [] for pool in POOLS}
    for (pool, _), what in zip(pairs, found, strict=True):
        rows[pool].append(what)
    title = f"programs that are deadly under some pool; hangs: not done after {options.limit:g} s"
    show_outcomes(title, options.only, rows)


if __name__ == "__main__":
    main()
