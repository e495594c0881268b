"""Names of the script that were pickled, and the check whether they have changed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING

from safepool.errors import let_handlers_pass
from safepool.machine import tell_once
from safepool.pool.calls.mains import ABSENT, Look, PlainFunction
from safepool.pool.calls.prints import Print, exposed, print_of
from safepool.pool.calls.values import value_of
from safepool.transport import trusted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safepool.pool.calls.deliveries import Delivery
    from safepool.transport.marks import Attributes

BY_CONTENT = object()
"""Stands for a value of which identity does not tell whether it has changed."""

# More time than this, of the program, to find out whether data has changed is worth a word.
_MUCH_S = 1.0
# Time for which a pickle that differs each time is not made again, as a multiple of the time that
# it took.
_PAUSE = 50


@dataclass(slots=True, eq=False, repr=False)
class Known:
    """Names that were pickled together.

    Attributes:
        doubts: Print of the objects that may have changed in place.
        stamp: The versions of the objects that it refers to.
        plain: The value, if its identity is enough to compare it; otherwise ``BY_CONTENT``.
        attributes: State of a function or class that workers have.
        short: The look at a function, if a short one will do.
        pickled_again: ``True`` if only a new pickle shows whether the value has changed.
        is_large: The check takes too long for the scheduler's thread.
        unsteady_until_s: Until then, by the monotonic clock, only identity is compared: two
            pickles have differed. They always do, or another thread has changed the values.
        spent_s: CPU time spent so far on finding out whether it has changed.
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
    attributes: Attributes | None
    short: PlainFunction | None
    pickled_again: bool
    is_large: bool
    unsteady_until_s: float = 0.0
    spent_s: float = 0.0
    asked: int = 0

    @property
    def is_deleted_attribute(self) -> bool:
        """Whether this is a path that the program has deleted: its class tells of changes."""
        return self.plain is ABSENT and "." in self.names[0]

    def is_still(self, space: Mapping[str, object]) -> bool:
        """Return whether the only value is unchanged, if its identity is enough."""
        name, value, attributes = self.names[0], self.plain, self.attributes
        if (value_of(name) if "." in name else space.get(name, ABSENT)) is not value:
            return False
        if attributes is None or (
            type(value) is FunctionType and not (value.__dict__ or attributes.by_path)
        ):
            return True
        return attributes.are_still()

    def is_unchanged(self, *, here: bool = False) -> bool:
        """Return whether the values are still those that were pickled; ``False`` if in doubt."""
        if self.short is not None:
            return self.short.is_still(value_of(self.names[0]))
        values = [*map(value_of, self.names)]
        look = Look(*values)
        if self.pickled_again or (here and self.is_large) or not look.same_as(self.look):
            return False
        same = self.doubts is None or (
            not self._is_unsteady() and self._is_print_of(look.doubts, here=here)
        )
        return same or (self._is_unsteady() and tuple(map(id, values)) == self.ids)

    def _is_unsteady(self) -> bool:
        return time.monotonic() < self.unsteady_until_s

    def _is_print_of(self, doubts: list[object], *, here: bool) -> bool:
        before = time.thread_time()
        same = self._has_print_of(doubts, here=here)
        self.spent_s += time.thread_time() - before
        self.asked += same or not here  # otherwise another thread checks again
        if self.spent_s > _MUCH_S:
            self._tell_of_time()
        return same

    def _tell_of_time(self) -> None:
        name = self.names[0]
        tell_once(
            f"the pool has spent {self.spent_s:.1f} s on checking whether the global {name} of "
            f"the script has changed: one check for each of {self.asked} calls of submit() and "
            "map(). Give map() more items at once, make arrays read-only "
            f"({name}.flags.writeable = False), or place a constant object once for all workers: "
            f"{name} = safepool.share({name})",
            subject=f"time for {name}",
        )
        self.spent_s = float("-inf")

    def _has_print_of(self, doubts: list[object], *, here: bool) -> bool:
        assert self.doubts is not None
        begun_s = time.monotonic()
        try:
            if here:
                return self.doubts.is_of(trusted.dumps(exposed(doubts)))
            if self.doubts.is_of(print_of(doubts)[0]):
                return True
            differs = print_of(doubts)[0][0] != print_of(doubts)[0][0]
            if differs and not _is_pickled_without_code(doubts):
                now_s = time.monotonic()
                self.unsteady_until_s = now_s + _PAUSE * (now_s - begun_s)
        except Exception as error:  # noqa: BLE001 -- user code; it is pickled again, and raises there
            let_handlers_pass(error)
        return False


def _is_pickled_without_code(doubts: list[object]) -> bool:
    """Tell whether only another thread can make two pickles differ."""
    try:
        trusted.dumps(exposed(doubts))
    except trusted.UntrustedError:
        return False
    return True
