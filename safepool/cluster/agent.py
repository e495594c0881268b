"""The agent of a node: it holds the node's pool, and runs the calls of cluster pools.

The agent is in the process in which the engine calls functions (a Dask worker, a rank of MPI). On
a node, a carrier calls only the functions of this module:

    agent_greet     options in, `Welcome` out
    agent_deliver   calls in                                 a coroutine
    agent_collect   answers out, as soon as there are any    a coroutine
    agent_work      calls in, all their answers out          for an engine of one call at a time
    agent_ask       a question about the node's pool         a coroutine
    agent_release   the cluster pool needs it no longer

    Session     of one cluster pool: its calls here, its shared objects
    NodePool    a `ProcessPool` for all sessions of the same options

    what ends                when
    a session's calls        the session is released, or was not heard of for `_LAPSE_S`
    a pool                   no session has used it for `_IDLE_S`
    all of it                with the process: workers of a `ProcessPool` end with their parent

Not covered:
    * Two Dask workers of one machine elsewhere than on Linux: each may have an agent, for cluster
      pools that begin at the same moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

from safepool import procfs
from safepool.budget import Request
from safepool.cluster.calls import RAISED, initialize, run
from safepool.cluster.messages import (
    LARGE_BYTES,
    MESSAGE_BYTES,
    PROTOCOL,
    DeliverMessage,
    Packet,
    Parcel,
    Report,
    Source,
    Welcome,
    own_version,
    python_version,
    unpickle,
)
from safepool.errors import SafepoolError, WorkerDiedError, text_of
from safepool.machine import read_budget
from safepool.pool.core.policy import Policy
from safepool.pool.executor import ProcessPool
from safepool.transport.sharing import placed, share
from safepool.workers.describe import describe

# A cluster pool asks for answers all the time. If it has not for so long, it is gone.
_LAPSE_S = 30.0
# From the last session of a pool to its end: the next program may need it.
_IDLE_S = 10.0
_LOOK_S = 1.0
# Work that a worker holds: it need not wait for this process, whose interpreter is the engine's as
# well. Calls of half of this are sent ahead; longer ones would be taken back from behind another.
_HELD_S = 0.04

_log = logging.getLogger("safepool")


class SessionLostError(SafepoolError):
    """A session is not known to this process: it was not heard of for too long, or never was."""


class WrongOptionsError(SafepoolError):
    """This node can make no pool of the arguments that a cluster pool was given.

    Attributes:
        reason: The exception of the node's pool.
        host: Name of the node's host.
    """

    def __init__(self, reason: str, host: str = "") -> None:
        super().__init__(reason, host)
        self.reason = reason
        self.host = host

    def __str__(self) -> str:
        return self.reason


class NodePool:
    """A pool for all sessions of the same options."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        given = dict(options)
        initializer = given.pop("initializer", None)
        if initializer is not None:
            given.update(initializer=initialize, initargs=(initializer,))
        # The script of this process is the engine's, and none of the calls'.
        try:
            if isinstance(env := given.get("env"), Packet):
                given["env"] = unpickle(env, {})
            self.pool: ProcessPool = ProcessPool(**given, main="value")
        except Exception as error:  # noqa: BLE001 -- told by the program
            reason = f"{type(error).__name__}: {text_of(error)}"
            raise WrongOptionsError(reason, socket.gethostname()) from None
        # The engine's process must not wait for calls when it ends: the node is lost then.
        self.pool._scheduler.ends_at_exit = True
        self.pool._scheduler.hold_ahead(_HELD_S)
        self.sessions: set[str] = set()
        self.idle_since_s: float = time.monotonic()

    def close(self) -> None:
        """End its workers, without waiting."""
        self.pool._scheduler.shut_down(wait=False, end="kill")


