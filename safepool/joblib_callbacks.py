"""joblib's callbacks in a thread of their call's own.

A callback takes the next calls from the program's iterator and submits them. The iterator may
be slow, or wait for another parallel call: in the thread that serves the pool it would hold up
every call there is, the one that it waits for included.

Not covered:
    * Batches that end after their call: their callbacks are dropped, joblib has no use for them.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["Callbacks"]

# Where a future tells of a callback that raised.
_log = logging.getLogger("concurrent.futures")

# Ctrl-C is to bring the prompt back within a second.
_WAIT_S = 0.5


class Callbacks:
    """Runs the callbacks of one ``Parallel`` call, one after the other, until it is closed."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[tuple[Callable[[Any], object], Future[Any]] | None]
        self._done = queue.SimpleQueue()
        self._closed = False
        # A daemon: it may be in the middle of an iterator that does not end.
        self._thread = threading.Thread(target=self._run, name="safepool-joblib", daemon=True)
        self._thread.start()

    def after(self, future: Future[Any], callback: Callable[[Any], object]) -> None:
        """Run a callback when a future is done."""
        future.add_done_callback(lambda done: self._done.put((callback, done)))

    def close(self) -> None:
        """Run no further ones, and wait for the one that runs; twice is once.

        A ``Parallel`` object may be called again at once, and joblib's callback would count its
        batch for that call. One that is in the middle of a slow iterator is not waited for.
        """
        self._closed = True
        self._done.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_WAIT_S)

    def _run(self) -> None:
        while (entry := self._done.get()) is not None and not self._closed:
            callback, future = entry
            try:
                callback(future)
            except Exception:  # noqa: BLE001 -- as a future does, and the next one is run
                _log.exception("exception calling callback for %r", future)
            # What the call returned is the program's to drop.
            del entry, callback, future
