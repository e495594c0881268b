"""Exceptions as programs have them. Importable in a worker, and the text of a script."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import threading
from typing import Any, Self


class TwoArgumentsError(Exception):
    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line} cannot be parsed")
        self.path, self.line = path, line


class CodeError(Exception):
    """Its constructor would take the text for the code, and make another text."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class KeywordError(ValueError):
    def __init__(self, *, field: str) -> None:
        super().__init__(f"bad field {field}")
        self.field = field


class NoArgumentsError(Exception):
    def __init__(self) -> None:
        super().__init__("something", "else")


class NewError(Exception):
    def __new__(cls, first: int, second: int) -> Self:
        return super().__new__(cls, first + second)

    def __init__(self, first: int, second: int) -> None:
        self.both = first, second


class SlotsError(Exception):
    __slots__ = ("__hidden", "unset", "where")

    def __init__(self, where: str, hidden: int) -> None:
        super().__init__(where)
        self.where, self.__hidden = where, hidden

    def hidden(self) -> int:
        return self.__hidden


class FileError(OSError):
    def __init__(self, path: str, why: str) -> None:
        super().__init__(2, why, path)
        self.why = why


class PlainFileError(OSError):
    """Whose constructor does not call the base's."""

    def __init__(self, path: str) -> None:
        self.path = path


class StrError(Exception):
    def __init__(self, a: int, b: int) -> None:
        self.a, self.b = a, b

    def __str__(self) -> str:
        return f"{self.a} is not {self.b}"


class BrokenReduceError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)
        self.b = b

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0],)


class OwnReduceError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)
        self.b = b

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.b)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int
    text: str


class HoldsLockError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock, self.seen = threading.Lock(), text


class UnicodeOwnError(UnicodeDecodeError):
    def __init__(self, text: str) -> None:
        super().__init__("ascii", text.encode(), 0, 1, "no")


class GroupError(ExceptionGroup):
    def __new__(cls, message: str, errors: list[Exception], extra: int) -> Self:
        made = super().__new__(cls, message, errors)
        made.extra = extra
        return made


def noted() -> Exception:
    error = TwoArgumentsError("b.txt", 4)
    error.add_note("noted")
    return error


def cyclic() -> Exception:
    error = TwoArgumentsError("c.txt", 5)
    error.itself = error
    return error


# What a task raises: one row per kind.
MADE: dict[str, Any] = {
    "two arguments": lambda: TwoArgumentsError("a.txt", 3),
    "another text": lambda: CodeError("hello", 5),
    "keywords": lambda: KeywordError(field="name"),
    "no arguments": NoArgumentsError,
    "__new__": lambda: NewError(1, 2),
    "slots": lambda: SlotsError("here", 7),
    "a system's error": lambda: FileError("/nowhere", "gone"),
    "a system's error without a number": lambda: PlainFileError("/nowhere"),
    "text from attributes": lambda: StrError(1, 2),
    "a broken __reduce__": lambda: BrokenReduceError(1, 2),
    "its own __reduce__": lambda: OwnReduceError(1, 2),
    "frozen": lambda: FrozenError(1, "two"),
    "noted": noted,
    "a cycle": cyclic,
    "a group": lambda: ExceptionGroup("all", [KeywordError(field="a"), CodeError("b", 2)]),
    "a group of its own": lambda: GroupError("all", [TwoArgumentsError("a", 1)], 9),
    "unicode": lambda: UnicodeOwnError("\u00e4"),
    "no file": lambda: FileNotFoundError(2, "No such file", "name", None, "other"),
    "a decoder's": lambda: json.JSONDecodeError("bad", "text", 2),
    "a process": lambda: subprocess.CalledProcessError(3, ["a"], b"out"),
    "a stream's end": lambda: asyncio.IncompleteReadError(b"a", 5),
    "syntax": lambda: SyntaxError("bad", ("file", 1, 2, "text", 1, 3)),
    "no name": lambda: NameError("no x", name="x"),
    "no module": lambda: ImportError("no x", name="x", path="/x"),
    "stop": lambda: StopIteration(5),
    "exit": lambda: SystemExit(3),
    "arguments that are exceptions": lambda: ValueError(KeywordError(field="in"), 1),
}


def throw(name: str) -> None:
    error = MADE[name]()
    raise error


def give(name: str) -> Any:
    return [MADE[name]()]


@dataclasses.dataclass
class Holder:
    by_name: dict[str, Exception]
    more: list[Exception]


def pass_on(holder: Holder, errors: Any) -> Any:
    assert all(one is two for one, two in zip(holder.by_name.values(), errors, strict=True))
    return (holder.by_name, holder.more), list(errors)


def throw_with_lock() -> None:
    raise HoldsLockError("held")


def throw_lock() -> None:
    raise ValueError("held", threading.Lock())


def throw_group_with_lock() -> None:
    raise ExceptionGroup("all", [HoldsLockError("held"), KeywordError(field="a")])


def facts(error: BaseException) -> list[Any]:
    """Return all that an exception is made of."""
    attributes = {k: v for k, v in vars(error).items() if v is not error}
    fields = [
        (name, repr(getattr(error, name, None)))
        for kind in type(error).__mro__
        for name in vars(kind)
        if not name.startswith("__")
        and name not in ("lock", "add_note", "with_traceback")
        and not callable(getattr(error, name, None))
    ]
    shown = [type(error).__qualname__, repr(error.args), str(error), repr(attributes), fields]
    if isinstance(error, BaseExceptionGroup):
        shown.append([facts(one) for one in error.exceptions])
    return shown
