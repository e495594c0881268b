"""``map`` over an iterator without an end takes what its results are taken for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import support_tasks

from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Iterator

# Far more than is ever read ahead; then the test ends instead of eating the memory.
_MOST = 500_000


def numbers(taken: list[int]) -> Iterator[int]:
    for number in range(_MOST):
        taken[0] = number
        yield number
    raise AssertionError("everything was taken")


def test_leaving_early_takes_nothing_more() -> None:
    """The iterator's weak reference dies before its ``finally`` runs: no reason to read on."""
    taken = [0]

    with ProcessPool(1) as pool:
        for value in pool.map(support_tasks.square, numbers(taken)):
            if value == 9:
                break

    assert 3 <= taken[0] < 20_000


def test_dropped_without_a_look_its_calls_run_all_the_same() -> None:
    """As in the standard pool, a ``map`` for the sake of what its calls do."""
    taken = [0]

    with ProcessPool(1) as pool:
        pool.map(support_tasks.square, itertools.islice(numbers(taken), 2000))

    assert taken[0] == 1999
