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
import pickle
import random
import sys
import threading
import time
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safepool.errors import text_of
from safepool.machine import tell_once
from safepool.pool.circles import components
from safepool.pool.imports import Imports
from safepool.pool.mains import (
    ABSENT,
    LRU_CACHE,
    Look,
    PlainFunction,
    is_definition,
    is_importable,
    is_plain,
    plain_function,
    uses_of,
)
from safepool.pool.prints import Print, length, placed, print_of, steadily
from safepool.transport import payloads, trusted
from safepool.transport.channel import size_of
from safepool.transport.held import Held, held_by_module
from safepool.transport.marks import attributes_of, find_attribute, main_space
from safepool.transport.names import Met
from safepool.transport.references import Collected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from safepool.transport.frames import Segment
    from safepool.transport.main_names import MainNames
    from safepool.transport.sharing import Shared

__all__ = ["Delivery", "Names"]

# Objects in a pickle. In a larger one nobody looks for what two values have in common.
_MOST_MET = 200_000
# Sets of names that calls have asked for.
_MOST_CLOSURES = 1024
# A function or class that nothing names is sent in case it is asked for, unless it is larger.
_QUIET_BYTES = 1 << 20
# They stay the same object in a worker when what they hold has changed.
_CONTAINERS = frozenset({dict, list, set, bytearray})
# Py_TPFLAGS_HEAPTYPE.
_HEAP = 1 << 9
# Code that names one of these may ask for any name of the script.
_REACHES_ALL = frozenset({"globals", "vars", "eval", "exec"})
# Of the worker's own module.
_OF_ANY_MODULE = frozenset({"__name__", "__package__", "__builtins__", "__spec__", "__loader__"})
# More is worth a word when it is sent again and again; it takes tens of milliseconds.
_MUCH_BYTES = 16 << 20
_TOLD_AT = 3
# So is more time than this, of the program, to find out whether data has changed.
_MUCH_S = 1.0
# What stands for a name where there is none.
_IMPORTS, _MISSING = "import", "del"


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Names with their values, on the way to workers.

    Attributes:
        version: Higher than that of any that was made before.
        names: In the order of the values.
        born: By name, the version with which its present object was delivered first. Workers
            keep a container or class when what it holds has changed.
        head: What workers are told about the names.
        segments: The pickle of the values.
        shared: What the values refer to, by :func:`safepool.share`.
        draws: A generator of random numbers is among the values.
    """

    version: int
    names: tuple[str, ...]
    born: tuple[int, ...] = ()
    head: Mapping[str, Any] = field(default_factory=dict, repr=False)
    segments: Sequence[Segment] = field(default=(), repr=False)
    shared: Sequence[Shared[Any]] = field(default=(), repr=False)
    draws: bool = False

    def message(self, has: dict[str, int]) -> list[Segment]:
        """Return what a worker is sent, and note that it has it.

        Args:
            has: Versions of the names that the worker has.
        """
        keep = tuple(has.get(n, 0) >= v for n, v in zip(self.names, self.born, strict=True))
        has.update(dict.fromkeys(self.names, self.version))
        return [pickle.dumps({**self.head, "keep": keep}, protocol=5), *self.segments]

    def lacks(self, has: Mapping[str, int]) -> bool:
        """Tell whether a worker with these versions is to be sent this one."""
        return any(has.get(name, 0) < self.version for name in self.names)

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        return sum(map(size_of, self.segments))


@dataclass(slots=True, eq=False)
class _Known:
    """Names that were pickled together.

    Attributes:
        names: Which.
        look: The values as they were.
        doubts: The print of what is in doubt.
        print: That of the whole pickle.
        delivery: What is sent.
        refs: Names that it refers to.
        uses: Names that its functions use.
        stamp: The versions of the objects that it refers to.
        ids: Of the values.
        plain: The value, if identity tells all about it.
        attributes: Of a function or class that workers have: paths to what was set on it.
        short: The look at a function, if a short one will do.
        pickled_again: Only the pickle of the whole tells whether it has changed.
        unsteady: Its pickle is another one each time: only identity tells.
        spent_s: What it has taken to find out whether it has changed, in CPU time.
        asked: How often that was asked.
    """

    names: tuple[str, ...]
    look: Look
    doubts: Print | None
    print: Print
    delivery: Delivery
    refs: frozenset[str]
    uses: frozenset[str]
    stamp: tuple[int, ...]
    ids: tuple[int, ...]
    plain: object
    attributes: frozenset[str] | None
    short: PlainFunction | None
    pickled_again: bool
    unsteady: bool = False
    spent_s: float = 0.0
    asked: int = 0

    def is_unchanged(self, *, here: bool = False) -> bool:
        """Tell whether the program's values are what was pickled; ``False`` if in doubt.

        Args:
            here: Run no code of the program.
        """
        if self.short is not None:
            return self.short.is_still(_value_of(self.names[0]))
        values = [*map(_value_of, self.names)]
        look = Look(*values)
        if self.pickled_again or not look.same_as(self.look):
            return False
        same = self.doubts is None or (
            not self.unsteady and self._is_print_of(look.doubts, here=here)
        )
        return same or (self.unsteady and tuple(map(id, values)) == self.ids)

    def _is_print_of(self, doubts: list[object], *, here: bool) -> bool:
        before = time.thread_time()
        same = self._has_print_of(doubts, here=here)
        self.spent_s += time.thread_time() - before
        self.asked += same or not here  # else it is asked again, in another thread
        if self.spent_s > _MUCH_S:
            self._tell_of_time()
        return same

    def _tell_of_time(self) -> None:
        name = self.names[0]
        tell_once(
            f"to find out whether the global {name} of the script has changed has taken "
            f"{self.spent_s:.1f} s in {self.asked} calls of submit() and map(), which ask it once "
            "each. Give map() more items at once, make arrays read-only "
            f"({name}.flags.writeable = False), or place what never changes once for all workers: "
            f"{name} = safepool.share({name})",
            subject=f"time for {name}",
        )
        self.spent_s = float("-inf")

    def _has_print_of(self, doubts: list[object], *, here: bool) -> bool:
        assert self.doubts is not None
        try:
            if here:
                return self.doubts.is_of(trusted.dumps(doubts))
            if self.doubts.is_of(print_of(doubts)[0]):
                return True
            self.unsteady = print_of(doubts)[0][0] != print_of(doubts)[0][0]
        except Exception:  # noqa: BLE001 -- user code; it is pickled again, and raises there
            pass
        return False


@dataclass(slots=True)
class _Pickled:
    """Names as they are pickled now.

    Attributes:
        kinds: By name the type of a container, of which what it holds is pickled; else ``None``.
        by_identity: Workers have an object of their own: only another one is a change.
        there: Workers have it by themselves, as it is.
        draws: As of :class:`Delivery`.
        attributes: As of :class:`_Known`.
        looked: What they were just before.
        held: By ``id()``, objects that another name may hold as well. Those that were made
            for the pickle are kept, so that no other gets their number.
    """

    names: tuple[str, ...]
    kinds: tuple[type | None, ...]
    segments: list[bytes | memoryview]
    refs: frozenset[str]
    uses: frozenset[str]
    shared: Sequence[Shared[Any]]
    held: dict[int, object]
    by_identity: bool = False
    there: bool = False
    draws: bool = False
    attributes: frozenset[str] | None = None
    looked: _Looked | None = None


@dataclass(slots=True)
class _Closure:
    """All that some names lead to."""

    known: list[_Known]
    absent: frozenset[str]
    deliveries: Needs


_needs = itertools.count(1)


class Needs(list[Delivery]):
    """What a call needs, in the order in which it is sent.

    Attributes:
        number: Its own. A worker that has had all of it once needs no further look.
    """

    def __init__(self, deliveries: Iterable[Delivery]) -> None:
        super().__init__(deliveries)
        self.number = next(_needs)


class _Inherited(dict[str, int]):
    """Versions of the names that a worker has, some of which it was born with.

    Args:
        known: Those of names that were known by then.
        first: Versions in which it has others.
        names: Which others; ``None`` is all that ``first`` tells of.
    """

    def __init__(
        self,
        known: Mapping[str, int],
        first: Mapping[str, int],
        names: frozenset[str] | None = None,
    ) -> None:
        super().__init__(known)
        self._first = first
        self._names = names

    def get(self, name: str, default: Any = None) -> Any:
        """Return the version of a name."""
        version = super().get(name)
        if version is None and (self._names is None or name in self._names):
            version = self._first.get(name)
        return default if version is None else version


class Names:
    """The names of one pool. From any thread.

    Args:
        main: What workers have that run the script; ``None`` if none do.
    """

    def __init__(self, main: MainNames | None = None) -> None:
        self.main = main
        self._learned = 0
        self._versions = itertools.count(1)
        self._known: dict[str, _Known] = {}
        self._first: dict[str, int] = {}
        # Of those that a worker which has run the script has by itself.
        self._there: dict[str, int] = {}
        self._closures: dict[frozenset[str], _Closure] = {}
        self._imports: Imports | None = None
        # What comes with any names: the imports, and those that nothing names.
        self._beside: tuple[Delivery, ...] = ()
        self._missing: dict[str, str] = {}
        self._looked_at = -1
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

    def keep(self, known: _Known) -> None:
        """Make names known."""
        for name in known.names:
            self._known[name] = known
            self._first.setdefault(name, known.delivery.version)

    def drop(self, names: Iterable[str]) -> None:
        """Keep nothing alive that has got another version."""
        gone = {id(self._known[name]) for name in names if name in self._known}
        for roots, closure in [*self._closures.items()]:
            if any(id(known) in gone for known in closure.known):
                del self._closures[roots]

    def _forget_other_script(self) -> None:
        """Begin anew if workers have something else of the script than was thought."""
        if self.main is not None and self.main.learned != self._learned:
            self._learned = self.main.learned
            for table in (self._known, self._closures, self._first, self._there):
                table.clear()
            self._imports, self._beside, self._looked_at = None, (), -1

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
                return _Inherited({}, self._there)
            known = {name: one.delivery.version for name, one in self._known.items()}
            return _Inherited(known, self._first, frozenset(main_space()))

    def _is_fresh(self, closure: _Closure, *, here: bool = False) -> bool:
        space, present = main_space(), self._known
        if len(space) != self._looked_at or not closure.absent.isdisjoint(space):
            return False
        for known in closure.known:
            if present[known.names[0]] is not known or not self._is_unchanged(known, here=here):
                return False
        return True

    def _close(self, roots: frozenset[str]) -> _Closure:
        if self._imports is None or len(main_space()) != self._looked_at:
            self._look_beside()
        walk = _Walk(self)
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
            beside.append(Delivery(next(self._versions), (_IMPORTS,), (0,), head))
        walk = _Walk(self, quiet=True)
        walk.go(_definitions())
        walk.finish()
        known = self._in_order(walk.reached)
        beside += [one.delivery for one in known if one.delivery.size_bytes < _QUIET_BYTES]
        if walk.missing:
            told = {"missing": walk.missing}
            beside.append(Delivery(next(self._versions), (_MISSING,), (0,), told))
        self._beside = tuple(beside)
        self._looked_at = len(here)

    def _in_order(self, reached: Iterable[str]) -> list[_Known]:
        """Return what some names are pickled in, what others need to be loaded before those.

        That is what they refer to, and if possible what their functions use: a class may run
        code when it is made.
        """
        known = {self._known[name]: None for name in reached if name in self._known}

        def leads(one: _Known, names: frozenset[str]) -> list[_Known]:
            others = (self._known.get(name) for name in sorted(names))
            return [other for other in others if other in known and other is not one]

        ordered: list[_Known] = []
        for circle in components({one: leads(one, one.refs | one.uses) for one in known}):
            within = {
                one: [other for other in leads(one, one.refs) if other in circle] for one in circle
            }
            ordered += [one for (one,) in components(within)]
        return ordered

    def _is_unchanged(self, known: _Known, *, here: bool = False) -> bool:
        if known.plain is not ABSENT:
            return _value_of(known.names[0]) is known.plain and (
                known.attributes is None or attributes_of(known.plain).keys() == known.attributes
            )
        refs = known.refs
        return (not refs or known.stamp == self._stamp(refs)) and known.is_unchanged(here=here)

    def _stamp(self, refs: frozenset[str]) -> tuple[int, ...]:
        return tuple(self._born(name) for name in sorted(refs))

    def _born(self, name: str) -> int:
        known = self._known.get(name)
        return 0 if known is None else known.delivery.born[known.names.index(name)]


class _Walk:
    """From some names to all that they lead to.

    Args:
        names: The pool's.
        quiet: Leave out what cannot be pickled, and do not follow what functions use.

    Attributes:
        reached: The names that there are.
        absent: Those that there are not.
        missing: Those that could not be pickled, and why.
    """

    def __init__(self, names: Names, *, quiet: bool = False) -> None:
        self._names = names
        self._quiet = quiet
        self._pickled: dict[str, _Pickled] = {}
        self._by_id: dict[int, str] | None = None
        self.reached: dict[str, None] = {}
        self.absent: list[str] = []
        self.missing: dict[str, str] = {}

    def go(self, roots: Iterable[str]) -> None:
        """Look at the names, and pickle those that have changed or are new.

        Raises:
            Exception: What the pickler raised.
        """
        if self._names.main:
            self._ask_ahead(roots)
        todo = sorted(roots, reverse=True)
        while todo:
            name = todo.pop()
            if name in self.reached or name in self.absent or name in _OF_ANY_MODULE:
                continue
            if _value_of(name) is ABSENT:
                self.absent.append(name)
                continue
            known = self._names._known.get(name)
            if known is not None and self._names._is_unchanged(known):
                self.reached.update(dict.fromkeys(known.names))
                todo += self._leads_on(name, known)
                continue
            try:
                one = self._pickled[name] = self._there(name) or self._alone(name)
            except Exception as error:
                if not self._quiet:
                    raise
                self.missing[name] = f"{type(error).__name__}: {text_of(error)}"
                continue
            if self._quiet and sum(map(length, one.segments)) > _QUIET_BYTES:
                del self._pickled[name]
                self.missing[name] = "no function that was called names it, and it is large"
                continue
            self.reached[name] = None
            todo += self._leads_on(name, one)
            todo += known.names if known is not None else ()

    def _ask_ahead(self, roots: Iterable[str]) -> None:
        """Ask what data is like where the script was run: for all of it at once."""
        known, main = self._names._known, self._names.main
        assert main is not None
        data: list[str] = []
        seen: set[str] = set()
        todo = list(roots)
        while todo:
            name = todo.pop()
            value = _value_of(name)
            if name in seen or name in known or value is ABSENT or name in _OF_ANY_MODULE:
                continue
            seen.add(name)
            if not is_definition(value):
                data.append(name)
            elif not (is_importable(value) or self._quiet):
                todo += uses_of(value)
                todo += attributes_of(value)
        main.ask(data)

    def _leads_on(self, name: str, one: _Known | _Pickled) -> Iterable[str]:
        if self._quiet and not isinstance(_value_of(name), type):
            return one.refs
        # Code of a class may run when it is made.
        return one.refs | one.uses | frozenset(one.names)

    def finish(self) -> None:
        """Make known what was pickled."""
        if not self._quiet and not _REACHES_ALL.isdisjoint(self.absent):
            everything = _Walk(self._names, quiet=True)
            everything.go(_definitions())
            everything.finish()
            uses = {
                used
                for name in everything.reached
                if (known := self._names._known.get(name)) is not None
                for used in known.uses
            }
            for used in uses:
                self._try(used)
        while self._pickled:
            for group in _together(self._pickled):
                self._make_known(group)
            # What refers to an object that workers get anew is to refer to that one.
            behind = [name for name in self.reached if self._is_behind(name)]
            if not behind:
                return
            # Beside those: in case they refer to each other now.
            self._pickled |= {name: self._alone(name) for name in behind}

    def _is_behind(self, name: str) -> bool:
        known = self._names._known.get(name)
        return known is not None and known.stamp != self._names._stamp(known.refs)

    def _try(self, name: str) -> None:
        try:
            self.go([name])
        except Exception:  # noqa: BLE001 -- perhaps nobody asks for it
            self._pickled.pop(name, None)

    def _there(self, name: str) -> _Pickled | None:
        """Return a name that workers have by themselves; ``None`` if it is to be sent."""
        main, value = self._names.main, _value_of(name)
        if not main or name in self._names._known:
            return None
        nothing: frozenset[str] = frozenset()
        if is_definition(value) and getattr(value, "__qualname__", "") == name and main.has(value):
            attributes = frozenset(attributes_of(value))
            uses = uses_of(value) | attributes
            one = _Pickled((name,), (None,), [b""], nothing, uses, (), {}, True, True)
            one.attributes = attributes
            return one
        if main.changed({name: value}):
            return None
        try:
            one = self._alone(name)
        except Exception:  # noqa: BLE001 -- the worker's own stays, as nothing else can be had
            one = _Pickled((name,), (None,), [b""], nothing, nothing, (), {}, True)
        one.there = True
        return one

    def _alone(self, name: str) -> _Pickled:
        value = _value_of(name)
        place = held_by_module(name, value)
        if place is not None:
            segments: list[bytes | memoryview] = [pickle.dumps((Held(place, value),), protocol=5)]
            nothing: frozenset[str] = frozenset()
            return _Pickled((name,), (None,), segments, nothing, nothing, (), {}, True)
        if self._by_id is None:
            self._by_id = _data_by_id()
        # First: what is changed meanwhile, by another thread, is noticed with the next call.
        looked = _looked_at([value])
        one = _pickle((name,), {})
        one.looked = looked
        others = {self._by_id[number] for number in one.held if number in self._by_id}
        one.refs |= others - {name}
        for number in self._by_id.keys() & one.held.keys():
            del one.held[number]
        if _can_be_shared(value):
            one.held[id(value)] = value  # which another name may hold as well
        return one

    def _make_known(self, group: tuple[str, ...]) -> None:
        table, pickled = self._names, self._pickled
        values = [*map(_value_of, group)]
        seeds = {
            name: _value_of(name)
            for member in group
            for name in pickled[member].refs
            if name not in group and _can_be_shared(_value_of(name))
        }
        one = pickled[group[0]]
        there = all(pickled[name].there for name in group)
        if len(group) > 1 or seeds:
            looked = one.looked if len(group) == 1 else _looked_at(values)
            one = _pickle(group, seeds)
            one.refs |= frozenset(seeds)
            one.looked = looked
        before = table._known.get(group[0])
        if before is not None and before.names != group:
            before = None
        ids, stamp = tuple(map(id, values)), table._stamp(one.refs)
        if before is not None and before.stamp == stamp and before.print.is_of(one.segments):
            delivery, whole = before.delivery, before.print
        else:
            since = self._born(group, values, before)
            segments = () if there else placed(one.segments)
            head = {"names": group, "kinds": one.kinds}
            version = next(table._versions)
            born = tuple(version if known is None else known for known in since)
            delivery = Delivery(version, group, born, head, segments, one.shared, one.draws)
            whole = Print(one.segments, segments or None)
            table.drop(group)
            if there:
                table._there.update(dict.fromkeys(group, version))
            elif before is not None:
                _tell_of_large(delivery)
        looked = one.looked or _looked_at(values)
        table.keep(
            _Known(
                group,
                looked.look,
                looked.print_beside(one.segments, () if there else delivery.segments),
                whole,
                delivery,
                one.refs,
                one.uses,
                stamp,
                ids,
                values[0] if len(group) == 1 and (one.by_identity or looked.plain) else ABSENT,
                one.attributes,
                plain_function(values[0]) if len(group) == 1 else None,
                looked.failed,
            )
        )

    def _born(
        self, group: tuple[str, ...], values: Sequence[object], before: _Known | None
    ) -> list[int | None]:
        """Return since which version workers have each object; ``None`` is the next one."""
        table, born = self._names, list[int | None]()
        before_ids = (0,) * len(group) if before is None else before.ids
        for name, value, was in zip(group, values, before_ids, strict=True):
            if not _stays(value):
                born.append(None)
            elif was == id(value):
                born.append(table._born(name))
            else:
                # What the script has made in a worker is filled there, whatever refers to it.
                born.append(0 if table.main and name not in table._known else None)
        return born


@dataclass(slots=True)
class _Looked:
    """What values were just before they were pickled.

    Attributes:
        look: What identity tells.
        printed: The pickle of what is in doubt; ``None`` if there is nothing.
        replaced: That pickle is for comparing only.
        failed: It cannot be made, as it was pickled in other company.
        plain: There is one value, and identity tells all.
    """

    look: Look
    printed: list[bytes | memoryview] | None = None
    replaced: bool = False
    failed: bool = False
    plain: bool = False

    def print_beside(
        self, pickled: Sequence[bytes | memoryview], stored: Sequence[Segment]
    ) -> Print | None:
        """Return the print of what is in doubt.

        Args:
            pickled: The pickle of the values themselves.
            stored: The same as it is kept for workers: its buffers are not kept twice.
        """
        if self.printed is None:
            return None
        same = [*map(length, self.printed[1:])] == [*map(length, pickled[1:])]
        return Print(self.printed, stored if stored and same and not self.replaced else None)


def _looked_at(values: Sequence[object]) -> _Looked:
    if len(values) == 1 and is_plain(values[0]):
        return _Looked(Look(), plain=True)
    looked = _Looked(Look(*values))
    if looked.look.doubts:
        try:
            looked.printed, looked.replaced = print_of(looked.look.doubts)
        except Exception:  # noqa: BLE001 -- user code; the pickle of the whole tells, or raises
            looked.failed = True
    looked.look.forget_doubts()
    return looked


def _pickle(group: tuple[str, ...], seeds: Mapping[str, object]) -> _Pickled:
    """Pickle the values of some names together.

    Args:
        group: The names.
        seeds: What is referred to by its name, because workers have it.
    """

    def attempt() -> _Pickled:
        values: list[object] = []
        kinds: list[type | None] = []
        own: dict[str, object] = {}
        for name in group:
            value: Any = _value_of(name)
            kind = type(value)
            elsewhere = [*own.values(), *seeds.values()]
            if kind in _CONTAINERS and not any(value is other for other in elsewhere):
                own[name] = value
                kinds.append(kind)
                values.append(kind(value))
            else:
                kinds.append(None)
                values.append(value)
        by_value = any(map(_is_of_script, values))
        with Met(group, {**own, **seeds}, keeps_memo=True) as met, Collected() as shared:
            segments = payloads.dumps(tuple(values), into_main=True, by_value=by_value)
        held: dict[int, object] = {}
        draws = any(map(_is_generator, values))
        if len(met.memo) < _MOST_MET:
            found = [value for _, value in met.memo.values()]
            held = {id(value): value for value in found if _can_be_shared(value)}
            draws = draws or any(map(_is_generator, found))
        met.refs.difference_update(group)
        refs, uses = frozenset(met.refs), frozenset(met.uses)
        one = _Pickled(group, tuple(kinds), segments, refs, uses, shared.found, held)
        one.draws = draws
        return one

    return steadily(attempt)


def _together(pickled: Mapping[str, _Pickled]) -> list[tuple[str, ...]]:
    """Return which names are to be pickled together, what is referred to first."""
    parents = {name: name for name in pickled}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    # What two of them hold is to be one object.
    holders: dict[int, str] = {}
    for name, one in pickled.items():
        for held in one.held:
            other = holders.setdefault(held, name)
            parents[root(name)] = root(other)
    # And so are those that refer to each other in a circle.
    edges: dict[str, list[str]] = {root(name): [] for name in pickled}
    for name, one in pickled.items():
        edges[root(name)] += [root(ref) for ref in sorted(one.refs) if ref in pickled]
    groups: dict[str, list[str]] = {top: [] for top in edges}
    for name in pickled:
        groups[root(name)].append(name)
    circles = components(edges)
    return [tuple(sorted(name for top in circle for name in groups[top])) for circle in circles]


def _value_of(name: str) -> Any:
    """Return what the script has under a name, or a function or class of it under a path."""
    if "." not in name:
        return main_space().get(name, ABSENT)
    found = find_attribute(name)
    return found[0] if found else ABSENT


def _definitions() -> list[str]:
    """Return the names of the script's functions and classes."""
    return [
        name
        for name, value in list(main_space().items())
        if is_definition(value) and not is_importable(value) and not name.startswith("__")
    ]


