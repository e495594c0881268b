"""Settings of the program in its workers: their table, and how a worker applies them.

The pool reads the program's settings (``pool.settings``) and sends changes. The worker sets them:
    at once if the setting's module is imported, otherwise after its import. No module is ever
    imported for a setting, nor for objects in its value, such as the warning class of a library:
    the setting waits for that import as well.

A setting of an initializer or a task belongs to the worker until the program changes that setting.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from safepool.threads.imports import AfterImport, imported
from safepool.transport import payloads
from safepool.transport.frames import Buffer, Kind, encode
from safepool.transport.marks import PLAIN
from safepool.transport.names import Met
from safepool.workers.settings_table import SETTINGS, Setting, filters_of, with_script

_FILTERS = "warnings.filters"
_added: dict[str, Setting] = {}
_revision = 0


def revision() -> int:
    """Return how often rows were added or taken back."""
    return _revision


def settings() -> tuple[Setting, ...]:
    """Return every row: the table's first, then those added, in their order."""
    return (*SETTINGS, *_added.values())


def register_setting(
    name: str,
    *,
    module: str,
    read: Callable[[ModuleType], object],
    write: Callable[[ModuleType, Any], object],
    of_thread: bool = False,
) -> None:
    """Make workers take over one more setting of the program, such as an option of a library.

    A library calls this at its import, a program before it makes pools. From then on each call
    to a pool checks whether the setting has changed. Workers set a changed value before they run
    the next calls.

    Args:
        name: Name of the setting. A registration of the same name is replaced.
        module: Full name of the module that holds the setting. Workers do not import it for the
            setting: they set the value once a task has imported it.
        read: Function of the module that returns a copy of the present value, which ``==`` can
            compare and pickle can pickle. It must take microseconds: most calls of a pool call it.
        write: Function of the module and a value of ``read`` that sets the value. Workers call
            it, so it must be a function of a module or of the script.
        of_thread: ``True`` if each thread has a separate value. Workers then take the value of the
            thread that made the pool.

    Raises:
        ValueError: The package's own table already has this setting.

    Example:
        >>> register_setting(
        ...     "mylib.digits",
        ...     module="mylib",
        ...     read=lambda mylib: mylib.digits,
        ...     write=lambda mylib, value: setattr(mylib, "digits", value),
        ... )
        >>> unregister_setting("mylib.digits")
    """
    if any(row.name == name for row in SETTINGS):
        raise ValueError(f"the table of settings already has a row {name!r}: choose another name")
    _added[name] = Setting(
        name=name, module=module, read=read, write=write, of_thread=of_thread, source=""
    )
    _changed()


def unregister_setting(name: str) -> None:
    """Remove the registration of ``name``, if there is one."""
    _added.pop(name, None)
    _changed()


def _changed() -> None:
    global _revision  # noqa: PLW0603 -- a fact about this process
    _revision += 1


class Packed(NamedTuple):
    """A setting on its way to a worker.

    Attributes:
        values: A payload for each part of the value. Only warning filters have several: each
            may wait for another module.
        write: A payload of the function that sets it; ``None`` for a row of the table.
        names: Names of the script that the payloads refer to.
    """

    name: str
    module: str
    values: list[list[bytes]]
    write: list[bytes] | None
    names: frozenset[str] = frozenset()


def pack_setting(row: Setting, value: Any) -> Packed:
    """Pickle the value of a setting."""
    if type(value) in PLAIN and row.name not in _added:
        return Packed(row.name, row.module, [[pickle.dumps(value, protocol=5)]], None)
    with Met() as met:
        write = None if row.name not in _added else _dumps(row.write)
        parts = [_dumps(value)] if row.name != _FILTERS else _dumps_filters(value)
    return Packed(row.name, row.module, parts, write, met.names)


def _dumps_filters(value: list[Any]) -> list[list[bytes]]:
    parts = []
    for one in value:
        try:
            # Most filters name modules, "__main__" among them, and none refers to its objects.
            of_main = one[2].__module__ in ("__main__", "__mp_main__")
            parts.append(_dumps(one) if of_main else [pickle.dumps(one, protocol=5)])
        except Exception as error:  # noqa: BLE001 -- user code; the other filters hold
            _warn("workers do not have the warning filter %s: %s", repr(one), repr(error))
    return parts


def settings_frame(packed: Sequence[Packed]) -> list[bytes | memoryview]:
    """Return the frame that brings settings to a worker."""
    told = [(one.name, one.module, one.values, one.write) for one in packed]
    return encode(Kind.SETTINGS, 0, [pickle.dumps(told, protocol=5)])


