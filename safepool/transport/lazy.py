"""Lazy imports (PEP 810, Python 3.15): a global that becomes a module when it is used.

A lazy import of the program's ``__main__`` travels as one, and its worker imports it when a task
uses it; in the program it stays as it is.

Not covered:
    * ``importlib.util.LazyLoader``, of older versions: its modules are modules, and sent by name.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LazyImport: Any = getattr(types, "LazyImportType", None)
LAZY_TYPES: frozenset[type] = frozenset({_LazyImport} - {None})
"""Types of an import that has not been done; none before Python 3.15."""

_REPR = "<lazy_import '", "'>"


def loaded(name: str, attribute: str) -> Any:
    """Return a module; ``None`` if it is not imported, or another thread is about to import it.

    The attribute is the last of those that are asked for: an import makes them one after the
    other.

    Example:
        >>> loaded("sys", "path") is sys
        True
        >>> loaded("sys", "not_yet"), loaded("not.imported", "path")
        (None, None)
    """
    module = sys.modules.get(name)
    return module if hasattr(module, attribute) else None


def lazy_names() -> list[str]:
    """Return what this process imports when it is used: modules, and names in modules."""
    return sorted(getattr(sys, "lazy_modules", ()))


def reduce_lazy(lazy: object) -> tuple[Any, ...]:
    """Return how to import the same lazily again."""
    # Without loading it, only its text is known.
    name = repr(lazy)[len(_REPR[0]) : -len(_REPR[1])]
    base, _, last = name.rpartition(".")
    # An attribute of another lazy import: by ``from``, or of a submodule by ``as``.
    if base and any(type(one) in LAZY_TYPES for one in gc.get_referents(lazy)):
        return _import_lazily, (f"lazy from {base} import {last}", last)
    top = name.partition(".")[0]
    # Other submodules, whose statements bind the same name and have been replaced by this one.
    others = [other for other in lazy_names() if other.startswith(f"{top}.") and other != name]
    return _import_lazily, ("\n".join(f"lazy import {one}" for one in [*others, name]), top)


# Lazy imports that have arrived in this process: statements, and the name that they bind.
_arrived: dict[tuple[str, str], None] = {}


def _import_lazily(statements: str, name: str) -> object:
    _arrived[statements, name] = None
    names: dict[str, object] = {"__name__": "__main__"}
    exec(statements, names)
    return names[name]


class _Lazily:
    """A lazy import that has been done here, on its way back to where it may not have been."""

    def __init__(self, statements: str, name: str) -> None:
        self._about = statements, name

    def __reduce__(self) -> tuple[Any, ...]:
        return _import_lazily, self._about


def arrived_lazily(value: object) -> object:
    """Return the pickled form of an object that has arrived as a lazy import, or ``None``."""
    if _arrived and issubclass(type(value), _IMPORTED):
        for statements, name in _arrived:
            # "lazy import a.b", which binds "a", or "lazy from a import b".
            base = statements.split()[-3] if " from " in statements else ""
            found = getattr(sys.modules.get(base), "__dict__", sys.modules).get(name)
            if found is value:
                return _Lazily(statements, name)
    return None


_IMPORTED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)


@contextmanager
def eager_imports() -> Iterator[None]:
    """Import at once within the block, also with ``-X lazy_imports``."""
    if not LAZY_TYPES:
        yield
        return
    python: Any = sys
    mode = python.get_lazy_imports()
    python.set_lazy_imports("normal")
    try:
        yield
    finally:
        python.set_lazy_imports(mode)


def load_own() -> None:
    """Import what this package's modules need and ``-X lazy_imports=all`` has put off.

    A process that forks must have done it, and so must a worker whose task may use up the
    descriptors.
    """
    python: Any = sys
    if not LAZY_TYPES or python.get_lazy_imports() != "all":
        return
    done: set[str] = set()
    with eager_imports():
        while new := [name for name in sys.modules if _is_own(name) and name not in done]:
            for module in new:
                done.add(module)
                names = vars(sys.modules[module])
                for name in [name for name in names if type(names[name]) in LAZY_TYPES]:
                    getattr(sys.modules[module], name)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] == "safepool"
