"""The workers of one pool, from their start to their end.

Only the scheduler's thread uses the staff. The staff knows processes, channels and deadlines; the
scheduler knows tasks and their loss.

Races, each handled at its letter below:
    A  A worker's channel closes before the system reports the exit code: wait for the end of the
       process.
    B  A worker ends with its result in transit: read the channel to its end before deciding.
    C  A worker ends, and a program that it started holds its channel open: the pidfd reports the
       end.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING

from safepool.errors import MemoryExceeded, naming
from safepool.procfs import obstacle
from safepool.transport.channel import NO_SIGPIPE, ChannelClosedError
from safepool.transport.frames import CorruptFrameError, Kind, encode
from safepool.workers.board import STACK_SIGNAL
from safepool.workers.contained import ContainedLogger
from safepool.workers.tree import KILL, TreeEnd, bury

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from safepool.pool.core.events import Force
    from safepool.pool.shell.worker import Worker
    from safepool.transport.frames import Frame
    from safepool.workers.tree import Descendant

_log = ContainedLogger()

# A worker whose channel is closed and that has not ended by then is ended (race A).
_ENDING_S = 1.0
# Time for a stopped worker to flush, run its atexit functions and join its threads.
_STOPPING_S = 30.0
# Between SIGTERM and SIGKILL when workers are ended at once: a prompt is to be back
# within a second of Ctrl-C.
_TERMINATING_S = 0.4
# From SIGKILL to the end: the memory of a large process is freed first. After that the pool goes
# on without it.
_DYING_S = 5.0
# Pause between two checks whether processes have stopped before they are killed.
_STOP_LOOK_S = 0.001
# Pause between two checks whether killed processes have ended.
_ORPHANS_LOOK_S = 0.05
# For faulthandler to write down a stack. Also in the middle of C code it takes microseconds,
# on a machine that is frozen by its quota a tenth of a second.
_STACK_S = 0.15
# Of a worker that goes on to fill the memory meanwhile: 80 MB more, at 1 GB a second.
_STACK_OF_A_HOG_S = 0.08


class Staff:
    """The workers of one pool.

    Args:
        parted: Called with a worker that can no longer be sent anything.
        ended: Called with a worker whose process has ended, after all of its messages, and with
            its exit code as ``multiprocessing.Process.exitcode``; ``None`` if the system kept
            none.

    Raises:
        OSError: No descriptor is left.
    """

    def __init__(
        self,
        start: Callable[[int], Worker],
        parted: Callable[[Staff, Worker], None],
        ended: Callable[[Staff, Worker, int | None], None],
    ) -> None:
        self._start = start
        self._parted = parted
        self._ended = ended
        self._all: tuple[Worker, ...] = ()
        self._lost: tuple[Worker, ...] = ()
        # Descendants of condemned workers that became children of this program.
        self._orphans: set[Descendant] = set()
        with naming("socketpair()"):
            self._wake_receiver, self._wake_sender = socket.socketpair()
        try:
            self._selector = selectors.DefaultSelector()
        except OSError:
            self._wake_receiver.close()
            self._wake_sender.close()
            raise
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        try:
            # If a filter refuses this call, wake() would have no effect, and could not report it.
            with naming("sendto()"):
                self._wake_sender.send(b"\0", NO_SIGPIPE)
        except OSError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Worker]:
        """All workers, leaving ones included; safe against changes meanwhile."""
        return iter(self._all)

    @property
    def lost(self) -> int:
        """Number of workers that could not be ended, and are still there."""
        return len(self._lost)

    def wake(self) -> None:
        """Make :meth:`listen` return. From any thread, never blocks, takes no lock."""
        try:
            self._wake_sender.send(b"\0", NO_SIGPIPE)
        except OSError:
            pass  # a wake-up is already under way, or all is over

    def descriptors(self) -> list[int]:
        """Return what a forked worker must not keep: it would hold others' channels open.

        From any thread; another pool's workers must not keep them either.
        """
        found = [
            self._wake_receiver.fileno(),
            self._wake_sender.fileno(),
            *(number for worker in self for number in worker.descriptors()),
        ]
        return [descriptor for descriptor in found if descriptor >= 0]

    def hire(self, place: int) -> Worker:
        """Start one worker, with this index in the pool.

        Raises:
            Exception: The exception of the start: ``OSError`` if the system lacks memory,
                processes or descriptors; ``RuntimeError`` if the interpreter shuts down.
        """
        worker = self._start(place)
        self._all = (*self._all, worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)
        if worker.sentinel is not None:
            self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)
        _log.debug("worker %d started", worker.pid)
        return worker

    def send(self, worker: Worker, pieces: list[bytes | memoryview]) -> bool:
        """Send a frame, or as much as goes now; return whether the worker is still there."""
        try:
            worker.channel.send(pieces)
        except ChannelClosedError:
            self.send_no_more(worker)
            return False
        self._watch(worker)
        return True

    def send_no_more(self, worker: Worker) -> None:
        """See to the end of a worker that reads no more.

        Messages that it has sent before must still be read (race B).
        """
        worker.channel.drop_unsent()
        self._watch(worker)
        self._expect_the_end(worker)

    def look_away(self, worker: Worker) -> None:
        """Leave a worker's messages to another thread, until :meth:`look_again`."""
        self._selector.unregister(worker.channel)

    def look_again(self, worker: Worker) -> None:
        """Listen to a worker again."""
        self._selector.register(worker.channel, worker.events, worker)

    def listen(
        self,
        timeout_s: float | None,
        hear: Callable[[Sequence[int]], bool],
        awake: Callable[[], Sequence[Worker]],
    ) -> Iterator[tuple[Worker, Frame]]:
        """Wait for workers or a wake-up; yield the frames that arrived.

        Args:
            timeout_s: Return after this time at the latest; ``None`` is not limited.
            hear: Called with the descriptors that have news. Returns whether it has seen to all of
                them, so that the waiting goes on.
            awake: Called when the waiting is over. Returns the descriptors to listen to in any
                case.
        """
        for worker in self._all:
            # Without a sentinel (Windows) a closed channel is all there is to see of an end.
            if worker.sentinel is None and worker.channel.fileno() < 0:
                self._bury(worker)
        news = self._wait(self._until_a_look(timeout_s), hear)
        others = awake()
        for key in news:
            found: Worker | None = key.data
            if found is None:
                self._wake_receiver.recv(4096)
            elif found in self._lost:
                self._part_with(found)
            elif found not in self._all:  # not by its number, which another may have by now
                pass  # ended by an earlier event of the same round
            elif key.fd == found.sentinel:
                yield from self._see_off(found)
            else:
                yield from self._read(found)
        for worker in others:
            if worker.channel.fileno() >= 0:
                yield from self._read(worker)
        self._end_the_late()

    def _wait(
        self, timeout_s: float | None, hear: Callable[[Sequence[int]], bool]
    ) -> list[selectors.SelectorKey]:
        """Wait for news; return those that ``hear`` has not seen to."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            news = [key for key, _ in self._selector.select(timeout_s)]
            if until is None or not hear([key.fd for key in news]):
                return news
            timeout_s = until - time.monotonic()
            if timeout_s <= 0:
                return []

    def _until_a_look(self, timeout_s: float | None) -> float | None:
        """Return the longest time to wait, in view of late workers and orphans."""
        deadlines = [worker.deadline for worker in self._all if worker.deadline is not None]
        if deadlines:
            left_s = max(0.0, min(deadlines) - time.monotonic())
            timeout_s = left_s if timeout_s is None else min(timeout_s, left_s)
        if self._orphans:
            self._orphans = bury(self._orphans)
            timeout_s = _ORPHANS_LOOK_S if timeout_s is None else min(timeout_s, _ORPHANS_LOOK_S)
        return timeout_s

    def stop(self, worker: Worker) -> None:
        """Tell a worker to end after the calls that it was sent."""
        # After a failed initializer it ends by itself: its log records must arrive.
        time_s = _STOPPING_S if worker.failure is None else _ENDING_S
        worker.deadline = time.monotonic() + time_s
        self.send(worker, encode(Kind.STOP, 0))

    def hurry(self, count: int) -> None:
        """Give one more second to the first ``count`` workers that end slowly."""
        ending = [one for one in self._all if one.dismissed and one.channel.fileno() < 0]
        for worker in ending[: max(0, count)]:
            self._expect_the_end(worker)

    def end(self, worker: Worker, force: Force) -> None:
        """End a worker in the middle of its call.

        Args:
            worker: The worker.
            force: ``"ask"`` sends ``SIGTERM``, whose handler may take its time; after
                ``"terminate"`` ``SIGKILL`` follows soon; ``"kill"`` sends that at once.
        """
        if worker.killed:
            return
        if force == "kill":
            self._kill(worker)
            return
        if force == "terminate":
            soon = time.monotonic() + _TERMINATING_S
            worker.deadline = min(worker.deadline or soon, soon)
        elif not worker.terminated:
            self.stop(worker)  # for one that does not heed the signal
        if not worker.terminated:
            worker.terminated = True
            worker.end(signal.SIGTERM)

    def condemn(self, worker: Worker, *, stack: bool) -> None:
        """End a worker in the middle of its task, with every process that the task started.

        Args:
            worker: The worker.
            stack: The worker first writes its Python stack on its board.
        """
        if worker.killed:
            return
        pause_s = 0.0
        if stack and worker.board and STACK_SIGNAL:
            worker.stack_begin = worker.board.written
            worker.end(STACK_SIGNAL)
            hog = isinstance(worker.condemned, MemoryExceeded)
            pause_s = _STACK_OF_A_HOG_S if hog else _STACK_S
        worker.deadline = time.monotonic() + pause_s

    def distrust(self, worker: Worker, error: BaseException) -> None:
        """End a worker that has violated the protocol."""
        _log.error("protocol error from worker %d (%s): killing it", worker.pid, error)
        worker.fault = error
        worker.end(signal.SIGTERM)
        self._disconnect(worker)

    def close(self) -> None:
        """Kill the remaining workers, and close every descriptor."""
        for worker in self:
            try:
                worker.end(KILL)
                self._forget(worker)
                worker.close()
            except Exception:  # noqa: BLE001 -- one that resists must not keep the others
                _log.exception("error while worker %d was ended", worker.pid)
        for worker in self._lost:
            worker.close()
        until = time.monotonic() + _ENDING_S
        while (left := bury(self._orphans)) and time.monotonic() < until:
            self._orphans = left
            time.sleep(_STOP_LOOK_S)
        self._selector.close()
        self._wake_sender.close()
        self._wake_receiver.close()

    def _read(self, worker: Worker) -> Iterator[tuple[Worker, Frame]]:
        try:
            for frame in worker.channel.receive():
                yield worker, frame
                if worker.channel.fileno() < 0:  # distrusted for what that frame said
                    return
        except ChannelClosedError:
            self._disconnect(worker)
        except (CorruptFrameError, MemoryError) as error:
            self.distrust(worker, error)
        else:
            if worker.channel.unsent:
                self.send(worker, [])

    def _see_off(self, worker: Worker) -> Iterator[tuple[Worker, Frame]]:
        if worker.channel.fileno() >= 0:
            try:
                for frame in worker.channel.receive(everything=True):  # races B and C
                    yield worker, frame
                    if worker.channel.fileno() < 0:
                        break
            except (ChannelClosedError, CorruptFrameError, MemoryError):
                pass
        self._bury(worker)

    def _bury(self, worker: Worker) -> None:
        exitcode = self._forget(worker)
        try:
            self._ended(self, worker, exitcode)
        finally:
            worker.close()  # only now: its board was to be read
            if worker.tree is not None:
                self._orphans |= worker.tree.found

    def _disconnect(self, worker: Worker) -> None:
        """The channel is of no more use; how the worker ends is still to come (race A)."""
        if worker.channel.fileno() >= 0:
            self._selector.unregister(worker.channel)
            worker.channel.close()
        if not worker.dismissed or worker.fault is not None:
            self._expect_the_end(worker)  # otherwise the earlier deadline holds

    def _expect_the_end(self, worker: Worker) -> None:
        self._parted(self, worker)
        if worker.killed:
            return  # nothing more can be done
        soon = time.monotonic() + _ENDING_S
        worker.deadline = soon if worker.deadline is None else min(worker.deadline, soon)

    def _watch(self, worker: Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.unsent else 0)
        if events != worker.events and worker.channel.fileno() >= 0:
            worker.events = events
            self._selector.modify(worker.channel, events, worker)

    def _end_the_late(self) -> None:
        for worker in self._all:
            if worker.deadline is None or worker.deadline > time.monotonic():
                continue
            if worker.killed:
                self._lose(worker)
            elif worker.condemned is not None:
                worker.tree = worker.tree or TreeEnd(worker)
                if worker.tree.advance():
                    self._expect_death(worker)
                else:
                    worker.deadline = time.monotonic() + _STOP_LOOK_S
            else:
                _log.info("worker %d did not end in time and is killed", worker.pid)
                if worker.channel.fileno() < 0:
                    worker.fault = worker.fault or ChannelClosedError(
                        "the worker closed its channel to the pool"
                    )
                self._kill(worker)

    def _kill(self, worker: Worker) -> None:
        worker.end(KILL)
        self._expect_death(worker)

    def _expect_death(self, worker: Worker) -> None:
        worker.killed = True
        worker.deadline = time.monotonic() + _DYING_S

    def _lose(self, worker: Worker) -> None:
        """Go on without a worker that nothing ends; it costs its place until it has ended."""
        worker.unkillable, worker.deadline = True, None
        _log.error(
            "worker %d cannot be ended: %s. The pool goes on with one worker less until that "
            "process has ended",
            worker.pid,
            obstacle(worker.pid),
        )
        self._disconnect(worker)  # if it runs on, it ends when it wants to answer
        self._all = tuple(one for one in self._all if one is not worker)
        self._lost = (*self._lost, worker)
        self._ended(self, worker, None)
        worker.drop_board()

    def _part_with(self, worker: Worker) -> None:
        _log.info("worker %d, which could not be ended, has ended", worker.pid)
        self._lost = tuple(one for one in self._lost if one is not worker)
        if worker.sentinel is not None:
            self._selector.unregister(worker.sentinel)
        worker.wait(0.0)
        worker.close()

    def _forget(self, worker: Worker) -> int | None:
        self._all = tuple(one for one in self._all if one is not worker)
        self._parted(self, worker)  # the worker is sent nothing more, whatever its last results
        if worker.channel.fileno() >= 0:
            self._selector.unregister(worker.channel)
        if worker.sentinel is not None:
            self._selector.unregister(worker.sentinel)
        return worker.wait(1.0)
