"""Calls of a function when one of certain modules has been imported, before its importer goes on.

Nothing else reaches a library that is first imported inside a task: the check before the task came
too early, the next comes too late, and some pools have no variable.

Not covered:
    * A module whose loader takes no attributes, or is the class itself (frozen, built in).
    * A module that loads itself lazily: it counts as imported after its loading, without a call.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType


def imported(name: str) -> ModuleType | None:
    """Return the module of that name if its import has ended, otherwise ``None``."""
    module = sys.modules.get(name)
    # The first read of an attribute would load importlib's lazy module.
    if module is None or type(module).__name__ == "_LazyModule":
        return None
    # Another thread may still import it.
    spec = getattr(module, "__spec__", None)
    return None if getattr(spec, "_initializing", False) else module


def is_importing(frame: FrameType | None) -> bool:
    """Tell whether this frame, or one that has called it, is a module that is being imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            spec = frame.f_globals.get("__spec__")
            if getattr(spec, "_initializing", False):
                return True
        frame = frame.f_back
    return False


class AfterImport:
    """Stand first in ``sys.meta_path`` and call back after certain imports.

    Args:
        tell: Function of a module's full name and the module, called in the importing thread.
    """

    def __init__(self, tell: Callable[[str, ModuleType], None]) -> None:
        self._tell = tell
        self._names: frozenset[str] = frozenset()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the other finders find the module; a wanted module reports the end of its import."""
        if fullname not in self._names:
            return None
        # Only later finders: an earlier one of this kind calls this one for the same module.
        finders = [*sys.meta_path]
        for finder in finders[finders.index(self) + 1 if self in finders else 0 :]:
            find = getattr(finder, "find_spec", None)
            if find is None:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                self._follow(spec.loader, fullname)
                return spec
        return None

    def start(self, names: frozenset[str]) -> None:
        """Call back for the modules of these full names from now on."""
        self._names = names
        # None: the interpreter ends and imports nothing; a generator's end may come here then.
        if sys.meta_path is not None and self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Remove this finder from ``sys.meta_path``."""
        if sys.meta_path is not None and self in sys.meta_path:
            sys.meta_path.remove(self)

    def _follow(self, loader: Any, fullname: str) -> None:
        if isinstance(loader, type) or not hasattr(loader, "exec_module"):
            return
        original = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # A loader may serve several modules, and is itself again after this one.
            if module.__name__ == fullname:
                loader.__dict__.pop("exec_module", None)
            original(module)
            if module.__name__ == fullname and type(module).__name__ != "_LazyModule":
                self._tell(fullname, module)

        try:
            # The loader itself, and no replacement: code uses a module's loader for the module's
            # source, resources and type.
            loader.exec_module = exec_module
        except AttributeError:
            pass
