"""Settings of the program for its workers, and those that have changed since.

Looked at, and pickled, by the threads that call the pool: some settings are each thread's own.

The cost of a check is bounded. A pool that is made and each ``map`` look at everything. A
``submit`` looks if the one before has ended, as nothing else is going on then: a few functions
written in C tell whether anything has changed. In a burst of submits it checks so rarely that
it takes a fiftieth of the time. Rows that change rarely or take long to read are always checked at
that rate (benchmarks/dispatch.py, submit).
"""

from __future__ import annotations

import functools
import operator
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

from safepool.errors import let_handlers_pass
from safepool.pool.hands import HELD_UP_S, PATIENCE_S
from safepool.threads.imports import imported
from safepool.transport.marks import PLAIN
from safepool.workers.contained import ContainedLogger
from safepool.workers.settings import Packed, pack_setting, revision, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.names import Names
    from safepool.pool.calls.tasks import PoolFuture
    from safepool.pool.hands import Hands
    from safepool.pool.shell.worker import Worker
    from safepool.workers.settings_table import Setting

_log = ContainedLogger()

_call: Callable[[Callable[[], object]], object] = operator.call
# Equal to nothing else.
_NEVER = object()
_UNSEEN: tuple[list[Callable[[], object]], list[object]] = [], [_NEVER]

# Pause between two checks, as a multiple of the last check's duration.
_PAUSE = 50


class _Seen:
    """A row, its module, and its value at the last check."""

    __slots__ = ("glance", "known", "module", "of_thread", "read", "row", "seen", "value")

    def __init__(self, row: Setting, module: ModuleType) -> None:
        self.row, self.module = row, module
        self.read, self.of_thread = row.read, row.of_thread
        self.glance = None if row.glance is None else row.glance(module)
        self.known = False
        self.seen: object = None
        self.value: object = None

    def check(self) -> tuple[Callable[[], object], object]:
        """Return a function, and what it returns as long as the setting does not change."""
        if self.glance is None:
            return functools.partial(self.read, self.module), self.value if self.known else _NEVER
        return self.glance, _NEVER if self.seen is None else self.seen


class Settings:
    """The program's settings, as one pool has read them.

    The methods hold no lock, because a signal handler may submit in the middle of one.

    Attributes:
        state: An object that is replaced after each change of a setting.
    """

    def __init__(self) -> None:
        self.state: object = object()
        self._thread = threading.get_ident()
        self._packed: dict[str, Packed] = {}
        self._seen: dict[str, _Seen] = {}
        # Rows whose module is there, and the state in which that was found.
        self._often: list[_Seen] = []
        self._seldom: list[_Seen] = []
        self._made_of = (0, 0)
        self._often_not_before_ns = self._seldom_not_before_ns = 0
        # By whether the thread is that of the pool: functions of the rows that are looked at
        # often, and what they return as long as nothing changes. Another dictionary after each
        # change: a thread that has not seen the change would take the value from before it for
        # what workers have.
        self._checks: dict[bool, tuple[list[Callable[[], object]], list[object]]] = {}
        self._last: weakref.ref[PoolFuture] | None = None
        self.look()

    def look_before(self, future: PoolFuture) -> None:
        """Look before a call is queued, if it is time to."""
        before, self._last = self._last, weakref.ref(future)
        now_ns = time.monotonic_ns()
        if now_ns < self._often_not_before_ns:
            last = None if before is None else before()
            if last is not None and not last.has_ended():
                return
        seldom = now_ns >= self._seldom_not_before_ns
        if not seldom and self._is_as_seen():
            self._often_not_before_ns = now_ns + _PAUSE * (time.monotonic_ns() - now_ns)
            return
        self._look(now_ns, seldom=seldom)

    def look(self) -> None:
        """Look at everything."""
        self._look(time.monotonic_ns(), seldom=True)

    def _is_as_seen(self) -> bool:
        """Tell whether nothing that is looked at often has changed, by few steps of C code."""
        functions, seen = self._checks.get(threading.get_ident() == self._thread, _UNSEEN)
        try:
            return [*map(_call, functions)] == seen
        except Exception as error:  # noqa: BLE001 -- any library's own errors, arrays, user code
            let_handlers_pass(error)
            return False

    def _look(self, begun_ns: int, *, seldom: bool) -> None:
        if self._made_of != (len(sys.modules), revision()):
            self._find()
        ours = threading.get_ident() == self._thread
        self._look_at([*self._often, *self._seldom] if seldom else self._often, ours)
        found = self._checks  # before the values, which another thread may change meanwhile
        checks = [one.check() for one in self._often if ours or not one.of_thread]
        functions, seen = [one for one, _ in checks], [one for _, one in checks]
        modules, rows = self._made_of
        found[ours] = [sys.modules.__len__, revision, *functions], [modules, rows, *seen]
        ended_ns = time.monotonic_ns()
        self._often_not_before_ns = ended_ns + _PAUSE * (ended_ns - begun_ns)
        if seldom:
            self._seldom_not_before_ns = self._often_not_before_ns

    def _find(self) -> None:
        # Only a test removes a module in the moment in which another one arrives.
        self._made_of = (len(sys.modules), revision())
        found = []
        for row in settings():
            module = imported(row.module)
            if module is not None:
                seen = self._seen.get(row.name)
                if seen is None or seen.row is not row or seen.module is not module:
                    seen = self._seen[row.name] = _Seen(row, module)
                found.append(seen)
        self._often = [one for one in found if not one.row.seldom]
        self._seldom = [one for one in found if one.row.seldom]

    def _look_at(self, rows: list[_Seen], ours: bool) -> None:
        for one in rows:
            if one.of_thread and not ours:
                continue
            try:
                seen = None if one.glance is None else one.glance()
                if seen is not None and seen == one.seen:
                    continue
                if type(seen) is list:  # it may be the setting itself
                    seen = [*seen]
                value = one.read(one.module)
                if one.known:
                    plain = type(value) in PLAIN and type(one.value) is type(value)
                    if one.value == value if plain else _is_equal(one.value, value):
                        one.seen = seen
                        continue
            except Exception as error:  # noqa: BLE001 -- any library's own errors, and user code
                let_handlers_pass(error)
                _log.debug("the setting %s cannot be read: %s", one.row.name, repr(error))
                continue
            packed = self._pack(one.row, value)
            if packed is not None:
                self._packed[one.row.name] = packed
                self.state = object()  # after that: a reader begins with it
            # Last: if a signal handler interrupts before it, the next check repeats the work.
            one.known, one.value, one.seen = True, value, seen
            self._checks = {}

    def _pack(self, row: Setting, value: object) -> Packed | None:
        try:
            return pack_setting(row, value)
        except Exception as error:  # noqa: BLE001 -- user code; workers do without
            let_handlers_pass(error)
            _tell_of(row.name, error)
            return None

    def packed(self) -> list[Packed]:
        """Return all settings for workers. From any thread."""
        return [*self._packed.copy().values()]


