r"""Dask distributed: places are the workers of the user's own ``distributed.Client``.

Calls go by ``Client.run``, outside of Dask's task scheduling. Hence Dask never runs a call again,
keeps no result and counts no thread of the worker for it; its scheduler only passes messages on.
The client's own connection is used, with its encryption: client and workers need not reach each
other. If they can, messages go from client to worker and back, past the scheduler, by the client's
pool of connections.

From a laptop to a cluster, one line of a program changes. The nodes need safepool, the program's
libraries, and the same version of Python::

    one machine       with safepool.ProcessPool() as pool:
    Dask on it        with Client() as client, safepool.ClusterPool(client) as pool:
    SLURM             with Client(cluster) as client, safepool.ClusterPool(client) as pool:
    Kubernetes        the same with Client("tcp://dask-scheduler:8786")

On SLURM, dask-jobqueue submits the jobs. One Dask worker per job is enough: it is a node, whose
pool has as many workers as the job has CPUs::

    cluster = SLURMCluster(cores=16, processes=1, memory="64GB", walltime="01:00:00")
    cluster.scale(jobs=4)

``print(cluster.job_script())`` shows the script that it submits::

    #!/usr/bin/env bash
    #SBATCH -J dask-worker
    #SBATCH -n 1
    #SBATCH --cpus-per-task=16
    #SBATCH --mem=60G
    #SBATCH -t 01:00:00
    python -m distributed.cli.dask_worker tcp://10.0.0.1:8786 --name dummy-name --nthreads 16 \
        --memory-limit 59.60GiB --nanny --death-timeout 60

On Kubernetes, the limits of a worker's container are those of its node's pool. IMAGE has
``safepool[dask]``::

    apiVersion: v1
    kind: Service
    metadata: {name: dask-scheduler}
    spec: {selector: {app: dask-scheduler}, ports: [{port: 8786}]}
    ---
    apiVersion: apps/v1
    kind: Deployment
    metadata: {name: dask-scheduler}
    spec:
      selector: {matchLabels: {app: dask-scheduler}}
      template:
        metadata: {labels: {app: dask-scheduler}}
        spec:
          containers:
          - name: scheduler
            image: IMAGE
            command: [dask, scheduler, --port, "8786"]
            ports: [{containerPort: 8786}]
    ---
    apiVersion: apps/v1
    kind: Deployment
    metadata: {name: dask-worker}
    spec:
      replicas: 4
      selector: {matchLabels: {app: dask-worker}}
      template:
        metadata: {labels: {app: dask-worker}}
        spec:
          containers:
          - name: worker
            image: IMAGE
            command: [dask, worker, "tcp://dask-scheduler:8786"]
            resources: {limits: {cpu: "16", memory: 64Gi}}

Not covered:
    * Adaptive clusters: Dask adds workers for its own tasks only. ``cluster.scale(n)`` works.
    * Dask's dashboard: it shows its own tasks only.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.cluster.carriers import EngineGoneError, PlaceLostError
from safepool.cluster.messages import Packet
from safepool.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future

# While a client connects again, its scheduler may come back. Then it is gone.
_RECONNECT_S = 10.0
# Where the scheduler forwards messages, larger ones are sent ahead by ``Client.scatter``, in views
# that are never copied on the way. An argument of ``Client.run`` is copied some ten times
# (benchmarks/cluster.py, 8 MB).
_LARGE_BYTES = 1 << 20
# A worker that this process can reach answers within so long. Until then, and if it does not, the
# scheduler forwards the messages; the worker is tried again.
_REACH_S = 5.0
_TRY_AGAIN_S = 30.0
_RETURNED, _RAISED = "returned", "raised"
_GONE = frozenset({"closing", "closed"})


def connect(address: str, *, timeout_s: float) -> Any:
    """Return a new ``distributed.Client`` of a scheduler.

    Raises:
        MissingExtraError: Dask is not installed.
        OSError: No scheduler answers there within that time.
        ValueError: The text is no address.
        TypeError: The address needs encryption, and Dask's configuration has no certificates.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError as error:
        raise MissingExtraError("distributed", "pip install 'safepool[dask]'") from error
    security = distributed.Security().get_connection_args("client")

    async def reach() -> None:
        comm = await importlib.import_module("distributed.comm").connect(
            address, timeout=timeout_s, **security
        )
        await comm.close()

    # First without a client: one that has not connected waits for 20 s in its ``__del__``.
    asyncio.run(reach())
    return distributed.Client(address, timeout=timeout_s, set_as_default=False)


def is_client(client: object) -> bool:
    """Tell whether this is a ``distributed.Client``, without importing that."""
    return any(
        kind.__module__.partition(".")[0] == "distributed" and kind.__name__ == "Client"
        for kind in type(client).__mro__
    )


