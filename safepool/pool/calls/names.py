"""The script's names: state of the program's ``__main__`` in workers, and names that workers lack.

A function of the script travels without the globals that its code names. Each such global is a
separate name here, whatever its value: a module, a function or class of the script, data. Before a
call, a worker is sent the names that the call needs and that the worker lacks in their present
version. The worker binds them. From then on they belong to the worker: a change by a task stays. A
name gets a new version only when the program's own value has changed:

    what identity tells about    by identity: numbers, text, modules, what workers import
    functions, classes           by the parts that they are made of (``mains``)
    all else                     by its pickle, and the memory of its arrays

Names that refer to each other, or to a common object, are pickled together, so that the object
stays one object in the worker. Objects that the worker already has are pickled as names.

Changes of the script to modules follow last (``transport.additions``), even for a call that needs
no names. The search runs again when the script has more names.

Not covered:
    * An object that two globals have in common, and that is no global itself, if one of them was
      delivered before the other was needed: each global gets a separate copy.
    * A change that is undone before the next call.
    * An object whose pickle differs each time: only rebinding of the name is noticed.
    * Changes by the program between the fork of a worker (``mp_context="fork"``) and the first
      call that needs them.

No lock is held while code of the program is pickled: that code may wait for another call, without
end, or for a finalizer. A thread writes its findings into a draft of the table, and publishes the
draft in one step. If another thread has published meanwhile, the thread merges entries about other
names, and looks at the rest again. Calls that need the same names wait for the first of these
calls, so that a large object is pickled once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from safepool.errors import let_handlers_pass
from safepool.pool.calls.closures import ADDED, close, find_additions
from safepool.pool.calls.deliveries import Delivery, Versions
from safepool.pool.calls.table import Closure, Table
from safepool.pool.latch import Latch
from safepool.transport.marks import main_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safepool.transport.main_names import MainNames

# Sets of names that calls have asked for.
_MOST_CLOSURES = 1024
# So long a call waits for another one that needs the same: that one may wait for this one.
_TURN_S = 10.0


class Names:
    """The names of one pool. From any thread.

    ``main`` are the names that workers have because they run the script; ``None`` if none do.
    """

    def __init__(self, main: MainNames | None = None) -> None:
        self._main = main
        self._last = Table(main)
        self._closures: dict[frozenset[str], Closure] = {}
        self._turns: dict[frozenset[str], Latch] = {}
        # Whether the script has put something into modules, and how many names it had then.
        self._adds = False
        self._looked_at = -1

    @property
    def learned(self) -> int:
        """Number of times that something new was found out about the workers' names."""
        return 0 if self._main is None else self._main.learned

    @property
    def table(self) -> Table:
        """Table that was published last."""
        table = self._last
        while table.heir:
            table = table.heir[0]
        self._last = table
        return table

    def needed(self, roots: frozenset[str]) -> Sequence[Delivery]:
        """Return the deliveries that a worker needs before it runs code with these names."""
        if not roots:
            self.look()
            if not self._adds:
                return ()
        closure = self._fresh(roots)
        if closure is None:
            turn = self._take_turn(roots)
            try:
                while closure is None:
                    closure = self._fresh(roots) or self._close(roots)
            finally:
                turn.open()
                if self._turns.get(roots) is turn:
                    del self._turns[roots]
        return closure.deliveries

    def needed_here(self, roots: frozenset[str]) -> Sequence[Delivery] | None:
        """Return what :meth:`needed` does; ``None`` if that may run code of the program."""
        if not (roots or self._adds or self._is_to_look()):
            return ()
        closure, table = self._closures.get(roots), self._last
        table = self.table if table.heir else table
        return closure.deliveries if closure and table.is_fresh(closure, here=True) else None

    def born_with(self, *, forked: bool) -> dict[str, int]:
        """Return the versions of names that a new worker has."""
        if not forked:
            return Versions({}, lambda: self.table.there)
        known = {name: one.delivery.version for name, one in self.table.known.items()}
        known[ADDED] = sys.maxsize  # its modules are the program's
        return Versions(known, lambda: self.table.first, frozenset(main_space()))

    def look(self) -> None:
        """Find out whether the script has put something into modules, if it has got more names.

        In the caller's thread, which need not wait for another one then.
        """
        try:
            if self._is_to_look():
                size = len(main_space())
                self._adds = find_additions()
                self._looked_at = size
        except Exception as error:  # noqa: BLE001 -- a metaclass's, or there is no __main__ any more
            let_handlers_pass(error)

    def _is_to_look(self) -> bool:
        main = self._main
        if main is not None and main.are_known:
            return False
        return len(main_space()) != self._looked_at

    def _fresh(self, roots: frozenset[str]) -> Closure | None:
        closure = self._closures.get(roots)
        return closure if closure and self.table.is_fresh(closure) else None

    def _take_turn(self, roots: frozenset[str]) -> Latch:
        mine = Latch()
        while (other := self._turns.setdefault(roots, mine)) is not mine:
            if other.wait(_TURN_S):
                break
            if self._turns.get(roots) is other:
                self._turns[roots] = mine
        return mine

    def _close(self, roots: frozenset[str]) -> Closure | None:
        """Find the objects of names; ``None`` if another thread has published one of the names."""
        base = self.table
        draft = base.draft()
        try:
            closure = close(draft, roots)
        except BaseException:
            self._publish(base, draft)  # entries beside them, which take long as well
            raise
        if not self._publish(base, draft):
            return None
        if len(self._closures) >= _MOST_CLOSURES:
            self._closures.clear()
        self._closures[roots] = closure
        return closure

    def _publish(self, base: Table, draft: Table) -> bool:
        """Publish a draft as the table; return whether the whole draft counts."""
        whole = True
        gone = {
            id(base.known[name])
            for known in draft.made
            for name in known.names
            if name in base.known
        }
        while base.heir.setdefault(0, draft) is not draft:
            after = self.table
            draft, kept = draft.on(after, base)
            base, whole = after, whole and kept
        if gone:  # keep nothing alive that has got another version
            for roots, closure in [*self._closures.items()]:
                if any(id(known) in gone for known in closure.known):
                    self._closures.pop(roots, None)
        return whole
