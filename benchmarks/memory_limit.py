"""What ``memory_limit=`` costs, and how soon it finds a task that takes too much.

    python benchmarks/memory_limit.py [--workers 8] [--seconds 10]

cpu     of the program while its workers run one long task each, with a limit and without
found   seconds from when a task that takes 1 GB a second exceeds 512 MiB to its error, and what
        it held
"""

from __future__ import annotations

import argparse
import tempfile
import time

from figures import OURS, show

import safepool

_MIB = 1 << 20


def wait(mebibytes: int, seconds: float) -> int:
    """Hold memory for some time."""
    held = bytearray(b"x") * (mebibytes * _MIB)
    time.sleep(seconds)
    return len(held)


def grow(path: str) -> None:
    """Take 1 GB a second, 10 MB at a time; say when it is more than 512 MiB."""
    held, begun = [], time.monotonic()
    while True:
        held.append(bytearray(b"x") * 10**7)
        if len(held) == 54:
            with open(path, "w") as file:
                file.write(str(time.monotonic()))
        time.sleep(max(0.0, len(held) / 100 - (time.monotonic() - begun)))


def cpu(workers: int, seconds: float, limit: str | None, mebibytes: int) -> float:
    """Return the share of a CPU, in percent."""
    with safepool.ProcessPool(workers, memory_limit=limit) as pool:
        list(pool.map(wait, [1] * workers, [0.5] * workers))
        futures = [pool.submit(wait, mebibytes, seconds + 3) for _ in range(workers)]
        time.sleep(2)
        used, begun = time.process_time(), time.monotonic()
        time.sleep(seconds)
        share = (time.process_time() - used) / (time.monotonic() - begun)
        assert not any(future.done() for future in futures)
    return share * 100


def found() -> tuple[float, float]:
    """Return the seconds and the mebibytes."""
    with (
        safepool.ProcessPool(1, memory_limit="512MiB") as pool,
        tempfile.NamedTemporaryFile() as file,
    ):
        error = pool.submit(grow, file.name).exception()
        took = time.monotonic() - float(file.read())
    assert isinstance(error, safepool.WorkerDiedError)
    assert error.exceeded is not None
    return took, error.exceeded.held_bytes / _MIB


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    asked = parser.parse_args()
    rows = {
        what: [(cpu(asked.workers, asked.seconds, limit, mebibytes),)]
        for limit, mebibytes, what in (
            (None, 1, "no limit"),
            ("1GiB", 1, "far from the limit"),
            ("64MiB", 60, "near the limit"),
        )
    }
    title = f"the program's share of a CPU while {asked.workers} workers run a long task each"
    show(title, ["%"], rows, base="no limit")
    rounds = [found() for _ in range(3)]
    title = "a task that takes 1 GB a second, with a limit of 512 MiB"
    show(title, ("seconds until its error", "MiB it held"), {OURS: rounds})


if __name__ == "__main__":
    main()
