"""Large and shared content that each node has, and messages that bring it what it lacks.

    Node      a place that was asked, or is open
    Handles   handles of shared objects: nodes may forget those that the program has dropped

Nothing is sent here: the shell sends the messages.
"""

from __future__ import annotations

import queue
import weakref
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from safepool.cluster.messages import KEPT_BYTES, LARGE_BYTES, DeliverMessage, Parcel, placed_bytes

# Number of large functions and buffers that a node keeps beside those of the last message that had
# some: each is a descriptor there.
_MOST_KEPT = 64


@dataclass(slots=True, eq=False)
class Node:
    """Facts about a place that was asked, or is open.

    Attributes:
        session: Session of the agent there; each opening has its own.
        label: Name of the place in errors.
        anyway: ``True`` if the place is used even if another process has the node's agent.
        failed: Number of calls that have failed with it.
        objects: Numbers of shared objects that it has.
        kept: Keys of large functions and buffers that it has, the last used last, and their sizes.
        forget: Numbers and keys that the next message lets it forget.
        due: Latest time of the answer to each kind of message.
    """

    session: str
    label: str
    anyway: bool = False
    pid: int = 0
    failed: int = 0
    objects: set[int] = field(default_factory=set)
    kept: OrderedDict[str, int] = field(default_factory=OrderedDict)
    forget: list[Any] = field(default_factory=list)
    due: dict[str, float] = field(default_factory=dict)

    def pack(self, message: DeliverMessage, number: int, call: Any, handles: Handles) -> int:
        """Add a call to a message; return how many bytes it has.

        Raises:
            CancelledError: The call was cancelled.
            Exception: The exception of the program's own code that pickles.
        """
        function, args = call.packed()
        nbytes: int = args.packet.nbytes
        for _, large in args.large:
            if large.key not in self.kept and large.key not in message.large:
                message.large[large.key] = large.packet
                nbytes += large.packet.nbytes
        for one in (*function.shared, *args.shared):
            if one.number not in self.objects and one.number not in message.objects:
                message.objects[one.number] = placed_bytes(one)
                nbytes += one.nbytes
                handles.watch(one)
        if not call.begin():
            raise CancelledError
        if function.key not in self.kept and function.key not in message.functions:
            numbers = tuple(one.number for one in function.shared)
            message.functions[function.key] = function.packet, numbers
            nbytes += function.packet.nbytes
        keys = [(place, large.key) for place, large in args.large]
        numbers = tuple(one.number for one in args.shared)
        timeout_s = call.policy.timeout_s
        parcel = Parcel(number, call.name, timeout_s, function.key, args.packet, keys, numbers)
        message.calls.append(parcel)
        return nbytes

    def note(self, message: DeliverMessage) -> None:
        """Note the content that the node has with this message; let it forget the oldest."""
        self.objects.update(message.objects)
        new = {
            key: packet.nbytes
            for key, (packet, _) in message.functions.items()
            if packet.nbytes >= LARGE_BYTES
        }
        new |= {key: packet.nbytes for key, packet in message.large.items()}
        self.kept.update(new)
        used = {parcel.function for parcel in message.calls}
        used |= {key for parcel in message.calls for _, key in parcel.large}
        for key in used & self.kept.keys():
            self.kept.move_to_end(key)
        others = [key for key in self.kept if key not in used] if new else []
        nbytes = sum(self.kept[key] for key in others)
        for at, key in enumerate(others):
            if len(others) - at <= _MOST_KEPT and nbytes <= KEPT_BYTES:
                break
            nbytes -= self.kept.pop(key)
            self.forget.append(key)


class Handles:
    """Handles of the shared objects that nodes have."""

    def __init__(self) -> None:
        self._watched: set[int] = set()
        self._dropped: queue.SimpleQueue[int] = queue.SimpleQueue()

    def watch(self, shared: Any) -> None:
        """Learn when the program has dropped the handle of a shared object."""
        if shared.number not in self._watched:
            self._watched.add(shared.number)
            end = weakref.finalize(shared, self._dropped.put, shared.number)
            end.atexit = False

    def forget(self, nodes: Collection[Node]) -> None:
        """Let nodes forget the objects whose handles were dropped."""
        while not self._dropped.empty():
            number = self._dropped.get()
            self._watched.discard(number)
            for node in nodes:
                if number in node.objects:
                    node.objects.discard(number)
                    node.forget.append(number)