class Session:
    """State of one cluster pool here."""

    def __init__(self, name: str, node_pool: NodePool) -> None:
        self.name = name
        self.heard_s: float = time.monotonic()
        self.node_pool = node_pool
        self._objects: dict[int, Any] = {}
        self._functions: dict[str, tuple[Any, Mapping[int, Any]]] = {}
        self._large: dict[str, Packet] = {}
        self._futures: dict[int, Future[Any]] = {}
        self._answers: deque[tuple[int, float, bool, Packet, tuple[Any, ...] | None]] = deque()
        self._traced = False
        self._returned: list[int] | None = None
        self._guard = threading.Lock()
        # Set when there is something to collect.
        self._wake = threading.Event()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def take_in(self, message: DeliverMessage) -> None:
        """Begin calls, and give back or end others."""
        self.heard_s = time.monotonic()
        self._traced = message.traced
        self._keep(message)
        functions = self._functions
        for parcel in message.calls:
            self._begin(parcel, *functions[parcel.function])
        for key, (packet, _) in message.functions.items():
            if packet.nbytes < LARGE_BYTES:  # sent again with the next message that needs it
                del functions[key]
        if message.back:
            self._give_back(message.back)
        for number in message.kill:
            future = self._futures.get(number)
            if future is not None and self.node_pool.pool.cancel(future, kill=True):
                self._answer(number, -1.0, CancelledError())
        for name in message.forget:
            self._objects.pop(name, None)
            functions.pop(name, None)
            self._large.pop(name, None)

    def _keep(self, message: DeliverMessage) -> None:
        """Place large objects in this machine's memory: the workers share one copy."""
        for number, packet in message.objects.items():
            self._objects[number] = _placed(packet)
        for key, content in message.large.items():
            # Each call may write to its view.
            self._large[key] = share(content, writable=True)
        for key, (packet, shared) in message.functions.items():
            needs = {number: self._objects[number] for number in shared}
            placed = share(packet) if packet.nbytes >= LARGE_BYTES else packet
            self._functions[key] = placed, needs

    def _begin(self, parcel: Parcel, function: Any, needs: Mapping[int, Any]) -> None:
        try:
            large = [(place, self._large[key]) for place, key in parcel.large]
            shared = {number: self._objects[number] for number in parcel.shared}
            future = self.node_pool.pool._scheduler.submit(
                run,
                (parcel.function, function, needs, parcel.segments, large, shared),
                {},
                name=parcel.name,
                policy=Policy(timeout_s=parcel.timeout_s, retries=0),
            )
        except Exception as error:  # noqa: BLE001 -- the pool is broken: the call's answer
            self._answer(parcel.number, -1.0, error)
            return
        self._futures[parcel.number] = future
        future.add_done_callback(partial(self._ended, parcel.number))

    def _give_back(self, numbers: Sequence[int]) -> None:
        back = [
            number for number in numbers if (one := self._futures.get(number)) and one.cancel()
        ]
        with self._guard:
            self._returned = (self._returned or []) + back
        self._tell()

    def _ended(self, number: int, future: Future[Any]) -> None:
        self._futures.pop(number, None)
        if future.cancelled():  # the canceller knows
            return
        error = future.exception()
        if error is not None:
            self._answer(number, -1.0, error)
            return
        ran, packet = future.result()
        seconds = (ran[3] - ran[2]) / 1e9
        self._put((number, seconds, False, packet, ran if self._traced else None))

    def _answer(self, number: int, seconds: float, error: BaseException) -> None:
        error.add_note(f"on node {socket.gethostname()}")
        died = isinstance(error, WorkerDiedError) and (not error.by_pool or bool(error.exceeded))
        pid, now_ns = getattr(error, "pid", 0), time.monotonic_ns()
        ran = (pid, None, now_ns, now_ns, 0, 0) if pid and self._traced else None
        self._put((number, seconds, died, Packet(RAISED, *describe(error)), ran))

    def _put(self, answer: tuple[int, float, bool, Packet, tuple[Any, ...] | None]) -> None:
        self._answers.append(answer)
        self._tell()

    def _tell(self) -> None:
        self._wake.set()
        waiter = self._waiter
        if waiter is not None:
            try:
                waiter[0].call_soon_threadsafe(waiter[1].set)
            except RuntimeError:
                pass  # the loop is closed, with the engine

    async def wait(self, most_s: float) -> None:
        """Return when there is something to collect, or after that time."""
        loop = asyncio.get_running_loop()
        there = asyncio.Event()
        self._waiter = loop, there
        try:
            if self._answers or self._returned is not None:
                return
            await asyncio.wait_for(there.wait(), most_s)
        except TimeoutError:
            pass
        finally:
            self._waiter = None
            self.heard_s = time.monotonic()

    def has_lapsed(self, now_s: float) -> bool:
        """Return whether the program has stopped asking for answers."""
        return self._waiter is None and self.heard_s + _LAPSE_S < now_s

    def report(self) -> Report:
        """Return what can be collected, and drop it here."""
        self.heard_s = time.monotonic()
        answers, nbytes = list[Any](), 0
        while self._answers and nbytes <= MESSAGE_BYTES:
            answers.append(self._answers.popleft())
            nbytes += answers[-1][3].nbytes
        with self._guard:
            returned, self._returned = self._returned, None
        source = Source(socket.gethostname(), os.getpid(), time.monotonic_ns())
        size = self.node_pool.pool.size
        return Report(answers, returned, size, source if self._traced else None)

    def wait_for_all(self, number: int) -> None:
        """Return when that many answers have arrived."""
        while len(self._answers) < number:
            self._wake.clear()
            if len(self._answers) < number:
                self._wake.wait(_LOOK_S)
                self.heard_s = time.monotonic()

    def end(self) -> None:
        """End its calls."""
        for future in [*self._futures.values()]:
            self.node_pool.pool.cancel(future, kill=True)
        self.forget()
        self._tell()

    def forget(self) -> None:
        """Drop all objects, functions and arrays that came with calls."""
        self._objects.clear()
        self._functions.clear()
        self._large.clear()


