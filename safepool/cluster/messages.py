"""Messages between a cluster pool and its agents, and their pickling.

    to an agent      options of the pool
                     `DeliverMessage`    calls, functions and shared objects that they need
    to the program   `Welcome`           limits, versions
                     `Report`            answers, calls that come back

The program and a worker pickle calls and answers. The engine and the agent see only bytes, and
import nothing that a call needs.

Not covered:
    * Settings of libraries, warning filters and changes of the script's globals while it runs,
      which a :class:`safepool.ProcessPool` takes to its workers. A function of the script travels
      with the globals that it uses, as they are when the call is submitted.
    * Open descriptors (sockets, connections): they are of one machine.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

from safepool.transport import payloads, references

PROTOCOL = 1
"""Version of these messages. Several versions of safepool may have the same."""

MESSAGE_BYTES = 32 << 20
"""The most bytes of a message; the rest goes with the next. Engines hold each several times."""
LARGE_BYTES = 16 * 1024
"""A function with at least so many bytes of code and data is sent to each node once."""
LARGE_ARGUMENT_BYTES = 1 << 20
"""A buffer in arguments of at least so many bytes is, too. It costs the node a descriptor."""
KEPT_BYTES = 64 << 20
"""The most bytes of large functions and buffers that are kept for later calls."""

Buffer = Any


class Welcome(NamedTuple):
    """First answer of an agent. Plain values: another version must be able to read it.

    Attributes:
        protocol: Version of the protocol of its messages.
        python: Version, such as ``"3.11"``.
        safepool: Version.
        node: The same for all processes of one machine and limit.
        host: Name of the machine.
        pid: Process id of the process that the agent is in.
        workers: Number of workers of the pool that fits.
        limits: Name, raw text and source of the limit that binds.
        holds: No other process of this node has the agent.
    """

    protocol: int
    python: str
    safepool: str
    node: str
    host: str
    pid: int
    workers: int
    limits: tuple[str, str, str]
    holds: bool


class Packet:
    """Segments of a pickle; each of its buffers is copied once by any pickler.

    Args:
        segments: The same as in :func:`safepool.transport.payloads.dumps`.
    """

    __slots__ = ("segments",)

    def __init__(self, *segments: Buffer) -> None:
        self.segments: tuple[Buffer, ...] = segments

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(memoryview(segment).nbytes for segment in self.segments)

    @classmethod
    def of(cls, value: object) -> Packet:
        """Pickle a message of this package."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        return cls(head, *(buffer.raw() for buffer in buffers))

    def value(self) -> Any:
        """Return the message."""
        head, *buffers = self.segments
        return pickle.loads(head, buffers=buffers)

    def plain(self) -> list[bytes | bytearray]:
        """Return the segments as what any pickler and any engine can carry."""
        return [
            part
            if isinstance(part, (bytes, bytearray))
            else (bytes if memoryview(part).readonly else bytearray)(part)
            for part in self.segments
        ]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:
            return Packet, tuple(self.plain())
        parts = self.segments
        return Packet, tuple(
            part if isinstance(part, bytes) else pickle.PickleBuffer(part) for part in parts
        )


class Parcel(NamedTuple):
    """A call in a message to an agent.

    Attributes:
        number: Number of this delivery.
        timeout_s: Seconds that the call may run.
        function: Key of the function.
        segments: The pickle of positional and keyword arguments, and its buffers.
        large: Indices of buffers that travel separately, and their keys.
        shared: Numbers of the shared objects that the arguments refer to.
    """

    number: int
    name: str
    timeout_s: float | None
    function: str
    segments: Packet
    large: Sequence[tuple[int, str]]
    shared: tuple[int, ...]


class DeliverMessage(NamedTuple):
    """From the pool to an agent.

    Attributes:
        calls: Calls to begin.
        functions: By key: the pickle, and numbers of the shared objects that it refers to. Small
            ones each time that they are needed, those of `LARGE_BYTES` until they are forgotten.
        large: Large buffers of arguments that the agent does not have, by key.
        objects: Shared objects that the agent does not have, by number.
        back: Numbers of the calls to return if they have not begun.
        kill: Numbers of the calls to end.
        forget: Numbers of shared objects, and keys of functions and buffers, that are no longer
            needed.
        traced: Answers are to tell which worker had a call, and when.
    """

    calls: list[Parcel]
    functions: dict[str, tuple[Packet, tuple[int, ...]]]
    large: dict[str, Packet]
    objects: dict[int, Packet]
    back: Sequence[int]
    kill: Sequence[int]
    forget: Sequence[Any]
    traced: bool


class Ran(NamedTuple):
    """The run of a call, in nanoseconds by the monotonic clock of its node.

    Attributes:
        worker: The same as :func:`safepool.worker_index`; ``None`` if the worker has ended.
        begin_ns: Begin of the call. All of the following is part of its time.
        end_ns: End of the call.
        loaded_ns: Time for reading function and arguments.
        packed_ns: Time for pickling the result.
    """

    pid: int
    worker: int | None
    begin_ns: int
    end_ns: int
    loaded_ns: int
    packed_ns: int


class Source(NamedTuple):
    """The agent that has sent a report.

    Attributes:
        host: Name of the machine.
        pid: Process id.
        now_ns: When the report was sent, by the clock of :class:`Ran`.
    """

    host: str
    pid: int
    now_ns: int


