"""Sockets, connections and other types with a reducer of ``multiprocessing``.

    sender                                      receiver
    reducer: reduction.DupFd(7)
    Outgoing.take(7)   duplicates it: place 0   arrive(0) is the new number,
    Handed([12])       the last segment         for the object that detaches it
    Side.send()   ---- its descriptors ---->    Side.receive(): a Descriptor each

The reducers are those of :class:`multiprocessing.reduction.ForkingPickler`, the program's own
included. Their descriptors use the worker's own channel, instead of the listening socket and the
thread that the standard library starts for them.

Ownership: the duplicates belong to the message, which may be sent to several workers, or again to
another worker. An arrived descriptor belongs to the object that is rebuilt; a descriptor without
an object is closed.

Not covered:
    * Other systems than Linux, which use the standard library's own way.
    * PyTorch's tensors that are not in shared memory: they travel like any array, because PyTorch
      would move them into ``/dev/shm``, which has 64 MB in many containers.
"""

from __future__ import annotations

import errno
import functools
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from safepool.transport.frames import Buffer, Filed
from safepool.transport.lazy import loaded
from safepool.transport.reductions import belong_to_pickle, reduce_once

# SCM_MAX_FD, unix(7).
_MOST_AT_ONCE = 253
# Types for which pickle or cloudpickle is as good as the standard library's reducer, or better.
_REDUCTION = "multiprocessing.reduction"
_NOT_NEEDED = frozenset(
    {
        "multiprocessing.managers",
        (_REDUCTION, "_reduce_method"),
        (_REDUCTION, "_reduce_method_descriptor"),
        (_REDUCTION, "_reduce_partial"),
    }
)
# Pickle refuses these, or CONNECTION recognises its result.
_REFUSED = frozenset(
    {
        (_REDUCTION, "_reduce_socket"),
        ("multiprocessing.connection", "reduce_connection"),
        ("multiprocessing.connection", "reduce_pipe_connection"),
        ("multiprocessing.heap", "reduce_arena"),
    }
)
# In the pickle of a connection by pickle itself, which holds the number of its descriptor.
CONNECTION = b"multiprocessing.connection"
# Registered for types of which only some objects are in memory that can be shared. Others travel
# by value, for which the standard pool's way is an error, or takes room in /dev/shm.
_SIGNS: dict[str, Callable[[Any], bool]] = {
    "multiprocessing.sharedctypes": lambda value: hasattr(value, "_wrapper"),
    "torch.multiprocessing.reductions": lambda tensor: bool(tensor.is_shared()),
}

_thread = threading.local()


class Handed(Filed):
    """At most 253 descriptors in transit, with a pickle that refers to them. It owns them."""

    __slots__ = ("__weakref__", "_numbers", "_pid")

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)
        self._pid = os.getpid()
        self.lengths: tuple[int, ...] = (0,) * len(self._numbers)
        _under_way.add(self)

    def filenos(self) -> list[int]:
        """Return the descriptors."""
        return self._numbers

    def close(
        self, close: Callable[[int], None] = os.close, getpid: Callable[[], int] = os.getpid
    ) -> None:
        """Close the descriptors. May be called again."""
        while self._numbers and getpid() == self._pid:
            close(self._numbers.pop())

    def __del__(self) -> None:
        self.close()


def close_all(numbers: Iterable[int]) -> None:
    """Close descriptors; some may be closed already."""
    for number in numbers:
        try:
            os.close(number)
        except OSError:
            pass


_under_way: weakref.WeakSet[Handed] = weakref.WeakSet()


def under_way() -> list[int]:
    """Return the descriptors of this process that are on their way to others."""
    return [number for handed in [*_under_way] for number in handed.filenos()]


class Descriptor(bytearray):
    """A descriptor that has arrived; an empty segment behind the buffers.

    It belongs to this object, until it is detached.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def detach(self) -> int:
        """Pass the descriptor on, once, as :class:`multiprocessing.resource_sharer.DupFd` does."""
        number, self._number = self._number, -1
        if number < 0:
            raise OSError(
                "this descriptor was detached before, and detach() works only once: keep the "
                "number that the first call returned"
            )
        return number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._number >= 0:
            close(self._number)


class Outgoing:
    """Takes the descriptors that a pickler of this thread meets, inside a ``with`` block.

    Unless ``allowed``, an object that has one cannot be pickled.
    """

    __slots__ = ("_before", "_numbers", "allowed")

    def __init__(self, *, allowed: bool) -> None:
        self.allowed: bool = allowed
        self._numbers: list[int] = []

    def take(self, descriptor: int) -> _Place:
        """Return the pickled form of a descriptor, and keep a duplicate of the descriptor."""
        if not self.allowed:
            raise pickle.PicklingError(
                f"descriptor {descriptor} (of a socket, a connection or the like) can be handed "
                f"over as an argument or a result of a task, and not in an exception, "
                f"safepool.share() or a copy. Pass it as an argument"
            )
        # In one step: a signal's handler that raises between two would lose the duplicate.
        self._numbers.extend(map(os.dup, (descriptor,)))
        belong_to_pickle()
        return _Place(len(self._numbers) - 1)

    def segments(self) -> list[Handed]:
        """Return what goes behind the segments of the pickle."""
        numbers, self._numbers = self._numbers, []
        steps = range(0, len(numbers), _MOST_AT_ONCE)
        return [Handed(numbers[at : at + _MOST_AT_ONCE]) for at in steps]

    def drop(self) -> None:
        """Close the taken descriptors: the pickle is not used."""
        Handed(self._numbers).close()
        self._numbers = []

    def __enter__(self) -> Self:
        self._before = getattr(_thread, "outgoing", None)
        # What is pickled inside of a pickle is read inside of it as well: one numbering.
        if self._before is None:
            _thread.outgoing = self
        if not _redirected and "multiprocessing.reduction" in sys.modules:
            _redirect()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _thread.outgoing = self._before
        if kind is not None:
            self.drop()


class _Place:
    """Stands for a descriptor in a pickle, in the words of ``multiprocessing``."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return arrive, (self._place,)


