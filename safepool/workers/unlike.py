"""Which globals of modules are otherwise here than in the program: asked by a pool, in a worker.

A value of built-in types is compared by content, an object of another class by its class alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from safepool.errors import let_handlers_pass
from safepool.transport.fingerprints import fingerprint
from safepool.transport.marks import PLAIN

CONTAINERS = frozenset({tuple, list, dict, set, frozenset, bytearray})
"""Types that are looked into."""

# What is compared with a missing global: no value has it.
_MISSING = b""
_MOST_PARTS = 1000


def summary(value: Any) -> bytes | None:
    """Return an equal value for equal objects; ``None`` if the type is not compared.

    Example:
        >>> summary({"a": [1]}) == summary({"a": [1]}) != summary({"a": [2]})
        True
        >>> summary(iter("a"))
        b'str_ascii_iterator'
        >>> summary([iter("a")]) is None
        True
    """
    kind = type(value)
    if kind not in PLAIN and kind not in CONTAINERS:
        return kind.__qualname__.encode()
    todo, count = [value], 0
    while todo and count <= _MOST_PARTS:
        one = todo.pop()
        count += 1
        if type(one) in CONTAINERS:
            todo += one
            if type(one) is dict:
                todo += one.values()
        elif type(one) not in PLAIN:
            return None
    return None if todo else fingerprint(value)


def unlike(told: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """Return which globals have another value here, as in ``"LEVEL of config"``."""
    found = []
    for name, values in told.items():
        try:
            space = vars(importlib.import_module(name))
        except Exception as error:  # noqa: BLE001 -- the module's own; a call that needs it tells
            let_handlers_pass(error)
            continue
        for key, theirs in values.items():
            ours = summary(space[key]) if key in space else _MISSING
            if ours is not None and ours != theirs:
                found.append(f"{key} of {name}")
    return found
