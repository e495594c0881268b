"""The core: every order of events for few calls and workers, and faults that this must find."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, get_args

import pytest
from support_explorer import Scenario, World
from support_orders import BadStateError, explore, walk

from safepool.pool.core import events, machine, starts
from safepool.pool.core.machine import Core

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.unit

TWO = {"a": "", "b": ""}
THREE = {"a": "", "b": "", "c": ""}
MAP = (("a", "b", "c"),)

# What is there, and what may happen. The letters of a call are explained at `Scenario`.
SCENARIOS: dict[str, Scenario] = {
    "a death at every step": Scenario(TWO, retries=1, budget={"die": 1}),
    "two deaths of one worker": Scenario(THREE, size=1, retries=1, budget={"die": 2}),
    "no retry": Scenario(THREE, size=1, budget={"die": 1}),
    "no boards": Scenario(TWO, boards=False, size=1, retries=1, budget={"die": 1, "drop": 1}),
    "nothing known of the function": Scenario(TWO, known=False, budget={"die": 1}),
    "a call hangs": Scenario({"a": "h", "b": ""}, timeout_s=1.0, budget={"tick": 1}),
    "a call hangs before others": Scenario(
        {"a": "h", "b": "", "c": ""}, size=1, timeout_s=1.0, budget={"tick": 1}
    ),
    "a call hangs, with retries": Scenario(
        {"a": "", "b": "h"}, size=1, timeout_s=1.0, retries=1, budget={"tick": 2, "die": 1}
    ),
    "time passes before a call begins": Scenario(TWO, size=1, timeout_s=1.0, budget={"tick": 1}),
    "calls are cancelled": Scenario(TWO, size=1, budget={"drop": 2}),
    "a call is cancelled, and a worker dies": Scenario(TWO, size=1, budget={"drop": 1, "die": 1}),
    "a call that hangs is cancelled": Scenario({"a": "", "b": "h"}, size=1, budget={"drop": 2}),
    "a call takes too much memory": Scenario(TWO, size=1, budget={"exceed": 1}),
    "a call takes too much memory, with retries": Scenario(
        TWO, size=1, retries=1, budget={"exceed": 1}
    ),
    "too much memory, without boards": Scenario(
        TWO, boards=False, size=1, retries=1, budget={"exceed": 1}
    ),
    "the pool shrinks and grows": Scenario(TWO, budget={"resize": 1}),
    "the pool is closed": Scenario(THREE, size=1, budget={"close": 1, "die": 1}),
    "what waits is cancelled": Scenario(THREE, size=1, budget={"cancel": 1, "die": 1}),
    "the pool is ended by force": Scenario(
        THREE, size=1, retries=1, budget={"terminate": 1, "die": 1}
    ),
    "all workers are started ahead": Scenario(
        {"a": ""}, budget={"fill": 1, "die": 1, "resize": 1}
    ),
    "the system refuses a second worker": Scenario(
        {"a": ""}, known=False, late=("b",), budget={"refuse": 1}
    ),
    "the system refuses the only worker": Scenario(
        {"a": ""}, size=1, retries=1, budget={"refuse": 2, "die": 1, "fill": 1}
    ),
    "the script fails for the next worker": Scenario(
        {"a": ""}, size=1, retries=1, budget={"spoil": 3, "die": 1}
    ),
    "an initializer fails": Scenario(TWO, budget={"fail": 1}),
    "one death breaks the pool": Scenario(
        TWO, size=1, break_on_death=True, retries=1, budget={"die": 2}
    ),
    "workers are replaced after two calls": Scenario(
        THREE, size=1, tasks_per_worker=2, budget={"die": 1}
    ),
    "large calls": Scenario(
        {"a": "l", "b": "", "c": "l"}, size=1, budget={"failed": 1, "drop": 1}
    ),
    "a call is pickled elsewhere": Scenario(
        {"a": "a", "b": ""}, size=1, budget={"terminate": 1, "die": 1}
    ),
    "a call behind others is pickled elsewhere": Scenario(
        {"a": "", "b": "", "c": "a", "d": ""}, size=1, retries=1, budget={"die": 1}
    ),
    "a call is pickled elsewhere, and two workers": Scenario(
        {"a": "a", "b": "", "c": ""}, unread=2
    ),
    "calls are taken back": Scenario(THREE, size=1, budget={"tick": 2}),
    "calls of a map are taken back": Scenario(
        {"d": ""}, maps=MAP, size=1, retries=1, budget={"tick": 1, "die": 1}
    ),
    "a map": Scenario(maps=MAP, size=1, retries=1, budget={"die": 2}),
    "a map of two workers": Scenario(maps=(("a", "b"),), budget={"die": 1}),
    "a map is ended by force": Scenario(maps=MAP, size=1, budget={"terminate": 1, "die": 1}),
    "a call of a map hangs": Scenario(
        {"a": "", "b": "h"}, maps=(("c",),), size=1, timeout_s=1.0, budget={"tick": 1}
    ),
    "a map that hangs is left": Scenario(
        {"a": ""}, poison={"b": "h"}, maps=(("c", "b"),), size=1, budget={"leave": 1}
    ),
    "a map in two workers is left": Scenario(maps=(("a", "b"),), budget={"leave": 1}),
    "chunks that stay together": Scenario(
        maps=(("a", "b", "c", "d"),), at_once=2, bound=True, size=1, budget={"die": 1}
    ),
    "a map and a call": Scenario({"c": ""}, maps=(("a", "b"),), size=1, budget={"drop": 1}),
    "callers send calls themselves": Scenario(
        {"a": ""}, size=1, retries=1, late=("b", "c"), budget={"die": 1}
    ),
    "callers send calls to two workers": Scenario({"a": ""}, late=("b",), budget={"resize": 1}),
    "a call that a caller has sent is cancelled": Scenario(
        {"a": ""}, size=1, late=("b",), budget={"drop": 1}
    ),
    "a pool is closed while callers send calls": Scenario(
        {"a": ""}, size=1, late=("b", "c"), budget={"close": 1, "terminate": 1}
    ),
    "callers send the calls of a map themselves": Scenario(
        {"a": ""}, size=1, retries=1, late=("b", "c"), together=True, budget={"die": 1}
    ),
    "a map that a caller has sent is left": Scenario(
        {"a": ""}, size=1, late=("b", "c"), together=True, budget={"leave": 1}
    ),
    "a map that a caller has sent, and two workers": Scenario(
        {"a": ""}, late=("b", "c"), together=True, unread=2
    ),
    "arguments that cannot be read": Scenario({"z": ""}, maps=MAP, size=1, poison={"b": "u"}),
    "arguments that kill who reads them": Scenario(maps=MAP, size=1, poison={"b": "p"}),
}


# Three calls and two workers.
SCENARIOS |= {
    "three calls, a death": Scenario(THREE, unread=2, retries=1, budget={"die": 1}),
    "three calls, the pool is closed": Scenario(THREE, unread=2, budget={"close": 1}),
    "three calls, one hangs": Scenario(
        {"a": "h", "b": "", "c": ""}, unread=2, timeout_s=1.0, budget={"tick": 1}
    ),
    "three calls, large ones": Scenario(
        {"a": "l", "b": "", "c": "l"}, unread=2, retries=1, budget={"die": 1}
    ),
    "three calls, no boards": Scenario(THREE, boards=False, retries=1, budget={"die": 1}),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_comes_in_whatever_order_every_call_ends_once(name: str) -> None:
    assert explore(World(Core, SCENARIOS[name])) > 20


# Too many orders for all of them.
LARGE: dict[str, Scenario] = {
    "calls": Scenario(
        dict.fromkeys("abcdef", ""),
        retries=2,
        budget={"die": 3, "drop": 2, "resize": 3, "close": 1, "exceed": 2},
    ),
    "calls of all kinds": Scenario(
        {"a": "h", "b": "l", "c": "a", "d": "", "e": "l", "f": ""},
        timeout_s=1.0,
        retries=1,
        tasks_per_worker=3,
        budget={"die": 2, "tick": 3, "failed": 1, "resize": 1},
    ),
    "calls that callers send": Scenario(
        {"a": "", "b": "l"},
        late=("c", "d", "e", "f", "g"),
        retries=1,
        budget={"die": 2, "drop": 2, "resize": 2, "tick": 1},
    ),
    "maps": Scenario(
        {"x": "", "y": ""},
        maps=(("a", "b", "c", "d", "e"), ("f", "g", "h")),
        retries=1,
        poison={"c": "u", "g": "p"},
        budget={"die": 2, "tick": 3, "resize": 2, "drop": 1, "exceed": 2},
    ),
    "the end": Scenario(
        {"a": "", "b": "a", "c": "l", "d": ""},
        maps=(("e", "f", "g"),),
        at_once=2,
        budget={"die": 2, "terminate": 1, "close": 1, "resize": 1},
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_walks_at_random_through_more(name: str) -> None:
    for seed in range(25):
        assert walk(World(Core, LARGE[name]), random.Random(seed)) > 0


# One row per fault that a user would meet: where it is found, a line of the core, and what stands
# there instead.
FAULTS: dict[str, tuple[str, str, str]] = {
    "one retry too many": (
        "two deaths of one worker",
        "again.attempts >= retries",
        "again.attempts > retries",
    ),
    "what was not begun is lost with its worker": (
        "no retry",
        "back = ledger.take_back(event.began)",
        "back = []",
    ),
    "what was only read is lost with its worker": (
        "a map",
        "back = ledger.take_back(event.began)",
        "back = ledger.take_back(event.claimed)",
    ),
    "a call that was passed over is forgotten": (
        "the pool shrinks and grows",
        "self._queue_again([member.ledger.withdraw()])",
        "member.ledger.withdraw()",
    ),
    "what was not sent is forgotten": ("large calls", "self._queue_again(event.back)", "pass"),
    "what is taken back is forgotten": (
        "a call hangs before others",
        "self._queue_again(back)",
        "pass",
    ),
    "a signal for one call meets the next": (
        "calls are cancelled",
        "if _is_of(head, unwanted) and member.can_be_at(head.position + head.count - 1):",
        "if _is_of(head, unwanted):",
    ),
    "a time that is over ends the next call": (
        "time passes before a call begins",
        "member.next == then.overdue and member.can_be_at(then.overdue)",
        "head is not None",
    ),
    "a call whose time was over is run again": (
        "a call hangs, with retries",
        "is_last = condemned is not None or bool(self.force)",
        "is_last = bool(self.force)",
    ),
    "a cancelled call behind others runs on": (
        "a call that hangs is cancelled",
        "self._unwanted.append((member, unwanted))",
        "pass",
    ),
    "a call of a map that was left runs on": (
        "a map that hangs is left",
        "return work is unwanted or (isinstance(work, Span) and work.run is unwanted)",
        "return work is unwanted",
    ),
    "the second call of a span that was left runs on": (
        "a map that hangs is left",
        "member.can_be_at(head.position + head.count - 1)",
        "member.can_be_at(head.position)",
    ),
    "a call that runs is taken back": (
        "calls are cancelled",
        "back = member.ledger.take_back(claimed)",
        "back = member.ledger.take_back(claimed - 1)",
    ),
    "a worker that has done its tasks stays": (
        "workers are replaced after two calls",
        "member.tasks_done > most",
        "member.tasks_done - 1 > most",
    ),
    "an earlier message is passed over": (
        "calls are cancelled",
        "if peeked:",
        "if False:",
    ),
    "calls that cannot be read together are forgotten": (
        "arguments that cannot be read",
        "self._queue_again([head.only(place) for place in range(head.count)])",
        "pass",
    ),
    "too many workers stay": (
        "the pool shrinks and grows",
        "too_many = member.index >= size",
        "too_many = False",
    ),
    "a worker that leaves is given calls": (
        "a death at every step",
        "if member.phase is Phase.READY and member.takes_more:",
        "if member.takes_more:",
    ),
    "lost calls are not run again": (
        "a death at every step",
        "self._queue_again([one.again for one in ending.lost if one.again is not None])",
        "pass",
    ),
    "the dead keep what they owed": (
        "no retry",
        "lost = [(*ledger.strike(), True) for _ in range(ledger.owed)]",
        "lost = []",
    ),
    "what waits when the pool breaks is forgotten": (
        "one death breaks the pool",
        "self._actions.append(e.Fail(failed))",
        "pass",
    ),
    "a closed pool ends before its calls": (
        "the pool is closed",
        "not (self.backlog or awaited or self.owes)",
        "not (awaited or self.owes)",
    ),
    "a pool that is ended by force waits for its calls": (
        "the pool is ended by force",
        "        if self.force:\n            return True\n",
        "",
    ),
    "what is taken back of a pool that ends is run": (
        "the pool is ended by force",
        "self._cancelling = self._cancelling or event.cancel",
        "pass",
    ),
    "what waits when it is cancelled is forgotten": (
        "what waits is cancelled",
        "self._actions.append(e.Fail(waiting) if self._broken else e.Cancel(waiting))",
        "pass",
    ),
    "one that takes too much is ended in the next call": (
        "a call takes too much memory",
        "if then.exceeded is not None and member.is_in_a_call:",
        "if then.exceeded is not None and head is not None:",
    ),
    "one that took too much is not run again": (
        "a call takes too much memory, with retries",
        "is_last = condemned is not None or bool(self.force)",
        "is_last = said is not None or bool(self.force)",
    ),
    "more workers than may be are started ahead": (
        "all workers are started ahead",
        "max(1, self.size - self.lost) - sum(not one.leaving for one in members)",
        "max(1, self.size - self.lost)",
    ),
    "a worker that was refused is asked for at once": (
        "the system refuses a second worker",
        "            or now_ns < self.not_before_ns\n",
        "",
    ),
    "a pool that has lost its worker does not try again": (
        "the system refuses the only worker",
        "if alone and (lasts or",
        "if alone or (lasts or",
    ),
    "the script is not run again": (
        "the script fails for the next worker",
        "self._failed >= _MOST_CRASHED",
        "self._failed >= 1",
    ),
    "the script is run again for half a minute": (
        "the script fails for the next worker",
        "lasts = lasts or self._failed >= _MOST_CRASHED",
        "lasts = lasts and self._failed >= _MOST_CRASHED",
    ),
    "nobody looks after the time of the next attempt": (
        "the system refuses the only worker",
        "return [*looks, self.not_before_ns] if now_ns < self.not_before_ns else looks",
        "return looks",
    ),
    "two processes have one place": (
        "workers are replaced after two calls",
        "free = self.size - sum(place < self.size for place in kept)",
        "free = self.size",
    ),
    "a position is used twice": (
        "callers send calls themselves",
        "member.ledger.skip(event.answered)",
        "pass",
    ),
    "a call that a caller has sent is forgotten": (
        "callers send calls themselves",
        "member.ledger.give(call)",
        "pass",
    ),
    "a worker that owes a call is lent": (
        "callers send calls themselves",
        "one.phase is Phase.READY and one.is_idle and one.has_board",
        "one.phase is Phase.READY and one.has_board",
    ),
    "a later call is sent before one that was passed over": (
        "calls are taken back",
        "member.doubted = claimed",
        "pass",
    ),
    "a later call takes the only worker": (
        "a call is pickled elsewhere",
        "range(self._kept if free > self._kept else len(hungry))",
        "range(0)",
    ),
    "a later call goes along with one that comes first": (
        "a call behind others is pickled elsewhere",
        "before = self._before if self._kept else sys.maxsize",
        "before = sys.maxsize",
    ),
    "a later call is sent with one that is pickled elsewhere": (
        "a call is pickled elsewhere",
        """        if event.full:
            self._hungry.clear()
