"""Waiting calls become messages for one worker: pickled, numbered, entered in its ledger.

The scheduler's thread pickles objects whose pickling is known to run no code of the program
(``trusted``). Other threads (``hands``) pickle everything else, and the scheduler goes on if that
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

import functools
import gc
import itertools
import math
import os
import pickle
import sys
import time
import types
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

from safepool.errors import text_of, users_frames
from safepool.machine import tell_once
from safepool.pool.calls.deliveries import Needs
from safepool.pool.calls.functions import Functions, SentFunction
from safepool.pool.calls.mains import is_data, runs_no_code
from safepool.pool.calls.names import Names
from safepool.pool.calls.tasks import Pickled, begin, fail
from safepool.pool.core.events import Copied, NotSent, Sent
from safepool.pool.core.work import Span
from safepool.pool.hands import HELD_UP_S, Hands
from safepool.pool.shell.packing import Packing
from safepool.pool.shell.settings import Settings, Telling
from safepool.transport import payloads, references, trusted
from safepool.transport.blame import find_unpicklable
from safepool.transport.channel import size_of
from safepool.transport.descriptors import are_beyond
from safepool.transport.files import require_to_pickle
from safepool.transport.frames import Filed, Kind, encode
from safepool.transport.marks import MAIN_NAMES, PLAIN
from safepool.transport.names import Met, names_of
from safepool.transport.trusted import UntrustedError, imports_here
from safepool.workers.messages import batch_frame, call_frame, task_frame, tasks_frame
from safepool.workers.settings import settings_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.mapping import MapRun
    from safepool.pool.calls.tasks import Parts, Task
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

# The most items of a batch that may be large.
_FEW = 16

# They hold nothing that a call could change.
_UNCHANGED: tuple[type, ...] = (
    *PLAIN,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)

# Parts of one item that are looked at.
_MOST_PARTS = 1000
# Sets of names that a worker is known to have.
_MOST_DELIVERED = 256
# Time to wait for a pickle of another thread. Most pickles are ready by then, and calls begin in
# the order of submission.
_PATIENCE_S = 0.005
# Between two looks whether what is being pickled still keeps a worker.
_LOOK_S = 0.25
# No worker is given anything.
_ALL = sys.maxsize
# Pickles made at a time, and calls that may wait for theirs.
_MOST_PICKLED = 16
_MOST_ASIDE = 1024
# Calls of one function of which it is searched what could not be pickled.
_MOST_BLAMED = 3
# First words of the note on a pickling error.
_NOT_SENT = "while the call of "
# In the pickler's words: of a coroutine that was called too early.
_COROUTINE = "'coroutine' object"
# Text of multiprocessing's locks, values and queues about a pickler that starts no process.
_INHERITED = "shared between processes through inheritance"

Pieces = list["bytes | memoryview"]


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
        self._of_task = heard(self._pickle_task_here), heard(self._pickle_task)
        self._of_span = heard(self._pickle_span_here), heard(self._pickle_span)
        self.functions: Functions = Functions()
        self.names: Names = Names(main)
        self.settings: Settings = Settings()
        self.hands: Hands = Hands("safepool-pickler", wake, _MOST_PICKLED)
        self.telling: Telling = Telling(self.settings, self.names, self.hands)
        # Numbers of functions that refer to names of the script.
        self._named: set[int] = set()
        # Names that an initializer needs.
        self._first: Sequence[Delivery] = ()
        self._blamed: Counter[str] = Counter()
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
        """Whether something is being pickled, or about to be, beside the scheduler's thread."""
        return bool(self.aside) or self._packing or self.telling.waits

    def kept(self) -> tuple[int, int]:
        """Return how many idle workers to keep for work that is aside, and the place of its first.

        For a moment no worker is given anything. Then each work keeps one, also the only worker of
        a pool. What came before all of it is given out.
        Nothing is kept as long as one may wait for a later call.
        """
        wanted = [(work.number, job) for work, job in self.aside.items() if _is_wanted(work)]
        if not wanted:
            return 0, 0
        now, first = time.monotonic(), min(number for number, _ in wanted)
        if self.hands.waiting >= _MOST_ASIDE:
            return _ALL, first
        if any(job.may_be_passed(now) for _, job in wanted):
            return 0, first
        fresh = any(now - job.begun_s < HELD_UP_S or job.ended for _, job in wanted)
        return (_ALL if fresh else len(wanted)), first

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
            more: A worker has room: pickle what waits for that.
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
            if not begin(task.future):
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
        late = False  # not the job itself: it has `finish`, and the two would keep the work

        def pickle_it() -> None:
            try:
                work.pickled = beside(work)
            except BaseException as problem:  # noqa: BLE001 -- user code; the call fails, not the pool
                error.append(_without_frames(problem))

        def finish() -> None:
            if late and self.aside.pop(work, None) is None:
                return  # it was given up
            if error:
                self.fail(work, error[0])
            elif late:
                self._back.append(work)

        job = self.hands.do(pickle_it, finish, _PATIENCE_S)
        if job is not None:
            late = True
            self.aside[work] = job
            if not isinstance(work, Span):
                work.future.wait_again()
        return not (job or error)

    def pickle_now(self, task: Task) -> None:
        """Pickle a task in the thread that submits it, if this thread imports a module.

        Objects of that module would make another thread wait for the import's end, and the program
        may wait for the call before the import ends.
        """
        if imports_here() and not _is_name_in_main(task.name):
            try:
                with Met() as met:
                    pickled = payloads.dumps_to_send(task.call, into_main=True)
                if not (met.names or references.known()):
                    task.pickled = Pickled(None, pickled, (), ())
            except Exception:  # noqa: BLE001 -- user code; tried again, and told, in its turn
                pass

    def pickle_function_now(self, run: MapRun) -> None:
        """Pickle the function of a run, as :meth:`pickle_now`."""
        if imports_here() and not _is_name_in_main(run.name):
            try:
                sent = self.functions.once(run.function, of_main=False)
                run.needs = self.names.needed(sent.names)
                run.sent = sent
            except Exception:  # noqa: BLE001 -- as above
                pass

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
            pickled = self._pickle_span_here(work)
            function, needs = work.run.sent, work.run.needs
        else:
            pickled = work.pickled = self._pickle_task_here(work)
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

    def _pickle_task_here(self, task: Task) -> Pickled | None:
        """Return a task's pickle, if to make it runs no code of the program."""
        assert task.call is not None
        function, args, kwargs = task.call
        sent = self.functions.known(function)
        if sent is None:
            bare = not kwargs and runs_no_code(function) and is_data(args)
            return self._pickle_bare(task) if bare else None
        needs = self.names.needed_here(sent.names)
        if needs is None:
            return None
        try:
            require_to_pickle(args)
            if kwargs:
                require_to_pickle(kwargs.values())
            elif PLAIN.issuperset(map(type, args)):
                return Pickled(sent, [pickle.dumps((args, kwargs), 5)], (), needs)
            return _dumps_here((args, kwargs))._replace(function=sent, needs=needs)
        except (UntrustedError, MemoryError):  # the hands say why
            return None

    def _pickle_bare(self, task: Task) -> Pickled | None:
        """Return the pickle of a function by value that holds data alone: most lambdas."""
        assert task.call is not None
        function, args, kwargs = task.call
        names = names_of(function.__code__)
        needs = self.names.needed_here(names)
        by_value = sys.modules.get("safepool.transport.by_value")
        if needs is None or by_value is None or not trusted.is_settled(by_value):
            return None
        sent = self.functions.lasting(function)
        if sent is not None:
            same = sent.names == names
            return Pickled(sent, [pickle.dumps((args, kwargs), 5)], (), needs) if same else None
        with Met() as met:
            segments = payloads.dumps(task.call, into_main=True, by_value=True)
        return Pickled(None, segments, (), needs) if met.names == names else None

    def _pickle_task(self, task: Task) -> Pickled:
        """Return a task's pickle. Any thread may call this."""
        call, task.call = task.call, None  # dropped here: a finalizer may wait as well
        assert call is not None
        function, args, kwargs = call
        try:
            require_to_pickle(args)
            require_to_pickle(kwargs.values())
            sent = self.functions.lasting(function)
            if sent is None:
                return self._dumps(call, by_value=_is_name_in_main(task.name))
            return self._dumps((args, kwargs), names=sent.names)._replace(function=sent)
        except BaseException as error:
            self._say_what(error, task.name, _whole(call))
            raise

    def _dumps(
        self, value: object, *, by_value: bool = False, names: frozenset[str] = frozenset()
    ) -> Pickled:
        """Pickle a call, or a part of it."""
        with Met() as met, references.Collected() as shared:
            segments = payloads.dumps_to_send(value, into_main=True, by_value=by_value)
        needed = self.names.needed(names | met.names if met.refs or met.uses else names)
        return Pickled(None, segments, shared.found, needed)

    def _pickle_span_here(self, span: Span) -> Pickled | None:
        run: MapRun = span.run
        if run.sent is None:
            sent = self.functions.known(run.function)
            needs = None if sent is None else self.names.needed_here(sent.names)
            if needs is not None:
                run.sent, run.needs = sent, needs
        if run.sent is None:
            return None
        try:
            return _pickle_items(span, _dumps_here)
        except (UntrustedError, MemoryError):  # the hands say why
            return None

    def _pickle_span(self, span: Span) -> Pickled:
        """Return the pickle of a run's function and common data, in any thread."""
        run: MapRun = span.run
        if run.sent is None:
            try:
                sent = self.functions.once(run.function, of_main=_is_name_in_main(run.name))
                run.needs = self.names.needed(sent.names)
                run.sent = sent
            except BaseException as error:
                self._say_what(error, run.name, run.function)
                raise
        try:
            return _pickle_items(span, self._dumps)
        except BaseException as error:
            if span.count > 1:
                return _EACH_ALONE
            items = run.arguments_of(span.items[0])
            self._say_what(error, run.name, _whole((run.function, items, {})))
            raise

    def _say_what(self, error: BaseException, name: str, value: object) -> None:
        """Add to a pickling error what it does not know: whose call it was, and what in it."""
        note = f"{_NOT_SENT}{name} was pickled, with its arguments"
        if _is_name_in_main(name):
            note += (
                " and the globals of __main__ that it uses, which travel to the worker by value"
            )
        inherited = isinstance(error, RuntimeError) and _INHERITED in text_of(error)
        # Not for each of many calls of a function: the workers wait meanwhile.
        if self._blamed[name] < _MOST_BLAMED and (
            inherited or isinstance(error, (TypeError, AttributeError, pickle.PicklingError))
        ):
            self._blamed[name] += 1
            culprit = find_unpicklable(value, payloads.dumps_to_send)
            note += f". It is {culprit}" if culprit else ""
            if _COROUTINE in text_of(error):
                note += ". A coroutine cannot be sent: pass its function and its arguments"
        if inherited:
            note += (
                '. Make it by multiprocessing.get_context("spawn"), and give it to the workers '
                "by ProcessPool(initializer=, initargs=)"
            )
        try:
            error.add_note(note)
        except BaseException:  # noqa: BLE001 -- an exception whose class allows no attributes
            pass

    def fail(self, work: Task | Span, error: BaseException) -> None:
        """End the calls of work with an exception."""
        if not isinstance(work, Span):
            if work.future.running() or begin(work.future):
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
        self.hands.do(hiring.pack, finish, _PATIENCE_S)
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
        """Note that a handle is gone. From any thread, under any lock (the collector's)."""
        self._unshared.append(number)
        self._wake()


