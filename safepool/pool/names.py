"""The script's names: what workers have of the program's ``__main__``, and what they lack.

A function of the script travels without the globals that its code names. Each of those is a name
of its own here, whatever it holds: a module, a function or class of the script, data. Before
a worker is sent a call it is sent the names that the call needs, and that it lacks in their
present version. There each is bound, and from then on the worker's own: what a task does to it
stays. A name gets a new version only when the program's own value has changed:

    what identity tells about    by identity: numbers, text, modules, what workers import
    functions, classes           by the parts that they are made of (``mains``)
    all else                     by its pickle, and the memory of its arrays

Names that hold each other, or something in common, are pickled together, so that it is one object
in the worker as well. What a worker has already is referred to by its name.

Not covered:
    * An object that two globals have in common, and that is no global itself, if one of them was
      delivered before the other was needed: each has its own.
    * A change that is undone before the next call.
    * An object whose pickle is another one each time: only rebinding the name is seen.
    * What the program has changed between the fork of a worker (``mp_context="fork"``) and the
      first call that needs it.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safepool.pool.circles import components
from safepool.pool.deliveries import Delivery, Needs, Versions
from safepool.pool.imports import Imports
from safepool.pool.mains import ABSENT
from safepool.pool.values import definitions, value_of
from safepool.pool.walk import QUIET_BYTES, Walk
from safepool.transport.marks import attributes_of, main_space

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from safepool.pool.known import Known
    from safepool.transport.main_names import MainNames

__all__ = ["Names"]

# Sets of names that calls have asked for.
_MOST_CLOSURES = 1024
# What stands for a name where there is none.
_IMPORTS, _MISSING = "import", "del"


@dataclass(slots=True)
class _Closure:
    """All that some names lead to."""

    known: list[Known]
    absent: frozenset[str]
    deliveries: Needs


class Names:
    """The names of one pool. From any thread.

    Args:
        main: What workers have that run the script; ``None`` if none do.

    Attributes:
        known: What was pickled last, by name.
        there: Versions in which a worker that has run the script has names by itself.
        versions: Each is higher than the one before.
    """

    def __init__(self, main: MainNames | None = None) -> None:
        self.main = main
        self._learned = 0
        self.versions = itertools.count(1)
        self.known: dict[str, Known] = {}
        self._first: dict[str, int] = {}
        self.there: dict[str, int] = {}
        self._closures: dict[frozenset[str], _Closure] = {}
        self._imports: Imports | None = None
        # What comes with any names: the imports, and those that nothing names.
        self._beside: tuple[Delivery, ...] = ()
        self._missing: dict[str, str] = {}
        self.look_at = -1
        self._lock = threading.RLock()

    def needed(self, roots: frozenset[str]) -> Sequence[Delivery]:
        """Return what a worker needs before code runs that asks for these names.

        Args:
            roots: What the pickle of a call refers to, and what its functions use.

        Returns:
            In the order in which they are to be sent, each in its present version.

        Raises:
            Exception: What the pickler raised for one of them.
        """
        if not roots:
            return ()
        with self._lock:
            self._forget_other_script()
            closure = self._closures.get(roots)
            if closure is None or not self._is_fresh(closure):
                closure = self._close(roots)
                if len(self._closures) >= _MOST_CLOSURES:
                    self._closures.clear()
                self._closures[roots] = closure
            return closure.deliveries

    def keep(self, known: Known) -> None:
        """Make names known."""
        for name in known.names:
            self.known[name] = known
            self._first.setdefault(name, known.delivery.version)

    def drop(self, names: Iterable[str]) -> None:
        """Keep nothing alive that has got another version."""
        gone = {id(self.known[name]) for name in names if name in self.known}
        for roots, closure in [*self._closures.items()]:
            if any(id(known) in gone for known in closure.known):
                del self._closures[roots]

    def _forget_other_script(self) -> None:
        """Begin anew if workers have something else of the script than was thought."""
        if self.main is not None and self.main.learned != self._learned:
            self._learned = self.main.learned
            for table in (self.known, self._closures, self._first, self.there):
                table.clear()
            self._imports, self._beside, self.look_at = None, (), -1

    def needed_here(self, roots: frozenset[str]) -> Sequence[Delivery] | None:
        """Return what :meth:`needed` does, if to find that out runs no code of the program.

        Returns:
            ``None`` if it may, or if another thread finds something out.
        """
        if not roots:
            return ()
        if not self._lock.acquire(blocking=False):
            return None
        try:
            closure = self._closures.get(roots)
            fresh = closure is not None and self._is_fresh(closure, here=True)
            return closure.deliveries if closure is not None and fresh else None
        finally:
            self._lock.release()

    def born_with(self, *, forked: bool) -> dict[str, int]:
        """Return the versions of names that a new worker has.

        Args:
            forked: It is a fork of the program, and has what that has.
        """
        with self._lock:
            if not forked:
                return Versions({}, self.there)
            known = {name: one.delivery.version for name, one in self.known.items()}
            return Versions(known, self._first, frozenset(main_space()))

    def _is_fresh(self, closure: _Closure, *, here: bool = False) -> bool:
        space, present = main_space(), self.known
        if len(space) != self.look_at or not closure.absent.isdisjoint(space):
            return False
        for known in closure.known:
            if present[known.names[0]] is not known or not self.is_unchanged(known, here=here):
                return False
        return True

    def _close(self, roots: frozenset[str]) -> _Closure:
        if self._imports is None or len(main_space()) != self.look_at:
            self._look_beside()
        walk = Walk(self)
        walk.go(roots)
        walk.finish()
        known = self._in_order(walk.reached)
        deliveries = (*self._beside, *(one.delivery for one in known))
        return _Closure(known, frozenset(walk.absent), Needs(dict.fromkeys(deliveries)))

    def _look_beside(self) -> None:
        """Look at the namespace as a whole: it has other names than at the last look."""
        here = main_space()
        before, self._imports = self._imports, Imports()
        beside: list[Delivery] = []
        if before is not None and before.modules == self._imports.modules:
            beside += self._beside[:1]
        elif not self.main:
            head = {"imports": self._imports.modules}
            beside.append(Delivery(next(self.versions), (_IMPORTS,), (0,), head))
        walk = Walk(self, quiet=True)
        walk.go(definitions())
        walk.finish()
        known = self._in_order(walk.reached)
        beside += [one.delivery for one in known if one.delivery.size_bytes < QUIET_BYTES]
        if walk.missing:
            told = {"missing": walk.missing}
            beside.append(Delivery(next(self.versions), (_MISSING,), (0,), told))
        self._beside = tuple(beside)
        self.look_at = len(here)

    def _in_order(self, reached: Iterable[str]) -> list[Known]:
        """Return what some names are pickled in, what others need to be loaded before those.

        That is what they refer to, and if possible what their functions use: a class may run
        code when it is made.
        """
        known = {self.known[name]: None for name in reached if name in self.known}

        def leads(one: Known, names: frozenset[str]) -> list[Known]:
            others = (self.known.get(name) for name in sorted(names))
            return [other for other in others if other in known and other is not one]

        ordered: list[Known] = []
        for circle in components({one: leads(one, one.refs | one.uses) for one in known}):
            within = {
                one: [other for other in leads(one, one.refs) if other in circle] for one in circle
            }
            ordered += [one for (one,) in components(within)]
        return ordered

    def is_unchanged(self, known: Known, *, here: bool = False) -> bool:
        """Tell whether names are what they were when they were pickled; ``False`` if in doubt."""
        if known.plain is not ABSENT:
            return value_of(known.names[0]) is known.plain and (
                known.attributes is None or attributes_of(known.plain).keys() == known.attributes
            )
        refs = known.refs
        return (not refs or known.stamp == self.stamp(refs)) and known.is_unchanged(here=here)

    def stamp(self, refs: frozenset[str]) -> tuple[int, ...]:
        """Return the versions of the objects that these names hold."""
        return tuple(self.born(name) for name in sorted(refs))

    def born(self, name: str) -> int:
        """Return the version with which the object that a name holds was delivered first."""
        known = self.known.get(name)
        return 0 if known is None else known.delivery.born[known.names.index(name)]
