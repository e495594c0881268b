"""What cannot be pickled is named by the way that leads to it, of every kind of container."""

from __future__ import annotations

import functools
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest

from safepool.transport import blame
from safepool.transport.blame import find_unpicklable

if TYPE_CHECKING:
    from collections.abc import Callable

LOCK = threading.Lock()


def by_default(lock: object = LOCK) -> object:
    return lock


def by_keyword(*, lock: object = LOCK) -> object:
    return lock


def of_the_outer() -> Callable[[], object]:
    return lambda: LOCK


def around(*, is_set: bool) -> Callable[[], object]:
    def inner() -> object:
        return lock

    if is_set:
        lock = LOCK
    return inner


def with_attribute() -> None:
    """Have one, see below."""


with_attribute.lock = LOCK  # type: ignore[attr-defined]


# One row per kind of holder: what is to be pickled, and what is said of it.
HOLDERS: dict[str, tuple[Any, str]] = {
    "set": ({1, LOCK}, "an item"),
    "keyword of a partial": (functools.partial(dict, file=LOCK), "argument 'file'"),
    "default": (by_default, "default 0 of <module>.by_default"),
    "default of a keyword": (by_keyword, "default 'lock' of <module>.by_keyword"),
    "inner function": (of_the_outer, "global 'LOCK' of <module>.of_the_outer"),
    "variable around": (
        around(is_set=True),
        "variable 'lock' around <module>.around.<locals>.inner",
    ),
    "variable around that is not set": (around(is_set=False), ""),
    "attribute of a function": (with_attribute, "attribute 'lock' of <module>.with_attribute"),
    "nothing": ([1, 2], ""),
}


def dumps(value: object) -> bytes:
    """Pickle a lock never, and a function, which has its name, as one that has none."""
    if value is LOCK or (callable(value) and not isinstance(value, type)):
        raise TypeError("it cannot be pickled")
    return pickle.dumps(value)


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_way_to_what_cannot_be_pickled_is_said(holder: str) -> None:
    value, said = HOLDERS[holder]
    found = find_unpicklable(value, dumps)
    assert found == said.replace("<module>", __name__)


def test_a_long_search_ends_with_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many parts nor many steps are looked through to the end."""
    many = [0] * 300 + [LOCK]
    assert find_unpicklable({"many": many}, pickle.dumps) == "item 'many'"

    deep: Any = LOCK
    for _ in range(20):
        deep = [deep]
    assert find_unpicklable(deep, pickle.dumps).count("item 0") == 8

    monkeypatch.setattr(blame, "_MOST_S", -1.0)
    assert find_unpicklable([LOCK], pickle.dumps) == ""
