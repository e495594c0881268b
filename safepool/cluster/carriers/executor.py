"""Any executor of one long call per node: executorlib's on SLURM and flux, ``mpi4py.futures``.

Restrictions of such an executor, and their consequences:

    which node runs a call     functions and shared objects travel with each message again
    anything while it works    results arrive when all calls of a message have ended: a second of
                               work, or as many calls as the node has workers
    that a node is lost        only by an exception of the executor's call. If an executor waits
                               for ever then, so do the calls that were there
    a call that waits in it    ``no_nodes_timeout`` counts while its queue has begun none

Two are run by the tests, with two nodes on one machine::

    mpi4py 4.1         ``mpiexec -n 3 python -m mpi4py.futures script.py``, with MPICH 5.0. The
                       script passes ``MPIPoolExecutor()``. MPI itself ends the whole program when
                       one of its processes dies
    executorlib 1.11   ``SingleNodeExecutor(max_workers=2, block_allocation=True)`` and
                       ``nodes=2``. Without ``block_allocation`` each message starts a process, and
                       a pool in it: seconds instead of milliseconds

Not tried: executorlib's executors on SLURM and flux, which need these systems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from typing import Any

from safepool.cluster.carriers import EngineGoneError


class ExecutorCarrier:
    """Carrier of calls by an executor.

    Args:
        executor: The user's executor.
        nodes: Number of parallel calls, each on a separate node.
    """

    at_once = True

    def __init__(self, executor: Executor, nodes: int) -> None:
        self._executor = executor
        self._places = [f"call {number}" for number in range(1, nodes + 1)]
        self._gone = ""

    def places(self) -> Sequence[str]:
        """Return one place for each call at a time."""
        if self._gone:
            raise EngineGoneError(self._gone)
        return self._places

    def is_in_this_thread(self) -> bool:
        """Return whether the executor needs the current thread: it has its own."""
        return False

    def submit(self, place: str, function: Callable[..., Any], *args: Any) -> Future[Any]:  # noqa: ARG002
        """Call a function on whichever node the executor takes."""
        try:
            return self._executor.submit(function, *args)
        except (RuntimeError, CancelledError) as error:  # shut down, or broken
            self._gone = f"the executor takes no more calls: {error}"
            raise EngineGoneError(self._gone) from error
