"""Errors that only a pool over several nodes has."""

from __future__ import annotations

from typing import Any

from safepool.errors import PoolBrokenError, WorkerDiedError
from safepool.shown import printable


class NodeLostError(WorkerDiedError):
    """The node that had begun this call is gone, and the call has no retries left.

    Attributes:
        node: Name of the node.
        reason: The engine's own words about its end.
        pid: Process id of the process that held the node's pool, 0 if unknown.
        exitcode: Always ``None``.
        task: The call, such as ``"package.module.function"``.

    Example:
        >>> str(NodeLostError("tcp://10.0.0.3:4567 (n3)", "connection closed", 4711, "m.f"))
        'node tcp://10.0.0.3:4567 (n3) was lost while it ran m.f: connection closed'
    """

    def __init__(self, node: str, reason: str, pid: int, task: str) -> None:
        super().__init__(pid, None, task)
        # Arguments from which a pickle makes it again.
        self.args: tuple[Any, ...] = (node, reason, pid, task)
        self.node = node
        self.reason = reason

    def __str__(self) -> str:
        node, task, reason = (printable(one) for one in (self.node, self.task, self.reason))
        return f"node {node} was lost while it ran {task}: {reason}"


class NoNodesError(PoolBrokenError):
    """No node could take this call within ``no_nodes_timeout``, or none that is there can be used.

    Attributes:
        reason: The time that the call has waited, and why each node that is there cannot be used.
    """