class Report(NamedTuple):
    """From an agent to the pool.

    Attributes:
        answers: For each call its number, seconds, whether its worker died, its result or
            exception, and a :class:`Ran` as a plain tuple if the pool has a trace.
        returned: Numbers of calls that come back; ``None`` if none were asked for.
        workers: Number of workers of the agent's pool.
        source: Only if the pool has a trace.
    """

    answers: Sequence[tuple[int, float, bool, Packet, tuple[Any, ...] | None]]
    returned: Sequence[int] | None
    workers: int
    source: Source | None = None


class PickledFunction(NamedTuple):
    """A function as agents know it.

    Attributes:
        key: Key of the pickle; equal pickles have equal keys.
        packet: The pickle.
        shared: Shared objects that it refers to.
    """

    key: str
    packet: Packet
    shared: tuple[Any, ...]


class _Large:
    """A copy of a large buffer of arguments."""

    __slots__ = ("__weakref__", "content", "key", "packet", "sample")

    def __init__(self, key: str, sample: tuple[int, bytes], content: Buffer) -> None:
        self.key: str = key
        self.sample: tuple[int, bytes] = sample
        self.content: bytearray = bytearray(content)
        self.packet: Packet = Packet(self.content)


class Buffers:
    """Copies of large buffers of arguments: one of each content, however many calls have it.

    A buffer is compared with the copies of the same sample. Hashing 8 MB takes 9 ms, copying or
    comparing them less than one (benchmarks/cluster.py, 8 MB).
    """

    def __init__(self) -> None:
        # A finalizer may submit calls as well.
        self._guard = threading.RLock()
        self._count = 0
        self._copies: WeakSet[_Large] = WeakSet()
        # The copies of calls that have ended: other calls with the same array may follow.
        self._recent: OrderedDict[str, _Large] = OrderedDict()

    def copy(self, part: memoryview) -> _Large:
        """Return a copy of a buffer, the earlier one if it was copied before."""
        nbytes = part.nbytes
        sample = nbytes, bytes(part[:: nbytes // 64])
        with self._guard:
            equal = (one for one in self._copies if one.sample == sample and one.content == part)
            found = next(equal, None)
            equal.close()
            if found is None or found.key not in self._recent:
                self._drop(KEPT_BYTES - nbytes)
            if found is None:
                self._count += 1
                found = _Large(str(self._count), sample, part)
                self._copies.add(found)
            self._recent[found.key] = found
            self._recent.move_to_end(found.key)
            return found

    def _drop(self, nbytes: int) -> None:
        """Drop the content that was unused for longest, above a size."""
        held = sum(one.packet.nbytes for one in self._recent.values())
        while self._recent and held > nbytes:
            _, one = self._recent.popitem(last=False)
            held -= one.packet.nbytes


class PickledArguments(NamedTuple):
    """Arguments of a call as they travel.

    Attributes:
        packet: The pickle, and its buffers but the large ones.
        large: These, with their places among the segments.
        shared: Shared objects that the arguments refer to.
    """

    packet: Packet
    large: tuple[tuple[int, _Large], ...] = ()
    shared: tuple[Any, ...] = ()


def pickle_function(function: Callable[..., Any]) -> PickledFunction:
    """Pickle a function; parts that a worker of another machine cannot import travel by value."""
    with references.Collected() as shared:
        segments = payloads.dumps(function, into_main=True)
    digest = hashlib.blake2b(digest_size=16)
    for segment in segments:
        digest.update(segment)
    # Arrays in it may change before they are sent.
    copied = [bytes(segment) for segment in segments]
    return PickledFunction(digest.hexdigest(), Packet(*copied), shared.found)


def pickle_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], buffers: Buffers
) -> PickledArguments:
    """Pickle the arguments of a call.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        buffers: Copies of large buffers.
    """
    if not references.known():
        return _copied(payloads.dumps((args, kwargs), into_main=True), buffers)
    with references.Collected() as shared:
        segments = payloads.dumps((args, kwargs), into_main=True)
    return _copied(segments, buffers)._replace(shared=shared.found)


def _copied(segments: Sequence[Buffer], buffers: Buffers) -> PickledArguments:
    # The program may change its arrays when submit() has returned.
    parts: list[Buffer] = [segments[0]]
    large: list[tuple[int, _Large]] = []
    for place, part in enumerate(segments[1:], 1):
        if part.nbytes < LARGE_ARGUMENT_BYTES:
            parts.append(bytearray(part))
        else:
            large.append((place, buffers.copy(part)))
    return PickledArguments(Packet(*parts), tuple(large))


def placed_bytes(shared: Any) -> Packet:
    """Return the placed form of a shared object, to be sent to another machine."""
    parts: list[Any] = shared._parts()
    flag = b"w" if shared.writable else b"r"
    return Packet(flag, *(part if isinstance(part, bytes) else memoryview(part) for part in parts))


def unpickle(packet: Packet, shared: Mapping[int, Any]) -> Any:
    """Unpickle an object of the program. In a worker.

    Args:
        packet: The pickle.
        shared: The objects that were shared there, by the number that they have there.
    """
    if not shared:
        return payloads.loads(packet.segments)
    # In pickles inside of this one as well, such as joblib's batches have.
    with references.Given(shared):
        return payloads.loads(packet.segments)


def own_version() -> str:
    """Return safepool's version."""
    # An import would be a cycle.
    version: str = sys.modules["safepool"].__version__
    return version


def python_version() -> str:
    """Return the part of Python's version that pickles of code depend on."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
