"""Values of the script's names, pickled alone or with those that share objects with them."""

from __future__ import annotations

import enum
import pickle
import random
import sys
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass
from safepool.pool.calls.mains import (
    ABSENT,
    Look,
    PlainFunction,
    is_definition,
    is_importable,
    is_plain,
    plain_function,
)
from safepool.pool.calls.prints import Print, print_of, steadily
from safepool.transport import payloads
from safepool.transport.channel import size_of
from safepool.transport.marks import find_attribute, is_of_python, main_space
from safepool.transport.names import Met
from safepool.transport.references import Collected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safepool.transport.additions import Addition
    from safepool.transport.frames import Segment
    from safepool.transport.marks import Attributes
    from safepool.transport.sharing import Shared

# Objects in a pickle. A larger pickle is not searched for common objects.
_MOST_MET = 200_000
# A pickle that the scheduler's thread does not make.
_LARGE_BYTES = 16 * 1024
# Types whose objects keep their identity in a worker when their content has changed.
CONTAINERS = frozenset({dict, list, set, bytearray})
# Names of the worker's own module.
OF_ANY_MODULE = frozenset({"__name__", "__package__", "__builtins__", "__spec__", "__loader__"})


@dataclass(slots=True, eq=False, repr=False)
class Pickled:
    """Names as they were just pickled.

    Attributes:
        kinds: By name, the type of a container whose content is pickled, or ``None``.
        there: Whether workers have the value by themselves, unchanged.
        held: By ``id()``, objects that another name may hold as well. Objects made for the pickle
            are kept, so that their id() is not used again.
    """

    names: tuple[str, ...]
    looked: Looked
    kinds: tuple[type | None, ...] = (None,)
    segments: Sequence[bytes | memoryview] = (b"",)
    refs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    shared: Sequence[Shared[Any]] = ()
    held: dict[int, object] = field(default_factory=dict)
    there: bool = False
    draws: bool = False
    attributes: Attributes | None = None


@dataclass(slots=True, eq=False, repr=False)
class Looked:
    """State of values just before they were pickled: later changes are noticed with the next call.

    Attributes:
        short: The look at a function, if a short one will do.
        printed: Pickle of the objects in doubt; ``None`` without such objects.
        replaced: ``True`` if ``printed`` is only for comparison.
        failed: ``True`` if that pickle is impossible, because the value was pickled together with
            others.
        plain: ``True`` for a single value whose identity is enough.
    """

    values: Sequence[object]
    look: Look
    short: PlainFunction | None = None
    printed: list[bytes | memoryview] | None = None
    replaced: bool = False
    failed: bool = False
    plain: bool = False

    @property
    def is_large(self) -> bool:
        """Whether the objects in doubt are large."""
        printed = self.printed
        return printed is not None and (len(printed) > 1 or len(printed[0]) > _LARGE_BYTES)

    def print_beside(
        self, pickled: Sequence[bytes | memoryview], stored: Sequence[Segment]
    ) -> Print | None:
        """Return the print of the objects in doubt."""
        if self.printed is None:
            return None
        same = [*map(size_of, self.printed[1:])] == [*map(size_of, pickled[1:])]
        return Print(self.printed, stored if stored and same and not self.replaced else None)


def look_at(values: Sequence[object], *, by_identity: bool = False) -> Looked:
    """Look at values that are about to be pickled.

    ``by_identity`` is for an object that workers have of their own: only another is a change.
    """
    if by_identity or (len(values) == 1 and is_plain(values[0])):
        return Looked(values, Look(), plain=True)
    short = plain_function(values[0]) if len(values) == 1 else None
    looked = Looked(values, Look(*values), short)
    if looked.look.doubts:
        try:
            looked.printed, looked.replaced = print_of(looked.look.doubts)
        except Exception as error:  # noqa: BLE001 -- user code; the pickle of the whole tells, or raises
            let_handlers_pass(error)
            looked.failed = True
    looked.look.forget_doubts()
    return looked


