"""Objects that a worker inherits for its initializer: ``multiprocessing``'s locks, queues, values.

Programs hand them over by ``initargs=``. They may be pickled only while a process is being
started, and their descriptors must travel beside the pickle; a forked worker needs no pickle.

Source: Python, Lib/multiprocessing/context.py, ``assert_spawning``, and reduction.py beside it.

Not covered:
    * Windows, where a handle is duplicated into a process that must exist by then.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.errors import let_handlers_pass
from safepool.transport import payloads
from safepool.transport.channel import store_large
from safepool.transport.marks import main_space
from safepool.transport.names import Met
from safepool.transport.references import Collected
from safepool.transport.sharing import Shared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.transport.frames import Segment

    Initializer = tuple[Callable[..., object] | None, tuple[Any, ...]]


class Inheritance(NamedTuple):
    """The initializer and its arguments, on their way to a worker.

    Attributes:
        segments: The pickle; none for a worker that is forked from this process.
        descriptors: Descriptors that the pickle refers to. They belong to the arguments.
        itself: Object that a forked worker finds in its memory.
        shared: Shared objects that the pickle refers to, by :func:`safepool.share`.
        names: Names of the script that the pickle refers to, or that its functions use.
    """

    segments: Sequence[Segment]
    descriptors: list[int]
    itself: Initializer | None = None
    shared: Sequence[Shared[Any]] = ()
    names: frozenset[str] = frozenset()


def pack(initializer: Initializer, *, forked: bool = False) -> Inheritance:
    """Make the initializer and its arguments ready for a worker that is about to start."""
    if forked:
        function, arguments = initializer
        values = (a.value if isinstance(a, Shared) else a for a in arguments)
        return Inheritance([], [], (function, tuple(values)))
    owner = _owner(initializer[0])
    with Collected() as shared, Met(seeds=owner) as met:
        segments, descriptors = _pickle(initializer)
    names = met.names | frozenset(owner)
    return Inheritance(store_large(segments), descriptors, shared=shared.found, names=names)


def _owner(initializer: object) -> dict[str, object]:
    """Return the global of the script whose method this is (``CACHE.update``), by its name.

    As in a fork, a method changes the worker's own global, and not a copy.
    """
    while isinstance(initializer, functools.partial):
        initializer = initializer.func
    owner = getattr(initializer, "__self__", None)
    if owner is None or isinstance(owner, (type, types.ModuleType)):
        return {}
    for name, value in [*main_space().items()]:
        if value is owner:
            try:
                payloads.dumps(owner, into_main=True)
            except Exception as error:  # noqa: BLE001 -- it holds what only a start may pickle
                let_handlers_pass(error)
                return {}
            return {name: owner}
    return {}


if sys.platform == "win32":

    def _pickle(initializer: Initializer) -> tuple[list[bytes | memoryview], list[int]]:
        return payloads.dumps(initializer, into_main=True), []

else:

    def _pickle(initializer: Initializer) -> tuple[list[bytes | memoryview], list[int]]:
        if initializer[0] is None:
            return payloads.dumps(initializer, into_main=True), []
        from multiprocessing import reduction  # noqa: PLC0415 -- a pool's start, not ours

        starting = _Starting()
        spawning: Any = sys.modules["multiprocessing.context"]
        before = spawning.get_spawning_popen()
        spawning.set_spawning_popen(starting)
        try:
            pickler: Any = reduction.ForkingPickler
            reducers = pickler._extra_reducers
            segments = payloads.dumps(initializer, into_main=True, reducers=reducers)
        finally:
            spawning.set_spawning_popen(before)
        return segments, starting.descriptors


_received: list[int] = []


def receive(descriptors: Sequence[int]) -> None:
    """Keep in a worker the descriptors that its initializer's arguments refer to."""
    _received[:] = descriptors


class _Received:
    """A descriptor by its place; in the words of ``multiprocessing.reduction.DupFd``."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        """Return the received descriptor."""
        return _received[self._place]


class _Starting:
    """Stands for the process that is started, in the words of multiprocessing's ``Popen``."""

    DupFd = _Received

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        """Take a descriptor along, and return its place."""
        self.descriptors.append(descriptor)
        return len(self.descriptors) - 1