""",
        """        if False:
            pass
""",
    ),
    "the dead are counted among the workers": (
        "no retry",
        "self.members = tuple(one for one in self.members if one is not member)",
        "pass",
    ),
}


@pytest.fixture
def mutants() -> Iterator[list[str]]:
    names: list[str] = []
    yield names
    for name in names:
        del sys.modules[name]


def mutant(names: list[str], old: str, new: str) -> type[Core]:
    """Return the core with a fault in it."""
    found, copies = 0, []
    for original in (starts, machine):
        source = Path(original.__file__ or "").read_text(encoding="utf-8")
        found += source.count(old)
        name = f"mutant_of_{original.__name__.rpartition('.')[2]}"
        copies.append(ModuleType(name))
        sys.modules[name] = copies[-1]
        names.append(name)
        exec(compile(source.replace(old, new), name, "exec"), vars(copies[-1]))
    assert found == 1, old
    vars(copies[1])["Starts"] = vars(copies[0])["Starts"]
    core: type[Core] = vars(copies[1])["Core"]
    return core


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_core_is_found(name: str, mutants: list[str]) -> None:
    scenario, *fault = FAULTS[name]
    core = mutant(mutants, *fault)
    with pytest.raises(BadStateError):
        explore(World(core, SCENARIOS[scenario]), 5000)


def test_the_tables_name_every_event_and_every_action() -> None:
    told = {*re.findall("^([A-Z][A-Za-z]+)  +[a-z]", events.__doc__ or "", re.MULTILINE)}
    kinds = {kind.__name__ for kind in (*get_args(events.Event), *get_args(events.Action))}
    assert told == kinds
    assert kinds | {"Then"} == {
        name for name, kind in vars(events).items() if hasattr(kind, "_fields")
    }