def _tell(dispatch: weakref.ref[Dispatch], number: int, pid: int) -> None:
    found = dispatch()
    if found is not None and os.getpid() == pid:  # a fork has others' descriptors, if any
        found.tell_unshared(number)


def _is_wanted(work: Task | Span) -> bool:
    return not (work.run.dropped if isinstance(work, Span) else work.future.cancelled())


def _is_name_in_main(name: str) -> bool:
    return name.partition(".")[0] in MAIN_NAMES


def _dumps_here(value: object) -> Pickled:
    """Pickle what runs no code of the program."""
    if payloads.by_value_modules() or are_beyond():
        raise UntrustedError
    if not references.known():
        return Pickled(None, trusted.dumps(value), (), ())
    with references.Collected() as met:
        segments = trusted.dumps(value)
    return Pickled(None, segments, met.found, ())


# Stands for the pickle of calls that must travel one by one.
_EACH_ALONE = Pickled(None, (), (), ())


def _pickle_items(span: Span, dumps: Callable[[object], Pickled]) -> Pickled:
    if span.count <= _FEW:
        for item in span.items:
            require_to_pickle(span.run.arguments_of(item))
    if span.alone:
        return dumps((span.run.arguments_of(span.items[0]), {}))
    return _dumps_items(span, dumps) or _EACH_ALONE


