"""Functions that are sent to a worker once and called by number from then on."""

from __future__ import annotations

import itertools
import pickle
import types
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safepool.errors import let_handlers_pass
from safepool.pool.calls.mains import Look, is_definition, is_importable, is_of_main
from safepool.transport import payloads
from safepool.transport.channel import store_large
from safepool.transport.held import modules_by_value
from safepool.transport.marks import main_space
from safepool.transport.names import Met, OfScript
from safepool.transport.references import Collected
from safepool.transport.trusted import is_found

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from safepool.transport.frames import Segment
    from safepool.transport.reductions import Reductions
    from safepool.transport.sharing import Shared

# Each is kept alive, and in every worker; a program that makes functions without end sends
# the later ones with each call.
_MOST = 1024
# Each pickle is kept in every worker; one that changes more often is sent with each call.
_MOST_CHANGES = 8


@dataclass(slots=True, eq=False, repr=False)
class SentFunction:
    """A function that workers keep.

    Attributes:
        number: Number that names it, at least 1.
        lasting: Kept as long as the pool; another is forgotten with its ``map``.
        names: Names of the script that it refers to or uses.
    """

    number: int
    segments: Sequence[Segment]
    lasting: bool
    shared: Sequence[Shared[Any]] = ()
    names: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False, repr=False)
class _Kept:
    """A function of ``__main__`` that is kept, and the number of times that it was pickled."""

    look: Look | None
    sent: SentFunction
    changes: int


class Functions:
    """The functions of one pool.

    Several threads use it at a time, and it holds no lock: if two threads pickle a function for
    the first time, it gets two numbers, and one is kept.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._importable: dict[Callable[..., Any], SentFunction] = {}
        self._of_main: dict[Callable[..., Any], _Kept] = {}
        self._seen: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

    def lasting(self, function: Callable[..., Any]) -> SentFunction | None:
        """Return a function that workers may keep; ``None`` if it is to travel with its call."""
        return self.importable(function) or self._main(function)

    def known(self, function: Callable[..., Any]) -> SentFunction | None:
        """Return a module's own function, or an unchanged function of ``__main__``."""
        if type(function) not in (types.FunctionType, types.BuiltinFunctionType):
            return None
        sent = self._importable.get(function)
        if sent is not None:
            return sent
        kept = self._of_main.get(function)
        if kept is None:
            return self.importable(function) if is_found(function) else None
        if modules_by_value():
            return None
        if kept.look is None:
            return kept.sent if main_space().get(function.__qualname__) is function else None
        look = Look(function)
        return kept.sent if not look.doubts and kept.look.same_as(look) else None

    def _main(self, function: Callable[..., Any]) -> SentFunction | None:
        if not is_definition(function) or payloads.by_value_modules():
            return None
        kept = self._of_main.get(function)
        name = getattr(function, "__qualname__", "")
        if main_space().get(name) is function:
            named = kept is not None and kept.look is None
            return kept.sent if named and kept else self._named(function, name)
        if not is_of_main(function):
            return None
        if kept is None and function not in self._seen:
            self._seen.add(function)  # most lambdas are called once
            return None
        return self._unnamed(function, kept)

    def _unnamed(self, function: Callable[..., Any], kept: _Kept | None) -> SentFunction | None:
        """Return a function that is referred to only by captured or passed objects."""
        look = Look(function)
        if look.doubts or (kept is None and len(self._of_main) >= _MOST):
            return None
        if kept is not None and kept.look is not None and kept.look.same_as(look):
            return kept.sent
        changes = 1 if kept is None else kept.changes + 1
        if changes > _MOST_CHANGES:
            return None
        with Met() as met:
            segments = payloads.dumps(function, into_main=True, by_value=True)
        sent = SentFunction(next(self._numbers), segments, lasting=True, names=met.names)
        self._of_main[function] = _Kept(look, sent, changes)
        return sent

    def _named(self, function: Callable[..., Any], name: str) -> SentFunction | None:
        """Return a function that workers find in their ``__main__``."""
        if len(self._of_main) >= _MOST:
            return None
        pickled = pickle.dumps(OfScript(name), protocol=5)
        names = frozenset([name])
        sent = SentFunction(next(self._numbers), [pickled], lasting=True, names=names)
        self._of_main[function] = _Kept(None, sent, 1)
        return sent

    def importable(self, function: Callable[..., Any]) -> SentFunction | None:
        """Return a module's own function, pickled once; ``None`` for any other callable."""
        if not isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
            return None
        sent = self._importable.get(function)
        if (
            sent is None
            and len(self._importable) < _MOST
            and is_importable(function)
            and not payloads.by_value_modules()
        ):
            try:
                pickled = pickle.dumps(function, protocol=5)
            except Exception as error:  # noqa: BLE001 -- pickle imports the packages above again
                let_handlers_pass(error)
                return None  # the pickle with the call raises it in the call
            sent = SentFunction(next(self._numbers), [pickled], lasting=True)
            self._importable[function] = sent
        return sent

    def once(
        self, function: Callable[..., Any], done: Reductions | None = None, *, of_main: bool
    ) -> SentFunction:
        """Return any callable, pickled now and for one ``map``."""
        sent = self.lasting(function)
        if sent is None:
            with Collected() as shared, Met() as met:
                segments = payloads.dumps_to_send(
                    function, into_main=True, by_value=of_main, reductions=done
                )
            stored = store_large(segments)
            number = next(self._numbers)
            sent = SentFunction(
                number, stored, lasting=False, shared=shared.found, names=met.names
            )
        return sent
