"""Listeners of a pool, without cost for pools that have none.

The pool asks its listener once, when it is made, for replacements of a few functions:

    asked for     in the place of                            thread      what is heard
    of_calls      what brings a `Call` or a `Fed`               any         who waits since when
    of_pickles    what pickles work, and returns the pickle  any         how long that took
    of_events     the core's `handle`                        scheduler   events, before the core
    of_actions    what does each kind of action              scheduler   actions
    of_answers    what settles calls by their answers        scheduler   what calls have raised

A pool without a listener calls its own functions. Rare events are reported by calls instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safepool.transport.frames import CorruptFrameError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from safepool.pool.core.events import Action, Event, Settle
    from safepool.pool.shell.worker import Worker

    Buffer = bytes | bytearray | memoryview
    Bring = Callable[[Any], None]
    Handle = Callable[[Event, int], list[Action]]
    Table = dict[type[Action], Callable[[Any, Any, Any], Event | None]]
    Pickles = Callable[[Any], Any]
    Settles = Callable[[Settle], dict[int, BaseException]]


class Listener:
    """A listener that hears nothing. Each method returns the function that it is given.

    Attributes:
        greeting: Content of the first message to each worker.
    """

    greeting: Sequence[bytes | memoryview] = ()

    def of_calls(self, bring: Bring) -> Bring:
        """Return the function that queues submitted calls."""
        return bring

    def of_pickles(self, pickle: Pickles) -> Pickles:
        """Return the function that pickles work."""
        return pickle

    def of_events(self, handle: Handle) -> Handle:
        """Return the function that takes events to the core."""
        return handle

    def of_actions(self, table: Table) -> Table:
        """Return the function of each kind of action."""
        return table

    def of_answers(self, settle: Settles) -> Settles:
        """Return the function that settles calls."""
        return settle

    def start(self, look: Callable[[], tuple[int, int, int]]) -> None:
        """Begin, in the scheduler's thread.

        Args:
            look: Returns how many calls wait, how many workers run something, and how many
                there are. May be called in another thread.
        """

    def close(self) -> None:
        """The pool has ended. Twice is once."""

    def descriptors(self) -> Iterable[int]:
        """Return the descriptors that a forked worker must close."""
        return ()

    def resized(self, before: int, after: int, why: str) -> None:
        """The pool has another number of workers. From any thread."""

    def timed(self, _worker: Worker, _segments: Sequence[Buffer]) -> None:
        """A worker has sent the times at which calls began and ended.

        Raises:
            CorruptFrameError: The worker has sent no times, or was not asked for them.
        """
        raise CorruptFrameError("times of calls were sent without a request")
