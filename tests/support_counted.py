"""Classes whose methods for pickling note that they were called, for programs of tests.

A program has the classes of this module, and by ``exec(SOURCE, globals())`` its own ones of the
same names.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

calls: list[str] = []
_interned: dict[object, Any] = {}


def note(thing: object, method: str) -> None:
    """Note a call of a method of an object's class."""
    calls.append(f"{type(thing).__name__}{getattr(thing, 'mark', '')}.{method}")


def the_one(kind: Any, mark: object, make: Callable[[Any], Any]) -> Any:
    """Return the only object of a class with this mark."""
    if (kind, mark) not in _interned:
        _interned[kind, mark] = make(kind)
        _interned[kind, mark].mark = mark
    return _interned[kind, mark]


def take_calls() -> list[str]:
    """Return the calls that this process has noted, and forget them."""
    taken = calls[:]
    calls.clear()
    return taken


SOURCE = """
import copyreg
import dataclasses
import enum

from support_counted import note, the_one


class Reduced:
    def __init__(self, mark, *parts):
        self.mark = mark
        self.parts = parts
        note(self, "__init__")

    def __reduce__(self):
        note(self, "__reduce__")
        return type(self), (self.mark, *self.parts)

    def method(self, *_):
        return None

    __call__ = method


class Stated:
    def __init__(self, mark, *parts):
        self.mark = mark
        self.parts = parts

    def __getstate__(self):
        note(self, "__getstate__")
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)
        note(self, "__setstate__")


class Refilled(dict):
    mark = 0

    def __reduce_ex__(self, protocol):
        note(self, "__reduce_ex__")
        return type(self), (), self.__dict__, None, self._pairs()

    def _pairs(self):
        for pair in self.items():
            note(self, "next pair")
            yield pair


class Registered:
    def __init__(self, mark, *parts):
        self.mark = mark
        self.parts = parts


def reduce_registered(one):
    note(one, "copyreg")
    return Registered, (one.mark, *one.parts)


copyreg.pickle(Registered, reduce_registered)


class Interned:
    def __new__(cls, mark):
        made = the_one(cls, mark, super().__new__)
        note(made, "__new__")
        return made

    def __getnewargs__(self):
        note(self, "__getnewargs__")
        return (self.mark,)

    def __getstate__(self):
        note(self, "__getstate__")


class Single:
    def __reduce__(self):
        note(self, "__reduce__")
        return "ONLY"


ONLY = Single()


class Colour(enum.Enum):
    RED = 1

    def __reduce_ex__(self, protocol):
        note(self, "__reduce_ex__")
        return Colour, (self.value,)


@dataclasses.dataclass(slots=True)
class Slotted:
    mark: int
    parts: tuple = ()

    def __getstate__(self):
        note(self, "__getstate__")
        return self.mark, self.parts

    def __setstate__(self, state):
        self.mark, self.parts = state
        note(self, "__setstate__")


class ReducedError(Exception):
    mark = "e"

    def __init__(self, *parts):
        super().__init__(*parts)

    def __reduce__(self):
        note(self, "__reduce__")
        return type(self), self.args


class Failing:
    mark = 0

    def __reduce__(self):
        note(self, "__reduce__")
        raise ZeroDivisionError("not for others")


class Refusing:
    mark = 0

    def __reduce__(self):
        note(self, "__reduce__")
        raise TypeError("cannot pickle this one")
"""

exec(SOURCE, globals())


# By the name of a shape: a value with objects of a class of a module's, and of the script's class
# of the same name. The mark tells the objects apart.
SHAPES: dict[str, Callable[[Any, Any, int, Any], object]] = {
    "of a module": lambda there, _, mark, __: there(mark),
    "of the script": lambda _, here, mark, __: here(mark),
    "mixed": lambda there, here, mark, _: [
        there(mark),
        here(mark),
        there(-mark),
        {1: here(-mark)},
    ],
    "only nested": lambda there, _, mark, __: [{1: (there(mark),)}, [there(-mark)]],
    "beside a function": lambda there, _, mark, function: [there(mark), function, there(-mark)],
    "beside object()": lambda there, _, mark, __: [there(mark), object(), there(-mark)],
    "beside a text": lambda there, _, mark, __: (there(mark), "__main__", there(-mark)),
    "beside a lock": lambda there, here, mark, _: [there(mark), here(mark), threading.Lock()],
    "in each other": lambda there, here, mark, _: there(mark, here(-mark, there(0))),
}


def build(shape: str, there: Any, here: Any, mark: int, function: Any) -> object:
    """Make a value, in the program or in a worker."""
    return SHAPES[shape](there, here, mark, function)


def throw(*arguments: Any) -> None:
    """Raise an error that has a value."""
    raise ValueError(build(*arguments))


def deep(bottom: object) -> object:
    """Make a value that is nested deeper than any pickler goes."""
    for _ in range(100_000):
        bottom = [bottom]
    return bottom


def begin(value: object) -> None:
    """Begin a worker that has got a value."""