def _warn(message: str, *arguments: object) -> None:
    from safepool.workers.contained import ContainedLogger  # noqa: PLC0415 -- it makes a logger

    ContainedLogger().warning(message, *arguments)


def _dumps(value: object) -> list[bytes]:
    return [bytes(part) for part in payloads.dumps(value, into_main=True)]


class _NotThereError(Exception):
    """A value refers to a module that this process has not imported."""


# Modules of Python and of this package may be imported for a value, and the script is there.
_OURS = {*sys.stdlib_module_names, "__main__", "__mp_main__", "cloudpickle", "loky", "safepool"}


def compile_ahead() -> None:
    """Compile the patterns of this process's warning filters as they arrive in workers.

    For workers that are forked from here: a program and its fork server import the same libraries,
    which add the same filters.
    """
    for one in filters_of(warnings):
        for part in one:
            if isinstance(part, re.Pattern):
                re.compile(part.pattern, part.flags)


class _Reader(pickle.Unpickler):
    """Reads a value without importing anything of the user's."""

    def __init__(
        self, segments: Sequence[bytes], there: Callable[[str], ModuleType | None]
    ) -> None:
        super().__init__(io.BytesIO(segments[0]), buffers=segments[1:])
        self._there = there

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in _OURS and self._there(module) is None:
            raise _NotThereError(module)
        return super().find_class(module, name)


class WorkerSettings:
    """The settings that this worker was sent, and those that wait for their module."""

    def __init__(self) -> None:
        self._rows = {row.name: row for row in SETTINGS}
        # By the module that they wait for, then by name.
        self._waiting: dict[str, dict[str, Packed]] = {}
        self._imports = AfterImport(self._imported)
        # A module that has run to its end, and whose import has not returned yet.
        self._just: ModuleType | None = None
        # The filters that were sent last, and those that could be read.
        self._found: tuple[Packed | None, list[Any]] = (None, [])

    def apply(self, frame: Buffer) -> None:
        """Apply the settings in a frame of :func:`settings_frame`."""
        for told in pickle.loads(frame):
            packed = Packed(*told)
            for others in self._waiting.values():
                others.pop(packed.name, None)
            self._set(packed)
        self._watch()

    def _watch(self) -> None:
        names = frozenset(name for name, packed in self._waiting.items() if packed)
        if names:
            self._imports.start(names)
        else:
            self._imports.stop()

    def _imported(self, name: str, module: ModuleType) -> None:
        before, self._just = self._just, module
        try:
            for packed in self._waiting.pop(name, {}).values():
                self._set(packed)
        finally:
            self._just = before
        self._watch()

    def _there(self, name: str) -> ModuleType | None:
        just = self._just
        return just if just is not None and just.__name__ == name else imported(name)

    def _set(self, packed: Packed) -> None:
        module = self._there(packed.module)
        if module is None and packed.module in sys.builtin_module_names:
            module = importlib.import_module(packed.module)
        if module is None:
            self._wait(packed, packed.module)
            return
        try:
            row = self._rows.get(packed.name)
            values = self._load(packed)
            if packed.write is not None:
                self._read(packed.write)(module, values[0])
            elif row is not None:
                value = values[0]
                if row.name == _FILTERS:
                    value = with_script(self._filters(packed, values))
                if row.read(module) != value:
                    row.write(module, value)
        except _NotThereError as error:
            self._wait(packed, str(error))
        except Exception as error:  # noqa: BLE001 -- any library's own errors, and user code
            _warn("the setting %s of the program is not set: %s", packed.name, repr(error))

    def _load(self, packed: Packed) -> list[Any]:
        if packed.name != _FILTERS:
            return [self._read(part) for part in packed.values]
        found = []
        for part in packed.values:
            try:
                found.append(self._read(part))
            except _NotThereError as error:
                # Until then there is no such warning. All are set anew then, in their order.
                self._wait(packed, str(error))
        return found

    def _filters(self, packed: Packed, values: list[Any]) -> list[Any]:
        """Return the warning filters to be set: all, or with those that have waited."""
        (before, known), self._found = self._found, (packed, values)
        if before is not packed:
            return values
        # Changes by the worker itself stay. Filters that the import has just added are among the
        # waiting ones, if the program has imported it too.
        new = [one for one in values if one not in known]
        found = [one for one in filters_of(warnings) if one not in new]
        for place in reversed(range(len(values))):
            if values[place] in new:
                behind = (found.index(one) for one in values[place + 1 :] if one in found)
                found.insert(next(behind, len(found)), values[place])
        return found

    def _read(self, segments: Sequence[bytes]) -> Any:
        return _Reader(segments, self._there).load()

    def _wait(self, packed: Packed, module: str) -> None:
        self._waiting.setdefault(module, {})[packed.name] = packed
