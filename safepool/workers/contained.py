"""The package's own log, for threads that no handler's exception must end."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from safepool.machine import call_handlers, has_handlers_elsewhere
from safepool.shown import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

# Not by getLogger(): a test may have put a mock in its place, which has parents without end.
_logger = logging.Logger.manager.getLogger("safepool")
# The future of a task reports the end of its worker. A program that wants it in its log configures
# logging.
_logger.addHandler(logging.NullHandler())
# For its handling of errors alone.
_errors = logging.Handler()
# Context in which each line of the log is written. A bar on the screen hides itself there.
around: Callable[[], AbstractContextManager[object]] = nullcontext


class ContainedLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger ``safepool``, for the scheduler's thread: no handler's exception ends that.

    An argument is a part of a line: the end of a line in it is escaped, and what moves a
    terminal's cursor. A message without arguments is logged as it is.
    """

    def __init__(self) -> None:
        super().__init__(_logger)

    def log(self, level: int, msg: object, *args: object, **keywords: Any) -> None:
        """Log, and contain what handlers and filters raise."""
        if has_handlers_elsewhere():
            # The answer for a level is usually in the cache; otherwise logging computes it under a
            # lock.
            wanted: dict[int, bool] = getattr(self.logger, "_cache", {})
            if wanted.get(level) is False or not _is_heard(self.logger):
                return
        elif not self.isEnabledFor(level):
            return
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") == "logging":
            frame = frame.f_back
        place = frame.f_code.co_filename, frame.f_lineno
        function, trace = frame.f_code.co_name, keywords.get("exc_info")
        trace = sys.exc_info() if trace is True else trace

        def handle() -> None:
            try:
                if self.isEnabledFor(level):
                    record = self.logger.makeRecord(
                        self.logger.name, level, *place, msg, _shown(args), trace, function
                    )
                    with around():
                        self.logger.handle(record)
            except Exception:  # noqa: BLE001 -- user code
                report(self.logger.makeRecord(self.logger.name, level, "", 0, msg, args, None))

        call_handlers(handle)


def _shown(args: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(one if isinstance(one, (int, float)) else printable(str(one)) for one in args)


def _is_heard(logger: logging.Logger) -> bool:
    """Return whether any handler may take the record: otherwise no thread is needed."""
    if not logger.handlers:
        return True  # logging's last resort
    heard: logging.Logger | None = logger
    while heard is not None:
        if any(type(handler) is not logging.NullHandler for handler in heard.handlers):
            return True
        heard = heard.parent if heard.propagate else None
    return False


def report(record: logging.LogRecord) -> None:
    """Report the exception of a handler, as :mod:`logging` does."""
    try:
        _errors.handleError(record)
    except Exception:  # noqa: BLE001 -- stderr is user code as well
        pass
