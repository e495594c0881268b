r"""Dask distributed: places are the workers of the user's own ``distributed.Client``.

Calls go by ``Client.run``, outside of Dask's task scheduling. Hence Dask never runs a call again,
keeps no result and counts no thread of the worker for it; its scheduler only passes messages on.
The client's own connection is used, with its encryption: client and workers need not reach each
other. If they can, large arguments go from client to worker.

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
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from safepool.cluster.carriers import EngineGoneError, PlaceLostError
from safepool.cluster.messages import Packet
from safepool.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from concurrent.futures import Future

# While a client connects again, its scheduler may come back. Then it is gone.
_RECONNECT_S = 10.0
# Larger messages are sent ahead by ``Client.scatter``, in views, which are never copied on the
# way. An argument of ``Client.run`` is copied some ten times (benchmarks/cluster.py, 8 MB).
_LARGE_BYTES = 1 << 20
# A worker that this process can reach answers within so long. Until then, and if it does not, the
# scheduler forwards the messages.
_REACH_S = 5.0
_PACKET, _RETURNED, _RAISED = "packet", "returned", "raised"
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
        # Whether each worker that was sent something large can be reached by this process.
        self._reached: dict[str, bool] = {}

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
        sent: list[Any] = [*args]
        held: list[Any] = []
        try:
            for at, packet in enumerate(args):
                if isinstance(packet, Packet) and packet.nbytes > _LARGE_BYTES:
                    held += await self._send_ahead(place, [[*packet.segments]])
                    sent[at] = _Ahead(held[-1].key)
            # A worker that has ended is given up at once: no other has its address.
            found = await self._client.run(safepool_call, function, *sent, workers=[place])
        except (OSError, KeyError) as error:
            raise PlaceLostError(f"{type(error).__name__}: {error}") from error
        outcome, value = found[place]
        if outcome == _RAISED:
            raise value
        return Packet(*value) if outcome == _PACKET else value

    async def _send_ahead(self, place: str, values: list[Any]) -> list[Any]:
        """Send values to a worker, past the scheduler if the worker can be reached."""
        if place not in self._reached:
            self._reached[place] = False
            self._start(self._try_to_reach(place))
        send = partial(self._client.scatter, values, workers=[place], hash=False)
        found: list[Any]
        if self._reached[place]:
            try:
                found = await send(direct=True)
            except OSError:
                self._reached[place] = False
            else:
                return found
        found = await send(direct=False)
        return found

    async def _try_to_reach(self, place: str) -> None:
        """Note whether what answers at a worker's address is that worker."""
        try:
            held = await asyncio.wait_for(
                self._client.scatter([b""], workers=[place], hash=False, direct=True), _REACH_S
            )
            found = await self._client.run(_has, held[0].key, workers=[place])
            self._reached[place] = found[place]
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
    """Stands for a packet that Dask has sent ahead, and keeps in the worker under this key."""

    key: Any


async def safepool_call(
    function: Callable[..., Any], *args: Any, dask_worker: Any = None
) -> tuple[str, Any]:
    """Call a function in a worker's event loop; return its result or exception, and which it is.

    What it raises is returned: Dask would write it into the worker's log. Segments of a packet are
    returned one by one: Dask sends bytes as they are, and pickles other objects.
    """
    logger = logging.getLogger("distributed.worker")
    if _quiet not in logger.filters:
        logger.addFilter(_quiet)
    try:
        result = function(
            *(
                Packet(*map(_writable, dask_worker.data[one.key]))
                if isinstance(one, _Ahead)
                else one
                for one in args
            )
        )
        if inspect.isawaitable(result):
            result = await result
    except Exception as error:  # noqa: BLE001 -- for the caller
        return _RAISED, error
    return (_PACKET, result.plain()) if isinstance(result, Packet) else (_RETURNED, result)


def _writable(segment: Any) -> Any:
    # Dask may have made it read-only on the way: a call may write to its arrays.
    is_view = isinstance(segment, memoryview)
    return bytearray(segment) if is_view and segment.readonly else segment


def _has(key: Any, dask_worker: Any = None) -> bool:
    return key in dask_worker.data


def _quiet(record: logging.LogRecord) -> bool:
    """Drop the line that Dask writes for each function that is run: ours are many."""
    return record.args != ("safepool_call",)