def _dumps_items(span: Span, dumps: Callable[[object], Pickled]) -> Pickled | None:
    """Pickle the items of several calls; ``None`` if each must travel alone.

    In a common pickle, an object that two calls refer to would be one object in the worker, and
    one call would see the changes of another. Hence each call gets a separate pickle, unless the
    caller has said which calls belong together, or nothing can be changed. cloudpickle costs more
    for each pickle: calls that need it share one if they have no object in common.
    """
    items = span.items
    span.apart = False
    if span.run.at_once is not None and span.count > 1:
        span.bound = not _are_plain(items, span.run.starred) and _have_parts_in_common(items)
    if span.run.at_once is not None or span.count == 1 or _are_plain(items, span.run.starred):
        return dumps(items)
    pickles: list[bytes | memoryview] = []
    shared: list[Shared[Any]] = []
    needs: list[Delivery] = []
    for item in items:
        _, segments, more, needed = dumps(item)
        if len(segments) > 1:
            return None
        if needed and not pickles and not _have_parts_in_common(items):
            return dumps(items)
        pickles.append(segments[0])  # type: ignore[arg-type]  # no file yet
        shared += more
        needs += needed
    span.apart = True
    return Pickled(None, payloads.dumps([bytes(one) for one in pickles]), shared, needs)


