"""Weak containers and references, which arrive together with their objects.

    an object in a container       sent with the container
    a global that keeps the        sent too, so that both have one object: the container holds it
    object alive                   weakly, as in the program
    an object that something       kept alive by the arrived container, as long as that lives
    else keeps alive

A reference (``weakref.ref``, ``WeakMethod``) keeps nothing alive: it arrives dead if nothing else
in the worker holds its object.

Not covered:
    * Callbacks of references.
    * An object shared with a global that was delivered before the container was needed.
"""

from __future__ import annotations

import collections
import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from safepool.transport.marks import PLAIN, is_of_python, main_space, own_dict
from safepool.transport.names import met

KINDS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
"""Containers of the standard library."""

_KEPT = "_kept_by_safepool"
_INTERNAL = {kind: frozenset({*vars(kind()), _KEPT}) for kind in KINDS}
# Depth of the search in globals for an object that keeps another alive, and the most objects.
_MOST_DEEP = 3
_MOST_LOOKED_AT = 20_000


def containers() -> dict[type, Callable[[Any], Any]]:
    """Return the reducers of containers."""
    return dict.fromkeys(KINDS, reduce_container)


def references() -> dict[type, Callable[[Any], Any]]:
    """Return the reducers of references."""
    return {weakref.ref: _reduce_reference, weakref.WeakMethod: _reduce_reference}


def reduce_container(weak: Any) -> tuple[Any, ...]:
    """Return how to make a container again."""
    base = next(kind for kind in KINDS if isinstance(weak, kind))
    if base is weakref.WeakSet:
        content: Any = list(weak)
    else:
        content = dict(weak.items())  # pyright: ignore[reportAttributeAccessIssue]
    items = content.values() if base is weakref.WeakValueDictionary else content
    kept = _not_held(items)
    own = {name: value for name, value in vars(weak).items() if name not in _INTERNAL[base]}
    # As a state: its content may refer to the container.
    return _make, (type(weak), base), (content, kept, own), None, None, _fill


def _make(kind: Any, base: Any) -> Any:
    made = kind.__new__(kind)
    base.__init__(made)
    return made


def _fill(weak: Any, state: tuple[Any, list[object], dict[str, object]]) -> None:
    content, kept, own = state
    vars(weak).update(own)
    if kept:
        vars(weak)[_KEPT] = kept
    weak.update(content)


def _reduce_reference(reference: Any) -> tuple[Any, ...]:
    target = reference()
    if target is None:
        return _dead, (type(reference),)
    _not_held([getattr(target, "__self__", target)])
    return type(reference), (target,)


class _Gone:
    def method(self) -> None:
        """Nothing: the reference is to be dead."""


def _dead(kind: Any) -> Any:
    gone = _Gone()
    return kind(gone.method if kind is weakref.WeakMethod else gone)


def _not_held(things: Iterable[object]) -> list[object]:
    """Return what no global keeps alive that is pickled now, and ask for those that would."""
    script = met()
    if script is None or not script.own:
        return [*things]
    names = _holders(things)
    script.refs.update({*names.values()} - {*script.own})
    by_name = {*map(id, script.seeds.values())}
    return [one for one in things if not (names.get(id(one)) in script.own or id(one) in by_name)]


def _holders(things: Iterable[object]) -> dict[int, str]:
    """Return the name of a global that keeps an object alive, by the object's ``id()``."""
    wanted = {*map(id, things)}
    found: dict[int, str] = {}
    level = [(name, value) for name, value in main_space().copy().items() if name[:2] != "__"]
    seen: set[int] = set()
    for _ in range(_MOST_DEEP + 1):
        below: list[tuple[str, object]] = []
        for name, value in level:
            if id(value) in wanted:
                found.setdefault(id(value), name)
            if id(value) not in seen:
                seen.add(id(value))
                room = _MOST_LOOKED_AT - len(seen) - len(below)
                below += ((name, part) for part in itertools.islice(_held_by(value), max(room, 0)))
        level = below
        if not level or len(found) == len(wanted):
            break
    return found


def _held_by(value: Any) -> Iterator[object]:
    kind = type(value)
    if issubclass(kind, (types.ModuleType, *KINDS)) or kind in _HOLD_NOTHING:
        return
    if kind in (list, tuple, set, frozenset, collections.deque):
        yield from value.copy() if hasattr(value, "copy") else value
    elif kind in (dict, collections.defaultdict, collections.OrderedDict):
        yield from value.copy().keys()
        yield from value.copy().values()
    elif issubclass(kind, type) or is_of_python(kind):
        yield from [*own_dict(value).values()]


_HOLD_NOTHING = PLAIN | {types.FunctionType}
