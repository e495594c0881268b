"""Answers of workers: they end tasks by their future, and calls of a map among its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safepool.errors import MemoryLimitError
from safepool.pool.calls.tasks import Task, fail, finish, rebuild
from safepool.pool.core.events import Answered
from safepool.pool.core.work import Span
from safepool.pool.hands import PATIENCE_S, Hands
from safepool.transport import payloads, trusted
from safepool.transport.frames import Kind
from safepool.transport.growing import OBJECTS, loaded_bytes
from safepool.transport.room import be_full, refusal
from safepool.transport.trusted import UntrustedError
from safepool.workers.board import records_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.calls.mapping import MapRun
    from safepool.pool.core.events import Settle
    from safepool.pool.core.worker import Member
    from safepool.workers.board import Left

    _Segments = Sequence[bytes | bytearray | memoryview]

# A larger result counts individually against the bound of its map.
_SMALL_BYTES = 64 * 1024
# Pickles of small results that arrive between two looks at the memory that is left.
_ARRIVED_BYTES = 256 * 1024
# A smaller result takes less than the error in its place.
_LEAST_REFUSED_BYTES = 128
# Results that the hands unpickle at a time.
_MOST_READ = 16


class _Answer:
    """Answer of a worker to one call, on its way to an object.

    Attributes:
        value: The value or exception of the call, when it was read.
        failed: Whether the call raised.
    """

    __slots__ = ("failed", "index", "kind", "segments", "value", "work")

    def __init__(self, work: Task | Span, place: int, kind: int, segments: _Segments) -> None:
        self.work = work
        self.index = work.start + place if isinstance(work, Span) else 0
        self.kind = kind
        self.segments = segments
        self.value: Any = None
        self.failed = False

    def read_here(self) -> bool:
        """Unpickle it, if that runs no code of the program; ``False`` if it may."""
        try:
            return self._read(trusted.loads)
        except UntrustedError:
            return False

    def read(self) -> None:
        """Unpickle it. In any thread."""
        self._read(payloads.loads)

    def _read(self, loads: Callable[[_Segments], Any]) -> bool:
        try:
            if self.kind == Kind.EXCEPTION:
                self.value, self.failed = rebuild(self.segments, loads, self.work.name), True
            else:
                self.value = loads(self.segments)
        except UntrustedError:
            raise
        except MemoryError as error:
            # The frames in its traceback would keep their objects alive as long as the error.
            self.value, self.failed = error.with_traceback(None), True
        except BaseException as error:  # noqa: BLE001 -- user code; the task fails, not the pool
            self.value, self.failed = error, True
        return True


class Settling:
    """Ends calls.

    Args:
        settled: Called with a run and the number of its calls that have ended.
        wake: Makes the scheduler call the hands' ``come_back``; from any thread.
    """

    def __init__(self, settled: Callable[[MapRun, int], None], wake: Callable[[], None]) -> None:
        self._settled = settled
        self.hands: Hands = Hands("safepool-unpickler", wake, _MOST_READ)
        # Answers that are being unpickled.
        self._unread: list[_Answer] = []
        self._arrived_bytes = 0

    @property
    def waits(self) -> bool:
        """Whether something is being unpickled."""
        return bool(self._unread)

    def arrived(self, size_bytes: int) -> None:
        """Count objects that other threads have unpickled against the memory that is left."""
        self._arrived_bytes += size_bytes

    def settle(self, done: Settle) -> dict[int, BaseException]:
        """End calls by their answers.

        Returns:
            The exceptions, by their place in the payload. An answer that takes long to unpickle
            stands for itself.
        """
        if done.plain:
            return self._settle_values(done, *done.payload)
        raised: dict[int, BaseException] = {}
        runs: set[MapRun] = set()
        for work, place, _, at in done.settled:
            error = self._settle_one(_Answer(work, place, *done.payload[at]))
            if error is not None:
                raised[at] = error
            if isinstance(work, Span):
                runs.add(work.run)
        for run in runs:
            run.tell()
        return raised

    def _settle_one(self, answer: _Answer) -> BaseException | None:
        """End a call by its answer, at once or later; return the exception of the call."""
        work = answer.work
        if isinstance(work, Task):
            work.pickled = None
        answer.value = self._refuse(len(answer.segments[0]))
        answer.failed = answer.value is not None
        if not (answer.failed or answer.read_here()):

            def finish() -> None:
                if answer in self._unread:
                    self._unread.remove(answer)
                    self._end(answer)
                    if isinstance(work, Span):
                        work.run.tell()

            self._unread.append(answer)
            if self.hands.do(answer.read, finish, PATIENCE_S) is not None:
                return Exception() if answer.kind == Kind.EXCEPTION else None
        else:
            self._end(answer)
        return answer.value if answer.failed else None

    def _refuse(self, size_bytes: int) -> MemoryLimitError | None:
        """Return the error if there is no room for unpickled objects; ``None`` if there is room.

        The program may keep all results, however small each is.
        """
        self._arrived_bytes += size_bytes
        if self._arrived_bytes < _ARRIVED_BYTES or size_bytes < _LEAST_REFUSED_BYTES:
            return None
        error = refusal(OBJECTS * _ARRIVED_BYTES)
        # If it is refused, the next is looked at as well.
        self._arrived_bytes = 0 if error is None else _ARRIVED_BYTES
        return error

    def _end(self, answer: _Answer) -> None:
        work, value, failed = answer.work, answer.value, answer.failed
        if failed and isinstance(value, MemoryLimitError):
            be_full()  # the worker's look, of which this process knows nothing
        if isinstance(work, Task):
            (fail if failed else finish)(work.future, value)
            return
        run: MapRun = work.run
        if failed:
            run.put_error(answer.index, value)
        else:
            head, *buffers = answer.segments
            size = OBJECTS * len(head) if len(head) < _SMALL_BYTES else loaded_bytes(head)
            run.put(answer.index, [value], size + sum(map(len, buffers)))
        self._settled(run, 1)

    def _settle_values(
        self, done: Settle, values: list[Any], size_bytes: int
    ) -> dict[int, BaseException]:
        """End calls of runs that returned plain values."""
        refused, each = self._refuse(size_bytes), OBJECTS * size_bytes // len(values)
        for work, place, count, at in done.settled:
            run: MapRun = work.run
            if refused is None:
                run.put(work.start + place, values[at : at + count], count * each)
            else:
                for index in range(work.start + place, work.start + place + count):
                    run.put_error(index, refused)
            self._settled(run, count)
            run.tell()
        return {} if refused is None else {at: refused for *_, at in done.settled}


def answers_of(worker: Member, records: bytes | bytearray, *, peeked: bool = False) -> Answered:
    """Return the event for answers that arrived together.

    Raises:
        ValueError: They are cut off.
    """
    answers, payload = [], []
    for position, microseconds, kind, pickled in records_of(records):
        answers.append((position, 1, microseconds))
        payload.append((kind, [pickled]))
    return Answered(worker, answers, payload, peeked=peeked)


def values_of(
    worker: Member, position: int, microseconds: int | None, values: list[Any], size_bytes: int
) -> Answered:
    """Return the event for calls that follow each other and returned plain values.

    Args:
        worker: Worker that answered.
        position: The first one's.
        microseconds: Time that they took together; ``None`` if that is not known yet.
        values: Values that they returned.
        size_bytes: Size of the message that they were read from.
    """
    one = (position, len(values), microseconds)
    return Answered(worker, [one], (values, size_bytes), plain=True)


def left_by(worker: Member, left: Left) -> list[Answered]:
    """Return the events for answers that a worker has left on its board, and not sent yet.

    Raises:
        ValueError: They are cut off.
    """
    found = [answers_of(worker, left.records, peeked=True)] if left.records else []
    if left.numbers:
        size_bytes = 8 * len(left.numbers)
        values = values_of(worker, left.first, None, left.numbers, size_bytes)
        found.append(values._replace(peeked=True))
    return found
