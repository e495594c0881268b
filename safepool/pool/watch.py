"""State of a pool for callers outside: each worker's task and Python stacks.

Any thread may ask, even while the scheduler's thread is stuck in a callback of the program:
nothing here waits for that thread. Notes of a worker are read in their present state. The
descriptors of a worker are used under its ``guard``, so that nothing closes and reuses a
descriptor meanwhile.

Not covered:
    * An answer that the worker has sent and the scheduler has not read: the worker counts as busy
      until then.
    * Stacks elsewhere than on Linux.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safepool.pool.core.worker import Phase
from safepool.procfs import Status, read_status, threads_that_block
from safepool.shown import html_table, size
from safepool.workers.board import STACK_SIGNAL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from safepool.pool.calls.mapping import Span
    from safepool.pool.calls.tasks import Task
    from safepool.pool.shell.worker import Worker

# Between two looks whether a worker has written its stack; that takes it microseconds.
_LOOK_S = 0.002
# More of old stacks is not kept in a worker's file: it is memory.
_KEPT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """State of one worker at one moment.

    Attributes:
        pid: Process id.
        index: Number of the worker in its pool, the same as :func:`safepool.worker_index` in the
            worker.
        state: ``"starting"`` until its initializer has ended; ``"busy"`` while it runs a task,
            otherwise ``"idle"``; ``"leaving"`` when it gets no more tasks and ends after its
            present ones.
        task: Name of the call that the worker runs, such as ``"package.module.function"``;
            ``None`` if none.
        running_s: Seconds since the call began; ``None`` if no call runs.
        tasks_done: Number of tasks that the worker has finished; each call of a ``map`` is one.
        waiting: Number of tasks that were sent to the worker and have not begun. An idle worker
            takes them over.
        resident_bytes: Resident memory of the worker; ``None`` if the system does not report it.
        native_threads: Number of threads of the worker's process, those of native libraries
            included; ``None`` if the system does not report it.

    Example:
        >>> from safepool import ProcessPool
        >>> with ProcessPool(1) as pool:
        ...     pool.submit(abs, -1).result()
        ...     (worker,) = pool.workers()
        1
        >>> worker.state, worker.task, worker.tasks_done
        ('idle', None, 1)
    """

    pid: int
    index: int
    state: Literal["starting", "idle", "busy", "leaving"]
    task: str | None
    running_s: float | None
    tasks_done: int
    waiting: int
    resident_bytes: int | None
    native_threads: int | None


def worker_table(caption: str, workers: Iterable[WorkerInfo]) -> str:
    """Return a table of workers in HTML."""
    head = ("pid", "state", "task", "since, s", "tasks done", "memory", "threads")
    rows = (
        (
            one.pid,
            one.state,
            one.task,
            None if one.running_s is None else f"{one.running_s:.1f}",
            one.tasks_done,
            None if one.resident_bytes is None else size(one.resident_bytes),
            one.native_threads,
        )
        for one in workers
    )
    return html_table(caption, head, rows)


def look_at(workers: Iterable[Worker]) -> tuple[WorkerInfo, ...]:
    """Return what each of the workers does."""
    return tuple(_look_at(worker) for worker in workers)


def _look_at(worker: Worker) -> WorkerInfo:
    at, since_ns = _place(worker)
    task, waiting = None, 0
    for work in _works(worker):
        begin, end = work.position + work.done, work.position + work.count
        if begin <= at < end:
            task = work.name
        waiting += max(0, end - max(begin, at + 1))
    state: Literal["starting", "idle", "busy", "leaving"]
    if worker.phase >= Phase.RETIRING:
        state = "leaving"
    elif not worker.ready:
        state = "starting"
    else:
        state = "idle" if task is None else "busy"
    status = read_status(worker.pid)
    return WorkerInfo(
        pid=worker.pid,
        index=worker.index,
        state=state,
        task=task,
        running_s=None if task is None else max(0, time.monotonic_ns() - since_ns) / 1e9,
        tasks_done=_done(worker),
        waiting=waiting,
        resident_bytes=worker.resident_bytes(),
        native_threads=None if status is None else status.threads,
    )


def _place(worker: Worker) -> tuple[int, int]:
    """Return the position that a worker has come to, and when that began."""
    board = worker.board
    while board:
        try:
            at, since_ns = board.claimed, board.since_ns
            if board.claimed == at:
                return at, since_ns
        except ValueError:
            break  # it has ended, and its board is closed
    # A worker runs its calls one by one, from the moment in which they were sent.
    head = next(iter(_works(worker)), None)
    return (0 if head is None else head.position + head.done), worker.sent_ns


def _done(worker: Worker) -> int:
    done, lane = worker.done, worker.lane
    return done if lane is None else done + lane.done


def _works(worker: Worker) -> list[Task | Span]:
    while True:
        lane = worker.lane
        try:
            work = None if lane is None else lane.work
            return list(worker.ledger) if work is None else [work]
        except RuntimeError:  # changed meanwhile
            pass


class Stacks:
    """Asks workers for their Python stacks, one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def of(self, workers: Iterable[Worker], timeout_s: float) -> dict[int, str]:
        """Return the stacks of each worker by its process id, or the reason in parentheses.

        The time is for all workers together.
        """
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            return {worker.pid: "(others are asking for its stacks)" for worker in workers}
        try:
            requests = [_Request(worker) for worker in workers]
            left = requests
            while left := [request for request in left if not request.look()]:
                if time.monotonic() >= deadline:
                    break
                time.sleep(_LOOK_S)
            return {request.worker.pid: request.close() for request in requests}
        finally:
            self._lock.release()