def _data_by_id() -> dict[int, str]:
    """Return by ``id()`` what may change and is held by a global."""
    return {
        id(value): name
        for name, value in reversed(list(main_space().items()))
        if _can_be_shared(value) and name not in _OF_ANY_MODULE
    }


def _can_be_shared(value: object) -> bool:
    """Tell whether it matters that two names hold this very object."""
    kind = type(value)
    if kind in _CONTAINERS or kind is types.CellType:
        return True
    # By its type: an object that imports something late does so when it is asked for more.
    if issubclass(kind, types.ModuleType) or is_definition(value):
        return False
    numpy: Any = sys.modules.get("numpy")
    # Of any class that Python code has made: it may be a sentinel.
    return bool(kind.__flags__ & _HEAP) or (numpy is not None and isinstance(value, numpy.ndarray))


# By module and name, so that nothing is imported to find out.
_GENERATORS = frozenset(
    {
        ("numpy.random._generator", "Generator"),
        ("numpy.random.mtrand", "RandomState"),
        ("torch._C", "Generator"),
    }
)


def _is_generator(value: object) -> bool:
    """Tell whether this draws random numbers, and a copy of it draws the same."""
    kind = type(value)
    if kind is random.Random or (kind.__module__, kind.__qualname__) in _GENERATORS:
        return True
    return issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom)


# How often a large global has changed.
_changes: Counter[tuple[str, ...]] = Counter()


def _tell_of_large(delivery: Delivery) -> None:
    """Say once that a large global is sent again and again."""
    if delivery.size_bytes < _MUCH_BYTES:
        return
    names = ", ".join(delivery.names)
    _changes[delivery.names] += 1
    if _changes[delivery.names] == _TOLD_AT:
        tell_once(
            f"the global {names} of the script ({delivery.size_bytes >> 20} MiB) is changed "
            f"between calls and sent to every worker again, {_TOLD_AT} times by now. Only a "
            "global that has changed is sent: keep what changes in one of its own, or pass it as "
            "an argument",
            subject=f"{names} is sent again",
        )


def _stays(value: object) -> bool:
    """Tell whether a worker has the same object when what it holds arrives anew."""
    return type(value) in _CONTAINERS or issubclass(type(value), (type, LRU_CACHE))


def _is_of_script(value: object) -> bool:
    if issubclass(type(value), types.ModuleType):
        return True  # the standard pickler would ask it for more, and may so import it
    return is_definition(value) and not is_importable(value)
