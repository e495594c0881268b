"""The boundary to an engine: all that a cluster pool asks of one.

A *place* is where the engine can run a function of ours: a worker process, or one of its calls at
a time. The engine is the user's: started, secured and ended by them.

    carriers/dask.py       a ``distributed.Client``: places are its workers
    carriers/executor.py   any ``concurrent.futures.Executor`` with one long call per node
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from safepool.errors import SafepoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future


class EngineGoneError(SafepoolError):
    """The engine takes no more calls: it was closed, or cannot be reached."""


class PlaceLostError(SafepoolError):
    """The place of a call is gone, or cannot be reached."""


class Carrier(Protocol):
    """Carries calls to places.

    Attributes:
        at_once: A place runs one call at a time, and may be any process: a message must hold all
            that its calls need. Otherwise a place is one process that runs coroutines beside each
            other.
    """

    at_once: bool

    def places(self) -> Sequence[str]:
        """Return the present places. Called once a second, and must not wait.

        Raises:
            EngineGoneError: The engine takes no more calls.
        """
        ...

    def is_in_this_thread(self) -> bool:
        """Return whether no call is carried while the current thread waits for something."""
        ...

    def submit(self, place: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Call a function of this package at a place.

        Returns:
            A future with the function's result or exception; with :class:`PlaceLostError` if the
            place is gone. The future need not be cancellable. The engine must not run the function
            again.

        Raises:
            EngineGoneError: The engine takes no more calls.
        """
        ...
