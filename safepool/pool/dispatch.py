"""From what waits to messages for one worker: pickled, numbered, written in its ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safepool.pool.functions import Functions, SentFunction
from safepool.pool.tasks import begin, fail
from safepool.transport import payloads
from safepool.transport.frames import Kind, encode
from safepool.workers.messages import batch_frame, task_frame, tasks_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.mapping import MapRun, Span
    from safepool.pool.staff import Worker
    from safepool.pool.tasks import Task

__all__ = ["Dispatch", "was_not_sent"]

# A larger pickle goes to an idle worker only, in a message of its own, and is not kept: what it
# refers to may be changed by the program as soon as it was sent, so it cannot be sent again.
_SMALL_BYTES = 64 * 1024
# Arguments of a batch, in one message.
_BATCH_BYTES = 256 * 1024

# How the note begins that such an error gets.
_NOT_SENT = "while the call of "

Pieces = list["bytes | memoryview"]


class Dispatch:
    """Makes the messages of one pool.

    Args:
        settled: Told of calls of a run that ended here, and how many.
    """

    def __init__(self, settled: Callable[[MapRun, int], None]) -> None:
        self.functions = Functions()
        self._settled = settled

    def pack_tasks(self, worker: Worker, tasks: list[Task]) -> tuple[Pieces, list[Task]]:
        """Give tasks to a worker.

        Returns:
            The pieces to send, and the tasks that it must not have yet.
        """
        pieces: Pieces = []
        group: list[tuple[int, bytes | memoryview]] = []
        first = 0
        for place, task in enumerate(tasks):
            if not begin(task.future):
                continue
            if task.pickled is None:
                try:
                    task.pickled = self._pickle(task)
                except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
                    _say_what(error, task.name)
                    fail(task.future, error)
                    continue
            function, segments = task.pickled
            small = len(segments) == 1 and len(segments[0]) <= _SMALL_BYTES
            if not small and worker.ledger.owed:
                task.future.wait_again()
                return [*pieces, *_tasks(first, group)], tasks[place:]
            task.call = None
            if function is not None:
                pieces += self._introduce(worker, function)
            worker.ledger.give(task)
            if small:
                if not group:
                    first = task.position
                group.append((function.number if function else 0, segments[0]))
                continue
            worker.exclusive = True
            pieces += task_frame(task.position, function.number if function else 0, segments)
            if not task.policy.retries:
                task.pickled = None
            return pieces, tasks[place + 1 :]
        return [*pieces, *_tasks(first, group)], []

    def pack_span(self, worker: Worker, span: Span) -> tuple[Pieces, list[Span]]:
        """Give calls of a run to a worker; as :meth:`pack_tasks`."""
        run = span.run
        if run.sent is None:
            try:
                run.sent = self.functions.once(
                    run.function, of_main=run.name.startswith("__main__.")
                )
            except BaseException as error:  # noqa: BLE001 -- user code
                _say_what(error, run.name)
                self._fail_all(span, error)
                return [], []
        try:
            value: object = (run.arguments_of(span.items[0]), {}) if span.alone else span.items
            segments = payloads.dumps(value, into_main=True)
        except BaseException as error:  # noqa: BLE001 -- user code; one of the calls fails
            if span.count == 1:
                _say_what(error, run.name)
                self._fail_all(span, error)
                return [], []
            return [], [span.only(place) for place in range(span.count)]
        size = sum(memoryview(segment).nbytes for segment in segments)
        run.most_at_once = max(1, _BATCH_BYTES * span.count // max(size, 1))
        pieces = self._introduce(worker, run.sent)
        worker.ledger.give(span)
        number = run.sent.number
        if span.alone:
            return [*pieces, *task_frame(span.position, number, segments)], []
        timed = run.policy.timeout_s is not None
        frame = batch_frame(span.position, number, segments, starred=run.starred, timed=timed)
        return [*pieces, *frame], []

    def _pickle(self, task: Task) -> tuple[SentFunction | None, Pieces]:
        assert task.call is not None
        function, args, kwargs = task.call
        sent = self.functions.importable(function)
        if sent is not None:
            return sent, payloads.dumps((args, kwargs), into_main=True)
        of_main = task.name.startswith("__main__.")
        return None, payloads.dumps(task.call, into_main=True, by_value=of_main)

    def _fail_all(self, span: Span, error: BaseException) -> None:
        run = span.run
        for place in range(span.count):
            run.put_error(span.start + place, error)
        self._settled(run, span.count)
        run.tell()

    def _introduce(self, worker: Worker, function: SentFunction) -> Pieces:
        if function.number in worker.functions:
            return []
        worker.functions.add(function.number)
        return encode(Kind.FUNCTION, function.number, function.segments)


def _say_what(error: BaseException, name: str) -> None:
    """Add to a pickling error what it does not know: whose call it was."""
    note = f"{_NOT_SENT}{name} was pickled, with its arguments"
    if name.startswith("__main__."):
        note += " and the globals of __main__ that it uses, which travel to the worker by value"
    try:
        error.add_note(note)
    except BaseException:  # noqa: BLE001 -- an exception whose class allows no attributes
        pass


def was_not_sent(error: BaseException) -> bool:
    """Tell whether this is what the pickler raised, and no worker has begun the call."""
    return any(note.startswith(_NOT_SENT) for note in getattr(error, "__notes__", ()))


def _tasks(first: int, group: list[tuple[int, bytes | memoryview]]) -> Pieces:
    return tasks_frame(first, group) if group else []


def forget(worker: Worker, function: SentFunction, send: Callable[[Worker, Pieces], bool]) -> None:
    """Let a worker drop the function of a ``map`` that has ended."""
    if function.number in worker.functions:
        worker.functions.discard(function.number)
        send(worker, encode(Kind.FORGET, function.number))