def pickle_names(group: tuple[str, ...], seeds: Mapping[str, object], looked: Looked) -> Pickled:
    """Pickle the values of some names together, after a look at them."""

    def attempt() -> Pickled:
        values: list[object] = []
        kinds: list[type | None] = []
        own: dict[str, object] = {}
        for name in group:
            value: Any = value_of(name)
            kind = type(value)
            elsewhere = [*own.values(), *seeds.values()]
            if kind in CONTAINERS and not any(value is other for other in elsewhere):
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
            held = {id(value): value for value in found if can_be_shared(value)}
            draws = draws or any(map(_is_generator, found))
        met.refs.difference_update(group)
        refs, uses, one = frozenset(met.refs), frozenset(met.uses), tuple(kinds)
        return Pickled(group, looked, one, segments, refs, uses, shared.found, held, draws=draws)

    return steadily(attempt)


def pickle_additions(
    additions: Mapping[int, Addition],
) -> tuple[bytes, frozenset[str], Sequence[Shared[Any]]]:
    """Pickle each of the script's changes to modules separately; leave out changes that fail.

    The numbers let a worker make each change once. Returns the pickle, the names that the changes
    refer to, and their shared objects.
    """
    named = data_by_id()
    pickles: dict[int, list[bytes]] = {}
    names: set[str] = set()
    with Collected() as shared:
        for number, one in additions.items():
            name = named.get(id(one.value))
            seeds = {} if name is None else {name: one.value}
            try:
                with Met(seeds=seeds) as met:
                    made = payloads.dumps(tuple(one), into_main=True, by_value=True)
            except Exception as error:  # noqa: BLE001 -- user code
                let_handlers_pass(error)
                continue
            pickles[number] = [*map(bytes, made)]
            names |= met.names | seeds.keys()
    return pickle.dumps(pickles, protocol=5), frozenset(names), shared.found


def value_of(name: str) -> Any:
    """Return the script's object of a name, or a function or class at a path below it."""
    if "." not in name:
        return main_space().get(name, ABSENT)
    found = find_attribute(name)
    return found[0] if found else ABSENT


def definitions() -> list[str]:
    """Return the names of the script's functions and classes."""
    return [
        name
        for name, value in list(main_space().items())
        if is_definition(value) and not is_importable(value) and name not in OF_ANY_MODULE
    ]


def data_by_id() -> dict[int, str]:
    """Return by ``id()`` what may change and is held by a global."""
    return {
        id(value): name
        for name, value in reversed(list(main_space().items()))
        if can_be_shared(value) and name not in OF_ANY_MODULE
    }


def can_be_shared(value: object) -> bool:
    """Tell whether it matters that two names hold this very object."""
    kind = type(value)
    if kind in CONTAINERS or kind is types.CellType:
        return True
    # The type is compared: an object with lazy imports imports something when its attributes are
    # read.
    if issubclass(kind, (types.ModuleType, enum.Enum)) or is_definition(value):
        return False
    home = str(kind.__module__).partition(".")[0]
    if home == "numpy":
        return isinstance(value, sys.modules["numpy"].ndarray)  # not their types
    # Of any class that Python code has made: it may be a sentinel.
    return is_of_python(kind) and home not in _UNCHANGED


# Types whose objects never change, or are pickled as names.
_UNCHANGED = frozenset(
    {"datetime", "decimal", "fractions", "ipaddress", "logging", "pathlib", "re"}
    | {"uuid", "zoneinfo"}
)


# By module and name, so that nothing is imported to find out.
_GENERATORS = frozenset(
    {("numpy.random._generator", "Generator"), ("numpy.random.mtrand", "RandomState")}
    | {("torch._C", "Generator")}
)


def _is_generator(value: object) -> bool:
    """Return whether this draws random numbers, and a copy repeats the draws."""
    kind = type(value)
    if kind is random.Random or (kind.__module__, kind.__qualname__) in _GENERATORS:
        return True
    return issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom)


def _is_of_script(value: object) -> bool:
    if issubclass(type(value), types.ModuleType):
        return True  # the standard pickler would ask it for more, and may so import it
    return is_definition(value) and not is_importable(value)