class _Request:
    """A worker that was sent ``STACK_SIGNAL`` for its stacks."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._text = ""
        self._begin = 0
        self._blocking: frozenset[int] = frozenset()
        with worker.guard:
            status = None if worker.closed else read_status(worker.pid)
            self._text = self._why_not(status)
            if self._text:
                return
            assert status is not None
            # Answers to other requests, and late ones, do not count.
            self._begin = worker.board.written
            self._blocking = threads_that_block(worker.pid, STACK_SIGNAL)
            if not status.awaits(STACK_SIGNAL):
                worker.end(STACK_SIGNAL)

    def _why_not(self, status: Status | None) -> str:
        if not (STACK_SIGNAL and self.worker.board):
            return "(no stacks: this system has no file that a worker can leave them in)"
        if status is None or status.state in "ZX":
            return "(it has ended)"
        if status.state in "Tt":
            return "(it is stopped, by SIGSTOP or a debugger: it runs nothing)"
        if not status.catches(STACK_SIGNAL):
            # A worker without the handler would be ended by the signal.
            told = "it handles no such signal" if self.worker.ready else "it is still starting"
            return f"(it cannot be asked: {told})"
        return ""

    def look(self) -> bool:
        """Return whether nothing is left to wait for."""
        if self._text:
            return True
        worker = self.worker
        with worker.guard:
            if worker.closed or not worker.board:
                self._text = "(it has ended)"
                return True
            status = read_status(worker.pid)
            if status is None or status.awaits(STACK_SIGNAL):
                return False
            if worker.board.written <= self._begin:
                return False
            # In the middle of its handler a thread blocks the signal.
            if threads_that_block(worker.pid, STACK_SIGNAL) - self._blocking:
                return False
            self._text = worker.board.fault(self._begin)
            if worker.board.written > _KEPT_BYTES and worker.condemned is None:
                worker.board.drop_faults()
        return True

    def close(self) -> str:
        """Return what there is."""
        if self._text:
            return self._text
        with self.worker.guard:
            found = "" if self.worker.closed else self.worker.board.fault(self._begin)
        return found or "(no answer in time: it waits in the kernel, or is frozen)"
