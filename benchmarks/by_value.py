"""What it costs to send what only the program has, beside cloudpickle alone.

    python benchmarks/by_value.py

Functions and classes of ``__main__``, pickled and unpickled in one process; each figure is the
best of several. A class is looked up before it is made again, which costs a call and
saves making it.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import timeit
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle
from figures import OURS, show

from safepool.transport import payloads

if TYPE_CHECKING:
    from collections.abc import Callable


def square(x: int) -> int:
    """Return something that needs no more than the function itself."""
    return x * x


@functools.cache
def cached(x: int) -> int:
    """Return the same; cloudpickle alone sends the name, which the worker does not have."""
    return x * x


@dataclass
class Point:
    """Something small with a class."""

    x: int
    y: int = 0


def many_methods() -> type:
    """Return a class that is large."""
    return type("Large", (), {f"method_{n}": lambda self: self for n in range(50)})


def each_us(call: Callable[[], object]) -> float:
    """Return the microseconds of one call of many."""
    timer = timeit.Timer(call)
    number, _ = timer.autorange()
    return min(timer.repeat(repeat=3, number=number)) / number * 1e6


def main() -> None:
    """Print the figures."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    values: dict[str, Any] = {
        "a function": square,
        "an instance": Point(1),
        "1,000 instances": [Point(n) for n in range(1000)],
        "an instance of a large class": many_methods()(),
        "a cached function": cached,
    }
    for name, value in values.items():
        segments = [bytes(segment) for segment in payloads.dumps(value, by_value=True)]
        alone = cloudpickle.dumps(value)
        send = each_us(lambda value=value: payloads.dumps(value, by_value=True))
        send_alone = each_us(lambda value=value: cloudpickle.dumps(value))
        receive = each_us(lambda segments=segments: payloads.loads(segments))
        receive_alone = each_us(lambda alone=alone: pickle.loads(alone))
        rows = {OURS: [(send, receive)], "cloudpickle alone": [(send_alone, receive_alone)]}
        show(name, ("send us", "receive us"), rows)


if __name__ == "__main__":
    main()
