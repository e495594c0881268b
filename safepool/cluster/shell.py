"""Execution of the core's actions, and delivery of its events. Each cluster pool has one thread.

    who            what                               comes by
    callers        submit, map, cancel, shutdown      the inbox
    the carrier    answers to messages                the inbox
    this thread    the list of places, the clock      `_look_around`

All events go to `Core.handle()`, whose actions are executed here.

Not covered:
    * Code of the program that pickles the items of a map, or unpickles results, runs in this
      thread: while that code waits, all calls of this pool wait.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
import uuid
import weakref
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from safepool.cluster import agent
from safepool.cluster import core as c
from safepool.cluster.calls import RAISED
from safepool.cluster.carriers import Carrier, EngineGoneError, PlaceLostError
from safepool.cluster.errors import NodeLostError, NoNodesError
from safepool.cluster.messages import (
    MESSAGE_BYTES,
    PROTOCOL,
    Buffers,
    DeliverMessage,
    Packet,
    Report,
    Welcome,
    own_version,
    pickle_arguments,
    pickle_function,
    python_version,
)
from safepool.cluster.nodes import Handles, Node
from safepool.cluster.submitted import ClusterFuture, Mapped, Submitted
from safepool.errors import PoolBrokenError, WorkerDiedError, text_of
from safepool.pool.calls.results import OpenMaps, ResultIterator, Results
from safepool.pool.calls.tasks import OwnerRef, PoolFuture, callbacks_by, here, rebuild
from safepool.pool.hands import Teller, ThreadThatStarts
from safepool.pool.latch import Latch
from safepool.pool.shell.exits import finish_at_exit, last_uncaught
from safepool.pool.tracing.costs import note_brought, note_pickled
from safepool.shown import printable
from safepool.transport import payloads
from safepool.workers.contained import ContainedLogger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.cluster.tracing import ClusterTrace
    from safepool.pool.calls.mapping import Item, MapRun
    from safepool.pool.core.policy import Policy
    from safepool.pool.shell.worker import Worker

_log = ContainedLogger()

# Between two looks at the list of places; the first ones are awaited.
_LIST_S = 1.0
_FIRST_LIST_S = 0.02
# An agent answers that there is nothing after so long.
_COLLECT_S = 5.0
# A node that has not answered a message for so long is given up. Other tasks of a Dask worker may
# hold the lock of its interpreter.
_SILENCE_S = 60.0
# A pool's end waits so long for the nodes to learn of it: if the program ended at once, they would
# run its calls until they miss it.
_RELEASE_S = 1.0
# Why calls are lost that run when a pool is ended.
_ENDS: dict[str, str] = {
    "ask": "terminate_workers() was called",
    "kill": "kill_workers() was called",
    "terminate": "the program was interrupted",
}


class Shell:
    """Runs calls by a carrier.

    Args:
        most_nodes: Nodes used at a time; ``None`` is all.
        no_nodes_s: The same as in the core.
        trace: Trace of calls and nodes; ``None`` for none.

    Attributes:
        told: Maps whose readers must check for new results.
        buffers: Copies of large buffers of arguments.
    """

    def __init__(
        self,
        carrier: Carrier,
        options: dict[str, Any],
        *,
        names: frozenset[str] | None,
        most_nodes: int | None,
        no_nodes_s: float | None,
        trace: ClusterTrace | None = None,
    ) -> None:
        self._carrier = carrier
        self.trace: ClusterTrace | None = trace
        self._options = pickle.dumps(options, protocol=5)
        self._names = names
        self._core = c.Core(
            most_nodes=most_nodes,
            no_nodes_s=no_nodes_s,
            at_once=carrier.at_once,
            now_s=time.monotonic(),
        )
        self._id = uuid.uuid4().hex
        self._openings = 0
        self._nodes: dict[str, Node] = {}
        self._listed: tuple[str, ...] = ()
        self._list_at_s = 0.0
        self.told: set[MapRun] = set()
        self.buffers: Buffers = Buffers()
        self._inbox: queue.SimpleQueue[Callable[[], c.Event | None]] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._me = OwnerRef(self)
        self._closing = False
        self._over = False
        self._ended = Latch()
        self._callers = Teller("safepool-callbacks")
        self._thread: ThreadThatStarts | None = None
        self._starting = threading.Lock()
        self._open_maps = OpenMaps()
        # Opened when no place is being asked.
        self._askers: list[Latch] = []
        self._handles = Handles()
        self._releases: list[Future[Any]] = []

    # Methods for callers, from any thread.

    def begin(self) -> None:
        """Ask the present places, before the first call."""
        with self._starting:
            if self._thread is None:
                finish_at_exit(self)
                self._thread = ThreadThatStarts(self._run, "safepool-cluster")
                self._thread.start()

    def submit(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        name: str,
        policy: Policy,
    ) -> PoolFuture:
        """Queue a call and return its future.

        Raises:
            RuntimeError: The pool was shut down, or this process is a fork of its owner.
        """
        self._check_open()
        call = Submitted(ClusterFuture(self._me), name, policy)
        before_ns = time.monotonic_ns()
        try:
            call.function = pickle_function(function)
            call.args = pickle_arguments(args, kwargs, self.buffers)
        except Exception as error:  # noqa: BLE001 -- the call's, as in any pool
            call.fail(error)
            return call.future
        if self.trace is not None:
            note_brought(call)
            note_pickled(call, before_ns)
        self._bring(c.Queued([call]))
        return call.future

    def map(
        self,
        run: MapRun,
        items: Iterable[Item],
        ahead: int | None,
        deadline: float | None,
        keep: object,
    ) -> ResultIterator:
        """Queue the calls of a run and return the iterator over its results."""
        self._check_open()
        sent: Any = pickle_function(run.function)
        run.sent = sent
        results = Results(run, iter(items), self, ahead, deadline)
        iterator = results.iterate(None if results.exhausted else keep)
        run.reader = weakref.ref(iterator)
        if not results.exhausted and ahead is None:
            self._open_maps.add(iterator, results, self._do_elsewhere)
        return iterator

    def _do_elsewhere(self, function: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            self._callers.do(function)
        else:
            function()

    def add_items(self, run: MapRun, items: list[Item], *, last: bool) -> None:
        """Queue further calls; ``last``: there will be no more."""
        if items:
            self._check_open()
        self._put(partial(self._fed, run, items, last))

    def give_up(self, run: MapRun) -> None:
        """Drop the calls that were not sent to a node, because they are not needed."""
        self._put(run.drop)

    def end_calls(self, run: MapRun) -> None:
        """End the calls of a run that was given up."""
        self._put(partial(self._unwanted, run))

    def wake(self) -> None:
        """Look again."""
        self._put(c.Look)

    def check_may_wait(self) -> None:
        """Refuse that a thread waits for a result that it has to bring itself.

        Raises:
            RuntimeError: The caller is this pool's own thread, the engine's, or a fork's.
        """
        if here.pid != self._pid:
            self._me.check()
        if self._is_needed():
            raise RuntimeError(
                "this thread carries the pool's calls, and would wait for itself. Await "
                "pool.run(), or wait in another thread: await asyncio.to_thread(future.result)"
            )

    def _is_needed(self) -> bool:
        own = threading.current_thread() is self._thread
        return own or self._carrier.is_in_this_thread()

    def kill(self, future: Future[Any]) -> bool:
        """Cancel a call, and end it where it runs; ``False`` if it has ended.

        Raises:
            ValueError: The future is not one of this pool.
        """
        if not isinstance(future, PoolFuture) or future.owner is not self._me:
            raise ValueError(
                "this future does not belong to this pool: pass a future of its submit()"
            )
        if not future.cancel_running():
            return False
        self._put(partial(self._unwanted, future))
        if self._over:  # by now, perhaps
            future.tell()
        return True

    def shut_down(self, *, wait: bool, cancel: bool = False, end: str = "") -> None:
        """Take no more calls; finish those that were submitted.

        Args:
            wait: Return when that is done; at once in a thread that has to do it.
            cancel: Cancel the calls that no node has.
            end: Do not wait for calls that run: why they are lost, or a word of a pool's core.
        """
        if os.getpid() != self._pid:
            return
        if not (cancel or end or self._closing or threading.current_thread() is self._thread):
            self._open_maps.finish()  # items that the standard pool would have taken by now
        self._closing = True
        if self._thread is None:
            with self._starting:
                self._over = True
                self._close_trace()
                self._ended.open()
            return
        if cancel:
            self._bring(c.CancelWaiting())
        self._bring(c.End(_ENDS.get(end, end)) if end else c.Close())
        if wait and not self._is_needed():
            try:
                self._ended.wait()
            except KeyboardInterrupt:
                self._bring(c.End(_ENDS["terminate"]))
                raise
            self._callers.join()

    def exit(self) -> None:
        """Finish before the interpreter ends."""
        interrupted = isinstance(last_uncaught(), KeyboardInterrupt)
        self.shut_down(wait=True, end="terminate" if interrupted else "")

    def descriptors(self) -> Sequence[int]:
        """Return the descriptors that a forked worker must close."""
        return () if self.trace is None else [*self.trace.descriptors()]

    def workers(self) -> list[Worker]:
        """Return no worker: all workers are on nodes."""
        return []

    def open_nodes(self) -> list[tuple[str, str, int, int]]:
        """Place, label, workers, and calls under way of each open node."""
        nodes = self._nodes
        return [
            (place, nodes[place].label, workers, calls)
            for place, _, workers, calls in self._core.open_places
            if place in nodes
        ]

    def wait_for_answers(self, most_s: float) -> None:
        """Return when each place that the engine has listed has answered, or after that time."""
        asker = Latch()
        self._put(partial(self._askers.append, asker))
        asker.wait(most_s)

    @property
    def is_broken(self) -> bool:
        """Whether it takes no calls: it was shut down, or the engine is gone."""
        return self._closing or self._core.is_broken

    def unused_places(self) -> dict[str, str]:
        """Why each place that is not open is not used."""
        return self._core.unused_places

    def ask(self, question: Callable[..., Any], *args: Any, timeout_s: float) -> dict[str, Any]:
        """Ask the agent of each open node, from any thread.

        Args:
            question: A function of this package, called there with the node's pool first.
            *args: Further arguments of the function.
            timeout_s: Seconds to wait for all places together.

        Returns:
            By the node's label the answer, or the exception that came in its place.

        Raises:
            NotImplementedError: The engine runs one call per node at a time.
        """
        if self._carrier.at_once:
            raise NotImplementedError(
                "ClusterPool cannot ask the nodes of an executor for their state: each node runs "
                "one long call and answers nothing else. Pass a distributed.Client instead"
            )
        self.check_may_wait()
        asked: dict[str, Future[Any]] = {}
        for place, node in [*self._nodes.items()]:
            if self._core.is_open(place):
                try:
                    asked[node.label] = self._carrier.submit(
                        place, agent.agent_ask, node.session, question, *args
                    )
                except EngineGoneError:
                    break
        wait(asked.values(), timeout_s)
        return {label: _answer(future, timeout_s) for label, future in asked.items()}

    def _check_open(self) -> None:
        self._me.check()
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self.begin()

    def _bring(self, event: c.Event) -> None:
        self._put(lambda: event)

    def _put(self, bring: Callable[[], c.Event | None]) -> None:
        self._inbox.put(bring)

    # The thread.

    def _run(self) -> None:
        callbacks_by(self._callers.do, self._me)
        try:
            if self.trace is not None:
                self.trace.start(self._look)
            while not self._over:
                self._step()
        except BaseException as error:  # noqa: BLE001 -- a fault of ours: nobody may wait for ever
            _log.exception("the thread of a cluster pool has failed")
            self._over = self._closing = True
            reason = f"its own thread has failed: {type(error).__name__}: {text_of(error)}"
            for action in self._core.handle(c.Broke(reason), time.monotonic()):
                if isinstance(action, c.Fail):
                    self._fail(action)
        finally:
            self._callers.close()
            self._refuse_late()
            self._answer_askers()
            self._close_trace()
            if not self._carrier.at_once:
                wait(self._releases, _RELEASE_S)
            self._ended.open()

    def _look(self) -> tuple[int, int, int]:
        """Calls that wait, workers that run something, workers. From another thread."""
        nodes = self._core.open_places
        running = sum(min(calls, workers) for _, _, workers, calls in nodes)
        return self._core.waiting, running, sum(workers for _, _, workers, _ in nodes)

    def _close_trace(self) -> None:
        if self.trace is not None:
            self.trace.close()

    def _step(self) -> None:
        now_s = time.monotonic()
        looks = [self._list_at_s, *(s for one in self._nodes.values() for s in one.due.values())]
        due_s = self._core.next_look()
        if due_s is not None:
            looks.append(due_s)
        try:
            bring = self._inbox.get(timeout=max(0.0, min(looks) - now_s))
        except queue.Empty:
            self._look_around()
            self._handle(c.Look())
        else:
            event = bring()
            if event is not None:
                self._handle(event)
            if self._list_at_s <= time.monotonic():
                self._look_around()
        for run in self.told:
            run.tell()
        self.told.clear()
        if self._askers and self._listed and not self._core.is_asking:
            self._answer_askers()

    def _answer_askers(self) -> None:
        askers, self._askers = self._askers, []
        for asker in askers:
            asker.open()

    def _handle(self, event: c.Event) -> None:
        for action in self._core.handle(event, time.monotonic()):
            _DO[type(action)](self, action)

    def _look_around(self) -> None:
        """Ask the carrier for its places, and give up those that do not answer."""
        now_s = time.monotonic()
        try:
            listed = tuple(self._carrier.places())
        except EngineGoneError as error:
            self._handle(c.Broke(str(error)))
            self._nodes.clear()
            self._list_at_s = now_s + _LIST_S
            return
        self._list_at_s = now_s + (_LIST_S if listed else _FIRST_LIST_S)
        if listed != self._listed or any(place not in self._nodes for place in listed):
            self._listed = listed
            self._handle(c.Listed(listed))
        for place, node in [*self._nodes.items()]:
            if place not in listed:
                self._lose(place, node.session, "the engine no longer lists it")
            elif min(node.due.values(), default=now_s) < now_s:
                self._lose(place, node.session, f"it has not answered for {_SILENCE_S:.0f} s")

    def _refuse_late(self) -> None:
        self._over = True
        while True:
            try:
                event = self._inbox.get_nowait()()
            except queue.Empty:
                return
            if isinstance(event, c.Queued):
                for call in event.calls:
                    call.fail(RuntimeError("cannot schedule new futures after shutdown"))
            for run in self.told:
                run.tell()

    # Places.

    def _submit(self, place: str, kind: str, function: Callable[..., Any], *args: Any) -> None:
        """Send a message; the method of that name gets the answer."""
        node = self._nodes[place]
        if not self._carrier.at_once:
            node.due[kind] = time.monotonic() + _SILENCE_S
        take = {"greet": self._greeted, "deliver": self._delivered, "collect": self._collected}

        def bring(future: Future[Any]) -> None:
            self._put(partial(self._arrived, place, node.session, kind, take[kind], future))

        try:
            future = self._carrier.submit(place, function, *args)
        except EngineGoneError as error:
            self._bring(c.Broke(str(error)))
        else:
            future.add_done_callback(bring)

    def _arrived(
        self,
        place: str,
        session: str,
        kind: str,
        take: Callable[[str, Node, Any], None],
        future: Future[Any],
    ) -> None:
        node = self._nodes.get(place)
        if node is None or node.session != session:
            return  # given up meanwhile
        node.due.pop(kind, None)
        if future.cancelled():
            self._lose(place, session, "the engine has cancelled the call")
            return
        error = future.exception()
        if error is None:
            take(place, node, future.result())
        elif kind != "greet" or isinstance(error, (PlaceLostError, EngineGoneError)):
            self._lose(place, session, text_of(error))
        elif isinstance(error, agent.WrongOptionsError):
            self._refuse(place, error.host, error.reason, wrong=True)
        else:
            self._refuse(place, "", f"{type(error).__name__}: {text_of(error)}")

    def _lose(self, place: str, session: str, reason: str) -> None:
        node = self._nodes.get(place)
        if node is None or node.session != session:
            return
        was_open = self._core.is_open(place)
        self._handle(c.Lost(place, reason))
        if self.trace is not None and (was_open or node.failed):
            self.trace.lost(node.label, reason, node.failed)
        del self._nodes[place]

    def _refuse(self, place: str, host: str, reason: str, *, wrong: bool = False) -> None:
        _log.warning("node %s is not used: %s", place, reason)
        self._handle(c.Refused(place, reason, wrong, self._is_wanted(place, host)))

    def _is_wanted(self, place: str, host: str) -> bool:
        names = {place, place.rpartition("://")[2], host, host.partition(".")[0]}
        return self._names is None or bool(names & self._names)

    def _open(self, action: c.Open) -> None:
        self._openings += 1
        node = Node(f"{self._id}-{self._openings}", action.place, anyway=action.anyway)
        self._nodes[action.place] = node
        self._submit(
            action.place, "greet", agent.agent_greet, PROTOCOL, node.session, self._options
        )

    def _greeted(self, place: str, node: Node, plain: Any) -> None:
        welcome = Welcome(*plain)
        node.label, node.pid = f"{place} ({welcome.host})", welcome.pid
        here, host = python_version(), welcome.host
        wanted = self._is_wanted(place, host)
        fits = (welcome.protocol, welcome.python) == (PROTOCOL, here)
        if wanted and not fits:
            self._refuse(
                place,
                host,
                f"it has Python {welcome.python} and safepool {welcome.safepool}, the program has "
                f"Python {here} and safepool {own_version()}. Install the same versions",
            )
            return
        one_call = self._carrier.at_once
        # Another call may be on any node, the same one included.
        which = place if one_call else welcome.node
        holds = one_call or node.anyway or welcome.holds
        self._handle(c.Opened(place, which, welcome.workers, wanted, holds))
        if not self._core.is_open(place):
            return
        if self.trace is not None:
            self.trace.opened(node.label, welcome.workers)
        if not one_call:
            self._collect(place, node)

    def _collect(self, place: str, node: Node) -> None:
        self._submit(place, "collect", agent.agent_collect, node.session, _COLLECT_S)

    def _collected(self, place: str, node: Node, packet: Packet) -> None:
        # Asked for the next before these are unpickled.
        if self._core.is_open(place):
            self._collect(place, node)
        self._take_report(place, packet.value())

    def _take_report(self, place: str, report: Report) -> None:
        if self.trace is not None and report.source is not None:
            self.trace.reported(place, self._label(place), report.source)
        answers = [c.Answer(*answer) for answer in report.answers]
        if answers:
            self._handle(c.Answered(place, answers, report.workers))
        if report.returned is not None:
            self._handle(c.Returned(place, report.returned))

    def _delivered(self, place: str, node: Node, packet: Packet | None) -> None:  # noqa: ARG002
        if packet is not None:
            self._take_report(place, packet.value())
        self._handle(c.Delivered(place))

    def _release(self, action: c.Release) -> None:
        node = self._nodes.get(action.place)
        if node is None:
            return
        try:
            future = self._carrier.submit(action.place, agent.agent_release, node.session)
        except EngineGoneError:
            return  # and the agent with it, or soon
        if self._closing:
            self._releases.append(future)

    # Calls.

    def _fed(self, run: MapRun, items: list[Item], last: bool) -> c.Event | None:
        first = run.count
        run.add(items, last=last)
        run.cut(len(items))
        if self._over and items:
            run.stop(lambda: RuntimeError("cannot schedule new futures after shutdown"))
            return None
        calls = [Mapped(self, run, first + at, item) for at, item in enumerate(items)]
        if self.trace is not None:
            for call in calls:
                note_brought(call)
        return c.Queued(calls)

    def _unwanted(self, whose: PoolFuture | MapRun) -> None:
        if isinstance(whose, PoolFuture):
            whose.tell()
        for call in self._core.under_way():
            if (call.run if isinstance(call, Mapped) else call.future) is whose:
                self._handle(c.Kill(call))

    def _deliver(self, action: c.Deliver) -> None:
        place = action.place
        node = self._nodes[place]
        self._handles.forget(self._nodes.values())
        traced = self.trace is not None
        message = DeliverMessage([], {}, {}, {}, action.back, action.kill, node.forget, traced)
        node.forget = []
        failed: list[c.Answer] = []
        left: list[int] = []
        nbytes = 0
        for number, call in action.calls:
            if nbytes > MESSAGE_BYTES:
                left.append(number)
                continue
            try:
                nbytes += node.pack(message, number, call, self._handles)
            except BaseException as error:  # noqa: BLE001 -- user code that pickles
                failed.append(c.Answer(number, -1.0, False, error))
        at_once = self._carrier.at_once
        if not at_once:
            node.note(message)
        if message.calls or message.back or message.kill:
            packet = Packet.of(message)
            if at_once:
                options = self._options
                self._submit(place, "deliver", agent.agent_work, node.session, options, packet)
            else:
                self._submit(place, "deliver", agent.agent_deliver, node.session, packet)
        else:
            node.forget = [*message.forget]
            self._bring(c.Delivered(place))
        if failed:
            self._bring(c.Answered(place, failed, 0))
        if left:
            self._bring(c.Returned(place, left))

    def _settle(self, action: c.Settle) -> None:
        call, answer = action.call, action.answer
        content = answer.content
        if isinstance(content, BaseException):
            call.fail(content)
            return
        flag, *segments = content.segments
        try:
            if bytes(flag) != RAISED:
                value = payloads.loads(segments)
                self._note_end(action, "returned")
                call.succeed(value, content.nbytes)
                return
            error = rebuild(segments, call=call.name)
        except BaseException as problem:  # noqa: BLE001 -- user code that unpickles
            error = problem
        if isinstance(error, WorkerDiedError):
            error.node = self._label(action.place)  # type: ignore[attr-defined]
        self._note_end(action, "raised", error)
        call.fail(error)

    def _again(self, action: c.Again) -> None:
        self._note_end(action, "retried")

    def _note_end(
        self, action: c.Settle | c.Again, outcome: str, error: BaseException | None = None
    ) -> None:
        if self.trace is not None:
            self.trace.ended(action.place, action.call, action.answer, outcome, error)

    def _label(self, place: str) -> str:
        node = self._nodes.get(place)
        return place if node is None else node.label

    def _lose_call(self, action: c.Lose) -> None:
        node = self._nodes.get(action.place)
        pid = 0 if node is None else node.pid
        if node is not None:
            node.failed += 1
        action.call.fail(
            NodeLostError(self._label(action.place), action.reason, pid, action.call.name)
        )

    def _fail(self, action: c.Fail) -> None:
        kind = NoNodesError if action.no_nodes else PoolBrokenError
        for call in action.calls:
            call.fail(kind(printable(action.reason)))

    def _cancel(self, action: c.Cancel) -> None:
        for call in action.calls:
            call.cancel()

    def _finished(self, _: c.Finished) -> None:
        self._over = True


def _answer(future: Future[Any], timeout_s: float) -> Any:
    if not future.done():
        return TimeoutError(f"it has not answered for {timeout_s:g} s")
    try:
        return future.result()
    except (Exception, CancelledError) as error:  # noqa: BLE001 -- in the place of the answer
        return error


_DO: dict[type[c.Action], Callable[[Shell, Any], None]] = {
    c.Open: Shell._open,
    c.Deliver: Shell._deliver,
    c.Settle: Shell._settle,
    c.Again: Shell._again,
    c.Lose: Shell._lose_call,
    c.Fail: Shell._fail,
    c.Cancel: Shell._cancel,
    c.Release: Shell._release,
    c.Finished: Shell._finished,
}
