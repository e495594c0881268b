"""Walk from the names of a call to all objects that they refer to; new ones are pickled."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

from safepool.errors import let_handlers_pass, text_of
from safepool.machine import tell_once
from safepool.pool.calls.deliveries import Delivery, versions
from safepool.pool.calls.known import BY_CONTENT, Known
from safepool.pool.calls.mains import (
    ABSENT,
    is_data,
    is_definition,
    is_importable,
    runs_no_code,
    uses_of,
)
from safepool.pool.calls.prints import Print, placed
from safepool.pool.calls.values import (
    CONTAINERS,
    OF_ANY_MODULE,
    Pickled,
    can_be_shared,
    data_by_id,
    definitions,
    look_at,
    pickle_names,
    value_of,
)
from safepool.pool.hands import LateError, within
from safepool.transport.channel import size_of
from safepool.transport.held import Held, held_by_module
from safepool.transport.marks import LRU_CACHE, Attributes, attribute_of, is_of_main, main_space
from safepool.transport.names import mentioned_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from safepool.pool.calls.table import Table

_N = TypeVar("_N")

QUIET_BYTES = 1 << 20
"""A function or class that nothing names is sent in case it is asked for, unless it is larger."""

# Time that the pickling of objects without a name may wait for something.
UNASKED_S = 1.0
_TOO_LONG = "no called function uses the name, and its pickling waited without using the processor"
# Code that names one of these may ask for any name of the script.
_REACHES_ALL = frozenset({"globals", "vars", "eval", "exec"})
# A global is worth a word when it is sent again and again; it takes tens of milliseconds.
_MUCH_BYTES = 16 << 20
_TOLD_AT = 3


class Walk:
    """A walk over names of the script, and over all objects that they refer to.

    The table is a draft, which gets the new entries. ``quiet`` leaves out objects that cannot be
    pickled, and does not follow names in functions.
    """

    def __init__(self, table: Table, *, quiet: bool = False) -> None:
        self._table = table
        self._quiet = quiet
        # Nobody has asked for what is being pickled: it is only in case somebody does.
        self._unasked = quiet
        self._patience_s = UNASKED_S
        self._pickled: dict[str, Pickled] = {}
        self._by_id: dict[int, str] | None = None
        self.reached: dict[str, None] = {}
        self.absent: list[str] = []
        self.missing: dict[str, str] = {}

    def go(self, roots: Iterable[str]) -> None:
        """Look at the names, and pickle those that have changed or are new."""
        if self._table.main:
            self._ask_ahead(roots)
        todo = sorted(roots, reverse=True)
        while todo:
            name = todo.pop()
            if name in self.reached or name in self.absent or name in OF_ANY_MODULE:
                continue
            known = self._table.known.get(name)
            # A path was there, or is: a worker is told that it is not.
            if known is None and "." not in name and value_of(name) is ABSENT:
                self.absent.append(name)
                continue
            if known is not None and self._table.is_unchanged(known):
                self.reached.update(dict.fromkeys(known.names))
                todo += self._leads_on(name, known)
                continue
            try:
                one = self._pickled[name] = self._own(name) or self._made(name)
            except Exception as error:
                if not self._quiet:
                    raise
                let_handlers_pass(error)
                self.missing[name] = f"{type(error).__name__}: {text_of(error)}"
                continue
            if self._quiet and sum(map(size_of, one.segments)) > QUIET_BYTES:
                del self._pickled[name]
                self.missing[name] = (
                    f"no called function uses the name, and its pickle exceeds {QUIET_BYTES} bytes"
                )
                continue
            self.reached[name] = None
            todo += self._leads_on(name, one)
            todo += known.names if known is not None else ()

    def _ask_ahead(self, roots: Iterable[str]) -> None:
        """Request the prints of all data at once, from the place where the script was run."""
        known, main = self._table.known, self._table.main
        assert main is not None
        data: list[str] = []
        seen: set[str] = set()
        todo = list(roots)
        while todo:
            name = todo.pop()
            value = value_of(name)
            if name in seen or name in known or value is ABSENT or name in OF_ANY_MODULE:
                continue
            seen.add(name)
            if not is_definition(value):
                data.append(name)
            elif not (is_importable(value) or self._quiet):
                todo += uses_of(value)
                todo += Attributes(value).by_path
        main.ask(data)

    def _leads_on(self, name: str, one: Known | Pickled) -> Iterable[str]:
        if self._quiet and not isinstance(value_of(name), type):
            return one.refs
        # Code of a class may run when it is made.
        return one.refs | one.uses | frozenset(one.names)

    def finish(self) -> None:
        """Add the pickled objects to the table."""
        if not self._quiet and not _REACHES_ALL.isdisjoint(self.absent):
            everything = Walk(self._table, quiet=True)
            everything.go(definitions())
            everything.finish()
            uses = {
                used
                for name in everything.reached
                if (known := self._table.known.get(name)) is not None
                for used in known.uses
            }
            for name in everything.reached:
                named = uses_of(value_of(name), mentioned_in)
                uses |= {one for one in named if one in main_space()}
            self.go_if_possible(uses)
        while self._pickled:
            for group in _together(self._pickled):
                self._make_known(group)
            # An object that refers to a replaced object must refer to the new one.
            behind = [name for name in self.reached if self._is_behind(name)]
            behind = behind or self._in_circles()
            if not behind:
                return
            # Beside those: in case they refer to each other now.
            self._pickled |= {name: self._alone(name, value_of(name)) for name in behind}

    def _is_behind(self, name: str) -> bool:
        known = self._table.known.get(name)
        return known is not None and known.stamp != self._table.stamp(known.refs)

    def _in_circles(self) -> list[str]:
        """Return names of which each refers to the next since one has changed, pickled apart."""
        known = entries(self._table, self.reached)
        edges = {one: linked(known, one, one.refs) for one in known.values()}
        circles = [circle for circle in components(edges) if len(circle) > 1]
        return [name for circle in circles for one in circle for name in one.names]

    def go_if_possible(self, names: Iterable[str]) -> None:
        """Look at names that may never be requested."""
        for name in sorted(names):
            self._unasked = True
            try:
                self.go([name])
            except Exception as error:  # noqa: BLE001 -- user code
                let_handlers_pass(error)
                self._pickled.pop(name, None)
            self._unasked = self._quiet

    def _made(self, name: str) -> Pickled:
        """Return a name as it is pickled, by the program's code."""
        value, slow = value_of(name), self._table.slow

        def make() -> Pickled:
            return self._there(name, value) or self._alone(name, value)

        if not self._unasked or runs_no_code(value) or is_data(value):
            return make()
        # An object that waits in there must not delay the call.
        if name in slow and slow[name] is value:
            raise TimeoutError(_TOO_LONG)
        try:
            return within(self._patience_s, make)
        except LateError:
            self._patience_s = UNASKED_S / 10  # one second in all, more or less
            slow[name] = value
            raise TimeoutError(_TOO_LONG) from None

    def _own(self, name: str) -> Pickled | None:
        """Return a function or class that workers have from their own run, by name."""
        main, value = self._table.main, value_of(name)
        if not main or not is_definition(value):
            return None
        if attribute_of(value, "__qualname__") != name or not main.has(value):
            return None
        attributes, known = Attributes(value), self._table.known.get(name)
        if known is not None and known.delivery.segments:
            return None
        # Each attribute is delivered by its path, also that it is gone: the class stays the same.
        now, attributes_before = attributes.by_path, None if known is None else known.attributes
        before = {} if attributes_before is None else attributes_before.by_path
        own = {path: one for path, one in now.items() if one is not None}
        if known is None:
            gone = {one for one in main.inside(name) if one not in now and value_of(one) is ABSENT}
            changed = main.others_at(own)
        else:
            gone = before.keys() - now.keys()
            changed = {path for path, one in own.items() if before.get(path) is not one}
            changed |= {path for path in known.uses if "." in path}
        uses = uses_of(value).union(gone, now.keys() - own.keys(), changed, _above(value))
        looked = look_at([value], by_identity=True)
        return Pickled((name,), looked, uses=uses, there=True, attributes=attributes)

    def _there(self, name: str, value: object) -> Pickled | None:
        """Return a name that workers have from their own run; ``None`` if it must be sent."""
        main = self._table.main
        if not main or name in self._table.known or value is ABSENT:
            return None
        if main.changed({name: value}):
            return None
        try:
            one = self._alone(name, value)
        except Exception as error:  # noqa: BLE001 -- the worker then keeps its own object
            let_handlers_pass(error)
            one = Pickled((name,), look_at([value], by_identity=True))
        one.there = True
        return one

    def _alone(self, name: str, value: object) -> Pickled:
        place = held_by_module(name, value)
        if place is not None:
            pickled = pickle.dumps((Held(place, value),), protocol=5)
            return Pickled((name,), look_at([value], by_identity=True), segments=[pickled])
        if self._by_id is None:
            self._by_id = data_by_id()
        one = pickle_names((name,), {}, look_at([value]))
        others = {self._by_id[number] for number in one.held if number in self._by_id}
        one.refs |= others - {name}
        for number in self._by_id.keys() & one.held.keys():
            del one.held[number]
        if can_be_shared(value):
            one.held[id(value)] = value  # which another name may hold as well
        return one

    def _make_known(self, group: tuple[str, ...]) -> None:
        table, pickled = self._table, self._pickled
        first = group[0]
        seeds = {
            name: value_of(name)
            for member in group
            for name in pickled[member].refs
            if name not in group and can_be_shared(value_of(name))
        }
        one = pickled[first]
        looked = one.looked if len(group) == 1 else look_at([*map(value_of, group)])
        values = looked.values
        there = all(pickled[name].there for name in group)
        if len(group) > 1 or seeds:
            one = pickle_names(group, seeds, looked)
            one.refs |= frozenset(seeds)
        before = table.known.get(first)
        if before is not None and before.names != group:
            before = None
        ids, stamp = tuple(map(id, values)), table.stamp(one.refs)
        if before is not None and before.stamp == stamp and before.print.is_of(one.segments):
            delivery, whole = before.delivery, before.print
        else:
            since = self._born(group, values, before)
            segments = () if there else placed(one.segments)
            head = {"names": group, "kinds": one.kinds}
            version = next(versions)
            born = tuple(version if known is None else known for known in since)
            delivery = Delivery(version, group, born, head, segments, one.shared, one.draws)
            whole = Print(one.segments, segments or None)
            if before is not None and not there:
                _tell_of_large(delivery)
        table.keep(
            Known(
                group,
                looked.look,
                looked.print_beside(one.segments, () if there else delivery.segments),
                whole,
                delivery,
                one.refs,
                one.uses,
                stamp,
                ids,
                values[0] if looked.plain else BY_CONTENT,
                one.attributes,
                looked.short,
                looked.failed,
                looked.is_large,
            )
        )

    def _born(
        self, group: tuple[str, ...], values: Sequence[object], before: Known | None
    ) -> list[int | None]:
        """Return since which version workers have each object; ``None`` is the next one."""
        table, born = self._table, list[int | None]()
        before_ids = (0,) * len(group) if before is None else before.ids
        for name, value, was in zip(group, values, before_ids, strict=True):
            if not stays(value):
                born.append(None)
            elif was == id(value):
                born.append(table.born(name))
            else:
                # An object that the script has made in a worker keeps its identity and is filled
                # there.
                born.append(0 if table.main and name not in table.known else None)
        return born


