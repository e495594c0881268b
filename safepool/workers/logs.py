"""Log records of a worker, sent to the loggers of its program.

A program configures logging once, in its own process, and workers do not have that configuration.
A record that no handler of the worker takes travels to the pool, and the program handles it as its
own. A worker may have handlers of its own, because a task, an initializer or a library has
configured logging. The worker keeps the records that these handlers take: each record is handled
in one place. A ``NullHandler`` takes nothing. A record that has passed filters of its logger in
the worker does not pass them again in the program. Filters of the program's handlers run in the
program.

The hook is in the logger's call of its handlers (``Logger.callHandlers``). A handler of the root
logger would miss records of a logger that does not propagate, and ``logging.basicConfig`` in an
initializer would find that handler and do nothing.

``logging.warning()`` and the other module-level functions call ``basicConfig()`` themselves,
without arguments, when the root logger has no handler. In a worker that call has no effect:
otherwise one such call would keep every later record there.

Records never delay the task. They wait here, up to a bound, while the pool is slow. Beyond the
bound, records are dropped, and a further record says how many. Records of a task arrive before its
result.

Not covered:
    * A process that a task forks, because the channel belongs to the worker: its records go to its
      handlers, or to stderr from ``WARNING`` on.
    * Records that wait when a worker falls idle are sent with its next record or answer.
    * Systems where a send cannot be non-blocking (Windows): records travel with the task's answer.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepool.errors import text_of
from safepool.transport.channel import Channel, ChannelClosedError
from safepool.transport.frames import Buffer, Kind, Segment, encode
from safepool.transport.marks import PLAIN

# Records that wait for a slow pool: a few thousand of the usual ones.
_WAITING_BYTES = 1024 * 1024

_formatter = logging.Formatter()


class Outbox:
    """Frames that a worker sends, from any thread: whole, one after the other.

    Answers wait until the pool reads; records never wait. Logging never waits for the lock, so a
    signal handler or a thread may log while an answer is being sent. The thread that holds the
    lock checks for new records after it has released it.

    Attributes:
        open: Whether records may be added.
        logged: ``True`` if there was a record since the runner last set this to ``False``.
    """

    __slots__ = ("_channel", "_dropped", "_lock", "_waiting", "logged", "open")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._dropped = 0
        self.open: bool = True
        self.logged: bool = False

    def hand_over(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        """Send the files of an answer, just before the frame that refers to them."""
        return self._channel.hand_over(segments)

    def send(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Send a frame after every record that was added before. May wait for the pool."""
        with self._lock:
            self._send_records()
            self._channel.send(pieces)
        self._offer_records()

    def send_answer(self, frame: bytes) -> None:
        """Send a frame as :meth:`send` does, but faster if there are no log records."""
        if self.logged or self._waiting or not self._lock.acquire(blocking=False):
            self.send([frame])
            return
        try:
            self._channel.send([frame])
        finally:
            self._lock.release()
        if self._waiting:
            self._offer_records()

    def add(self, record: logging.LogRecord, *, filtered: bool) -> None:
        """Send a record soon, or drop and count it. Never waits.

        With ``filtered`` its logger has filters in this process, and it has passed them. User code
        makes text of its arguments, and may raise.
        """
        frame = b"".join(encode(Kind.LOG, 0, [pack_record(record, filtered=filtered)]))
        self.logged = True
        # A copy: other threads add and take.
        waiting_bytes = sum(map(len, self._waiting.copy()))
        if waiting_bytes and waiting_bytes + len(frame) > _WAITING_BYTES:
            self._dropped += 1
            frame = b""
        if frame:
            self._waiting.append(frame)
        self._offer_records()

    def close(self, *, flush: bool = False) -> None:
        """Take no more records; ``flush`` sends those that wait."""
        self.open = False
        if flush:
            with self._lock:
                self._send_records()

    def _send_records(self) -> None:
        # Not until none is left: a thread may log without end.
        for _ in range(len(self._waiting)):
            self._channel.send([self._waiting[0]])
            self._waiting.popleft()
        if self._dropped:
            self._channel.send([self._report()])

    def _offer_records(self) -> None:
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    if not self._channel.offer(self._waiting[0]):
                        return
                    self._waiting.popleft()
                if self._dropped:
                    self._waiting.append(self._report())
            except ChannelClosedError:
                self._waiting.clear()
                return
            finally:
                self._lock.release()

    def _report(self) -> bytes:
        count, self._dropped = self._dropped, 0
        record = logging.getLogger("safepool").makeRecord(
            "safepool",
            logging.WARNING,
            __file__,
            0,
            "worker %d logged faster than the program took it: %d records were dropped",
            (os.getpid(), count),
            None,
        )
        return b"".join(encode(Kind.LOG, 0, [pack_record(record)]))


