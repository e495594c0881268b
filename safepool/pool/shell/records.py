"""Log records in the program: those of its workers, and the pool's own.

Both are handled by handlers that the program has chosen, in a thread of their own: they may be
slow, and wait for the pool. Their exceptions are reported as by :mod:`logging`, on stderr, and do
not disturb pool or task (``workers.contained``).

Records of a call are handled before its result arrives, unless that takes long. When handlers are
slow a thousand records wait; further ones are dropped, and counted.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING

from safepool.pool.hands import Teller
from safepool.progress import beside_bars
from safepool.workers.contained import ContainedLogger, report
from safepool.workers.logs import unpack_record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_log = ContainedLogger()

# Time for handlers to end, before a call's result is delivered.
_PATIENCE_S = 0.05
# With more records the scheduler lets the handlers catch up, if they are as fast as that; and no
# more wait.
_MANY_WAITING, _MOST_WAITING = 100, 1000
# Part of the message of `Outbox`.
_DROPPED = b"records were dropped"


class Records:
    """The records of one pool, on their way to their handlers. For the scheduler's thread."""

    def __init__(self) -> None:
        self.teller: Teller = Teller("safepool-handlers")
        self._dropped = 0

    def handle(self, segments: Sequence[bytes | bytearray | memoryview]) -> None:
        """Handle a worker's record soon."""
        waiting = self.teller.waiting
        if waiting >= _MANY_WAITING:
            self.teller.catch_up(_PATIENCE_S)
        # Except a worker's own count of dropped records, which would be missing in the sum.
        if waiting >= _MOST_WAITING and _DROPPED not in bytes(segments[0]):
            self._dropped += 1
            return
        self._report()
        self.teller.do(functools.partial(_handle, segments))

    def call(self, run: Callable[[], None]) -> None:
        """Run handlers for what this thread itself has to say, and wait for a moment."""
        self.teller.do(run, _PATIENCE_S)

    def catch_up(self) -> None:
        """Wait for a moment until all was handled."""
        self._report()
        self.teller.catch_up(_PATIENCE_S)

    def _report(self) -> None:
        count, self._dropped = self._dropped, 0
        if count:
            _log.warning(
                "%d log records of workers were dropped: the handlers of this program are too "
                "slow. Use faster ones",
                count,
            )


def _handle(segments: Sequence[bytes | bytearray | memoryview]) -> None:
    """Handle a worker's record as if it had been logged in this process.

    The present level of its logger in this process decides whether the record is handled; a worker
    knows the levels from its start.
    """
    record = logging.LogRecord("safepool", logging.ERROR, "", 0, "", None, None)
    try:
        attributes, filtered = unpack_record(segments[0])
        record = logging.makeLogRecord(attributes)
        if _names_script_otherwise(record.name):
            record.name = record.name.replace("__mp_main__", "__main__", 1)
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            with beside_bars():
                # A filter of the script that adds to the message would do so twice.
                (logger.callHandlers if filtered else logger.handle)(record)
    except Exception:  # noqa: BLE001 -- user code: handlers, filters, what is unpickled
        report(record)


def _names_script_otherwise(name: str) -> bool:
    """Tell whether a logger is that of the script, which has another name here (``__name__``)."""
    main = sys.modules["__main__"].__name__
    return name.partition(".")[0] == "__mp_main__" != main
