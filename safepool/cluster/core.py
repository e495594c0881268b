"""The decisions of a cluster pool: an event comes in, actions come out.

The core touches no clock, thread, process, future or engine, so a test can try every order of
events. The tables say what each event and action means; a class has a docstring if its fields need
one.

    a place     where an agent can run: a Dask worker, or one of the calls of an executor
    a node      one agent with one pool; several places of one machine and limit are one node

State of a place:

    LISTED    seen, not asked yet
    OPENING   asked for its limits and versions
    OPEN      the agent of its node is here
    SPARE     its node's agent is at another place, or no further node is wanted. The first
              process of a node that is asked has its agent, whichever cluster pool asks
    REFUSED   cannot be used

    event                    meaning                              actions that may follow
    Listed(places)           the engine's list of places          Open; as Lost for missing places
    Opened(place, ...)       its agent answers                    Deliver, Release
    Refused(place, reason)   it cannot be used                    Fail
    Lost(place, reason)      the engine says that it is gone      Lose, Open (a spare), Deliver
    Queued(calls)            calls were submitted                 Deliver
    Delivered(place)         a message has arrived                Deliver
    Answered(place, ...)     calls have ended there               Settle, Deliver
    Returned(place, ...)     calls that had not begun come back   Deliver
    Kill(call)               a running call is cancelled          Deliver
    Broke(reason)            the engine itself is gone            Fail
    CancelWaiting()          waiting calls are dropped            Cancel
    Close()                  no further calls                     Release, Finished
    End()                    close, and lose running calls        Cancel, Lose, Release, Finished
    Look()                   time has passed                      Fail, Deliver

    action                       effect
    Open(place)                  ask the place's agent
    Deliver(place, ...)          send calls, numbers of calls to give back, of calls to end
    Settle(call, answer)         end a call by its answer
    Again(call, answer)          report that a call's worker has died, and that it runs again
    Lose(call, place, reason)    fail a begun call whose place is gone, without a retry left
    Fail(calls, reason)          fail calls that can no longer run
    Cancel(calls)                end calls as cancelled
    Release(place)               tell the place's agent that the pool has ended
    Finished()                   end: nothing is left to do

A call that was delivered counts as begun, because a dead node cannot answer. Hence no more calls
are delivered than begin at once, or soon: `_AHEAD_S` of work for each worker.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.pool.core.work import Call

# Work for each worker of a node that is under way, by the mean time of the function. A round trip
# through a Dask scheduler takes some 5 ms (benchmarks/cluster.py).
_AHEAD_S = 0.05
# The same where a node takes one message at a time: the next is sent when all of this has ended.
_AHEAD_AT_ONCE_S = 1.0
# Calls in one message.
_MOST_CALLS = 2000
# Calls fail when no node is open for so long and a node has refused: another may join, or restart.
# Dask's nanny restarts a worker in 2 to 5 s, and the list of places is read once a second.
_UNFIT_S = 10.0
# The same if the pool's arguments were refused and no node has taken them yet: most likely none
# will. Places that were asked and have not answered are not waited for beyond this.
_WRONG_S = 5.0
# Age from which a delivered call that has not begun is requested back for an idle node.
_LATE_S = 0.25


class State(enum.IntEnum):
    """Stage of a place."""

    LISTED = 0
    OPENING = 1
    OPEN = 2
    SPARE = 3
    REFUSED = 4


class Answer(NamedTuple):
    """End of a call on its node.

    Attributes:
        seconds: Duration of the call; negative if it did not run to its end.
        died: ``True`` if the call's worker has died: the call may run again.
        content: The value that it returned or the error that it raised, still pickled.
        ran: The worker that had it and its times, for a trace.
    """

    number: int
    seconds: float
    died: bool
    content: Any
    ran: Any = None


# Events.


class Listed(NamedTuple):
    places: Sequence[str]


class Opened(NamedTuple):
    """The agent of a place answers.

    Attributes:
        node: The same for all places of one machine and limit.
        workers: Number of workers of the node's pool.
        wanted: ``True`` if the user has named the node, or no nodes at all.
        holds: No other process of the node has the agent that all cluster pools use.
    """

    place: str
    node: str
    workers: int
    wanted: bool = True
    holds: bool = True


class Refused(NamedTuple):
    """A place cannot be used.

    Attributes:
        wrong: The pool's arguments are the reason: most likely no other place takes them either.
        wanted: ``True`` if the user has named the node, or no nodes at all. ``False`` also if the
            node is not known: it did not tell its name.
    """

    place: str
    reason: str
    wrong: bool = False
    wanted: bool = True


class Lost(NamedTuple):
    place: str
    reason: str


class Queued(NamedTuple):
    calls: Sequence[Any]


class Delivered(NamedTuple):
    place: str


class Answered(NamedTuple):
    place: str
    answers: Sequence[Answer]
    workers: int


class Returned(NamedTuple):
    place: str
    numbers: Sequence[int]


class Kill(NamedTuple):
    call: Any


class Broke(NamedTuple):
    reason: str


class CancelWaiting(NamedTuple):
    """Request to drop the calls that wait."""


class Close(NamedTuple):
    """No further calls will come."""


class End(NamedTuple):
    reason: str


class Look(NamedTuple):
    """Time has passed."""


# Actions.


class Open(NamedTuple):
    """Ask the agent of a place.

    Attributes:
        anyway: Use it also if another process of its node has the agent: that is at no place.
    """

    place: str
    anyway: bool = False


class Deliver(NamedTuple):
    place: str
    calls: Sequence[tuple[int, Any]]
    back: Sequence[int] = ()
    kill: Sequence[int] = ()


class Settle(NamedTuple):
    call: Any
    place: str
    answer: Answer


class Again(NamedTuple):
    call: Any
    place: str
    answer: Answer


class Lose(NamedTuple):
    call: Any
    place: str
    reason: str


class Fail(NamedTuple):
    calls: Sequence[Any]
    reason: str
    no_nodes: bool


class Cancel(NamedTuple):
    calls: Sequence[Any]


class Release(NamedTuple):
    place: str


class Finished(NamedTuple):
    """All work is done."""


Event = (
    Listed
    | Opened
    | Refused
    | Lost
    | Queued
    | Delivered
    | Answered
    | Returned
    | Kill
    | Broke
    | CancelWaiting
    | Close
    | End
    | Look
)
Action = Open | Deliver | Settle | Again | Lose | Fail | Cancel | Release | Finished


@dataclass(slots=True, eq=False)
class _Place:
    """Facts about one place.

    Attributes:
        state: Stage that the node has reached.
        workers: Number of workers of the node's pool.
        wanted: ``True`` if the user has named the node, or no nodes at all.
        gives_way: Another process of its node has the agent.
        why: Why it was refused.
        refused_s: When it was refused.
        wrong: The pool's arguments are the reason.
        sent: Calls delivered and not ended, by number.
        expected_s: Expected time of these calls, one after the other.
        posting: A message is on its way.
        asked_back: Numbers that were asked back and are not answered yet.
        sent_s: When calls were last delivered.
        kill: Numbers of the calls to end.
    """

    name: str
    state: State = State.LISTED
    node: str = ""
    workers: int = 1
    wanted: bool = True
    gives_way: bool = False
    why: str = ""
    refused_s: float = 0.0
    wrong: bool = False
    sent: dict[int, tuple[Call, float]] = field(default_factory=dict)
    expected_s: float = 0.0
    posting: bool = False
    asked_back: bool = False
    sent_s: float = 0.0
    kill: list[int] = field(default_factory=list)


class Core:
    """Knowledge and decisions of one cluster pool.

    Args:
        most_nodes: Nodes used at a time; ``None`` is all.
        no_nodes_s: The most seconds that calls wait while no node is open; ``None`` is no limit.
            Calls wait less if a node has refused: see `_UNFIT_S` and `_WRONG_S`.
        at_once: A place takes one message at a time and answers it when all its calls have ended.
        now_s: When this begins, by the monotonic clock.
    """

    def __init__(
        self,
        *,
        most_nodes: int | None = None,
        no_nodes_s: float | None = None,
        at_once: bool = False,
        now_s: float = 0.0,
    ) -> None:
        self._most_nodes = most_nodes
        self._no_nodes_s = no_nodes_s
        self._at_once = at_once
        self._ahead_s = _AHEAD_AT_ONCE_S if at_once else _AHEAD_S
        self._places: dict[str, _Place] = {}
        self._backlog: deque[Call] = deque()
        self._mean_s: dict[str, float] = {}
        self._number = 0
        self._closing = self._finished = False
        self._broken = ""
        # Since when calls wait and no node is open.
        self._nobody_since_s = now_s
        self._was_open = False
        self._now_s = now_s
        self._actions: list[Action] = []

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """Process an event, and return the actions, in order."""
        self._now_s = now_s
        _DO[type(event)](self, event)
        self._go_on()
        actions, self._actions = self._actions, []
        return actions

    @property
    def open_places(self) -> list[tuple[str, str, int, int]]:
        """Place, node, workers and calls under way of each open node."""
        return [
            (one.name, one.node, one.workers, len(one.sent))
            for one in [*self._places.values()]
            if one.state is State.OPEN
        ]

    @property
    def waiting(self) -> int:
        """Number of calls that were not sent to a node."""
        return len(self._backlog)

    @property
    def unused_places(self) -> dict[str, str]:
        """Why each place that is not open is not used."""
        unsaid = {State.OPENING: "it has not answered", State.SPARE: "it is not one of nodes="}
        return {
            one.name: one.why or unsaid.get(one.state, "it has just joined")
            for one in [*self._places.values()]
            if one.state is not State.OPEN
        }

    @property
    def is_broken(self) -> bool:
        """Whether the engine is gone."""
        return bool(self._broken)

    @property
    def is_asking(self) -> bool:
        """Whether a place has not yet answered whether it can be used."""
        return any(one.state in (State.LISTED, State.OPENING) for one in self._places.values())

    def is_open(self, place: str) -> bool:
        """Tell whether calls may be delivered to a place."""
        found = self._places.get(place)
        return found is not None and found.state is State.OPEN

    def under_way(self) -> list[Any]:
        """Return the calls that were delivered and have not ended."""
        return [call for place in self._open() for call, _ in place.sent.values()]

    def next_look(self) -> float | None:
        """Return when a `Look` is due at the latest; ``None`` if only an event brings one."""
        looks: list[float] = []
        if self._backlog and not self._open():
            looks += self._ends_of_waiting()
        if not self._at_once and any(not one.sent for one in self._open()):
            looks += [one.sent_s + _LATE_S for one in self._open() if self._has_surplus(one)]
        return min(looks, default=None)

    # Places come and go.

    def _listed(self, event: Listed) -> None:
        if self._broken:
            return
        there = set(event.places)
        for name in [name for name in self._places if name not in there]:
            self._lose(name, "the engine no longer lists it")
        for name in event.places:
            if name not in self._places:
                self._places[name] = _Place(name)

    def _opened(self, event: Opened) -> None:
        place = self._places.get(event.place)
        if place is None or place.state is not State.OPENING:
            return  # lost meanwhile
        place.node, place.workers = event.node, max(1, event.workers)
        place.wanted, place.gives_way = event.wanted, not event.holds
        taken = {one.node for one in self._open()}
        full = self._most_nodes is not None and len(taken) >= self._most_nodes
        if not place.wanted or place.gives_way or place.node in taken or full:
            place.state = State.SPARE
            self._actions.append(Release(place.name))
        else:
            place.state = State.OPEN
            self._was_open = True

    def _refused(self, event: Refused) -> None:
        place = self._places.get(event.place)
        if place is not None and place.state is State.OPENING:
            place.state, place.why = State.REFUSED, event.reason
            place.refused_s, place.wrong = self._now_s, event.wrong
            place.wanted = event.wanted

    def _lose(self, name: str, reason: str) -> None:
        place = self._places.pop(name, None)
        if place is None:
            return
        if place.state is State.OPEN and len(self._open()) == 0:
            self._nobody_since_s = self._now_s
        for one in self._places.values():
            if one.node == place.node:
                one.gives_way = False  # it may be the next
        again: list[Call] = []
        for call, _ in place.sent.values():
            call.attempts += 1
            if call.attempts > (call.policy.retries or 0):
                self._actions.append(Lose(call, name, reason))
            else:
                again.append(call)
        self._put_back(again)

    def _open(self) -> list[_Place]:
        return [one for one in self._places.values() if one.state is State.OPEN]

    # Calls.

    def _queued(self, event: Queued) -> None:
        if not self._backlog and not self._open():
            self._nobody_since_s = self._now_s
        self._backlog.extend(event.calls)

    def _put_back(self, calls: Iterable[Call]) -> None:
        """Let calls wait again, before all others."""
        self._backlog.extendleft(reversed([*calls]))

    def _delivered(self, event: Delivered) -> None:
        place = self._places.get(event.place)
        if place is not None:
            place.posting = False

    def _answered(self, event: Answered) -> None:
        place = self._places.get(event.place)
        if place is None:
            return
        place.workers = event.workers or place.workers
        again: list[Call] = []
        for answer in event.answers:
            call = self._take_off(place, answer.number)
            if call is None:
                continue
            if answer.seconds >= 0:
                before_s = self._mean_s.get(call.name, answer.seconds)
                # The last few dozen count.
                self._mean_s[call.name] = before_s + (answer.seconds - before_s) / 16
            if answer.died:
                call.attempts += 1
                if call.attempts <= (call.policy.retries or 0) and call.is_wanted():
                    again.append(call)
                    self._actions.append(Again(call, place.name, answer))
                    continue
            self._actions.append(Settle(call, place.name, answer))
        self._put_back(again)

    def _returned(self, event: Returned) -> None:
        place = self._places.get(event.place)
        if place is not None:
            place.asked_back = False
            found = [self._take_off(place, number) for number in event.numbers]
            self._put_back(call for call in found if call is not None)

    def _take_off(self, place: _Place, number: int) -> Call | None:
        found = place.sent.pop(number, None)
        if found is None:
            return None
        place.expected_s -= found[1]
        if not place.sent:
            place.expected_s = 0.0
        return found[0]

    def _kill(self, event: Kill) -> None:
        for place in self._open():
            for number, (call, _) in place.sent.items():
                if call is event.call:
                    place.kill.append(number)
                    return

    # The end.

    def _broke(self, event: Broke) -> None:
        self._broken = self._broken or event.reason
        calls = self._drop_waiting()
        for place in self._places.values():
            calls += [call for call, _ in place.sent.values()]
        self._places.clear()
        if calls:
            self._actions.append(Fail(calls, self._broken, no_nodes=False))

    def _cancel_waiting(self, _: CancelWaiting) -> None:
        calls = self._drop_waiting()
        if calls:
            self._actions.append(Cancel(calls))

    def _close(self, _: Close) -> None:
        self._closing = True

    def _end(self, event: End) -> None:
        self._closing = True
        self._cancel_waiting(CancelWaiting())
        for place in self._open():
            for call, _ in place.sent.values():
                self._actions.append(Lose(call, place.name, event.reason))
            place.sent.clear()

    def _drop_waiting(self) -> list[Call]:
        calls = [*self._backlog]
        self._backlog.clear()
        return calls

    # The work after every event.

    def _go_on(self) -> None:
        if self._broken and self._backlog:
            self._actions.append(Fail(self._drop_waiting(), self._broken, no_nodes=False))
        self._ask_places()
        self._hand_out()
        if not self._at_once:
            self._ask_back()
        self._give_up_waiting()
        idle = not self._backlog and not any(one.sent for one in self._places.values())
        if self._closing and idle and not self._finished:
            self._finished = True
            self._actions += [Release(one.name) for one in self._open()]
            self._actions.append(Finished())

    def _ask_places(self) -> None:
        """Ask places that are new, and spare ones whose node has lost its agent."""
        if self._closing and not self._backlog:
            return
        taken = {one.node for one in self._open()}
        for one in self._places.values():
            if one.state is State.LISTED:
                self._ask(one)
        full = self._most_nodes is not None and len(taken) >= self._most_nodes
        taken |= {one.node for one in self._places.values() if one.state is State.OPENING}
        spare = [one for one in self._places.values() if one.state is State.SPARE and one.wanted]
        # Places that give way come last, and only if no place has the agent that they give way to.
        for one in [] if full else sorted(spare, key=lambda one: one.gives_way):
            if one.node not in taken and not (one.gives_way and self.is_asking):
                taken.add(one.node)
                self._ask(one)

    def _ask(self, place: _Place) -> None:
        place.state = State.OPENING
        self._actions.append(Open(place.name, place.gives_way))

    def _hand_out(self) -> None:
        free = [one for one in self._open() if not one.posting]
        # The node with the least work first.
        free.sort(key=lambda one: len(one.sent) / one.workers)
        workers = sum(one.workers for one in free)
        for place in free:
            # Each its part, so that the first does not take all there is.
            part = -(-len(self._backlog) * place.workers // max(1, workers))
            workers -= place.workers
            calls = self._take_for(place, part)
            kill, place.kill = place.kill, []
            if calls or kill:
                place.posting = True
                if calls:
                    place.sent_s = self._now_s
                self._actions.append(Deliver(place.name, calls, (), kill))

    def _take_for(self, place: _Place, most: int) -> list[tuple[int, Any]]:
        calls: list[tuple[int, Any]] = []
        while self._backlog and len(calls) < min(most, _MOST_CALLS):
            mean_s = self._mean_s.get(self._backlog[0].name)
            if len(place.sent) >= place.workers and (
                mean_s is None or place.expected_s + mean_s > self._ahead_s * place.workers
            ):
                break
            call = self._backlog.popleft()
            if not call.is_wanted():
                continue
            self._number += 1
            expected_s = mean_s or 0.0
            place.sent[self._number] = call, expected_s
            place.expected_s += expected_s
            calls.append((self._number, call))
        return calls

    def _has_surplus(self, place: _Place) -> bool:
        return len(place.sent) > place.workers and not (place.posting or place.asked_back)

    def _ask_back(self) -> None:
        """Ask the slowest node for calls that it has not begun, while another has nothing."""
        opened = self._open()
        if self._backlog or all(one.sent or one.posting for one in opened):
            return
        late = [
            one for one in opened if self._has_surplus(one) and one.sent_s + _LATE_S <= self._now_s
        ]
        if not late:
            return
        place = max(late, key=lambda one: len(one.sent) / one.workers)
        surplus = len(place.sent) - place.workers
        # The last ones: they are the least likely to have begun.
        back = [*place.sent][-max(1, surplus // 2) :]
        place.posting = place.asked_back = True
        place.sent_s = self._now_s
        self._actions.append(Deliver(place.name, (), back))

    def _ends_of_waiting(self) -> list[float]:
        """Return when calls fail for which no node is open."""
        asks = self.is_asking
        ends: list[float] = []
        for one in self._places.values():
            if one.state is State.REFUSED and one.wanted:
                hopeless = one.wrong and not self._was_open
                since_s = max(one.refused_s, self._nobody_since_s)
                if hopeless or not asks:
                    ends.append(since_s + (_WRONG_S if hopeless else _UNFIT_S))
        if self._no_nodes_s is not None:
            ends.append(self._nobody_since_s + self._no_nodes_s)
        return ends

    def _give_up_waiting(self) -> None:
        if not self._backlog or self._open():
            return
        if self._now_s < min(self._ends_of_waiting(), default=math.inf):
            return
        waited_s = self._now_s - self._nobody_since_s
        is_over = self._no_nodes_s is not None and waited_s >= self._no_nodes_s
        why = [f"{place}: {reason}" for place, reason in self.unused_places.items()]
        told = "; ".join(why) if why else "the engine lists none"
        what = f"could take a call for {self._no_nodes_s:g} s" if is_over else "can be used"
        reason = f"no node {what} ({told})"
        self._actions.append(Fail(self._drop_waiting(), reason, no_nodes=True))


_DO: dict[type[Event], Callable[[Core, Any], None]] = {
    Listed: Core._listed,
    Opened: Core._opened,
    Refused: Core._refused,
    Lost: lambda core, event: core._lose(event.place, event.reason),
    Queued: Core._queued,
    Delivered: Core._delivered,
    Answered: Core._answered,
    Returned: Core._returned,
    Kill: Core._kill,
    Broke: Core._broke,
    CancelWaiting: Core._cancel_waiting,
    Close: Core._close,
    End: Core._end,
    Look: lambda _core, _event: None,  # the work after every event is all
}
