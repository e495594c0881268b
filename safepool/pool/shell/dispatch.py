"""Waiting calls become messages for one worker: pickled, numbered, entered in its ledger.

The scheduler's thread makes the pickles (``calls.pickling``) that run no code of the program
(``trusted``). Other threads (``hands``) make all others, and the scheduler goes on if that
takes longer than a moment:

    pack()  a task without a pickle   --> `_prepare`: in time, it is sent at once
                                          late, it is aside until `come_back`, then queued
                                          first, with its pickle or its error; a worker is
                                          kept for it meanwhile (`kept`)
            the same for calls of a map, and for its function

Afterwards the scheduler's thread sends the worker missing functions and shared objects first
(``_introduce``): the other threads know no worker.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safepool.errors import without_our_frames
from safepool.machine import tell_once
from safepool.pool.calls.deliveries import Needs
from safepool.pool.calls.pickling import Pickling
from safepool.pool.calls.tasks import fail
from safepool.pool.core.backlog import kept_for
from safepool.pool.core.events import Copied, NotSent, Sent
from safepool.pool.core.work import Span
from safepool.pool.hands import HELD_UP_S, PATIENCE_S, Hands
from safepool.pool.shell.settings import Settings, Telling
from safepool.transport.channel import size_of
from safepool.transport.frames import Filed, Kind, encode
from safepool.workers.messages import batch_frame, call_frame, task_frame, tasks_frame
from safepool.workers.settings import settings_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.functions import SentFunction
    from safepool.pool.calls.mapping import MapRun
    from safepool.pool.calls.names import Names
    from safepool.pool.calls.tasks import Task
    from safepool.pool.hands import Job
    from safepool.pool.shell.hiring import Hiring
    from safepool.pool.shell.listener import Listener
    from safepool.pool.shell.staff import Staff
    from safepool.pool.shell.worker import Worker
    from safepool.transport.frames import Segment
    from safepool.transport.main_names import MainNames
    from safepool.transport.sharing import Shared
    from safepool.workers.inheritance import Inheritance

# A larger pickle goes only to an idle worker, in a separate message, and is not kept. The pool
# cannot send it again: the program may change its objects as soon as it was sent.
_SMALL_BYTES = 64 * 1024
# Arguments of a batch, in one message.
_BATCH_BYTES = 256 * 1024
# Size up to which the scheduler's own thread copies into files: that takes less than a
# millisecond. More would keep the other workers waiting for longer than it takes to wake another
# thread and be woken.
_AT_ONCE_BYTES = 4 << 20

# Sets of names that a worker is known to have.
_MOST_DELIVERED = 256
# Between two looks whether what is being pickled still keeps a worker.
_LOOK_S = 0.25
# Pickles made at a time, and calls that may wait for theirs.
_MOST_PICKLED = 16
_MOST_ASIDE = 1024
Pieces = list["bytes | memoryview"]


@dataclass(slots=True, eq=False, repr=False)
class Packing:
    """One large payload of a worker, on its way into memory files.

    Copying 100 MB takes tens of milliseconds, in which the scheduler's thread would not serve the
    other workers. Hence other threads (``hands``) copy, and the scheduler sends the message when
    the copy is complete.

    Attributes:
        position: Position of the work in the ledger.
        function: Number of the function that is called, 0 if it is in the payload.
        segments: The payload; after the copy, the segments to send.
        error: Reason why the payload could not be copied.
    """

    worker: Worker
    work: Task | Span
    position: int
    function: int
    segments: Sequence[Segment]
    error: BaseException | None = None

    def store(self, given_up: Callable[[], bool] = bool) -> None:
        """Copy the payload into files, or keep the error that prevents it."""
        try:
            self.segments = self.worker.channel.store(self.segments, given_up)
        except BaseException as error:  # noqa: BLE001 -- told to the task
            # The frames in its traceback would keep their objects alive as long as the error.
            self.error, self.segments = error.with_traceback(None), ()

    @property
    def wanted(self) -> bool:
        """Whether the worker still owes an answer for it."""
        owed = any(work is self.work for work in self.worker.ledger)
        return owed and self.work.position == self.position and not self.worker.leaving


class Dispatch:
    """Makes the messages of one pool.

    Args:
        settled: Called with a run and the number of its calls that ended here.
        wake: Makes the scheduler call :meth:`send_packed`; from any thread.
        main: Names of the script that its workers have.
        listener: Hears how long work takes to be pickled.
    """

    def __init__(
        self,
        settled: Callable[[MapRun, int], None],
        wake: Callable[[], None],
        main: MainNames | None,
        listener: Listener,
    ) -> None:
        # The pickling function for this thread, and the one for other threads.
        heard = listener.of_pickles
        self.pickling: Pickling = Pickling(main)
        self.names: Names = self.pickling.names
        self._of_task = heard(self.pickling.task_here), heard(self.pickling.task)
        self._of_span = heard(self.pickling.span_here), heard(self.pickling.span)
        self.settings: Settings = Settings()
        self.hands: Hands = Hands("safepool-pickler", wake, _MOST_PICKLED)
        self.telling: Telling = Telling(self.settings, self.names, self.hands)
        # Numbers of functions that refer to names of the script.
        self._named: set[int] = set()
        # Names that an initializer needs.
        self._first: Sequence[Delivery] = ()
        # First worker that had each random generator of the script.
        self._generators: dict[str, int] = {}
        self._settled = settled
        # A copy waits for nothing, and two at a time would take CPUs from workers.
        self._copiers = Hands("safepool-packer", wake, 1, math.inf)
        self._copied: list[Packing] = []
        self._closed = False
        # Work that is being pickled, or waits for that, and is in no queue.
        self.aside: dict[Task | Span, Job] = {}
        self._back: list[Task | Span] = []
        self._packing = False
        self._wake = wake
        self._shared: set[int] = set()
        self._unshared: deque[int] = deque()

    def close(self) -> None:
        """Give up the work that is being pickled or copied."""
        self._closed = True
        self.aside.clear()
        self.hands.close()
        self._copiers.close(busy_too=True)

    def take_aside(self) -> list[Task | Span]:
        """Remove and return the work that is aside."""
        found = [*self.aside]
        self.aside.clear()
        return found

    @property
    def waits(self) -> bool:
        """Whether another thread than the scheduler's pickles something, or is about to."""
        return bool(self.aside) or self._packing or self.telling.waits

    def kept(self) -> tuple[int, int]:
        """Return how many idle workers to keep for work that is aside, and the place of its first.

        As :func:`kept_for` decides.
        """
        now, wanted = time.monotonic(), [work for work in self.aside if _is_wanted(work)]
        jobs = [self.aside[work] for work in wanted]
        return kept_for(
            [work.number for work in wanted],
            full=self.hands.waiting >= _MOST_ASIDE,
            passed=(job.may_be_passed(now) for job in jobs),
            fresh=(now - job.begun_s < HELD_UP_S or job.ended for job in jobs),
        )

    def _keeps_all(self, work: Task | Span) -> bool:
        """Tell whether work that was not pickled in time keeps workers from later work."""
        return work in self.aside and self.kept()[0] > 0

    def next_look(self) -> float | None:
        """Return when to call :meth:`come_back` at the latest, by the monotonic clock."""
        looks = [self.hands.next_pump(), self.telling.next_look()]
        if self.kept()[0]:
            looks.append(time.monotonic() + _LOOK_S)
        return min((look for look in looks if look is not None), default=None)

    def come_back(self, *, more: bool) -> list[Task | Span]:
        """Return work to queue again that was pickled meanwhile; fail work that could not be.

        Args:
            more: ``True`` if a worker has room: pickle waiting work.
        """
        self.hands.come_back(more=more)
        back, self._back = self._back, []
        return back

    def send_packed(self, send: Callable[[Worker, Pieces], bool]) -> list[Copied | NotSent]:
        """Send work that was copied into files; return the events for the core."""
        events: list[Copied | NotSent] = []
        self._copiers.come_back()
        copied, self._copied = self._copied, []
        for packing in copied:
            worker, work = packing.worker, packing.work
            if not packing.wanted:  # it was taken back, or its worker has ended
                events.append(Copied(worker))
            elif isinstance(work, Span) and work.run.dropped:
                # The worker has meanwhile received an order to forget the function.
                events.append(NotSent(worker, packing.position, [work]))
            else:
                pieces, again = self._finish(packing)
                if pieces:
                    send(worker, pieces)
                    events.append(Copied(worker))
                else:
                    events.append(NotSent(worker, packing.position, again))
        return events

    def _give_large(
        self, packing: Packing, before: Pieces, back: Sequence[Task]
    ) -> tuple[Pieces, Sent]:
        """Make a message of a payload that may go in files, or have it copied there first."""
        worker, work = packing.worker, packing.work
        exclusive = not isinstance(work, Span)
        if worker.channel.takes_file(packing.segments):
            if _size(packing.segments) > _AT_ONCE_BYTES:
                self._copiers.do(
                    lambda: packing.store(lambda: self._closed),
                    lambda: self._copied.append(packing),
                    0.0,
                )
                if self._copied:  # no thread could be started
                    self._wake()
                return before, Sent(worker, [work], back, exclusive, packing.position)
            packing.store()
        pieces, again = self._finish(packing)
        given = [work] if pieces else []
        sent = Sent(worker, given, [*again, *back], exclusive and bool(given))
        return [*before, *pieces], sent

    def _finish(self, packing: Packing) -> tuple[Pieces, Sequence[Task | Span]]:
        """Return the pieces of a payload that was copied.

        Without events it failed: return the work to queue again.
        """
        work, error = packing.work, packing.error
        if error is None:
            try:
                return self._frame(packing), []
            except MemoryError as problem:  # it could not go as a file after all
                error = problem
        if isinstance(work, Span) and work.count > 1:
            return [], [work.only(place) for place in range(work.count)]
        work.pickled = None
        self.fail(work, error)
        return [], []

    def _frame(self, packing: Packing) -> Pieces:
        work, segments = packing.work, packing.worker.channel.hand_over(packing.segments)
        if isinstance(work, Span):
            if work.alone:
                return task_frame(packing.position, packing.function, segments)
            return batch_frame(
                packing.position,
                packing.function,
                segments,
                starred=work.run.starred,
                timed=work.run.policy.timeout_s is not None,
                apart=work.apart,
            )
        if not work.policy.retries:
            work.pickled = None
        elif work.pickled is not None:
            # The same files again.
            work.pickled = work.pickled._replace(segments=list(packing.segments))
        return task_frame(packing.position, packing.function, segments)

    def pack(self, worker: Worker, work: Span | list[Task]) -> tuple[Pieces, Sent]:
        """Make the message that gives work to a worker."""
        if isinstance(work, Span):
            return self._pack_span(worker, work)
        return self._pack_tasks(worker, work)

    def _pack_tasks(self, worker: Worker, tasks: list[Task]) -> tuple[Pieces, Sent]:
        pieces: Pieces = []
        given: list[Task | Span] = []
        back: list[Task] = []
        group: list[tuple[int, bytes | memoryview]] = []
        first, full = worker.ledger.last + 1, False
        for place, task in enumerate(tasks):
            if not task.future.begin():
                continue
            if task.pickled is None and not self._prepare(task):
                full = self._keeps_all(task)
                if full:
                    back = tasks[place + 1 :]
                    break
                continue
            assert task.pickled is not None
            function, segments, shared, needs = task.pickled
            small = _small(segments)
            if small is None and (worker.ledger.owed or given):
                back = tasks[place:]
                break
            task.call = None
            pieces += self._introduce(worker, function, shared, needs)
            number = function.number if function else 0
            if small is None:
                packing = Packing(worker, task, first, number, segments)
                return self._give_large(packing, pieces, tasks[place + 1 :])
            given.append(task)
            group.append((number, small))
        pieces += _tasks(first, group)
        return pieces, Sent(worker, given, back, full=full)

    def _pack_span(self, worker: Worker, span: Span) -> tuple[Pieces, Sent]:
        run: MapRun = span.run
        if span.pickled is None and not self._prepare(span):
            return [], Sent(worker, (), (), full=self._keeps_all(span))
        assert span.pickled is not None
        assert run.sent is not None
        packed, span.pickled = span.pickled, None
        _, segments, shared, needs = packed
        # In a common payload a shared writable object would be one object for several calls, and
        # one call would see the changes of another.
        if not segments or (span.count > 1 and any(one.writable for one in shared)):
            alone = [span.only(place) for place in range(span.count)]
            return [], Sent(worker, (), alone)
        run.most_at_once = max(1, _BATCH_BYTES * span.count // max(_size(segments), 1))
        pieces = self._deliver(worker, run.needs)
        pieces += self._introduce(worker, run.sent, shared, needs)
        position = worker.ledger.last + 1
        return self._give_large(
            Packing(worker, span, position, run.sent.number, segments), pieces, []
        )

    # Pickling: what runs the program's code is done by the hands.

    def _prepare(self, work: Task | Span) -> bool:
        """Pickle work; return whether it may be sent now: not if it failed, or is aside."""
        here, beside = self._of_span if isinstance(work, Span) else self._of_task
        work.pickled = here(work)
        if work.pickled is not None:
            return True
        error: list[BaseException] = []
        late = False  # not the job itself: it refers to `finish`, and the two would keep the work

        def pickle_it() -> None:
            try:
                work.pickled = beside(work)
            except BaseException as problem:  # noqa: BLE001 -- user code; the call fails, not the pool
                error.append(without_our_frames(problem))

        def finish() -> None:
            if late and self.aside.pop(work, None) is None:
                return  # it was given up
            if error:
                self.fail(work, error[0])
            elif late:
                self._back.append(work)

        job = self.hands.do(pickle_it, finish, PATIENCE_S)
        if job is not None:
            late = True
            self.aside[work] = job
            if not isinstance(work, Span):
                work.future.wait_again()
        return not (job or error)

    def pack_alone(
        self, worker: Worker, work: Task | Span
    ) -> tuple[int, bytes | memoryview] | None:
        """Pickle calls for a worker that needs no other message before them.

        In any thread, without any lock.

        Returns:
            The function's number and the pickle; ``None`` if the worker lacks something, it is
            large, or to pickle it may run code of the program.
        """
        if isinstance(work, Span):
            pickled = self.pickling.span_here(work)
            function, needs = work.run.sent, work.run.needs
        else:
            pickled = work.pickled = self.pickling.task_here(work)
            function, needs = (pickled.function, pickled.needs) if pickled else (None, ())
        if pickled is None or function is None or pickled.shared or not pickled.segments:
            return None
        number, small = function.number, _small(pickled.segments)
        if (
            small is None
            or number not in worker.functions
            or not self.telling.is_told(worker)
            or (needs and getattr(needs, "number", 0) not in worker.delivered)
        ):
            return None
        return number, small

    def fail(self, work: Task | Span, error: BaseException) -> None:
        """End the calls of work with an exception."""
        if not isinstance(work, Span):
            fail(work.future, error)
            return
        run: MapRun = work.run
        for place in range(work.count):
            run.put_error(work.start + place, error)
        self._settled(run, work.count)
        run.tell()

    def _introduce(
        self,
        worker: Worker,
        function: SentFunction | None,
        shared: Sequence[Shared[Any]],
        needs: Sequence[Delivery],
    ) -> Pieces:
        """Return what brings a worker the function, shared objects and names that it lacks."""
        pieces = self._share(worker, shared)
        if needs:
            pieces += self._deliver(worker, needs)
        if function is None or function.number in worker.functions:
            return pieces
        worker.functions.add(function.number)
        if function.names:
            self._named.add(function.number)
        pieces += self._share(worker, function.shared)
        segments = worker.channel.hand_over(function.segments)
        return [*pieces, *encode(Kind.FUNCTION, function.number, segments)]

    def _deliver(self, worker: Worker, needs: Sequence[Delivery]) -> Pieces:
        """Return what brings a worker the names that it lacks in their present version."""
        pieces: Pieces = []
        number = needs.number if isinstance(needs, Needs) else 0
        if number in worker.delivered:
            return pieces
        if number:
            if len(worker.delivered) >= _MOST_DELIVERED:
                worker.delivered.clear()
            worker.delivered.add(number)
        for delivery in needs:
            if delivery.draws:
                self._note_generator(worker, delivery)
            if not delivery.lacks(worker.names):
                continue
            pieces += self._share(worker, delivery.shared)
            message = worker.channel.hand_over(delivery.message(worker.names))
            pieces += encode(Kind.NAMES, 0, message)
        if pieces:
            # Functions that refer to a name must find the object that is bound to it now.
            worker.functions -= self._named
        return pieces

    def _note_generator(self, worker: Worker, delivery: Delivery) -> None:
        """Say once that workers draw the same random numbers: a second one gets a copy."""
        name = delivery.names[0]
        if self._generators.setdefault(name, worker.pid) != worker.pid:
            tell_once(
                f"several workers draw the same random numbers from the global {name} of the "
                "script: each has a copy of the generator. Pass a seed with each task, as "
                "numpy.random.SeedSequence(seed).spawn(tasks) makes them, or make the generator "
                "in ProcessPool(initializer=)"
            )

    def pack_initializer(self, hiring: Hiring) -> bool:
        """Pickle the initializer and first messages of new workers; return whether it is done."""
        if self._packing or not self.telling.may_be_told():
            return False
        if hiring.packs_at_once:
            hiring.pack()
            return True

        def finish() -> None:
            self._packing = False

        self._packing = True
        self.hands.do(hiring.pack, finish, PATIENCE_S)
        return not self._packing

    def need_first(self, names: frozenset[str]) -> None:
        """Let new workers have names of the script before their initializer runs."""
        self._first = self.names.needed(names)

    def bring_settings(self, worker: Worker) -> Pieces:
        """Return a message with the settings that have changed since the worker's last one."""
        changed = self.telling.changed_for(worker)
        pieces: Pieces = []
        for _, needs in changed:
            pieces += self._deliver(worker, needs)
        return [*pieces, *settings_frame([packed for packed, _ in changed])] if changed else []

    def initialize(self, worker: Worker, inheritance: Inheritance) -> Pieces:
        """Return the first messages for a new worker."""
        worker.names = self.names.born_with(forked=inheritance.itself is not None)
        pieces = self.bring_settings(worker)
        pieces += self._share(worker, inheritance.shared)
        pieces += self._deliver(worker, self._first)
        segments = worker.channel.hand_over(inheritance.segments)
        return [*pieces, *encode(Kind.INITIALIZE, 0, segments)]

    def _share(self, worker: Worker, shared: Sequence[Shared[Any]]) -> Pieces:
        pieces: Pieces = []
        for one in shared:
            if one.number in worker.shared:
                continue
            worker.shared.add(one.number)
            if one.number not in self._shared:
                self._shared.add(one.number)
                weakref.finalize(one, _tell, weakref.ref(self), one.number, os.getpid())
            segments = worker.channel.hand_over(one.message())
            pieces += encode(Kind.SHARE, one.number, segments)
        return pieces

    def unshare(self, staff: Staff) -> None:
        """Let the workers drop the shared objects whose handles are gone."""
        while self._unshared:
            number = self._unshared.popleft()
            self._shared.discard(number)
            for worker in staff:
                if number in worker.shared and not worker.leaving:
                    worker.shared.discard(number)
                    staff.send(worker, encode(Kind.UNSHARE, number))

    def tell_unshared(self, number: int) -> None:
        """Note that a handle was dropped. From any thread, also by the garbage collector."""
        self._unshared.append(number)
        self._wake()


def _tell(dispatch: weakref.ref[Dispatch], number: int, pid: int) -> None:
    found = dispatch()
    if found is not None and os.getpid() == pid:  # a fork has others' descriptors, if any
        found.tell_unshared(number)


def _is_wanted(work: Task | Span) -> bool:
    return not (work.run.dropped if isinstance(work, Span) else work.future.cancelled())


def _tasks(first: int, group: list[tuple[int, bytes | memoryview]]) -> Pieces:
    if len(group) == 1:
        return [call_frame(first, *group[0])]
    return tasks_frame(first, group) if group else []


def forget(worker: Worker, function: SentFunction, send: Callable[[Worker, Pieces], bool]) -> None:
    """Let a worker drop the function of a ``map`` that has ended."""
    if function.number in worker.functions:
        worker.functions.discard(function.number)
        send(worker, encode(Kind.FORGET, function.number))


def _small(segments: Sequence[Segment]) -> bytes | memoryview | None:
    """Return the pickle of a payload without buffers, if it is small."""
    pickled, *buffers = segments
    if buffers or isinstance(pickled, Filed) or len(pickled) > _SMALL_BYTES:
        return None
    return pickled


def _size(segments: Sequence[Segment]) -> int:
    return sum(map(size_of, segments))