def _placed(packet: Packet) -> Any:
    """Place a shared object in this machine's memory; return its handle here."""
    flag, *parts = packet.segments
    segments: list[Any] = [bytes(parts[0]), *(memoryview(part) for part in parts[1:])]
    return placed(segments, writable=bytes(flag) == b"w")


class Agent:
    """All that cluster pools have in this process."""

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._pools: dict[bytes, NodePool] = {}
        self._thread: threading.Thread | None = None
        # Nodes that are held: no other process has their agent.
        self._held: dict[str, socket.socket | None] = {}

    def hold(self, node: str) -> bool:
        """Hold a node until nothing is left here; ``False`` if another process does."""
        with self._guard:
            try:
                self._held[node] = self._held.get(node) or _bound(f"safepool-agent-{node}")
            except OSError:
                return False
            return True

    def known(self, name: str) -> Session:
        """Return a session.

        Raises:
            SessionLostError: The agent has no session of that name.
        """
        session = self._sessions.get(name)
        if session is None:
            raise SessionLostError(
                f"process {os.getpid()} has no session {name}: the process was restarted, or the "
                f"session sent nothing for {_LAPSE_S:.0f} s"
            )
        session.heard_s = time.monotonic()
        return session

    def session(self, name: str, options: bytes) -> Session:
        """Return a session, made when it is first asked for."""
        with self._guard:
            session = self._sessions.get(name)
            if session is not None:
                session.heard_s = time.monotonic()
                return session
            node_pool = self._pools.get(options)
            if node_pool is None or node_pool.pool._broken:
                node_pool = self._pools[options] = NodePool(pickle.loads(options))
            node_pool.sessions.add(name)
            session = self._sessions[name] = Session(name, node_pool)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="safepool-agent", daemon=True
                )
                self._thread.start()
            return session

    def release(self, name: str) -> None:
        """End a session."""
        with self._guard:
            session = self._sessions.pop(name, None)
            if session is not None:
                session.node_pool.sessions.discard(name)
                session.node_pool.idle_since_s = time.monotonic()
        if session is not None:
            session.end()

    def _watch(self) -> None:
        """End unused sessions and pools; end when nothing is left."""
        while True:
            time.sleep(_LOOK_S)
            now_s = time.monotonic()
            for session in [*self._sessions.values()]:
                if session.has_lapsed(now_s):
                    _log.warning(
                        "cluster pool %s has sent nothing for %d s: the node ends its calls",
                        session.name,
                        _LAPSE_S,
                    )
                    self.release(session.name)
            with self._guard:
                over = [
                    key
                    for key, one in self._pools.items()
                    if not one.sessions and one.idle_since_s + _IDLE_S < now_s
                ]
                ended = [self._pools.pop(key) for key in over]
                if not (self._pools or self._sessions):
                    self._thread = None
                    while self._held:
                        _, holder = self._held.popitem()
                        if holder is not None:
                            holder.close()
            for one in ended:
                one.close()
            if self._thread is None:
                return


_agent = Agent()


