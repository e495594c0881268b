"""Modules that the program has loaded from files which no import finds.

A program loads plugins, a script without a suffix or (as pytest with ``--import-mode=importlib``)
its tests by ``importlib.util.spec_from_file_location`` and enters them in ``sys.modules``. Pickle
writes their functions by name, and a forked worker has the module. Any other worker imports it by
this table, if nothing else finds it: from the same file, as a new module.

Not covered: modules that were made without a file.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safepool.errors import let_handlers_pass

Table = dict[str, tuple[str | None, list[str] | None]]
"""By full name: the file, if there is one, and the folders of a package."""

# One: that of the modules and the path at the last look.
_found: dict[tuple[object, ...], Table] = {}
_table: Table = {}


def modules_off_path() -> Table:
    """Return this process's modules whose files lie where no import looks for them.

    The table may name modules that a finder of their own finds, as those of an editable install.
    """
    state = len(sys.modules), *(one for one in sys.path if isinstance(one, str))
    found = _found.get(state)
    if found is None:
        found = {}
        modules = sys.modules.copy().items()
        _enter_all(found, modules)
        if found:  # a package may have come after its modules
            _enter_all(found, modules)
        _found.clear()
        _found[state] = found
    return found


def _enter_all(found: Table, modules: Iterable[tuple[str, object]]) -> None:
    for name, module in modules:
        try:
            _enter(found, name, module)
        except Exception as error:  # noqa: BLE001 -- a namespace without its parent, odd values
            let_handlers_pass(error)


def _enter(found: Table, name: str, module: object) -> None:
    spec = _spec_of(module)
    if spec is None or spec.name != name:
        return
    folders = spec.submodule_search_locations
    file = spec.origin if spec.has_location else None
    place = next(iter(folders), file) if folders else file
    if place is None:
        return
    base, _, last = name.rpartition(".")
    above, _, leaf = place.rpartition("/")
    looked_in = _path_of(base) if base else sys.path
    if base not in found and leaf.partition(".")[0] == last and above in looked_in:
        return
    found[name] = file, [*folders] if folders else None
    while base and base not in found and _spec_of(sys.modules.get(base)) is None:
        found[base] = None, [*_path_of(base)]  # an empty module, which nothing but its name needs
        base = base.rpartition(".")[0]


def _spec_of(module: object) -> importlib.machinery.ModuleSpec | None:
    spec = _space_of(module).get("__spec__")
    return spec if type(spec) is importlib.machinery.ModuleSpec else None


def _path_of(package: str) -> Sequence[str]:
    return _space_of(sys.modules.get(package)).get("__path__") or ()


def _space_of(module: object) -> dict[str, Any]:
    kind = type(module)
    if kind is types.ModuleType:
        return vars(module)
    # Not the module's own __getattribute__, which may start a lazy import.
    is_module = issubclass(kind, types.ModuleType)
    return object.__getattribute__(module, "__dict__") if is_module else {}


class _Finder:
    """Stands last in ``sys.meta_path`` of a worker."""

    @staticmethod
    def find_spec(name: str, *_: object) -> Any:
        """Return the specification of a module of the table."""
        file, folders = _table.get(name, (None, None))
        if file is None:
            if folders is None:
                return None
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = folders
            return spec
        if not os.path.isfile(file):
            return None
        # For any other suffix. (The types of 3.15 know no loader's get_code.)
        loader: Any = importlib.machinery.SourceFileLoader(name, file)
        of_file = importlib.util.spec_from_file_location
        return of_file(name, file, submodule_search_locations=folders) or of_file(
            name, file, loader=loader, submodule_search_locations=folders
        )


def find_modules(table: Mapping[str, Any]) -> None:
    """Let this process import the modules of a table of the program's."""
    _table.clear()
    _table.update(table)
    if _table and _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
