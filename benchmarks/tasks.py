"""What the benchmarks run in workers. In a module of its own: every pool can import it there."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def nothing(value: int) -> int:
    """Return at once: what is left is the pool's own cost."""
    return value


def spin(microseconds: int) -> int:
    """Keep a CPU busy for so long, by the wall clock."""
    end = time.perf_counter_ns() + microseconds * 1000
    while time.perf_counter_ns() < end:
        pass
    return microseconds


def spin_and_tell(microseconds: int) -> int:
    """Keep a CPU busy for so long; return the id of this process."""
    spin(microseconds)
    return os.getpid()


def sleep_or_spin(microseconds: int) -> float:
    """Spin, or sleep if it is long; return when it ended, by the clock of all processes."""
    if microseconds < 100_000:
        spin(microseconds)
    else:
        time.sleep(microseconds / 1e6)
    return time.monotonic()


def die_if_odd_one_out(value: int) -> int:
    """Kill the own process for one value of a thousand."""
    if value % 1000 == 500:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def numpy_and_scipy_loaded(_: object = None) -> int:
    """Import what a scientific task needs, and stay a moment so that every worker gets one."""
    import numpy as np
    import scipy.linalg

    assert np
    assert scipy.linalg
    time.sleep(0.01)
    return os.getpid()


def loaded_modules(_: object = None) -> int:
    """Return how many modules this process has imported."""
    return len(sys.modules)


def touch(array: Any) -> float:
    """Read one item of each page of memory."""
    return float(array[::512].sum())


def make_array(items: int) -> Any:
    """Return an array of so many floats, all of them written."""
    import numpy as np

    return np.ones(items)


def hold(array: Any) -> float:
    """Read an array, and keep it for a second."""
    total = float(array.sum())
    time.sleep(1)
    return total


def set_file_bytes(count: int) -> None:
    """Let this worker send results of so many bytes in files, and smaller ones in the stream."""
    from safepool.transport import channel

    channel.FILE_BYTES = count
