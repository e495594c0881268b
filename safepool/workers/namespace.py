"""``__main__`` inside a worker: filled by what arrives, kept by what runs there.

A worker does not import the program's ``__main__``. Its functions arrive by value, each time
with the globals that they refer to, and all of them get this one namespace. So a global
that an initializer sets is there for the tasks, and one that a task sets for the next, as in
a worker of the standard pool; what the program changes in between arrives as well.

Not covered:
    * What code of a module puts into ``__main__`` before anything of the program's own
      ``__main__`` has arrived: something of the same name that arrives takes its place.
    * A global object that a task changes in place: the program's own arrives again with the
      next task and takes its place. Rebind the name (``global cache``), or keep what
      is to last in a module that is imported.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

from safepool.transport.payloads import main_namespace, main_uses

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["MainNamespace"]


class MainNamespace:
    """Hold on to the globals that code of this worker has set.

    Enter it when a call has arrived and before it runs, leave it when it has run.
    """

    def __init__(self) -> None:
        spec = main_namespace().get("__spec__")
        if getattr(spec, "name", "").startswith("loky."):
            # loky's own launcher runs as ``__main__``; its names are not the program's.
            sys.modules["__main__"] = types.ModuleType("__main__")
        self._names = main_namespace()
        self._own: dict[str, Any] = {}
        self._arrived: dict[str, Any] = {}
        self._uses = main_uses()
        self._watched = False

    def __enter__(self) -> None:
        # As long as nothing of ``__main__`` has arrived, nothing of it can be lost: to look
        # costs a quarter of a short task (benchmarks/dispatch.py, submit).
        self._watched = self._watched or main_uses() != self._uses
        if not self._watched:
            return
        self._names.update(self._own)
        self._arrived = self._names.copy()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._watched:
            return
        for name, value in self._names.copy().items():  # a task's thread may go on
            if self._arrived.get(name, self) is not value:
                self._own[name] = value
        self._arrived = {}
