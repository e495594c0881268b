"""What tests of arrays run in workers, and how they count what is left of arrays."""

from __future__ import annotations

import mmap
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

NAME = "memfd:safepool-arrays"
# Large enough for files of their own, small enough for hundreds of tests.
ITEMS = (4 << 20) // 8


def itself(value: Any) -> Any:
    return value


def total(array: Any) -> float:
    return float(array.sum())


def ones(items: int) -> Any:
    return np.ones(items)


def overwrite(array: Any) -> float:
    """Return what was there: tasks must not see each other's writes."""
    before = float(array[0])
    array[:] = -1
    return before


def flags(array: Any) -> tuple[bool, bool, bool, tuple[int, ...]]:
    kinds = array.flags
    return kinds.writeable, kinds.c_contiguous, kinds.f_contiguous, array.shape


def write_at(array: Any, index: int) -> None:
    array[index] = index


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def address_and_pid(array: Any) -> tuple[int, int]:
    time.sleep(0.002)
    return address(array), os.getpid()


def files_here(_: object = None) -> tuple[int, int]:
    """Return how many mappings and descriptors of our files this process has."""
    maps = Path("/proc/self/maps").read_text()
    mapped = sum(NAME in line for line in maps.splitlines())
    opened = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            opened += NAME in os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            pass  # the listing's own
    return mapped, opened


def expect_files(mapped: int, opened: int) -> None:
    """Wait until this process has so many.

    The thread that hands a result over has something of its message for a moment longer.
    """
    deadline = time.monotonic() + 30
    while files_here() != (mapped, opened) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert files_here() == (mapped, opened)


def use_up_descriptors() -> list[int]:
    """Open as many files as this process may."""
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return taken


def answer_without_descriptors(array: Any) -> Any:
    """Return the array doubled, by a worker that has no descriptor left."""
    low, high = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(low, 256), high))
    taken = use_up_descriptors()
    _taken.extend(taken)
    return array * 2


_taken: list[int] = []


def give_descriptors_back() -> None:
    while _taken:
        os.close(_taken.pop())


def limit_memory(extra_bytes: int) -> None:
    """Let this process have so many further bytes of addresses."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size + extra_bytes, resource.RLIM_INFINITY))


def unlimit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
