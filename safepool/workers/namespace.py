"""``__main__`` inside a worker: names that arrive are bound in it, and changes by tasks stay.

A worker that does not run the script has a separate ``__main__``. The functions, classes and data
of the script arrive as names, each before the first call that needs it (``pool.calls.names``), and
are bound there once. From then on they belong to the worker: a change by its initializer or a task
stays until the program's own value has changed and arrives again.

A list, dictionary, set or bytearray that arrives again keeps its identity and gets the new
content, as in the program: other references in the worker see the change.
"""

from __future__ import annotations

import importlib
import pickle
import sys
import types
from typing import TYPE_CHECKING, Any

from safepool.errors import text_of
from safepool.transport.additions import Addition, add
from safepool.transport.marks import (
    Absent,
    delete_from,
    find_attribute,
    main_space,
    set_on,
    space_of,
)
from safepool.transport.names import of_script
from safepool.transport.payloads import loads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from safepool.transport.frames import Received


class MainNamespace:
    """The names of the script in this worker."""

    def __init__(self) -> None:
        spec = main_space().get("__spec__")
        if getattr(spec, "name", "").startswith("loky."):
            # loky's own launcher runs as ``__main__``; its names are not the program's.
            sys.modules["__main__"] = types.ModuleType("__main__")
        # Names that are not there, and why.
        self._missing: dict[str, str] = {}
        # Numbers of the script's changes to modules.
        self._added: set[int] = set()

    def receive(self, segments: Sequence[Received]) -> None:
        """Bind the names of a frame.

        A value that cannot be unpickled is reported to the calls that use it.
        """
        head = pickle.loads(segments[0])
        _import_all(head.get("imports", ()))
        self._missing.update(head.get("missing", ()))
        if "added" in head:
            self._put_into_modules(pickle.loads(segments[1]))
        names: Sequence[str] = head.get("names", ())
        try:
            self._bind(names, head.get("kinds", ()), head["keep"], segments[1:])
        except BaseException as error:  # noqa: BLE001 -- user code
            reason = f"{type(error).__name__}: {text_of(error)}"
            self._missing.update(dict.fromkeys(names, reason))

    def _put_into_modules(self, pickles: Mapping[int, Sequence[bytes]]) -> None:
        for number in sorted(pickles.keys() - self._added):
            self._added.add(number)
            try:
                add(Addition(*loads(pickles[number])))
            except Exception:  # noqa: BLE001 -- user code; the module is another one here, perhaps
                pass

    def _bind(
        self,
        names: Sequence[str],
        kinds: Sequence[type | None],
        keep: Sequence[bool],
        segments: Sequence[Received],
    ) -> None:
        if not names:
            return
        for name, kind, kept in zip(names, kinds, keep, strict=True):
            # Bound before it is filled: the pickle may refer to it.
            if kind is not None and not (kept and type(_bound_to(name)) is kind):
                _bind(name, kind())
        try:
            values = loads(segments)
        except BaseException:
            for name in names:  # not the worker's former value, which is out of date
                main_space().pop(name, None)
            raise
        for name, kind, value in zip(names, kinds, values, strict=True):
            if kind is None:
                _bind(name, value)
            else:
                _fill(_bound_to(name), value)
            self._missing.pop(name, None)

    def explain(self, error: BaseException) -> None:
        """Add a note to an exception of a call that explains why a name is missing."""
        name = getattr(error, "name", None) if isinstance(error, NameError) else None
        if isinstance(error, KeyError) and len(error.args) == 1:
            name = error.args[0]
        reason = self._missing.get(name) if isinstance(name, str) else None
        if reason is not None:
            try:
                error.add_note(f"{name!r} of __main__ is not in this worker: {reason}")
            except BaseException:  # noqa: BLE001 -- an exception whose class allows no attributes
                pass


def _bound_to(name: str) -> Any:
    if "." not in name:
        return main_space().get(name)
    return next(iter(find_attribute(name)), None)


def _bind(name: str, value: Any) -> None:
    """Bind a value to a name, or to an attribute of a function or class of the script."""
    holder, _, attribute = name.rpartition(".")
    if value is Absent:
        _unbind(holder, attribute)
    elif holder:
        found = find_attribute(holder) or (of_script(holder),)
        set_on(found[0], attribute, value)
    else:
        main_space()[name] = value


def _unbind(holder: str, name: str) -> None:
    if not holder:
        main_space().pop(name, None)
        return
    for found in find_attribute(holder):
        if name in space_of(found):
            delete_from(found, name)


def _fill(container: Any, content: Any) -> None:
    if isinstance(container, (list, bytearray)):
        container[:] = content
    else:
        container.clear()
        container.update(content)


def _import_all(modules: Sequence[str]) -> None:
    """Import the script's imports, for their effects: they register, patch and configure."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001 -- a function that needs it will say so
            pass