def forward_records(outbox: Outbox) -> None:
    """From now on, send to the pool the records that no handler of this process takes.

    Handlers that exist already were set up for the program, not for its worker (a fork inherits
    them, ``spawn`` makes them again when it imports ``__main__``). They are removed, and their
    records go to the program's own handlers.
    """
    manager = logging.root.manager
    for logger in [logging.root, *manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True
    # On the class, so that later loggers have it as well. A replacement by another package
    # (Sentry's SDK) is still called for records that stay in this process.
    logging.Logger.callHandlers = _forwarding(  # type: ignore[assignment, method-assign]
        outbox, logging.Logger.callHandlers
    )
    logging.basicConfig = _unless_asked(outbox, logging.basicConfig)


def _unless_asked(outbox: Outbox, configure: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(configure)
    def basic_config(**wanted: Any) -> None:
        if wanted or not outbox.open:
            configure(**wanted)

    return basic_config


def _forwarding(
    outbox: Outbox, otherwise: Callable[[logging.Logger, logging.LogRecord], None]
) -> Callable[[logging.Logger, logging.LogRecord], None]:
    def call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        if not outbox.open or _is_taken(self, record):
            otherwise(self, record)
            return
        try:
            outbox.add(record, filtered=bool(self.filters))
        except RecursionError:  # as in logging's own handlers (bpo-36272)
            raise
        except Exception:  # noqa: BLE001 -- user code
            logging.Handler().handleError(record)  # an error of logging must not end the task

    return call_handlers


def _is_taken(logger: logging.Logger, record: logging.LogRecord) -> bool:
    at: logging.Logger | None = logger
    while at is not None:
        for handler in at.handlers:
            if record.levelno >= handler.level and not isinstance(handler, logging.NullHandler):
                return True
        at = at.parent if at.propagate else None
    return False


def pack_record(record: logging.LogRecord, *, filtered: bool = False) -> bytes:
    """Pickle a record in words: its arguments and exception as text, as they are now.

    Values of ``extra=`` travel as themselves, or as their ``repr()`` if they cannot be pickled.
    """
    told = dict(record.__dict__)
    told["msg"], told["args"] = str.__str__(record.getMessage()), None
    if record.exc_info and not record.exc_text:
        told["exc_text"] = _formatter.formatException(record.exc_info)
    told["exc_info"] = None
    plain = {name: value for name, value in told.items() if type(value) in PLAIN}
    others = {name: _pickle(told[name]) for name in told.keys() - plain.keys()}
    return pickle.dumps((plain, others, filtered), protocol=5)


def unpack_record(packed: Buffer) -> tuple[Mapping[str, Any], bool]:
    """Return the attributes of a record that :func:`pack_record` packed, and ``filtered``.

    Example:
        >>> record = logging.makeLogRecord({"msg": "%d files", "args": (3,)})
        >>> unpack_record(pack_record(record))[0]["msg"]
        '3 files'
    """
    attributes: dict[str, Any]
    attributes, others, filtered = pickle.loads(packed)
    for name, pickled in others.items():
        try:
            attributes[name] = pickle.loads(pickled)
        except Exception as error:  # noqa: BLE001 -- user code; the rest of the record is whole
            attributes[name] = f"(cannot be unpickled: {text_of(error)})"
    return attributes, filtered


def _pickle(value: object) -> bytes:
    try:
        return pickle.dumps(value, protocol=5)
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 -- user code; words will do
        return pickle.dumps(_words(value), protocol=5)


def _words(value: object) -> str:
    try:
        return str.__str__(repr(value))
    except RecursionError:
        raise
    except Exception as error:  # noqa: BLE001 -- user code
        return f"(not shown: {text_of(error)})"
