"""Modules that a fork server preloads: the program's libraries, and those of its tasks.

Only installed modules are preloaded: those of the standard library and of ``site-packages``. The
import of a module of the program, from its folder or an editable install, would run the program's
code. The installed modules among them are

* the modules that the program has imported. Behind a front end (a notebook, IPython, pytest),
  which imports a thousand modules that no task needs, only the modules that the program's own
  modules refer to: modules, functions and classes among the globals of ``__main__`` and of other
  modules that are not installed;
* the modules that tasks have imported, as their workers report (``Imports``): the next worker has
  them.

The server looks for effects of each import beside its modules (``traces``). A module whose import
leaves threads, descriptors, children or other state that workers must not have is left out from
then on, and the server is started again without it. The tables here are the exceptions.

Not covered:
    * A random generator that a library makes at its import, other than Python's and NumPy's own:
      every worker draws the same numbers from it, as under ``fork``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType

from safepool.transport.lazy import lazy_names
from safepool.transport.marks import own_dict

NOT_PRELOADED = {
    "safepool": "in the server as far as it is needed there",
    # Modules of the interpreter and of front ends.
    "sitecustomize": "run by each interpreter itself",
    "usercustomize": "run by each interpreter itself",
    "readline": "sets up the terminal",
    "rlcompleter": "sets up the terminal",
    "IPython": "a front end",
    "ipykernel": "a front end",
    "debugpy": "a debugger, which is asked for by the program",
    "pydevd": "a debugger, which is asked for by the program",
    "pdb": "a debugger, which sets up the terminal",
    "antigravity": "opens a browser",
    "this": "prints",
    # Modules whose import starts threads without a recognisable name (measured).
    "onnxruntime": "starts a thread",
    "openvino": "starts a thread",
}
"""Installed packages that are not imported ahead unless asked for by name, and why not."""

_FRONT_ENDS = frozenset({"IPython", "_pytest", "bpython", "ipykernel", "ptpython"})

BACKGROUND_THREADS = frozenset(
    {
        # jemalloc, background_thread:true: its child restores the thread when needed (jemalloc,
        # src/background_thread.c, background_thread_postfork_child). In the wheels of pyarrow and
        # polars. 400 of 400 children worked.
        "jemalloc_bg_thd",
        # polars: removes its spill files; a child that does not spill never needs it.
        "polars-ooc-clea",
    }
)
"""Names of threads that a fork may lose, as in ``/proc/PID/task/TID/comm`` (15 characters)."""


# Modules that tasks have imported in workers, in their order. Kept for the life of the process.
_learned: dict[str, None] = {}
_MOST_LEARNED = 20_000

# Modules of the program at the last look, by name, and those of them that are preloaded.
_seen: tuple[dict[str, int], list[str]] = ({}, [])

_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def modules_of_the_program() -> list[str]:
    """Return the installed modules that the program has imported, or refers to, by now."""
    global _seen  # noqa: PLW0603 -- of the process
    modules = dict(sys.modules)
    if _FRONT_ENDS.isdisjoint(modules):
        # The same modules, by identity, as at the start of another pool.
        now = dict(zip(modules, map(id, modules.values()), strict=True))
        if now != _seen[0]:
            names = [n for n, one in modules.items() if _may_be_preloaded(n) and _is_there(one)]
            _seen = now, names
        found = _seen[1]
    else:
        found = [*_referred_to(modules)]
    return [*dict.fromkeys([*found, *_lazy()])]


def modules_learned() -> list[str]:
    """Return the installed modules that tasks have imported."""
    return [*_learned]


def learn(told: bytes) -> None:
    """Remember the imports of a task, from a worker's :meth:`Imports.new`."""
    names = told.decode(errors="replace").split("\n")
    if len(_learned) < _MOST_LEARNED:
        _learned.update((name, None) for name in names if name and _may_be_preloaded(name))


class Imports:
    """The installed modules that this process imports, from now on."""

    def __init__(self) -> None:
        self._count = len(sys.modules)

    def __bool__(self) -> bool:
        return len(sys.modules) != self._count

    def new(self) -> bytes:
        """Return the modules since the last call, in order, for :func:`learn`; possibly none."""
        # The newest are the last of the table. If modules were removed, some are reported again.
        begin, self._count = self._count, len(sys.modules)
        # A list of all: another thread may import meanwhile.
        recent = [*sys.modules.items()][min(begin, self._count) :]
        names = [name for name, module in recent if _may_be_preloaded(name) and _is_there(module)]
        return "\n".join(names).encode(errors="replace")


def _may_be_preloaded(name: object) -> bool:
    # A program may have put anything there.
    return type(name) is str and name.partition(".")[0] not in NOT_PRELOADED


def _is_there(module: object) -> bool:
    """Tell whether a module is installed, and was not made by the program."""
    return _is_installed(_origin_of(_namespace(module).get("__spec__")))


def _origin_of(spec: object) -> str | None:
    try:
        origin = getattr(spec, "origin", None)
    except Exception:  # noqa: BLE001 -- user code
        return None
    return origin if type(origin) is str else None


def _is_installed(origin: str | None) -> bool:
    return origin is not None and (
        origin.startswith(_STANDARD_LIBRARY) or any(part in origin for part in _PACKAGES)
    )


def _namespace(module: object) -> Mapping[str, object]:
    # Not by its own attributes: one that is loaded at the first look (LazyLoader) would be.
    return own_dict(module) if issubclass(type(module), ModuleType) else {}


def _referred_to(modules: Mapping[str, object]) -> Iterator[str]:
    """Yield the installed modules that modules of the program refer to."""
    tops: set[str] = set()
    for name, module in modules.items():
        if name != "__main__" and (not _may_be_preloaded(name) or not is_own(module)):
            continue
        for value in [*_namespace(module).values()]:
            found = _module_of(value)
            if found in modules and _may_be_preloaded(found) and _is_there(modules[found]):
                yield found
                if issubclass(type(value), ModuleType):
                    tops.add(found)
    # "import a.b" leaves but "a" among the globals. Modules that "a" itself has imported cost
    # nothing.
    for name, module in modules.items():
        if not _may_be_preloaded(name):
            continue
        top, _, rest = name.partition(".")
        public = not rest.startswith("_") and "._" not in rest
        if rest and top in tops and public and _is_there(module):
            yield name


def _lazy() -> Iterator[str]:
    """Yield the modules that the program imports lazily: the server imports them ahead of time."""
    for name in lazy_names():
        top = name.partition(".")[0]
        spec = None if top in sys.builtin_module_names else _find_spec(top)
        if _may_be_preloaded(name) and _is_installed(_origin_of(spec)):
            yield name


def is_own(module: object) -> bool:
    """Tell whether a module is of the program, and not installed: from its folder, say."""
    origin = _origin_of(_namespace(module).get("__spec__"))
    return origin is not None and os.sep in origin and not _is_installed(origin)


def _module_of(value: object) -> str:
    kind = type(value)
    if issubclass(kind, ModuleType):
        found: object = _namespace(value).get("__name__")
    elif kind in (FunctionType, BuiltinFunctionType) or issubclass(kind, type):
        try:
            found = value.__module__
        except Exception:  # noqa: BLE001 -- user code
            found = None
    else:
        found = None
    return found if type(found) is str else ""


def _find_spec(top: str) -> object:
    try:
        return importlib.util.find_spec(top)
    except Exception:  # noqa: BLE001 -- a finder of the program
        return None