class Incoming:
    """Offers the descriptors that came with a pickle while it is read, inside a ``with`` block.

    In the place of one that could not be sent is another empty segment.
    """

    __slots__ = ("_before", "_segments")

    def __init__(self, segments: Sequence[Buffer]) -> None:
        self._segments = segments

    def take(self, place: int) -> Descriptor:
        """Return the descriptor at a place."""
        segment = self._segments[place]
        if isinstance(segment, Descriptor):
            return segment
        raise OSError(
            errno.ETOOMANYREFS,
            f"cannot send {len(self._segments)} descriptors (of sockets, connections and the like)"
            f" between a pool and its worker: too many are in transit. "
            f"Hand over fewer at a time, or open them in the task",
        )

    def __enter__(self) -> Self:
        self._before = getattr(_thread, "incoming", None)
        _thread.incoming = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.incoming = self._before


def arrive(place: int) -> Descriptor:
    """Return the descriptor at a place of this thread's payload. Pickles call this function."""
    incoming: Incoming | None = getattr(_thread, "incoming", None)
    if incoming is None:
        raise LookupError(
            f"descriptor {place} cannot be unpickled here: only a pool and its workers exchange "
            "descriptors"
        )
    return incoming.take(place)


@dataclass(slots=True, eq=False, repr=False)
class Registered:
    """Reducers that were registered with ``multiprocessing`` at one time, by type.

    Without those of the standard library that pickle does not need. ``beyond`` is ``True`` if some
    are for types that pickle itself accepts.
    """

    reducers: dict[type, Callable[[Any], Any]]
    beyond: bool


_seen: list[Any] = []
_registered = Registered({}, beyond=False)


def are_beyond() -> bool:
    """Return whether pickle itself may treat a type otherwise than its registered reducer.

    Asked with each task. A second registration for the same type is seen only by
    :func:`registered`.
    """
    reduction = loaded("multiprocessing.reduction", "ForkingPickler")
    if reduction is None:
        return False
    if len(reduction.ForkingPickler._extra_reducers) != len(_seen):
        registered()
    return _registered.beyond


def registered() -> Registered:
    """Return the reducers registered with ``multiprocessing``; the same until one is new."""
    global _registered  # noqa: PLW0603 -- a fact about this process
    reduction = loaded("multiprocessing.reduction", "ForkingPickler")
    if reduction is None:
        return _registered
    extra: dict[type, Callable[[Any], Any]] = reduction.ForkingPickler._extra_reducers
    now = [*extra.values()]
    if now != _seen:
        reducers: dict[type, Callable[[Any], Any]] = {
            kind: _where_it_holds(reduce)
            for kind, reduce in extra.copy().items()
            if _NOT_NEEDED.isdisjoint((_name_of(reduce), _name_of(reduce)[0]))
        }
        beyond = not {*map(_name_of, reducers.values())} <= _REFUSED
        once = functools.partial(functools.partial, reduce_once)
        reducers = {
            kind: once(one if sys.platform == "linux" else functools.partial(_for_one_pickle, one))
            for kind, one in reducers.items()
        }
        _registered = Registered(reducers, beyond=beyond)
        _seen[:] = now
    return _registered


def _for_one_pickle(reduce: Callable[[Any], Any], obj: Any) -> Any:
    # What the standard library sends in the place of a handle can be used up once.
    belong_to_pickle()
    return reduce(obj)


def _name_of(reduce: Callable[[Any], Any]) -> tuple[str, str]:
    return getattr(reduce, "__module__", ""), getattr(reduce, "__name__", "")


def _where_it_holds(reduce: Callable[[Any], Any]) -> Callable[[Any], Any]:
    sign = _SIGNS.get(_name_of(reduce)[0])

    def reduce_if_shared(value: Any) -> Any:
        return reduce(value) if sign and sign(value) else value.__reduce_ex__(5)

    return reduce if sign is None else reduce_if_shared


_redirected = sys.platform != "linux"


def _redirect() -> None:
    """Let reducers that run in this package's picklers pass descriptors to them.

    ``set_spawning_popen()`` is not used: locks and queues would take it for the start of a
    process, in which they may travel. ``reduction.DupFd`` calls this.
    """
    global _redirected  # noqa: PLW0603 -- a fact about this process
    try:
        from multiprocessing import resource_sharer  # noqa: PLC0415 -- with the first need
    except (ImportError, OSError):
        return  # no descriptor is left to read it; then no reducer can either
    sharer: Any = resource_sharer
    standard = sharer.DupFd

    def duplicate(descriptor: int) -> Any:
        outgoing: Outgoing | None = getattr(_thread, "outgoing", None)
        if outgoing is None:
            belong_to_pickle()
            return standard(descriptor)
        return outgoing.take(descriptor)

    sharer.DupFd = duplicate
    _redirected = True
