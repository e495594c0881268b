"""How often a worker is looked at that has a limit on its memory, and when it is found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from safepool.pool.core.gauge import Gauge

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.unit

GB = 10**9
LIMIT = 2 * GB
BORN = GB // 10


@dataclass(frozen=True)
class Looks:
    """A worker's time: looks until it was found out, and what it held then."""

    count: int
    found_s: float
    held: int


def watch(held_at: Callable[[float], float], most_s: float = 10.0) -> Looks:
    gauge, now_ns, count = Gauge(LIMIT, BORN), 0, 0
    while now_ns < most_s * 1e9:
        count += 1
        held = gauge.note(BORN + int(held_at(now_ns / 1e9)), now_ns)
        if held is not None:
            return Looks(count, now_ns / 1e9, held)
        assert gauge.look_ns > now_ns
        now_ns = gauge.look_ns
    return Looks(count, most_s, 0)


# One row per task: what it holds when, and when it holds too much.
HOGS: dict[str, tuple[Callable[[float], float], float]] = {
    "1 GB a second from its start": (lambda s: s * GB, 2.0),
    "1 GB a second after a while": (lambda s: max(0.0, s - 3.33) * GB, 5.33),
    "1 GB a second, just below the limit": (lambda s: LIMIT - 1e6 + max(0, s - 3.33) * GB, 3.331),
    "10 GB at once": (lambda s: 10 * GB * (s > 3.33), 3.33),
    "20 MB a second": (lambda s: 1.9 * GB + s * 20e6, 5.0),
    "in steps": (lambda s: int(s / 0.4) * 0.5 * GB, 2.0),
}


@pytest.mark.parametrize("hog", HOGS)
def test_a_hog_is_found_out_in_time(hog: str) -> None:
    held_at, exceeds_s = HOGS[hog]
    found = watch(held_at)

    assert exceeds_s <= found.found_s <= exceeds_s + 0.11
    assert found.held > LIMIT


# One row per task that stays below: what it holds when. And the looks in ten seconds.
OTHERS: dict[str, tuple[Callable[[float], float], int]] = {
    "holds nothing": (lambda _: 0, 101),
    "stays just below the limit": (lambda _: LIMIT, 110),
    "comes and goes": (lambda s: GB * (int(s / 0.25) % 2), 101),
    "comes and goes just below the limit": (lambda s: LIMIT - 2e8 * (int(s / 0.25) % 2), 260),
    "grows slowly": (lambda s: LIMIT / 2 + s * 50e6, 101),
}


@pytest.mark.parametrize("other", OTHERS)
def test_who_does_not_grow_is_seldom_looked_at(other: str) -> None:
    held_at, most = OTHERS[other]
    found = watch(held_at)

    assert found.held == 0
    assert 95 <= found.count <= most