def _tell_of(name: str, error: Exception) -> None:
    told = "the program's %s cannot be sent to workers: %s. Set it in initializer="
    _log.warning(told, name, repr(error))


def _is_equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except Exception as error:  # noqa: BLE001 -- arrays, and user code
        let_handlers_pass(error)
        return False


class Telling:
    """Settings for workers, each with the names of the script that it needs.

    For the scheduler's thread. The hands find the names of a setting, as that may run code of the
    program. Calls wait for that for half a second at the most, then begin without the setting.

    Args:
        settings: Settings of the program.
        names: Names of the program's script.
        hands: The pool's.
    """

    def __init__(self, settings: Settings, names: Names, hands: Hands) -> None:
        self._settings, self._names, self._hands = settings, names, hands
        # By name; another object after each change.
        self._ready: dict[str, tuple[Packed, Sequence[Delivery]]] = {}
        self._known: object = None
        self._learned = 0
        # Results of the hands; ``None`` if a setting cannot be pickled.
        self._found: dict[str, tuple[Packed, Sequence[Delivery] | None]] = {}
        self._asked_at: float | None = None

    @property
    def waits(self) -> bool:
        """Whether the hands find something out."""
        return self._asked_at is not None

    def next_look(self) -> float | None:
        """Return when calls wait no longer, by the monotonic clock."""
        until = None if self._asked_at is None else self._asked_at + HELD_UP_S
        return until if until is not None and time.monotonic() < until else None

    def may_be_told(self) -> bool:
        """Tell whether the settings are ready for workers, or would keep calls for too long."""
        state, learned = self._settings.state, self._names.learned
        if state is self._known and learned == self._learned:
            return True
        if learned != self._learned:
            self._learned = learned
            self._found.clear()
        if self._asked_at is None:
            asked = self._look()
            if asked:
                self._asked_at = time.monotonic()
                run = functools.partial(self._ask, asked)
                if self._hands.do(run, self._come_back, PATIENCE_S) is None:
                    self._look()
            if self._asked_at is None:
                self._known = state
                return True
        return self.next_look() is None

    def _look(self) -> list[Packed]:
        """Prepare what needs no code of the program; return the rest."""
        ready, asked = {}, []
        for one in self._settings.packed():
            before, needs = self._found.get(one.name, (None, None))
            if before is not one:
                needs = self._names.needed_here(one.names)
                if needs is None:
                    asked.append(one)
            if needs is not None:
                ready[one.name] = (one, needs)
        self._ready = ready
        return asked

    def _ask(self, asked: list[Packed]) -> None:
        """Find out what settings need. In any thread."""
        for one in asked:
            try:
                self._found[one.name] = (one, self._names.needed(one.names))
            except Exception as error:  # noqa: BLE001 -- user code; workers do without
                let_handlers_pass(error)
                self._found[one.name] = (one, None)
                _tell_of(one.name, error)

    def _come_back(self) -> None:
        self._asked_at = None

    def is_told(self, worker: Worker) -> bool:
        """Tell whether a worker has all settings as they are now. From any thread."""
        return (
            worker.told is self._ready
            and self._settings.state is self._known
            and self._names.learned == self._learned
        )

    def changed_for(self, worker: Worker) -> list[tuple[Packed, Sequence[Delivery]]]:
        """Return the settings that have changed since the last message to a worker."""
        if worker.told is self._ready:
            return []
        worker.told = self._ready
        changed = {
            name: one
            for name, one in self._ready.items()
            if worker.settings.get(name) is not one[0]
        }
        worker.settings |= {name: packed for name, (packed, _) in changed.items()}
        return [*changed.values()]