def agent_greet(protocol: int, session: str, options: bytes) -> tuple[Any, ...]:
    """Say what this node is, and make a session if the cluster pool has the same protocol.

    Takes and returns plain values: any version of safepool must be able to read them.

    Args:
        protocol: Version of the protocol of the cluster pool.
        session: A name that is never given again.
        options: Pickled arguments of the node's pool.

    Raises:
        WrongOptionsError: The options are wrong on this node.
    """
    budget, _ = read_budget(Request())
    because, workers, holds = budget.because, budget.workers, True
    node = _node(because.name, because.source, because.raw)
    if protocol == PROTOCOL:
        workers = _agent.session(session, options).node_pool.pool.size
        holds = _agent.hold(node)
    return tuple(
        Welcome(
            protocol=PROTOCOL,
            python=python_version(),
            safepool=own_version(),
            node=node,
            host=socket.gethostname(),
            pid=os.getpid(),
            workers=workers,
            limits=(because.name, because.raw, because.source),
            holds=holds,
        )
    )


if sys.platform == "linux":

    def _bound(name: str) -> socket.socket | None:
        """Take a name that only one process of a machine can have, until its end.

        Returns:
            Holder of the name; ``None`` if another user has taken it, to keep this one from it.

        Raises:
            OSError: Another process of this user has the name.
        """
        # The socket has an abstract name, so no file is left, and does not listen, so nobody can
        # connect to it.
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0{name}")
        except OSError:
            holder.close()
            if _is_own(name):
                raise
            return None
        return holder

    def _is_own(name: str) -> bool:
        """Return whether a process of this user has the name."""
        lines = [line.split() for line in (procfs.read("/proc/net/unix") or "").splitlines()]
        links = {f"socket:[{words[6]}]" for words in lines if words[-1] == f"@{name}"}
        return any(not links.isdisjoint(_descriptors(pid)) for pid in procfs.processes())

    def _descriptors(pid: int) -> Iterator[str]:
        """Yield the targets of a process's descriptors; nothing of another user's process."""
        folder = f"/proc/{pid}/fd"
        try:
            own = os.stat(f"/proc/{pid}").st_uid == os.geteuid()
            numbers = os.listdir(folder) if own else []
        except OSError:
            return  # it has ended
        for number in numbers:
            try:
                yield os.readlink(f"{folder}/{number}")
            except OSError:
                pass  # closed meanwhile

else:  # not Linux

    def _bound(_name: str) -> socket.socket | None:
        return None


def _node(*binding: str) -> str:
    """Return the common mark of processes that share one machine and one limit.

    The mark is the binding limit, not the process's own group: SLURM gives each task a group below
    the job's, whose limit holds for all of them.
    """
    facts = [*binding]
    if sys.platform != "win32":
        facts.append(str(os.getuid()))
    # A container has its own process ids, and files of the same names.
    boot = procfs.read("/proc/sys/kernel/random/boot_id")
    facts.append(socket.gethostname() if boot is None else boot.strip())
    for name in ("pid", "cgroup"):
        try:
            facts.append(os.readlink(f"/proc/self/ns/{name}"))
        except OSError:
            facts.append("")
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()


async def agent_deliver(session: str, message: Packet) -> None:
    """Take in a `DeliverMessage`.

    Raises:
        SessionLostError: This process does not know the session.
    """
    # In a thread: the first call of a pool starts processes.
    await asyncio.to_thread(lambda: _agent.known(session).take_in(message.value()))


async def agent_collect(session: str, most_s: float) -> Packet:
    """Return a `Report` as soon as an answer or a message is ready, or after ``most_s`` seconds.

    Raises:
        SessionLostError: This process does not know the session.
    """
    one = _agent.known(session)
    await one.wait(most_s)
    _agent.known(session)
    return Packet.of(one.report())


async def agent_ask(session: str, question: Callable[..., Any], *args: Any) -> Any:
    """Call a function of this package with the node's pool and further arguments, in a thread.

    Raises:
        SessionLostError: This process does not know the session.
        Exception: The exception of the function.
    """
    return await asyncio.to_thread(question, _agent.known(session).node_pool.pool, *args)


def agent_work(session: str, options: bytes, message: Packet) -> Packet:
    """Run calls to their ends, and return a `Report`."""
    one = _agent.session(session, options)
    delivered: DeliverMessage = message.value()
    one.take_in(delivered)
    one.wait_for_all(len(delivered.calls))
    one.forget()  # the next message, with all of this, may go to another process
    return Packet.of(one.report())


def agent_release(session: str) -> None:
    """End a session, and its calls."""
    _agent.release(session)
