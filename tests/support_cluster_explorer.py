"""Every order of events for the core of a cluster pool: places that come, are lost and come again.

A small model of the engine and the agents does the core's actions. A step is one thing that may
happen next; `support_orders` goes through all orders of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support_orders import BadStateError, must

from safepool.cluster import core as c
from safepool.pool.core.policy import Policy
from safepool.pool.core.work import Call

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_books(core: c.Core) -> None:
    """Check what holds between any two events."""
    calls = [id(call) for call in core._backlog]
    for one in core._places.values():
        calls += [id(call) for call, _ in one.sent.values()]
        assert one.state is c.State.OPEN or not one.sent, "a place that is not open has calls"
    assert len(calls) == len(set(calls)), "a call is at two places"
    nodes = [one.node for one in core._open()]
    assert len(nodes) == len(set(nodes)), "a node has two agents"
    assert core._most_nodes is None or len(nodes) <= core._most_nodes, "too many nodes"


@dataclass(frozen=True)
class Scenario:
    """What is there, and how often each thing may happen.

    Attributes:
        calls: One letter each: the calls.
        places: Name of each place, and its node.
        workers: Of each node.
        retries: Of each call.
        refused: Places that cannot be used.
        mute: Places that never answer.
        wrong: As they do not take the arguments of the pool.
        unnamed: Places that the user has not named.
        late: Places that join by a step "join".
        holder: Place whose process has the agent of its node, for another cluster pool.
        frees: A place that is lost has an agent no longer.
        comes_back: A place that is lost is listed again.
        at_once: As of the core.
        most_nodes: As of the core.
        budget: Steps that may happen so many times: "lose" a place, "die" a worker, "drop" a call,
            "tick" for time, "later" for more, "join", "close", "cancel", "end", "broke".
    """

    calls: str = "ab"
    places: dict[str, str] = field(default_factory=lambda: {"p": "n"})
    workers: int = 1
    retries: int = 0
    refused: str = ""
    mute: str = ""
    wrong: bool = False
    unnamed: str = ""
    late: str = ""
    holder: str = ""
    frees: bool = True
    comes_back: bool = True
    at_once: bool = False
    most_nodes: int | None = None
    known_s: float | None = None
    budget: dict[str, int] = field(default_factory=dict)


class Letter(Call):
    """A call that has a letter, and may be dropped."""

    def __init__(self, letter: str, retries: int) -> None:
        super().__init__("f", Policy(retries=retries))
        self.letter = letter
        self.dropped = False

    def is_wanted(self) -> bool:
        return not self.dropped


class World:
    """The core, with agents and an engine around it."""

    is_too_far = False

    def __init__(self, core: type[c.Core], scenario: Scenario) -> None:
        self.scenario = scenario
        self.now_s = 0.0
        self.core = core(most_nodes=scenario.most_nodes, no_nodes_s=60.0, at_once=scenario.at_once)
        self.budget = dict(scenario.budget)
        self.calls = {letter: Letter(letter, scenario.retries) for letter in scenario.calls}
        self.starts = dict.fromkeys(scenario.calls, 0)
        self.outcomes: dict[str, str] = {}
        # By place: what is on its way there, calls there in order, and what is on its way back.
        self.sent: dict[str, list[Any]] = {}
        self.there: dict[str, list[tuple[int, str]]] = {}
        self.opening: list[c.Open] = []
        self.asked = dict.fromkeys(scenario.places, 0)
        # By node: the place whose process has the agent.
        self.holders = {scenario.places.get(scenario.holder, "n"): scenario.holder}
        self.gone = scenario.late
        # When a node was last open, and whether one was.
        self.open_s = 0.0
        self.was_open = False
        self.finished = self.closing = self.broken = False
        if scenario.known_s is not None:
            vars(self.core)["_mean_s"]["f"] = scenario.known_s
        self.tell(c.Queued([*self.calls.values()]))
        self.tell(c.Listed(self.listed()))

    def listed(self) -> list[str]:
        return [one for one in self.scenario.places if one not in self.gone]

    def tell(self, event: c.Event) -> None:
        if self.core.open_places:
            self.open_s, self.was_open = self.now_s, True
        for action in self.core.handle(event, self.now_s):
            self.act(action)
        try:
            check_books(self.core)
        except AssertionError as error:
            raise BadStateError(str(error)) from None

    def act(self, action: c.Action) -> None:
        if isinstance(action, c.Open):
            must(not any(one.place == action.place for one in self.opening), "it is asked twice")
            self.asked[action.place] += 1
            lost = self.scenario.budget.get("lose", 0) - self.budget.get("lose", 0)
            must(self.asked[action.place] <= 2 + 2 * lost, "it is asked over and over again")
            self.opening.append(action)
        elif isinstance(action, c.Deliver):
            must(action.place not in self.sent, "two messages to one place at a time")
            must(
                not self.scenario.at_once or not self.there.get(action.place),
                "a message to a place that takes one at a time",
            )
            calls = [(number, call.letter) for number, call in action.calls]
            for _, letter in calls:
                must(letter not in self.outcomes, f"{letter} is sent and has ended")
            self.sent[action.place] = [calls, [*action.back], [*action.kill]]
        elif isinstance(action, c.Settle):
            self.end(action.call.letter, "settled")
        elif isinstance(action, c.Again):
            must(action.call.letter not in self.outcomes, "it has ended and is run again")
        elif isinstance(action, c.Lose):
            must(
                self.starts[action.call.letter] > 0,
                f"{action.call.letter} never began and is lost",
            )
            self.end(action.call.letter, "lost")
        elif isinstance(action, (c.Fail, c.Cancel)):
            how = self.failed(action) if isinstance(action, c.Fail) else "cancelled"
            for call in action.calls:
                self.end(call.letter, how)
        elif isinstance(action, c.Release):
            self.sent.pop(action.place, None)
            self.there.pop(action.place, None)
        else:
            must(not self.finished, "finished twice")
            self.finished = True

    def failed(self, action: c.Fail) -> str:
        if action.no_nodes:
            least_s = 5.0 if self.scenario.wrong and not self.was_open else 10.0
            if not set(self.scenario.refused) - set(self.scenario.unnamed):
                least_s = 60.0
            waited_s = self.now_s - self.open_s
            must(waited_s >= least_s, f"calls have waited {waited_s:g} s, not {least_s:g} s")
        return "failed"

    def end(self, letter: str, how: str) -> None:
        if self.calls[letter].dropped:
            return  # nobody looks any more
        must(
            letter not in self.outcomes, f"{letter} ends twice: {self.outcomes.get(letter)}, {how}"
        )
        self.outcomes[letter] = how

    # What may happen next.

    @property
    def at_will(self) -> dict[str, int]:
        return self.budget

    def steps(self) -> Iterator[tuple[str, Any]]:
        for asked in self.opening:
            if asked.place not in self.scenario.mute:
                yield "open", asked
        for place in self.sent:
            yield "arrive", place
        for place, calls in self.there.items():
            for number, letter in calls[: self.scenario.workers]:
                yield "answer", (place, number, letter)
        for what, left in self.budget.items():
            if left:
                yield from ((what, which) for which in getattr(self, f"can_{what}")())

    def do(self, step: tuple[str, Any]) -> None:
        what, which = step
        if what in self.budget:
            self.budget[what] -= 1
        getattr(self, f"on_{what}")(which)

    def on_open(self, asked: c.Open) -> None:
        self.opening.remove(asked)
        place = asked.place
        wanted = place not in self.scenario.unnamed
        if place in self.scenario.refused:
            self.tell(c.Refused(place, "another version", self.scenario.wrong, wanted))
            return
        node = self.scenario.places[place]
        # Another process of this program's own list has it, or one that is at no place.
        self.holders[node] = self.holders.get(node) or place
        holds = asked.anyway or self.holders[node] == place
        self.tell(c.Opened(place, node, self.scenario.workers, wanted, holds))

    def on_arrive(self, place: str) -> None:
        calls, back, kill = self.sent.pop(place)
        there = self.there.setdefault(place, [])
        there += calls
        for _, letter in calls:
            # Begun: at the latest now, for all that the pool can know.
            self.starts[letter] += 1
            must(
                self.starts[letter] <= 1 + self.scenario.retries,
                f"{letter} has begun {self.starts[letter]} times",
            )
        if back:
            waiting = there[self.scenario.workers :]
            given = [one for one in waiting if one[0] in back]
            for one in given:
                there.remove(one)
                self.starts[one[1]] -= 1
            self.tell(c.Returned(place, [number for number, _ in given]))
        for number in kill:
            there[:] = [one for one in there if one[0] != number]
            self.tell(c.Answered(place, [c.Answer(number, -1.0, False, None)], 1))
        if not self.scenario.at_once or not there:
            self.tell(c.Delivered(place))

    def on_answer(self, which: tuple[str, int, str], *, died: bool = False) -> None:
        place, number, letter = which
        self.there[place].remove((number, letter))
        self.tell(c.Answered(place, [c.Answer(number, 0.0, died, None)], self.scenario.workers))
        if self.scenario.at_once and not self.there.get(place):
            self.tell(c.Delivered(place))

    def can_lose(self) -> list[str]:
        return self.listed() if not self.broken else []

    def on_lose(self, place: str) -> None:
        self.opening = [one for one in self.opening if one.place != place]
        node = self.scenario.places[place]
        if self.scenario.frees and self.holders.get(node) == place:
            self.holders[node] = ""
        sent = self.sent.pop(place, None)
        if sent is not None:
            for _, letter in sent[0]:
                self.starts[letter] += 1
        self.there.pop(place, None)
        self.tell(c.Lost(place, "killed"))
        self.gone += "" if self.scenario.comes_back else place
        self.tell(c.Listed(self.listed()))

    def can_join(self) -> list[str]:
        return [*self.scenario.late] if self.gone and not self.broken else []

    def on_join(self, place: str) -> None:
        self.gone = self.gone.replace(place, "")
        self.tell(c.Listed(self.listed()))

    def can_die(self) -> list[Any]:
        return [
            (place, number, letter)
            for place, calls in self.there.items()
            for number, letter in calls[: self.scenario.workers]
        ]

    def on_die(self, which: Any) -> None:
        self.on_answer(which, died=True)

    def can_drop(self) -> list[str]:
        return [letter for letter in self.calls if letter not in self.outcomes]

    def on_drop(self, letter: str) -> None:
        call = self.calls[letter]
        call.dropped = True
        self.outcomes[letter] = "dropped"
        self.calls[letter] = call
        if call in self.core.under_way():
            self.tell(c.Kill(call))

    def can_tick(self) -> list[str]:
        return [""] if self.core.next_look() is not None else []

    def on_tick(self, _: str) -> None:
        self.now_s = max(self.now_s, self.core.next_look() or 0.0)
        self.tell(c.Look())
        due_s = self.core.next_look()
        must(due_s is None or due_s > self.now_s, "time is over, and over again")

    def can_later(self) -> list[str]:
        return [""]

    def on_later(self, _: str) -> None:
        self.now_s += 100.0
        self.tell(c.Look())

    def can_close(self) -> list[str]:
        return [""]

    def on_close(self, _: str) -> None:
        self.closing = True
        self.tell(c.Close())

    can_cancel = can_end = can_broke = can_close

    def on_cancel(self, _: str) -> None:
        self.closing = True
        self.tell(c.CancelWaiting())
        self.tell(c.Close())

    def on_end(self, _: str) -> None:
        self.closing = True
        # What is on its way counts as begun.
        for sent in self.sent.values():
            for _number, letter in sent[0]:
                self.starts[letter] += 1
        self.sent.clear()
        self.tell(c.End("ended"))

    def on_broke(self, _: str) -> None:
        self.broken = True
        self.sent.clear()
        self.there.clear()
        self.opening.clear()
        self.tell(c.Broke("the scheduler is gone"))

    # States.

    def key(self) -> Any:
        core = vars(self.core)
        return (
            repr(self.sent), repr(self.there), repr(self.opening), repr(self.holders),
            repr(sorted(self.budget.items())),
            repr(sorted(self.outcomes.items())),
            repr(sorted(self.starts.items())),
            tuple(call.letter for call in core["_backlog"]),
            tuple((call.letter, call.attempts) for call in self.calls.values()),
            tuple(
                (one.name, one.state, one.gives_way, one.posting, one.asked_back, *one.sent,
                 one.refused_s)
                for one in core["_places"].values()
            ),
            *(
                (*one.kill, self.asked[one.name])
                for one in core["_places"].values()
            ),
            self.now_s, self.gone, self.finished, self.closing,
            self.scenario.refused and (core["_nobody_since_s"], self.open_s, self.was_open),
        )  # fmt: skip

    def check_end(self) -> None:
        """Check a state in which nothing happens any more by itself."""
        missing = [letter for letter in self.calls if letter not in self.outcomes]
        hopeless = self.core.next_look() is None
        usable = [
            one
            for one in self.scenario.places
            if one in self.listed()
            and one not in (*self.scenario.refused, *self.scenario.mute, *self.scenario.unnamed)
            and not self.broken
        ]
        must(not missing or not usable, f"{missing} wait, and nothing is asked of {usable}")
        must(
            not missing or not hopeless, f"nothing happens any more, and {missing} have not ended"
        )
        must(not self.closing or missing or self.finished, "closed, and not finished")
