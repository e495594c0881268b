"""Many nodes: one safe pool on each, carried by an existing engine.

    program                        engine (the user's)          node (a machine with a limit)
    ClusterPool  --submit, map-->
      shell      the one thread
        core     decides    ---->  carrier: submit to a  ---->  agent: holds the node's ProcessPool
                                   place, list of places          calls: run in its workers

    pool        `ClusterPool`: arguments and methods
    shell       does what the core decides; the one thread, maps, sessions
    submitted   calls as the shell holds them: how each is pickled, and ends
    nodes       what each node has, and what a message must bring it
    core        a pure state machine: which call is where, what is sent, lost, run again
    messages    what travels, and how it is pickled
    carriers/   the boundary to engines, and the two that there are: Dask, and any executor
    agent       on the node: one pool for all cluster pools and all of the engine's processes there
    tracing     the trace: what ran where, as far as the program hears of it
    calls       in a worker of that pool: unpickle, call, pickle
    errors      what only a cluster has

Data flows one way: ``errors, core, messages, calls -> agent -> carriers, tracing -> nodes,
submitted -> shell -> pool``.

One rule ensures "at most 1 + retries starts": a call that was sent may have begun, and is sent
again only as one of its retries. The engine's own repetition of calls is not used.

Not covered:
    * A ``ProcessPool`` that the program runs beside on the same machine, and other users' Dask
      tasks: neither knows of the other.
    * Cluster pools with different options have different pools on a node, each as large as fits.
"""

from __future__ import annotations

from safepool.cluster.errors import NodeLostError, NoNodesError
from safepool.cluster.pool import ClusterPool, NodeInfo, NodeWorkerInfo

__all__ = ["ClusterPool", "NoNodesError", "NodeInfo", "NodeLostError", "NodeWorkerInfo"]
