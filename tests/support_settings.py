"""A module with a setting of its own, which nothing imports but the tests of that."""

from __future__ import annotations

from typing import Any

value: Any = None
written = 0


def read(module: Any) -> object:
    return module.value


def write(module: Any, to: object) -> None:
    module.value = to


def look(_: object) -> object:
    return value
