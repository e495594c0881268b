"""``ClusterPool``: the executor that people hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

from safepool.arguments import RULES, TIME_TO_WAIT, Rule, check, checked
from safepool.cluster.carriers.dask import DaskCarrier, is_client
from safepool.cluster.carriers.executor import ExecutorCarrier
from safepool.cluster.messages import Packet
from safepool.cluster.shell import Shell
from safepool.errors import text_of
from safepool.pool.calls.front import PoolCalls
from safepool.pool.core.policy import Policy, policy_of
from safepool.pool.executor import ProcessPool
from safepool.pool.watch import WorkerInfo
from safepool.shown import html_table
from safepool.transport import payloads
from safepool.workers.contained import ContainedLogger
from safepool.workers.describe import name_of

if TYPE_CHECKING:
    import os

    from safepool.budget import Rounding
    from safepool.cluster.carriers import Carrier
    from safepool.cluster.tracing import ClusterTrace

_log = ContainedLogger()

# Beside what a node itself waits for: an answer through a Dask scheduler takes milliseconds.
_ASK_S = 5.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _is_nodes(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return False
    return all(isinstance(name, str) for name in value)


def _lacks_as_nodes(value: object) -> str:
    if isinstance(value, int):
        return "" if value >= 1 else "at least 1"
    return "" if value else "at least one name"


_NODES = Rule(
    kind="a number of nodes of at least 1, or a list of names",
    is_kind=_is_nodes,
    lacks=_lacks_as_nodes,
    remedy="Leave it out for all nodes. Names are those of hosts, or addresses of Dask workers",
)


_ENGINE = Rule(
    kind="a distributed.Client or an executor",
    is_kind=lambda value: is_client(value) or isinstance(value, Executor),
    remedy="For the address of a Dask scheduler: ClusterPool(distributed.Client(address)). "
    "Install that with: pip install 'safepool[dask]'",
)


class NodeInfo(NamedTuple):
    """A node that a cluster pool uses.

    Attributes:
        place: The engine's name for the place of the node's agent, such as the address of a Dask
            worker.
        name: The same name, with the name of the host.
        workers: Number of workers of the node's pool.
        calls: Number of calls that were sent to the node and have not ended.
    """

    place: str
    name: str
    workers: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeWorkerInfo(WorkerInfo):
    """State of one worker of one node at one moment.

    Attributes:
        node: Name of the node, as :class:`NodeInfo` has it. The other attributes are those of
            :class:`safepool.WorkerInfo`.
    """

    node: str


# map() there takes no items as well, and does not compare them with the function.
class ClusterPool(PoolCalls, Executor):  # type: ignore[misc]
    """An executor over many nodes: one :class:`safepool.ProcessPool` that fits on each.

    You start and secure the nodes with an engine of your own, which carries the calls. Each node
    has the properties of a ``ProcessPool``: it fits the limits of the node, native threads are
    capped, a dead worker fails only its own call, and timeouts are exact.

    Args:
        client_or_executor: A ``distributed.Client``, or an executor that runs one long call on
            each node (``executorlib``, ``mpi4py.futures``). The end of the pool leaves the client
            or executor open.
        nodes: The most nodes to use, or names of hosts, or addresses of Dask workers. ``None`` is
            all nodes, including those that join later. With an executor, the number of its
            parallel calls, if it does not report that itself.
        no_nodes_timeout: Seconds without a usable node after which waiting calls fail with
            :class:`safepool.cluster.NoNodesError`. ``None`` waits without end, for a batch
            system's queue. They fail earlier if nodes are there and none can be used: see below.
        workers_per_node: The most workers of each node; ``None`` is the number that fits there.
        initializer: Function that each worker of each node calls once before its first call.
        initargs: Arguments of ``initializer``.
        max_tasks_per_child: The same as in :class:`safepool.ProcessPool`, as are the following.
        threads_per_worker: Threads of each native pool in a worker.
        rounding: Treatment of a fraction of a CPU.
        reserve: CPUs of each node kept for programs beside the pool.
        memory_per_worker: Memory that one worker needs. A node starts no more workers than its
            free memory holds.
        pin_workers: Bind each worker to separate CPUs.
        env: Environment variables of the workers, as a dict, or a function that returns those of
            one worker: each node calls it, in the engine's process, with the worker's index there.
        gpus: GPUs of each node, one for each worker in turn. ``"auto"`` is every GPU that the
            engine's process there may use.
        timeout: Seconds that a call may run, from its start on its node.
        retries: Number of times that a call runs again after its worker or node was lost, on any
            node: at most ``1 + retries`` runs.
        max_memory_per_worker: The pool replaces a worker that holds more after a call.
        memory_limit: The pool kills a worker that holds more during a call. Linux nodes only.
        preload: Modules that each node imports once, ahead of its workers. ``"auto"`` is each
            installed library that the engine's process there, or an earlier call, has imported.
        trace: File for a picture of the run, such as ``"run.json"``: a row for each worker of each
            node. https://ui.perfetto.dev and ``safepool report`` show it.
        end_subprocesses: ``True`` ends the processes that calls started when the node's engine
            ends.

    A node has one pool for all cluster pools with the same options, also for those of other
    programs. All Dask workers of one host and one limit are one node: the engine's own numbers of
    workers and threads are ignored. The node's pool starts with the first call. The pool of a node
    ends 10 seconds after the last cluster pool, or with the Dask worker. A node ends the calls of
    a program that has sent nothing for 30 seconds.

    No call waits for ever, unless ``no_nodes_timeout`` is ``None``. Events, the error of the calls
    that are concerned, and the latest time of that error::

        no node is there            NoNodesError     after no_nodes_timeout
        nodes are there, and none   NoNodesError     10 s, and when each has answered. A node with
        has the program's versions                   other versions is named in the log once, and
        of Python and safepool                       the others are used
        nodes are there, and none   NoNodesError     5 s; 10 s, and when each has answered, if an
        can use the arguments (for                   earlier node could use them
        example, preload names no
        module)
        a node has ended            NodeLostError    2 s after the engine knows
        a node is silent            NodeLostError    60 s
        the scheduler is gone       NodeLostError    2 s, for calls that were sent to a node
                                    PoolBrokenError  12 s, for all others
        the client is closed        PoolBrokenError  2 s
        a result cannot be pickled  its TypeError    at once

    The 5 and 10 seconds begin when calls wait, no node is in use, and one has refused. A node that
    joins or restarts in that time is used. If ``nodes`` has names, only the answers of named nodes
    count. A node without safepool cannot tell its host: it counts if ``nodes`` has its address.
    Otherwise the error comes after ``no_nodes_timeout``.

    A broken pool stays broken: if the scheduler was gone for 10 seconds, or the client is closed,
    make a new ``ClusterPool``, also if a scheduler starts again at the same address.

    Differences from ``ProcessPool``::

        max_workers          is workers_per_node: nodes come and go
        mp_context           refused: each node starts its workers in the way that works best there
        on_worker_death      refused: a broken pool would break other programs' calls on the node
        main                 refused: no node has the script; calls bring what they need of it
        preload              () by default: calls need few imports of the engine's process
        resize()             refused: other cluster pools use the pool of the node as well
        size                 of the nodes that are open now: 0 before the first call
        workers()            names the node of each worker
        dump_tracebacks()    has the name of the node in each key
        nodes()              only here
        map(chunksize=)      without effect: a batch has a twentieth of a second of calls
        _max_workers, _processes, _broken    of the standard pool: not here
        settings             of the program, such as warning filters: not sent, use initializer=

    A call counts as begun when it was sent to a node: if the node is lost, the call fails. Hence a
    node gets only as many calls as it has workers, or as it can finish in a twentieth of a second.

    An executor as engine cannot end a call: its node finishes the call and the result is dropped.

    The event loop of an asynchronous client carries the calls. A coroutine there awaits
    ``pool.run()``: ``result()`` of a call that has not ended raises ``RuntimeError`` instead of
    blocking the loop for ever, and ``shutdown()`` returns while calls go on.

    Raises:
        TypeError: The engine or a value has a wrong type.
        ValueError: A value is out of its range.
        TraceFileError: The file of ``trace`` cannot be written, or another running pool writes it.
    """

    _scheduler: Shell

    @checked(
        "ClusterPool",
        {
            "mp_context": "each node starts its workers in the way that works best there",
            "on_worker_death": "the pool of a node is that of other cluster pools as well, so a "
            "worker's death costs the one call",
            "main": "no node has the script. Its functions, classes and data are sent",
        },
        nodes=_NODES,
        no_nodes_timeout=RULES["idle_worker_timeout"]._replace(
            remedy="Leave it out for 60 s. None waits for ever",
            optional=True,
        ),
        workers_per_node=RULES["max_workers"],
    )
    def __init__(  # noqa: PLR0913 -- the arguments of ProcessPool, by name
        self,
        client_or_executor: Any,
        *,
        nodes: int | Sequence[str] | None = None,
        no_nodes_timeout: float | None = 60.0,
        workers_per_node: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        threads_per_worker: int | Literal["auto"] = 1,
        rounding: Rounding = "floor",
        reserve: float = 0.0,
        memory_per_worker: float | str | None = None,
        pin_workers: bool = False,
        env: Mapping[str, str] | Callable[[int], Mapping[str, str]] | None = None,
        gpus: Literal["auto"] | int | Sequence[int | str] | None = None,
        timeout: float | None = None,
        retries: int = 0,
        max_memory_per_worker: float | str | None = None,
        memory_limit: float | str | None = None,
        preload: Literal["auto"] | Sequence[str] = (),
        trace: str | os.PathLike[str] | None = None,
        end_subprocesses: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "max_workers": workers_per_node,
            "max_tasks_per_child": max_tasks_per_child,
            "threads_per_worker": threads_per_worker,
            "rounding": rounding,
            "reserve": reserve,
            "memory_per_worker": memory_per_worker,
            "pin_workers": pin_workers,
            "env": _packed(env) if callable(env) else env and dict(env),
            "gpus": gpus,
            "max_memory_per_worker": max_memory_per_worker,
            "memory_limit": memory_limit,
            "preload": preload if isinstance(preload, str) else [*preload],
            "end_subprocesses": end_subprocesses,
        }
        if initializer is not None:
            options["initializer"] = _packed((initializer, tuple(initargs or ())))
        self._policy = Policy(timeout_s=timeout, retries=retries)
        names = None if nodes is None or isinstance(nodes, int) else frozenset(nodes)
        carrier = _carrier(client_or_executor, nodes)
        self._scheduler = Shell(
            carrier,
            options,
            names=names,
            most_nodes=nodes if isinstance(nodes, int) else None,
            no_nodes_s=no_nodes_timeout,
            trace=None if trace is None else _trace(trace),
        )
        self._finalizer = weakref.finalize(self, self._scheduler.shut_down, wait=False)
        self._finalizer.atexit = False

    @property
    def size(self) -> int:
        """Number of workers of all nodes that are open now."""
        return sum(node.workers for node in self.nodes())

    def nodes(self) -> tuple[NodeInfo, ...]:
        """Return a :class:`NodeInfo` for each node in use: its name, workers and calls."""
        return tuple(NodeInfo(*node) for node in self._scheduler.open_nodes())

    @overload
    def submit(
        self, fn: Callable[_P, Coroutine[Any, Any, _T]], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]: ...

    @overload
    def submit(
        self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]: ...

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Schedule ``fn(*args, **kwargs)`` on a node and return its future.

        Args:
            fn: Any callable that pickle or cloudpickle can pickle.
            *args: Positional arguments of ``fn``, pickled at once. An object of
                :func:`safepool.share` is sent to each node once, and has one copy in memory there.
                The same holds for the content of each array of at least 1 MiB. The program and
                each node cache up to 64 MiB of arrays that recent calls did not use.
            **kwargs: Keyword arguments of ``fn``.

        Returns:
            A future, as in :meth:`safepool.ProcessPool.submit`. ``result()`` raises
            :class:`safepool.cluster.NodeLostError`, a ``WorkerDiedError``, if the node is lost.

        Raises:
            RuntimeError: The pool was shut down.
        """
        return self._scheduler.submit(
            fn, args, kwargs, name=name_of(fn), policy=policy_of(fn, self._policy)
        )

    _own_submit = submit

    def resize(self, max_workers: int) -> None:
        """Raise an error: cluster pools with the same options share the pool of a node.

        Raises:
            NotImplementedError: Always. ``workers_per_node=`` is the most workers of each node.
        """
        raise NotImplementedError(
            f"ClusterPool has no resize({max_workers!r}): the pool of a node is that of other "
            "cluster pools as well. Make another ClusterPool with workers_per_node="
        )

    def workers(self) -> tuple[NodeWorkerInfo, ...]:
        """Return the state of each worker of each open node at this moment.

        Cluster pools with the same options share a node's pool: their calls are listed as well. A
        node that does not answer within 5 seconds is left out, and the log names it.

        Returns:
            One entry for each worker process; none before the first call.

        Raises:
            NotImplementedError: The engine is an executor, whose nodes answer nothing while they
                work.
        """
        found: list[NodeWorkerInfo] = []
        for node, answer in self._scheduler.ask(ProcessPool.workers, timeout_s=_ASK_S).items():
            if isinstance(answer, BaseException):
                _log.warning("cannot read the workers of node %s: %s", node, text_of(answer))
            else:
                found += (NodeWorkerInfo(node=node, **asdict(worker)) for worker in answer)
        return tuple(found)

    @checked("dump_tracebacks", timeout=TIME_TO_WAIT)
    def dump_tracebacks(self, timeout: float = 1.0) -> dict[tuple[str, int], str]:
        """Return the Python stacks of every thread of every worker of each open node.

        Args:
            timeout: Seconds that each node waits for its workers, at least 0. The nodes have 5
                more seconds to answer.

        Returns:
            Stacks by name of the node and process id, in the format of
            :meth:`safepool.ProcessPool.dump_tracebacks`. A node that does not answer has the
            process id 0, and the reason in parentheses.

        Raises:
            NotImplementedError: The engine is an executor, whose nodes answer nothing while they
                work.
        """
        found: dict[tuple[str, int], str] = {}
        answers = self._scheduler.ask(
            ProcessPool.dump_tracebacks, timeout, timeout_s=timeout + _ASK_S
        )
        for node, answer in answers.items():
            if isinstance(answer, BaseException):
                found[node, 0] = f"({text_of(answer)})"
            else:
                found |= {(node, pid): stacks for pid, stacks in answer.items()}
        return found

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and finish the submitted calls. The engine stays open.

        Args:
            wait: Whether to return only after the last call has ended.
            cancel_futures: Whether to cancel the calls that were sent to no node.
        """
        self._scheduler.shut_down(wait=wait, cancel=cancel_futures)

    def terminate_workers(self) -> None:
        """End this pool's calls on all nodes and close the pool, without waiting.

        An executor as engine cannot end a call: its nodes finish their calls and the results are
        dropped.
        """
        self._scheduler.shut_down(wait=False, end="ask")

    def kill_workers(self) -> None:
        """Kill the workers that run this pool's calls, and close the pool, without waiting."""
        self._scheduler.shut_down(wait=False, end="kill")

    def __repr__(self) -> str:
        nodes = self.nodes()
        state = "closed " if self._scheduler.is_broken else ""
        return f"<{state}ClusterPool of {self.size} workers on {len(nodes)} nodes>"

    def _repr_html_(self) -> str:
        """Return a table for a notebook: what each node has to do."""
        rows = ((node.name, node.workers, node.calls) for node in self.nodes())
        return html_table(repr(self)[1:-1], ("node", "workers", "calls"), rows)


def _packed(value: object) -> Packet:
    return Packet(*payloads.dumps(value, into_main=True))


def _trace(path: str | os.PathLike[str]) -> ClusterTrace:
    from safepool.cluster.tracing import ClusterTrace  # noqa: PLC0415 -- seldom

    return ClusterTrace(path)


def _carrier(engine: Any, nodes: int | Sequence[str] | None) -> Carrier:
    check("client_or_executor", engine, _ENGINE)
    if is_client(engine):
        return DaskCarrier(engine)
    told: object = getattr(engine, "_max_workers", None)
    number = nodes if isinstance(nodes, int) else told
    if nodes is not None and not isinstance(nodes, int):
        raise ValueError(
            "nodes= must be a number if the engine is an executor, which does not name its nodes"
        )
    if not isinstance(number, int):
        kind = type(engine).__name__
        raise ValueError(  # noqa: TRY004 -- it is nodes= that lacks
            f"{kind} does not report the number of calls that it runs at a time. Pass that number "
            "as nodes="
        )
    return ExecutorCarrier(engine, number)