def _above(value: object) -> Iterator[str]:
    """Yield the names of the script's classes that a class has its methods from."""
    if issubclass(type(value), type):
        for one in (*attribute_of(value, "__mro__"), type(value)):
            name = attribute_of(one, "__qualname__")
            if one is not value and is_of_main(one) and value_of(name) is one:
                yield name


def entries(table: Table, names: Iterable[str]) -> dict[str, Known]:
    """Return what the table has of these names."""
    return {name: table.known[name] for name in names if name in table.known}


def linked(known: Mapping[str, Known], one: Known, names: Iterable[str]) -> list[Known]:
    """Return what there is of some names besides one entry."""
    others = (known.get(name) for name in sorted(names))
    return [other for other in others if other is not None and other is not one]


def _together(pickled: Mapping[str, Pickled]) -> list[tuple[str, ...]]:
    """Return the groups of names to pickle together, dependencies first."""
    parents = {name: name for name in pickled}

    def root(name: str) -> str:
        while parents[name] != name:
            name = parents[name]
        return name

    # An object of two names must stay one object.
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


def components(edges: Mapping[_N, Sequence[_N]]) -> list[list[_N]]:
    """Return the nodes in cycles, each cycle after the cycles that it leads to.

    Source:
        R. Tarjan, Depth-first search and linear graph algorithms, 1972.

    Example:
        >>> components({"a": ["b"], "b": ["c"], "c": ["b"], "d": []})
        [['b', 'c'], ['a'], ['d']]
    """
    found: list[list[_N]] = []
    number: dict[_N, int] = {}
    lowest: dict[_N, int] = {}
    path: list[_N] = []
    done: set[_N] = set()
    for start in edges:
        todo = [] if start in number else [(start, iter(edges[start]))]
        while todo:
            node, others = todo[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                path.append(node)
            for other in others:
                if other not in number:
                    todo.append((other, iter(edges[other])))
                    break
                if other not in done:
                    lowest[node] = min(lowest[node], number[other])
            else:
                todo.pop()
                if todo:
                    above = todo[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == number[node]:
                    place = path.index(node)
                    found.append(path[place:])
                    done.update(path[place:])
                    del path[place:]
    return found


# Number of changes of each large global.
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
            f"between calls and sent to every worker again, {_TOLD_AT} times by now. Keep the "
            "part that changes in a global of its own, because only changed globals are sent, or "
            "pass it as an argument",
            subject=f"{names} is sent again",
        )


def stays(value: object) -> bool:
    """Return whether a worker keeps the same object when its content arrives again."""
    return type(value) in CONTAINERS or issubclass(type(value), (type, LRU_CACHE))
