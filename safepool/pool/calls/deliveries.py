"""Names of the script with their values, sent to workers, and each worker's record of them."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safepool.transport.channel import size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from safepool.transport.frames import Segment
    from safepool.transport.sharing import Shared

versions: itertools.count[int] = itertools.count(1)
"""Of deliveries: each is higher than the one before."""


@dataclass(slots=True, eq=False, repr=False)
class Delivery:
    """Names with their values, sent to workers.

    Attributes:
        version: Higher than that of every earlier delivery.
        born: By name, the version with which its present object was delivered first. Workers keep
            a container or class when its content has changed.
        head: Facts for workers about the names.
        draws: Whether a generator of random numbers is among the values.
    """

    version: int
    names: tuple[str, ...]
    born: tuple[int, ...] = ()
    head: Mapping[str, Any] = field(default_factory=dict)
    segments: Sequence[Segment] = ()
    shared: Sequence[Shared[Any]] = ()
    draws: bool = False

    def message(self, has: dict[str, int]) -> list[Segment]:
        """Return the message for a worker that has these versions, and note that it has it."""
        keep = tuple(has.get(n, 0) >= v for n, v in zip(self.names, self.born, strict=True))
        has.update(dict.fromkeys(self.names, self.version))
        return [pickle.dumps({**self.head, "keep": keep}, protocol=5), *self.segments]

    def lacks(self, has: Mapping[str, int]) -> bool:
        """Return whether a worker with these versions needs this delivery."""
        return any(has.get(name, 0) < self.version for name in self.names)

    @property
    def size_bytes(self) -> int:
        """Size of the delivery."""
        return sum(map(size_of, self.segments))


_needs = itertools.count(1)


class Needs(list[Delivery]):
    """Deliveries that a call needs, in the order in which they are sent.

    A worker that once had all deliveries of this number needs no further check.
    """

    def __init__(self, deliveries: Iterable[Delivery]) -> None:
        super().__init__(deliveries)
        self.number: int = next(_needs)


class Versions(dict[str, int]):
    """Version numbers of the names that a worker knows.

    ``first`` returns the versions of the values that the worker got at its start, for all names or
    only for these.
    """

    def __init__(
        self,
        known: Mapping[str, int],
        first: Callable[[], Mapping[str, int]],
        names: frozenset[str] | None = None,
    ) -> None:
        super().__init__(known)
        self._first = first
        self._names = names

    def get(self, name: str, default: Any = None) -> Any:
        """Return the version of a name."""
        version = super().get(name)
        if version is None and (self._names is None or name in self._names):
            version = self._first().get(name)
        return default if version is None else version
