"""Work for workers: a single call, or calls of a map that travel together.

The caller's side adds the message and the place of the result (``tasks``, ``mapping``), which this
module does not look at. Attributes of a call and of a span:

    position      position of the first call, while a worker has the work
    count         number of calls, at least 1
    done          number of settled calls
    expected_ns   expected time of each call
    number        place in the order in which work came
    bound         whether the calls stay together, even if other workers are idle
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sized

    from safepool.pool.core.policy import Policy

# A call or a span, with what its owner has added: its type is the owner's.
Given = Any


class Run(Protocol):
    """A map, as far as its calls wait for workers.

    Attributes:
        at_once: Calls that travel together; ``None`` is as many as their time allows.
        most_at_once: Calls whose arguments are thought to fit one message.
        number: Place of the waiting calls in the order of arrival.
        waiting: Work that no worker has, in order.
        stopped: The rest is not needed, or cannot be computed.
        dropped: No further results will be taken.
        queued: Whether it is in the backlog.
        held: ``True`` if no further calls are sent, because too many results wait to be taken.
        is_full: ``True`` if too much waits to be taken, and a reader can take it.
        noted: Notes of a listener; unset without a listener.
    """

    at_once: int | None
    most_at_once: int
    number: int
    dropped: bool
    queued: bool
    held: bool
    noted: Any

    @property
    def name(self) -> str: ...  # noqa: D102 -- attributes above
    @property
    def policy(self) -> Policy: ...  # noqa: D102
    @property
    def waiting(self) -> Sized: ...  # noqa: D102
    @property
    def stopped(self) -> bool: ...  # noqa: D102
    @property
    def is_full(self) -> bool: ...  # noqa: D102

    def add(self, items: list[Any], *, last: bool) -> None:
        """Let further calls wait; ``last``: there will be no more."""

    def cut(self, count: int) -> Span:
        """Take the next calls, at most ``count``, from those that wait."""
        ...


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """A call that is sent separately.

    Attributes:
        policy: Policy of the call.
        attempts: Number of times that it was begun and lost with its worker.
        pickled: Bytes that were sent, kept while they may have to be sent again.
        noted: Notes of a listener; unset without a listener.
    """

    name: str
    policy: Policy
    attempts: int = 0
    position: int = 0
    done: int = 0
    expected_ns: int = 0
    number: int = 0
    pickled: Any = None
    noted: Any = field(init=False)
    count = 1
    bound = False

    def is_wanted(self) -> bool:
        """Whether anybody waits for its result."""
        return True

    def tasks_in(self, calls: int) -> float:
        """Return the number of tasks in that many calls."""
        return calls

    def split(self, at: int) -> Self:
        """Never called: there is only one call."""
        raise ValueError(at)


@dataclass(slots=True, eq=False, repr=False)
class Span:
    """Successive calls of one run, which are sent together and taken back together.

    Attributes:
        run: The :class:`Run` of their map.
        start: Index of the first call.
        items: Arguments of each call.
        attempts: Number of times that the first call was begun and lost with its worker.
        alone: ``True`` if the span is one call that must be sent separately.
        apart: Whether each item was pickled separately.
        bound: Whether the calls of a chunk share an object that one of them could change. Such a
            chunk is not divided, so that the others see the change, as in the standard pool.
        pickled: The pickle of the items, if it was made before a worker had room; the core does
            not look into it. The span then stays whole.
        noted: Notes of a listener; unset without a listener.
    """

    run: Any
    start: int
    items: list[Any]
    attempts: int = 0
    alone: bool = False
    apart: bool = False
    bound: bool = False
    position: int = 0
    done: int = 0
    expected_ns: int = 0
    number: int = 0
    pickled: Any = None
    noted: Any = field(init=False)

    @property
    def count(self) -> int:
        """Number of calls."""
        return len(self.items)

    @property
    def name(self) -> str:
        """Name of each call in errors."""
        name: str = self.run.name
        return name

    @property
    def policy(self) -> Policy:
        """Policy of each call."""
        policy: Policy = self.run.policy
        return policy

    def tasks_in(self, calls: int) -> float:
        """Return the number of tasks in some calls; a part of one with a ``chunksize``."""
        return calls / (self.run.at_once or 1)

    def is_followed_by(self, other: Span) -> bool:
        """Return whether both can be joined: no call has begun or must be sent separately.

        Nor calls of two chunks, which share nothing in a worker.
        """
        at_once = self.run.at_once
        return (
            self.run is other.run
            and self.start + len(self.items) == other.start
            and (at_once is None or self.start // at_once == other.start // at_once)
            and not (self.alone or other.alone or self.done or other.done or other.attempts)
            and self.pickled is other.pickled is None
        )

    def split(self, at: int) -> Self:
        """Keep the calls before ``at``, return the others."""
        rest = type(self)(self.run, self.start + at, self.items[at:])
        rest.expected_ns, rest.number = self.expected_ns, self.number
        rest.bound = self.bound
        del self.items[at:]
        return rest

    def only(self, place: int) -> Self:
        """Return the call at this place as a separate span."""
        span = type(self)(self.run, self.start + place, [self.items[place]], alone=True)
        span.attempts = self.attempts if place == 0 else 0
        span.number = self.number
        return span
