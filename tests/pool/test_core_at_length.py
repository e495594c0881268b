"""The core: every order of events for more calls and workers than ``test_core`` has time for."""

from __future__ import annotations

import pytest
from support_explorer import Scenario, World
from support_orders import explore

from safepool.pool.core.machine import Core

THREE = {"a": "", "b": "", "c": ""}

# As in test_core.py. A minute of CPU time each at the most.
SCENARIOS: dict[str, Scenario] = {
    "the pool shrinks, and a worker dies": Scenario(
        THREE, unread=2, retries=1, budget={"resize": 1, "die": 1}
    ),
    "what waits is cancelled": Scenario(THREE, unread=2, budget={"cancel": 1}),
    "a worker dies of a map": Scenario(
        maps=(("a", "b", "c"),), unread=2, retries=1, budget={"die": 1}
    ),
    "none sent ahead": Scenario(THREE, known=False, retries=1, budget={"die": 1, "resize": 1}),
    "an end by force": Scenario(THREE, unread=2, budget={"terminate": 1}),
    "no boards": Scenario(THREE, boards=False, retries=1, budget={"die": 1, "drop": 1}),
    "a call is cancelled": Scenario(THREE, unread=2, budget={"drop": 1}),
    "four calls, three workers, none sent ahead": Scenario(
        {**THREE, "d": ""}, size=3, known=False, retries=1, budget={"die": 1}
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_comes_in_whatever_order_every_call_ends_once(name: str) -> None:
    assert explore(World(Core, SCENARIOS[name])) > 1000