class DaskCarrier:
    """Carries calls by a client of Dask.

    Args:
        client: A ``distributed.Client``, synchronous or not.
    """

    at_once = False

    def __init__(self, client: Any) -> None:
        self._client = client
        self._places: list[str] = []
        self._asking = False
        self._away_since_s: float | None = None
        # Whether each worker can be reached by this process, and when that was tried last.
        self._reached: dict[str, tuple[bool, float]] = {}

    def places(self) -> Sequence[str]:
        """Return the workers that the scheduler has named last, and ask it again."""
        status: str = self._client.status
        if status in _GONE:
            raise EngineGoneError(f"the Dask client is {status}")
        if status == "running":
            self._away_since_s = None
        else:
            now_s = time.monotonic()
            self._away_since_s = self._away_since_s or now_s
            if self._away_since_s + _RECONNECT_S < now_s:
                raise EngineGoneError(
                    f"the Dask scheduler cannot be reached for {_RECONNECT_S:.0f} s (the client "
                    f"is {status})"
                )
        if not self._asking and status == "running":
            self._asking = True
            self._start(self._ask())
        return self._places

    def is_in_this_thread(self) -> bool:
        """Return whether the client's event loop runs in the current thread."""
        return asyncio._get_running_loop() is self._client.loop.asyncio_loop

    async def _ask(self) -> None:
        try:
            self._places = [*await self._client.nthreads()]
        except Exception:  # noqa: BLE001 -- the status of the client tells what has happened
            self._places = []
        finally:
            self._asking = False

    def submit(self, place: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function of this package in a worker."""
        return self._start(self._run(place, function, args))

    async def _run(self, place: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        packet = Packet.of((function, args))
        try:
            if await self._is_reached(place):
                found = await self._directly(place, packet)
            else:
                found = await self._by_scheduler(place, packet)
        except Exception as error:
            if self._client.status in _GONE:
                raise EngineGoneError("the Dask client was closed") from error
            if not isinstance(error, (OSError, KeyError)):
                raise
            # A worker that has ended is given up at once: no other has its address.
            self._reached.pop(place, None)
            raise PlaceLostError(f"{type(error).__name__}: {error}") from error
        outcome, value = _taken(found).value()
        if outcome == _RAISED:
            raise value
        return value

    async def _directly(self, place: str, packet: Packet) -> Any:
        to_serialize = importlib.import_module("distributed.protocol").to_serialize
        segments = to_serialize([*packet.segments])
        answer = await self._client.rpc(place).safepool_call(segments=segments)
        if answer is None:  # it has no such handler
            self._reached.pop(place, None)
            raise PlaceLostError("another process has its address now")
        return answer["segments"]

    async def _by_scheduler(self, place: str, packet: Packet) -> Any:
        segments: Any = [*packet.segments]
        # Kept while the call runs.
        held: list[Any] = []
        if packet.nbytes > _LARGE_BYTES:
            held += await self._client.scatter(
                [segments], workers=[place], hash=False, direct=False
            )
            segments = _Ahead(held[0].key)
        found = await self._client.run(safepool_call, segments, workers=[place])
        return found[place]

    async def _is_reached(self, place: str) -> bool:
        """Return whether the worker answers this process; begin to find out if that is unknown."""
        now_s = time.monotonic()
        reached, tried_s = self._reached.get(place, (False, -math.inf))
        if reached:
            connections = self._client.rpc
            try:
                connections.reuse(place, await connections.connect(place))
            except OSError:  # nothing was sent
                self._reached[place] = reached, _ = False, now_s
        elif tried_s + _TRY_AGAIN_S < now_s:
            self._reached[place] = False, now_s
            self._start(self._try_to_reach(place))
        return reached

    async def _try_to_reach(self, place: str) -> None:
        """Note whether what answers at a worker's address is that worker."""
        try:
            found = await self._client.run(_opened, workers=[place])
            answer = await asyncio.wait_for(self._client.rpc(place).identity(), _REACH_S)
            if answer["id"] == found[place]:
                self._reached[place] = True, 0.0
        except Exception:  # noqa: BLE001 -- the scheduler passes on what is sent
            pass

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        loop: asyncio.AbstractEventLoop = self._client.loop.asyncio_loop
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as error:  # the loop is closed
            coroutine.close()
            raise EngineGoneError(f"the Dask client is closed: {error}") from error


class _Ahead(NamedTuple):
    """Stands for segments that Dask has sent ahead, and keeps in the worker under this key."""

    key: Any


async def safepool_call(segments: Any, dask_worker: Any = None) -> list[Any]:
    """Call a function in a worker's event loop; return its result or exception, and which it is.

    What it raises is returned: Dask would write it into the worker's log. Call and answer are the
    segments of a packet, which Dask sends without a copy.
    """
    logger = logging.getLogger("distributed.worker")
    if _quiet not in logger.filters:
        logger.addFilter(_quiet)
    try:
        if isinstance(segments, _Ahead):
            segments = dask_worker.data[segments.key]
        function, args = _taken(segments).value()
        result = function(*args)
        if inspect.isawaitable(result):
            result = await result
    except Exception as error:  # noqa: BLE001 -- for the caller
        return [*Packet.of((_RAISED, error)).segments]
    return [*Packet.of((_RETURNED, result)).segments]


async def _answer(segments: list[Any]) -> Any:
    """Answer a message that did not come by the scheduler."""
    to_serialize = importlib.import_module("distributed.protocol").to_serialize
    return {"segments": to_serialize(await safepool_call(segments))}


def _opened(dask_worker: Any = None) -> str:
    """Let a worker take messages that do not come by the scheduler; return its identity."""
    dask_worker.handlers["safepool_call"] = _answer
    identity: str = dask_worker.id
    return identity


def _taken(segments: Sequence[Any]) -> Packet:
    """Return what Dask has received, with buffers that may be written to and kept."""
    return Packet(*map(_own, segments))


def _own(segment: Any) -> Any:
    if not isinstance(segment, memoryview):
        return segment
    # A call may write to its arrays, and a view of a large message would keep all of it.
    whole = memoryview(segment.obj).nbytes
    return bytearray(segment) if segment.readonly or whole > 2 * segment.nbytes else segment


def _quiet(record: logging.LogRecord) -> bool:
    """Drop the line that Dask writes for each function that is run: ours are many."""
    return record.args != ("safepool_call",)