def _are_plain(items: list[Any], starred: bool) -> bool:
    parts = itertools.chain.from_iterable(items) if starred else items
    return PLAIN.issuperset(map(type, parts))


def _have_parts_in_common(items: list[Any]) -> bool:
    """Tell whether two items refer, however deep, to one object that a call could change."""
    seen: set[int] = set()
    for item in items:
        mine: set[int] = set()
        parts = [item]
        while parts:
            part = parts.pop()
            # isinstance() is not used: it reads __class__ of an object of the program.
            if issubclass(type(part), _UNCHANGED) or id(part) in mine:
                continue
            if id(part) in seen:
                return True
            # Only the content of these can be changed.
            if type(part) not in (tuple, frozenset):
                mine.add(id(part))
            parts += gc.get_referents(part)
            if len(mine) + len(parts) > _MOST_PARTS:
                return True  # perhaps: to find out would take longer than to send them apart
        seen |= mine
    return False


def _without_frames(error: BaseException) -> BaseException:
    """Return an error without our frames, and without what there was no memory for."""
    frames = None if isinstance(error, MemoryError) else users_frames(error.__traceback__)
    # By the base class: a frozen dataclass forbids to set an attribute.
    return BaseException.with_traceback(error, frames)


def was_not_sent(error: BaseException) -> bool:
    """Return whether this is an exception of the pickler, and no worker has begun the call."""
    return any(note.startswith(_NOT_SENT) for note in getattr(error, "__notes__", ()))


def _whole(call: Parts) -> object:
    """Return a call in one piece, for words about its parts."""
    function, args, kwargs = call
    return functools.partial(function, *args, **kwargs) if callable(function) else call


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
