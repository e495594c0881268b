"""What the tests of the words of errors run in workers."""

from __future__ import annotations

import threading
from typing import Any

import safepool


class RefusesError(Exception):
    """Raised by code of the program that pickling runs."""


class Refuses:
    def __reduce__(self) -> Any:
        return self._give_up()

    def _give_up(self) -> Any:
        raise RefusesError("not this one")


class RefusesToArrive:
    def __reduce__(self) -> Any:
        return _give_up, ()


def _give_up() -> Any:
    raise RefusesError("not here")


class Holder:
    def __init__(self) -> None:
        self.held = {"locks": [1, threading.Lock()]}


def hold(_: object) -> Holder:
    return Holder()


def lock_in_dict(_: object) -> dict[str, Any]:
    return {"a": [1, threading.Lock()]}


def lock(_: object) -> object:
    return threading.Lock()


def refuse(_: object) -> Refuses:
    return Refuses()


def fail(_: object) -> Any:
    return _fail_below()


def _fail_below() -> Any:
    raise RefusesError("a mistake")


@safepool.worker
def fail_decorated(_: object) -> Any:
    return _fail_below()


def add(x: int, y: int) -> int:
    return x + y


def first(pair: tuple[Any, Any]) -> Any:
    return pair[0] + "a"


def either(x: Any, y: Any = 1) -> Any:
    return x + y
