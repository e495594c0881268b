"""Names of the script, which replace objects of the worker's ``__main__`` in a pickle.

    side      object                                                      in the pickle
    program   a function or class of the script, while a pool pickles     its name, ``Met.refs``
              the globals that a function's code names                    nothing, ``Met.uses``
              an object that a global of the script holds (``seeds``)     its name
    worker    the object that is bound to the name                        the name

A worker that was forked from the program sends the same names back for objects of both.

Hence every message of a pool can refer to the script's functions, classes and data, which the pool
sends separately and once (``pool.calls.names``). Outside of pools' messages, functions travel with
their globals.
"""

from __future__ import annotations

import dis
import functools
import struct
import threading
import types
from collections.abc import Collection, Mapping
from typing import Any, Self

from safepool.transport.marks import at_path, codes_in, find_attribute, is_of_main, main_space

_thread = threading.local()
_UINT = struct.Struct("<I")


@functools.lru_cache(maxsize=4096)
def names_of(code: types.CodeType) -> frozenset[str]:
    """Return the globals that code names; ``globals`` among them if it may ask for any."""
    names: set[str] = set()
    for inner in codes_in(code):
        names.update(one.argval for one in dis.get_instructions(inner) if one.opname in _GLOBALS)
        if {"modules", "__main__"}.intersection(inner.co_names) or "__main__" in inner.co_consts:
            names.add("globals")
    return frozenset(names)


@functools.lru_cache(maxsize=4096)
def mentioned_in(code: types.CodeType) -> frozenset[str]:
    """Return what code names as an attribute or has as a text: names that it may look up."""
    names: set[str] = set()
    for inner in codes_in(code):
        names.update(inner.co_names, (one for one in inner.co_consts if type(one) is str))
    return frozenset(names)


# The last is of an annotation in a class's body, from Python 3.14 on.
_GLOBALS = frozenset(
    {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
)


def met() -> Met | None:
    """Return what gathers names in this thread; ``None`` where functions bring their globals."""
    return getattr(_thread, "met", None)


class Met:
    """Gathers the names that a pickler of this thread meets, inside a ``with`` block.

    Args:
        own: Names whose functions and classes are pickled themselves.
        seeds: Objects of the script that are pickled as their names.
        prints: The pickle is compared and never loaded.

    Attributes:
        refs: Names that the pickle refers to: needed to load it.
        uses: Names that its functions may ask for when they are called.
        memo: Objects that the last pickler has met, by ``id()``; kept if ``keeps_memo`` is set.
    """

    def __init__(
        self,
        own: Collection[str] = (),
        seeds: Mapping[str, object] | None = None,
        *,
        prints: bool = False,
        keeps_memo: bool = False,
    ) -> None:
        self.own: Collection[str] = own
        self.seeds: Mapping[str, object] = seeds or {}
        self.prints: bool = prints
        self.keeps_memo: bool = keeps_memo
        self.replaced: bool = False
        self.refs: set[str] = set()
        self.uses: set[str] = set()
        self.memo: Mapping[int, tuple[int, object]] = {}
        self._held: frozenset[int] | None = None

    def __enter__(self) -> Self:
        self._before = met()
        _thread.met = self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.met = self._before

    @property
    def names(self) -> frozenset[str]:
        """Every name that a worker needs."""
        return frozenset(self.refs | self.uses)

    def path_of(self, thing: Any) -> str | None:
        """Return the dotted name of a function or class in the script; ``None``: pickle it."""
        here = main_space()
        path = getattr(thing, "__qualname__", "")
        root = path.partition(".")[0]
        if at_path(here, path) is not thing:
            if self._held is None:
                self._held = frozenset(map(id, list(here.values())))
            if id(thing) not in self._held:  # most lambdas, and functions made by a function
                return None
            others = (name for name, value in reversed(list(here.items())) if value is thing)
            path = root = next(others, "")
            if not root:
                return None
        if root in self.own or path in self.own:
            return None
        self.refs.add(root)
        return path

    def begin(self, pickler: Any, file: Any) -> None:
        """Prepare a pickler that has not pickled anything."""
        if not self.seeds:
            return
        # A pickle may begin with opcodes that fill the memo: the receiver looks up objects that
        # the pickler regards as pickled already. No callback for each object, as a persistent id
        # is.
        file.write(b"\x80\x05")
        for place, name in enumerate(self.seeds):
            text = name.encode()
            file.write(b"c" + f"{__name__}\n{of_script.__name__}\n".encode())
            file.write(b"(X" + _UINT.pack(len(text)) + text + b"tR")
            file.write(b"r" + _UINT.pack(place) + b"0")
        seeds = enumerate(self.seeds.values())
        pickler.memo = {id(value): (place, value) for place, value in seeds}

    def end(self, pickler: Any) -> None:
        """Collect the names that a finished pickler has met."""
        if self.keeps_memo:
            self.memo = pickler.memo.copy()


def of_script(path: str) -> Any:
    """Return the object at a dotted name of the script's ``__main__``. Pickles call this."""
    root, _, rest = path.partition(".")
    try:
        found = main_space()[root]
    except KeyError:
        raise NameError(f"name {root!r} is not defined in __main__", name=root) from None
    try:
        for part in rest.split(".") if rest else ():
            found = getattr(found, part)
    except AttributeError:
        way = find_attribute(path)  # through a descriptor
        if not way:
            raise
        (found,) = way
    return found


# Functions and classes that this process has from the program it was forked from.
_born_with: dict[str, Any] = {}


def be_fork() -> None:
    """From now on send objects that the program has in its script by name, too."""
    kinds = types.FunctionType, type
    here = main_space().items()
    _born_with.update({name: value for name, value in here if issubclass(type(value), kinds)})


def reduce_by_program(thing: Any) -> tuple[Any, ...] | None:
    """Reduce a function or class that the program has under its name; ``None`` for others."""
    kind = type(thing)
    if not _born_with or not issubclass(kind, (types.FunctionType, type)) or not is_of_main(thing):
        return None
    path: str = thing.__qualname__
    return (of_script, (path,)) if at_path(_born_with, path) is thing else None


class OfScript:
    """Value of the script's ``__main__`` under a name, on its way to a worker."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return of_script, (self._name,)
