"""The levels of the program's loggers, in a worker. No logger is made for its level.

A library with its own class of loggers makes its logger at its import, and fails or gets another
class if the name is taken. Hence a level waits here until its logger exists.

A level that a library sets for its logger at its import is replaced by the program's level: the
program has imported the library too, and has set its level later. A level that an initializer or a
task sets holds until the program changes its level.

Not covered:
    * A level that is assigned (``logger.level = 10``) instead of set.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from safepool.threads.imports import is_importing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def levels_of_the_program() -> tuple[int, dict[str, int]]:
    """Return the value of ``logging.disable()``, and the levels that are set, by logger."""
    root = logging.root
    loggers = list(root.manager.loggerDict.items())
    levels = {
        name: logger.level
        for name, logger in loggers
        if isinstance(logger, logging.Logger) and logger.level
    }
    if "__main__" in levels:  # the script's own, by the name that it has under ``spawn``
        levels["__mp_main__"] = levels["__main__"]
    return root.manager.disable, {"": root.level, **levels}


def glance_at_levels(_logging: Any) -> object:
    """Return an object that is another one as soon as a level has been set, or a logger made.

    Each of these clears what every logger remembers of its level; Python 3.7 and later.
    """
    remembered: Any = getattr(logging.root, "_cache", None)
    if remembered is None:
        return None
    return remembered.setdefault("safepool", object())


class Levels:
    """Sets levels of loggers, now or when they are made."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}
        # Levels of loggers that do not exist yet.
        self._waiting: dict[str, int] = {}
        self._came_later: set[str] = set()
        self._watches = False

    def apply(self, disabled: int, levels: Mapping[str, int]) -> None:
        """Set the levels that have changed since the last time; ``""`` is the root logger's."""
        unset = dict.fromkeys(self._told.keys() - levels.keys(), logging.NOTSET)
        changed = {n: level for n, level in levels.items() if self._told.get(n) != level}
        self._told = dict(levels)
        there = logging.root.manager.loggerDict
        for name, level in (unset | changed).items():
            logger = logging.root if not name else there.get(name)
            if isinstance(logger, logging.Logger):  # and no place holder
                logger.setLevel(level)
            elif level:
                self._waiting[name] = level
            else:
                self._waiting.pop(name, None)
        logging.disable(disabled)  # it also forgets what loggers have remembered of levels
        if self._waiting and not self._watches:
            self._watches = True
            self._watch(logging.root.manager)

    def _watch(self, manager: logging.Manager) -> None:
        make: Any = manager.getLogger
        set_level = logging.Logger.setLevel
        effective_level = logging.Logger.getEffectiveLevel

        def get_logger(name: str) -> logging.Logger:
            logger: logging.Logger = make(name)
            if name in self._waiting:
                self._came_later.add(name)
                set_level(logger, self._waiting.pop(name))
            return logger

        def set_level_unless_imported(self_: logging.Logger, level: int | str) -> None:
            if self_.name in self._came_later and is_importing(sys._getframe(1)):
                return
            set_level(self_, level)

        def get_effective_level(self_: logging.Logger) -> int:
            name = "" if self_.level else self_.name
            while name and self._waiting:
                if name in self._waiting:
                    return self._waiting[name]
                if getattr(manager.loggerDict.get(name), "level", logging.NOTSET):
                    break
                name = name.rpartition(".")[0]
            return effective_level(self_)

        # For this manager only: another one keeps its method.
        manager.getLogger = get_logger  # type: ignore[method-assign]
        kind: Any = logging.Logger
        kind.setLevel = set_level_unless_imported
        # A logger without a level has the level of the next logger above it, which may not exist
        # yet.
        kind.getEffectiveLevel = get_effective_level


apply_levels: Callable[..., None] = Levels().apply
"""Of this process."""
