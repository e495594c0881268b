"""A thread for the callbacks of one joblib call.

A callback takes the next calls from the program's iterator and submits them. The iterator may be
slow, or wait for another parallel call: in the thread that serves the pool it would delay every
call, even the one that it waits for.

It also wakes a program at the end of its call: joblib itself looks every 10 ms.

Not covered:
    * Batches that end after their call: their callbacks are dropped, joblib has no use for them.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from joblib.parallel import TASK_ERROR, BatchCompletionCallBack

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

# After Ctrl-C the prompt must come back within a second.
_WAIT_S = 0.5
# Pause between two checks of a call, in case that a wake-up is lost.
_LOOK_S = 0.1


class Callbacks:
    """Runs the callbacks of one ``Parallel`` call, one after the other, until it is closed.

    Args:
        goes_on: Function that returns whether the call needs further results.
    """

    def __init__(self, goes_on: Callable[[], bool]) -> None:
        self._goes_on = goes_on
        self._over = threading.Event()
        self._done: queue.SimpleQueue[tuple[Any, Future[Any]] | None]
        self._done = queue.SimpleQueue()
        self._closed = False
        # A daemon: it may be in the middle of an iterator that does not end.
        self._thread = threading.Thread(target=self._run, name="safepool-joblib", daemon=True)
        self._thread.start()

    def after(self, future: Future[Any], callback: Any) -> None:
        """Run a callback of joblib's when a future is done."""
        future.add_done_callback(lambda done: self._done.put((callback, done)))

    def wait(self) -> None:
        """Return when the call needs no further callback. Callbacks must not call this."""
        while self._goes_on():
            self._over.wait(_LOOK_S)
            self._over.clear()

    def close(self) -> None:
        """Run no further callbacks, and wait for the running one. May be called twice.

        A ``Parallel`` object may be called again at once, and joblib's callback would count its
        batch for that call. A callback in the middle of a slow iterator is not waited for.
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
            except BaseException as error:  # noqa: BLE001 -- raised where the program waits
                fail(callback.parallel, callback.parallel_call_id, error)
            if not self._goes_on():
                self._over.set()
            # The program owns the result of the call.
            del entry, callback, future


def fail(parallel: Any, call_id: str | None, error: BaseException) -> None:
    """Let a call raise what its callback has raised, as joblib does with an iterator's errors.

    Otherwise no batch would be dispatched any more, and the program would wait without end. The
    cause is ``SystemExit`` or ``KeyboardInterrupt`` from the iterator, or the printing of
    progress.
    """
    with parallel._lock:
        if parallel._call_id == call_id:
            failed = BatchCompletionCallBack(0.0, 0, parallel)
            parallel._register_new_job(failed)
            failed._register_outcome({"result": error, "status": TASK_ERROR})
