"""Functions and classes of ``__main__`` that a receiver has too, so that they travel by name.

The fork server that ran the script reports what it has (``marks.marks_of``): the qualified name of
each function and class, and a mark of how it was defined. An object that the program has under the
same name, with the same mark, is pickled as that name. Everything else travels by value: objects
defined below the guard, redefined at a prompt, or without a namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safepool.transport.fingerprints import ABSENT, UNKNOWN, fingerprint
from safepool.transport.marks import find_in_main, is_made_in_main, is_mark_of


def _know_nothing(_names: list[str]) -> dict[str, bytes | None]:
    return {}


class MainNames:
    """Names of ``__main__`` that the workers of one pool have.

    A pool whose workers do not run the script calls :meth:`learn` with no marks. The values of the
    program's data globals at the end of the top level are requested when they are needed.

    Attributes:
        learned: Number of different reports so far.
        are_known: Whether anything may travel by name.
    """

    def __init__(self) -> None:
        self.learned: int = 0
        self.are_known: bool = False
        self._marks: Mapping[str, bytes] | None = {}
        # Objects that were found to be the same, by name.
        self._same: dict[str, object] = {}
        self._ask: Callable[[list[str]], Mapping[str, bytes | None]] = _know_nothing
        self._prints: dict[str, bytes | None] = {}

    def learn(
        self,
        marks: Mapping[str, bytes],
        ask: Callable[[list[str]], Mapping[str, bytes | None]] | None = None,
    ) -> None:
        """Take the report of the server: the marks that :func:`marks_of` returned there.

        ``ask`` returns what :func:`~safepool.transport.fingerprints.fingerprint` says there of
        globals that it is given the names of. A name that it does not return is unknown.
        """
        self._ask = ask or _know_nothing
        if marks != self._marks:
            self.learned += 1
            self._marks = marks
            self.are_known = bool(marks)
            self._same.clear()
            self._prints.clear()

    def ask(self, names: list[str]) -> None:
        """Ask what globals are like there, unless that is known."""
        unknown = [name for name in names if name not in self._prints]
        if unknown and self._marks is not None:
            self._prints |= dict.fromkeys(unknown, UNKNOWN) | dict(self._ask(unknown))

    def changed(self, values: Mapping[str, object]) -> dict[str, object]:
        """Return those globals that workers do not have as the program has them now.

        Args:
            values: Globals of ``__main__`` in the program, by name; and attributes of its
                functions and classes, by their path.

        Returns:
            Names to be delivered. What is there and cannot be pickled here is not among them: it
            is the worker's own.
        """
        self.ask(list(values))
        found = {}
        for name, value in values.items():
            theirs = self._prints.get(name, UNKNOWN)
            if theirs == ABSENT:
                found[name] = value
                continue
            ours = fingerprint(value)
            if ours is not None and (ours == UNKNOWN or ours != theirs):
                found[name] = value
        return found

    def __bool__(self) -> bool:
        return self.are_known

    def has(self, thing: Any) -> bool:
        """Tell whether a function or class of ``__main__`` is there under its qualified name."""
        name: str = thing.__qualname__
        if find_in_main(name) is not thing:
            return False
        if name in self._same:  # a decorator that is used again makes another one, of this mark
            return self._same[name] is thing
        mark = None if self._marks is None else self._marks.get(name)
        if not is_mark_of(mark, thing):
            return False
        self._same[name] = thing
        return True

    def others_at(self, things: Mapping[str, Any]) -> set[str]:
        """Return the paths of functions, classes and descriptors that are not there.

        Args:
            things: All that is in one class, by path. What other modules have made for it is
                there, too.
        """
        marks = self._marks or {}
        others = {
            path
            for path, thing in things.items()
            if (path in marks or is_made_in_main(thing)) and not is_mark_of(marks.get(path), thing)
        }
        self._same.update((path, things[path]) for path in marks.keys() & things.keys() - others)
        return others

    def inside(self, name: str) -> list[str]:
        """Return the paths of functions and classes that are there in one of this name."""
        return [path for path in self._marks or () if path.startswith(f"{name}.")]
