"""The core of a cluster pool: tables, every order of events, and planted faults."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_cluster_explorer import Letter, Scenario, World
from support_orders import BadStateError, explore, walk

from safepool.cluster import core as c
from safepool.cluster.core import Core

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.unit

TWO = {"p": "n", "q": "m"}
SAME = {"p": "n", "q": "n"}

SCENARIOS: dict[str, Scenario] = {
    "a node is lost at every step": Scenario(budget={"lose": 1}),
    "a node is lost, with retries": Scenario(retries=1, budget={"lose": 2}),
    "one of two nodes is lost": Scenario(places=TWO, retries=1, budget={"lose": 1}),
    "a worker of a node dies": Scenario(retries=1, budget={"die": 2}),
    "a worker dies, and a node is lost": Scenario(retries=1, budget={"die": 1, "lose": 1}),
    "two processes of one node": Scenario(places=SAME, retries=1, budget={"lose": 1}),
    "the process with the agent is lost for good": Scenario(
        places=SAME, retries=1, comes_back=False, budget={"lose": 1}
    ),
    "another cluster pool uses the second process": Scenario(
        places=SAME, retries=1, holder="q", budget={"lose": 1}
    ),
    "a process that is lost still has the agent": Scenario(
        places=SAME, retries=1, frees=False, budget={"lose": 2}
    ),
    "a process of another engine has the agent": Scenario(
        places=SAME, holder="elsewhere", budget={"lose": 1}
    ),
    "calls follow each other": Scenario("abcd", known_s=0.02, budget={"lose": 1}),
    "one of two nodes is used": Scenario(places=TWO, most_nodes=1, budget={"lose": 1}),
    "a node that is refused": Scenario(refused="p", budget={"tick": 1}),
    "a node that never answers": Scenario(mute="p", budget={"lose": 1, "tick": 1}),
    "one of two is refused": Scenario(places=TWO, refused="p", budget={"lose": 1, "tick": 1}),
    "the only node that is not refused restarts": Scenario(
        places=TWO, refused="q", retries=1, budget={"lose": 1, "tick": 1, "later": 1}
    ),
    "the only node that takes the arguments restarts": Scenario(
        places=TWO, refused="q", wrong=True, retries=1, budget={"lose": 1, "tick": 1, "later": 1}
    ),
    "the first node to join is refused": Scenario(
        places=TWO, refused="q", late="p", budget={"join": 1, "tick": 2}
    ),
    "a node that nobody has named is refused": Scenario(
        places=TWO, refused="q", unnamed="q", late="p", budget={"join": 1, "tick": 2}
    ),
    "arguments that are wrong": Scenario(
        places=TWO, refused="pq", wrong=True, budget={"lose": 1, "tick": 1}
    ),
    "arguments that one does not take": Scenario(
        places=TWO, refused="p", wrong=True, budget={"lose": 1, "tick": 1}
    ),
    "short calls are sent ahead": Scenario("abc", known_s=0.001, budget={"lose": 1}),
    "calls are asked back": Scenario("abcd", TWO, known_s=0.02, budget={"tick": 2, "lose": 1}),
    "a call is dropped": Scenario("abc", known_s=0.001, budget={"drop": 1, "lose": 1}),
    "one message at a time": Scenario(
        "abc", at_once=True, retries=1, budget={"lose": 1, "die": 1}
    ),
    "it is closed": Scenario(retries=1, budget={"close": 1, "lose": 1}),
    "what waits is cancelled": Scenario("abc", budget={"cancel": 1, "lose": 1}),
    "it is ended by force": Scenario("abc", retries=1, budget={"end": 1, "lose": 1}),
    "the engine is gone": Scenario("abc", retries=1, budget={"broke": 1, "lose": 1}),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_comes_in_whatever_order_every_call_ends_once(name: str) -> None:
    assert explore(World(Core, SCENARIOS[name])) > 3


LARGE: dict[str, Scenario] = {
    "many": Scenario(
        "abcdefgh", {"p": "n", "q": "n", "r": "m"}, workers=2, retries=2, known_s=0.02,
        budget={"lose": 3, "die": 3, "drop": 2, "tick": 4, "close": 1},
    ),
    "one at a time": Scenario(
        "abcdefgh", TWO, workers=2, retries=1, known_s=0.3, at_once=True,
        budget={"lose": 2, "die": 2, "drop": 1, "cancel": 1},
    ),
    "the end": Scenario(
        "abcdef", TWO, workers=2, retries=1, budget={"lose": 2, "tick": 2, "end": 1, "broke": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_walks_at_random_through_more(name: str) -> None:
    for seed in range(25):
        assert walk(World(Core, LARGE[name]), random.Random(seed)) > 0


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        Scenario,
        st.sampled_from(["a", "abc", "abcdef"]),
        st.sampled_from([TWO, SAME, {"p": "n"}]),
        workers=st.integers(1, 3),
        retries=st.integers(0, 2),
        refused=st.sampled_from(["", "q"]),
        at_once=st.booleans(),
        most_nodes=st.sampled_from([None, 1]),
        known_s=st.sampled_from([None, 0.0, 0.01, 1.0]),
        budget=st.fixed_dictionaries(
            {}, optional={what: st.integers(1, 3) for what in ("lose", "die", "drop", "tick")}
        ),
    ),
    st.integers(0, 1000),
)
def test_any_scenario_ends(scenario: Scenario, seed: int) -> None:
    walk(World(Core, scenario), random.Random(seed), most=150)


FAULTS: dict[str, tuple[str, str, str]] = {
    "one start too many after a node": (
        "a node is lost, with retries",
        "if call.attempts > (call.policy.retries or 0):",
        "if call.attempts > 1 + (call.policy.retries or 0):",
    ),
    "one start too many after a worker": (
        "a worker of a node dies",
        "if call.attempts <= (call.policy.retries or 0) and",
        "if call.attempts <= 1 + (call.policy.retries or 0) and",
    ),
    "a lost node is no attempt": (
        "a worker dies, and a node is lost",
        "            call.attempts += 1\n            if call.attempts > ",
        "            if call.attempts > ",
    ),
    "calls of a lost node are forgotten": (
        "a node is lost, with retries",
        "                again.append(call)\n        self._put_back(again)\n\n    def _open(",
        "                pass\n        self._put_back(again)\n\n    def _open(",
    ),
    "two messages to a node at a time": (
        "calls follow each other",
        "free = [one for one in self._open() if not one.posting]",
        "free = self._open()",
    ),
    "two agents of one node": (
        "a process that is lost still has the agent",
        "or place.gives_way or place.node in taken or full",
        "or place.gives_way or full",
    ),
    "nobody has the agent that all give way to": (
        "a process of another engine has the agent",
        "if one.node not in taken and not (one.gives_way and self.is_asking):",
        "if one.node not in taken and not one.gives_way:",
    ),
    "they give way for ever": (
        "a process of another engine has the agent",
        "self._actions.append(Open(place.name, place.gives_way))",
        "self._actions.append(Open(place.name))",
    ),
    "a spare process is forgotten": (
        "the process with the agent is lost for good",
        "for one in [] if full else",
        "for one in [] if True else",
    ),
    "calls that came back are forgotten": (
        "calls are asked back",
        "self._put_back(call for call in found if call is not None)",
        "pass",
    ),
    "nobody gives up waiting": (
        "a node that never answers",
        "            ends.append(self._nobody_since_s + self._no_nodes_s)",
        "            pass",
    ),
    "a restart is not waited for": (
        "the only node that is not refused restarts",
        "since_s = max(one.refused_s, self._nobody_since_s)",
        "since_s = one.refused_s",
    ),
    "arguments that a node has taken are wrong": (
        "the only node that takes the arguments restarts",
        "hopeless = one.wrong and not self._was_open",
        "hopeless = one.wrong",
    ),
    "no other node is waited for": (
        "the first node to join is refused",
        "ends.append(since_s + (_WRONG_S if hopeless else _UNFIT_S))",
        "ends.append(since_s)",
    ),
    "a node that nobody has named ends the waiting": (
        "a node that nobody has named is refused",
        "if one.state is State.REFUSED and one.wanted:",
        "if one.state is State.REFUSED:",
    ),
    "calls of a dead engine are forgotten": (
        "the engine is gone",
        "calls += [call for call, _ in place.sent.values()]",
        "pass",
    ),
    "what comes later to a dead engine waits": (
        "it is ended by force",
        "self._actions.append(Lose(call, place.name, event.reason))",
        "pass",
    ),
    "a closed pool does not finish": (
        "it is closed",
        "if self._closing and idle and not self._finished:",
        "if self._closing and idle and self._finished:",
    ),
}


@pytest.fixture
def mutants() -> Iterator[list[str]]:
    names: list[str] = []
    yield names
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_core_is_found(name: str, mutants: list[str]) -> None:
    scenario, old, new = FAULTS[name]
    source = Path(c.__file__ or "").read_text(encoding="utf-8")
    assert source.count(old) == 1, old
    module = ModuleType("safepool_cluster_mutant")
    sys.modules[module.__name__] = module
    mutants.append(module.__name__)
    exec(compile(source.replace(old, new), module.__name__, "exec"), vars(module))
    # Events and actions are those of the core itself: it looks their types up.
    own = {kind.__name__ for kind in (*get_args(c.Event), *get_args(c.Action))} | {"Answer"}
    vars(module).update({kind: getattr(c, kind) for kind in own})
    handlers = vars(module)["_DO"].items()
    vars(module)["_DO"] = {getattr(c, kind.__name__): handle for kind, handle in handlers}
    with pytest.raises(BadStateError):
        explore(World(vars(module)["Core"], SCENARIOS[scenario]), 20000)


def test_the_tables_name_every_event_and_every_action() -> None:
    told = {*re.findall(r"^    ([A-Z][A-Za-z]+)\(", c.__doc__ or "", re.MULTILINE)}
    assert told == {kind.__name__ for kind in (*get_args(c.Event), *get_args(c.Action))}


def opened(workers: int = 2, mean_s: float | None = None, **words: Any) -> Core:
    core = Core(**words)
    if mean_s is not None:
        vars(core)["_mean_s"]["f"] = mean_s
    core.handle(c.Listed(["p"]), 0.0)
    core.handle(c.Opened("p", "n", workers), 0.0)
    return core


# Mean time of the function, workers of the node, and how many of 1000 calls are sent at once.
SENT: dict[str, tuple[float | None, int, int]] = {
    "nothing is known": (None, 2, 2),
    "long calls": (1.0, 2, 2),
    "a little shorter than the time ahead": (0.03, 1, 1),
    "short calls": (0.0078125, 2, 12),
    "calls that take no time": (0.0, 1, 1000),
}


@pytest.mark.parametrize("name", SENT)
def test_no_more_is_sent_than_begins_soon(name: str) -> None:
    mean_s, workers, expected = SENT[name]
    core = opened(workers, mean_s=mean_s)
    (action,) = core.handle(c.Queued([Letter("x", 0) for _ in range(1000)]), 0.0)
    assert isinstance(action, c.Deliver)
    assert len(action.calls) == expected


def test_calls_are_divided_among_nodes() -> None:
    core = Core()
    core.handle(c.Listed(["p", "q"]), 0.0)
    for place, node in (("p", "n"), ("q", "m")):
        core.handle(c.Opened(place, node, 4), 0.0)
    actions = core.handle(c.Queued([Letter("x", 0) for _ in range(4)]), 0.0)
    assert [len(one.calls) for one in actions if isinstance(one, c.Deliver)] == [2, 2]


def test_why_no_node_was_there_is_told() -> None:
    core = Core(no_nodes_s=5.0)
    core.handle(c.Listed(["p", "q"]), 0.0)
    core.handle(c.Refused("p", "it has Python 2.7"), 0.0)
    call = Letter("x", 0)
    assert core.handle(c.Queued([call]), 1.0) == []
    assert core.next_look() == 6.0
    (action,) = core.handle(c.Look(), 6.0)
    told = "p: it has Python 2.7; q: it has not answered"
    assert action == c.Fail([call], f"no node could take a call for 5 s ({told})", True)


def test_nodes_of_another_version_are_told_when_each_has_answered_and_no_other_joins() -> None:
    core = Core()
    core.handle(c.Listed(["p", "q"]), 0.0)
    call = Letter("x", 0)
    assert core.handle(c.Queued([call]), 1.0) == []
    assert core.handle(c.Refused("p", "it has Python 2.7"), 2.0) == []
    assert core.next_look() is None  # the other may be right, however long it takes
    assert core.handle(c.Look(), 1000.0) == []
    # The first has had its time.
    (action,) = core.handle(c.Refused("q", "it has Python 2.6"), 1001.0)
    told = "no node can be used (p: it has Python 2.7; q: it has Python 2.6)"
    assert action == c.Fail([call], told, True)
    # One that joins is asked, and used.
    assert core.handle(c.Listed(["p", "q", "r"]), 1002.0) == [c.Open("r")]
    assert core.handle(c.Queued([call]), 1003.0) == []
    (sent,) = core.handle(c.Opened("r", "n", 1), 1004.0)
    assert isinstance(sent, c.Deliver)


def test_a_restart_of_the_only_node_that_can_be_used_is_waited_for() -> None:
    core = Core(no_nodes_s=60.0)
    core.handle(c.Listed(["a", "b"]), 0.0)
    core.handle(c.Refused("a", "it has Python 2.7"), 0.0)
    core.handle(c.Opened("b", "n", 1), 0.0)
    calls = [Letter("x", 3), Letter("y", 3)]
    core.handle(c.Queued(calls), 100.0)
    assert core.handle(c.Lost("b", "killed"), 200.0) == []
    assert core.next_look() == 210.0
    assert core.handle(c.Listed(["a", "new b"]), 205.0) == [c.Open("new b")]
    assert core.next_look() == 260.0  # it may be slow
    (sent,) = core.handle(c.Opened("new b", "n", 1), 215.0)
    assert isinstance(sent, c.Deliver)
    # It does not come back.
    assert core.handle(c.Lost("new b", "killed"), 300.0) == []
    (action,) = core.handle(c.Look(), 310.0)
    assert action == c.Fail(calls, "no node can be used (a: it has Python 2.7)", True)


def test_a_node_that_joins_after_one_that_cannot_be_used_is_waited_for() -> None:
    core = Core()
    call = Letter("x", 0)
    core.handle(c.Listed(["a"]), 0.0)
    core.handle(c.Refused("a", "it has Python 2.7"), 1.0)
    assert core.handle(c.Queued([call]), 100.0) == []
    assert core.next_look() == 110.0
    core.handle(c.Listed(["a", "b"]), 109.0)
    (sent,) = core.handle(c.Opened("b", "n", 1), 111.0)
    assert isinstance(sent, c.Deliver)


def test_a_refusal_of_a_node_that_is_not_named_does_not_end_the_waiting() -> None:
    core = Core(no_nodes_s=60.0)
    call = Letter("x", 0)
    core.handle(c.Listed(["a"]), 0.0)
    core.handle(c.Queued([call]), 0.0)
    assert core.handle(c.Refused("a", "no safepool", wanted=False), 0.2) == []
    assert core.next_look() == 60.0
    (action,) = core.handle(c.Look(), 60.0)
    told = "no node could take a call for 60 s (a: no safepool)"
    assert action == c.Fail([call], told, True)


def test_wrong_arguments_are_told_when_a_node_has_had_the_time_to_take_them() -> None:
    core = Core()
    core.handle(c.Listed(["p", "q"]), 0.0)
    call = Letter("x", 0)
    assert core.handle(c.Queued([call]), 1.0) == []
    assert core.handle(c.Refused("p", "no gpu", wrong=True), 2.0) == []
    assert core.next_look() == 7.0
    assert core.handle(c.Refused("q", "no gpu", wrong=True), 3.0) == []
    (action,) = core.handle(c.Look(), 7.0)
    told = "no node can be used (p: no gpu; q: no gpu)"
    assert action == c.Fail([call], told, True)
    core.handle(c.Listed(["p", "q", "r"]), 8.0)
    assert core.handle(c.Queued([call]), 9.0) == []
    assert core.next_look() == 14.0
    (action,) = core.handle(c.Opened("r", "n", 1), 13.0)
    assert isinstance(action, c.Deliver)


def test_places_that_are_not_used_are_told() -> None:
    core = Core(no_nodes_s=5.0)
    core.handle(c.Listed(["p", "q"]), 0.0)
    core.handle(c.Opened("p", "n", 2, wanted=False), 0.0)
    call = Letter("x", 0)
    core.handle(c.Queued([call]), 1.0)
    (action,) = core.handle(c.Look(), 6.0)
    told = "p: it is not one of nodes=; q: it has not answered"
    assert action == c.Fail([call], f"no node could take a call for 5 s ({told})", True)
