"""Every order in which the steps of a world may come, each state once; and one order at random.

A world is a core between made-up callers, workers, nodes and a clock: ``support_explorer`` for a
pool's, ``support_cluster_explorer`` for a cluster pool's. Nothing here knows what a step means.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Collection, Hashable, Iterator

Step = tuple[Any, ...]


class BadStateError(AssertionError):
    """Something does not hold."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise BadStateError(what)


class World(Protocol):
    """What is explored; it can be pickled.

    Attributes:
        at_will: Names of steps that need not come: where only these are left, all must have ended.
        is_too_far: Nothing more is tried from here.
    """

    @property
    def at_will(self) -> Collection[str]: ...

    @property
    def is_too_far(self) -> bool: ...

    def steps(self) -> Iterator[Step]:
        """Yield what may happen next."""
        ...

    def do(self, step: Step) -> None:
        """Let it happen, and check what must hold then."""
        ...

    def key(self) -> Hashable:
        """Return what tells this state from others, in which something else can come."""
        ...

    def check_end(self) -> None:
        """Check a state after which nothing happens."""
        ...


def explore(first: World, most: int = 10**9) -> int:
    """Go through every order of steps, breadth first; return how many states there are.

    Raises:
        BadStateError: Something does not hold; it tells the steps that led there.
    """
    with _uncollected():
        return _explored(first, most)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector from looking at all worlds again and again: they have no circles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _explored(first: World, most: int) -> int:
    seen = {first.key()}
    # The worlds themselves: the first step is taken in it, and only for others is it copied.
    queue: deque[tuple[World, tuple[Any, ...]]] = deque([(first, ())])
    while queue and len(seen) < most:
        world, path = queue.popleft()
        if world.is_too_far:
            continue
        steps = [*world.steps()]
        if all(step[0] in world.at_will for step in steps):
            _checked(world.check_end, path)
        copies = pickle.dumps(world, 5) if len(steps) > 1 else b""
        for number, step in enumerate(steps):
            if number:
                world = pickle.loads(copies)
            _checked(partial(world.do, step), (path, step))
            key = world.key()
            if key not in seen:
                seen.add(key)
                queue.append((world, (path, step)))
    return len(seen)


def walk(world: World, chance: random.Random, most: int = 400) -> int:
    """Take steps at random until nothing can happen any more; return how many.

    Two workers may take calls from each other for as long as chance lets neither begin one: then
    it ends after `most`.

    Raises:
        BadStateError: As of `explore`.
    """
    path: tuple[Any, ...] = ()
    for count in range(most):
        steps = [*world.steps()]
        if all(step[0] in world.at_will for step in steps):
            _checked(world.check_end, path)
        if not steps:
            return count
        step = chance.choice(steps)
        path = (path, step)
        _checked(partial(world.do, step), path)
    return most


def _checked(do: Callable[[], object], path: tuple[Any, ...]) -> None:
    try:
        do()
    except AssertionError as error:
        steps = []
        while path:
            path, step = path
            steps.append(step)
        told = ", ".join(" ".join(map(str, step)).strip() for step in reversed(steps))
        raise BadStateError(f"{error}; after: {told}") from None
