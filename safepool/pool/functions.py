"""Functions that are sent to a worker once and called by number from then on."""

from __future__ import annotations

import itertools
import pickle
import sys
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safepool.transport import payloads
from safepool.transport.channel import store_large
from safepool.transport.references import Collected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.transport.frames import Segment
    from safepool.transport.sharing import Shared

__all__ = ["Functions", "SentFunction"]

# Each is kept alive, and in every worker; a program that makes functions without end sends
# the later ones with each call.
_MOST = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SentFunction:
    """A function that workers keep.

    Attributes:
        number: What it is called by, at least 1.
        segments: Its pickle.
        lasting: Kept as long as the pool; another is forgotten with its ``map``.
        shared: What it refers to.
    """

    number: int
    segments: Sequence[Segment] = field(repr=False)
    lasting: bool
    shared: Sequence[Shared[Any]] = field(default=(), repr=False)


class Functions:
    """The functions of one pool."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._importable: dict[Callable[..., Any], SentFunction] = {}

    def importable(self, function: Callable[..., Any]) -> SentFunction | None:
        """Return a module's own function, pickled once; ``None`` for any other callable."""
        if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
            return None
        sent = self._importable.get(function)
        if sent is None and len(self._importable) < _MOST and _is_importable(function):
            pickled = pickle.dumps(function, protocol=5)
            sent = SentFunction(next(self._numbers), [pickled], lasting=True)
            self._importable[function] = sent
        return sent

    def once(self, function: Callable[..., Any], *, of_main: bool) -> SentFunction:
        """Return any callable, pickled now and for one ``map``.

        Raises:
            Exception: What the pickler raised.
        """
        sent = self.importable(function)
        if sent is None:
            with Collected() as met:
                segments = payloads.dumps(function, into_main=True, by_value=of_main)
            number = next(self._numbers)
            sent = SentFunction(number, store_large(segments), lasting=False, shared=met.found)
        return sent


def _is_importable(function: types.FunctionType | types.BuiltinFunctionType) -> bool:
    module, name = getattr(function, "__module__", None), function.__qualname__
    if module is None or module == "__main__" or payloads.by_value_modules():
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is function
