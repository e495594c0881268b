"""Log records in the program: those of its workers, and the pool's own.

Both are handled in the scheduler's thread, by handlers that the program has chosen. Whatever
those raise is reported as :mod:`logging` does it, on stderr, and costs neither pool nor task
(``workers.contained``).

Not covered:
    * A handler that is slow: the scheduler's thread runs it, and the pool is as slow.
      ``logging.handlers.QueueHandler`` is the remedy.
    * A handler that waits for a task of the same pool: it waits for its own thread.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from safepool.progress import beside_bars
from safepool.workers.contained import report
from safepool.workers.logs import unpack_record

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["handle_record"]


def handle_record(segments: Sequence[bytes | bytearray | memoryview]) -> None:
    """Handle a worker's record as if it had been logged in this process.

    The level that its logger has here and now decides whether it is wanted; a worker knows the
    levels from its start.

    Args:
        segments: One, that :func:`~safepool.workers.logs.pack_record` made.
    """
    record = logging.LogRecord("safepool", logging.ERROR, "", 0, "", None, None)
    try:
        record = logging.makeLogRecord(unpack_record(segments[0]))
        if _names_script_otherwise(record.name):
            record.name = record.name.replace("__mp_main__", "__main__", 1)
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            with beside_bars():
                logger.handle(record)
    except Exception:  # noqa: BLE001 -- user code: handlers, filters, what is unpickled
        report(record)


def _names_script_otherwise(name: str) -> bool:
    """Tell whether a logger is that of the script, which has another name here (``__name__``)."""
    main = sys.modules["__main__"].__name__
    return name.partition(".")[0] == "__mp_main__" != main
