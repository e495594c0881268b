"""Objects that a forked worker inherits from the program, and a worker of the fork server lacks.

Pools in the place of forked pools use the module (``safepool run --patch``), because the program
relies on forks. The module looks for:

    what connects a fork with the program         lock, queue and value of ``multiprocessing``,
    (`shared_with_forks`)                         ``RawArray``, mmap, in globals of its own modules
    what the program has set in modules           data in globals of modules that a function names,
    (`WatchingScheduler`)                         or what it calls in the program's own modules

Globals of the script itself are delivered in both cases. A worker, which has imported the module,
finds out whether the program has set a global: the pool sends a call of its own before the
function's first call.

Not covered:
    * Defaults of functions, closures, and contents of library objects.
    * Objects made after the pool: a fork lacks them as well.
    * Globals that the called code itself sets, and containers that it changes: a cache, as a rule.
    * A function among a call's arguments; modules that are imported inside of functions.
    * Pools of ``max_tasks_per_child``, whose calls are counted.
"""

from __future__ import annotations

import abc
import dis
import functools
import itertools
import sys
import types
from typing import TYPE_CHECKING, Any

from safepool.machine import tell_once
from safepool.pool.core.policy import Policy
from safepool.pool.shell.scheduler import Scheduler
from safepool.transport.marks import (
    MAIN_NAMES,
    PLAIN,
    attribute_of,
    codes_in,
    main_space,
    space_of,
)
from safepool.workers.preload import is_own
from safepool.workers.unlike import CONTAINERS, summary, unlike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future


# By the last part of the module's name: "multiprocess" is a fork of the module.
_SHARED = frozenset(
    f"{package}.{module}"
    for package in ("multiprocessing", "multiprocess")
    for module in ("synchronize", "queues", "sharedctypes", "heap")
)
_MOST_DEEP = 3
# A larger container is data.
_MOST_ITEMS = 256


def shared_with_forks() -> str:
    """Return the name of a global that a forked worker would share with the program, or ``""``.

    Such as ``"lock of __main__"``.
    """
    for module, space in _own_spaces():
        for name, value in [*space.items()]:
            if not name.startswith("__") and _is_shared(value, _MOST_DEEP):
                return f"{name} of {module}"
    return ""


def _own_spaces() -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "__main__", main_space()
    for name, module in [*sys.modules.items()]:
        if name not in MAIN_NAMES and name.partition(".")[0] != "safepool" and is_own(module):
            yield name, space_of(module)


def _is_shared(value: Any, depth: int) -> bool:
    kind = type(value)
    if kind in PLAIN or not depth:
        return False
    home = _home_of(kind)
    if home in _SHARED or (home == "mmap" and kind.__name__ == "mmap"):
        return True
    if kind is dict or kind in _SEQUENCES:
        parts = value.values() if kind is dict else value
        return len(value) <= _MOST_ITEMS and any(_is_shared(one, depth - 1) for one in [*parts])
    if kind is memoryview or (home == "numpy" and kind.__name__ in _ARRAYS):
        return _is_shared(_memory_of(value), depth)
    # A class or an instance of the program's own, or a value of ctypes in shared memory.
    own = _home_of(value) if kind is type else home
    if home == "ctypes" or own in MAIN_NAMES or is_own(sys.modules.get(own)):
        space = space_of(value)
        return len(space) <= _MOST_ITEMS and any(
            _is_shared(one, depth - 1) for one in [*space.values()]
        )
    return False


def _home_of(kind: type) -> str:
    home = attribute_of(kind, "__module__")
    return home if type(home) is str else ""


def _memory_of(value: Any) -> Any:
    try:
        return value.obj if type(value) is memoryview else value.base
    except ValueError:  # it was released
        return None


_ARRAYS = frozenset({"ndarray", "memmap", "matrix", "recarray"})
_SEQUENCES = frozenset({list, tuple, set, frozenset})


class WatchingScheduler(Scheduler):
    """Scheduler that warns of globals of modules that workers lack."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Code of the functions that were looked at, or need not be.
        self._met: set[object] = {unlike.__code__}

    def _meet(self, function: Callable[..., Any]) -> None:
        """Find the data that a function would lack, before its first call."""
        code = getattr(_unwrapped(function), "__code__", None)
        if code is None or code in self._met:
            return
        self._met.add(code)
        told = data_of(function)
        if told:
            name, policy = "a comparison of globals", Policy(timeout_s=None, retries=0)
            asked = self.submit(unlike, (told,), {}, name=name, policy=policy)
            asked.add_done_callback(_tell)


def _tell(asked: Future[list[str]]) -> None:
    if asked.cancelled() or asked.exception() is not None or not asked.result():
        return
    names = asked.result()
    tell_once(
        f"workers do not have the program's value of {', '.join(names)}. They import the module "
        "again, and only forks of this process have the value. Pass it as an argument, or set it "
        "in the workers by initializer= and initargs="
    )


def data_of(function: Callable[..., Any]) -> dict[str, dict[str, bytes]]:
    """Return the data in globals of modules that a function, and the functions it calls, name.

    By module and name, what :func:`~safepool.workers.unlike.summary` says. The function is
    followed into the script and the program's own modules.
    """
    search = _Search(function)
    told: dict[str, dict[str, bytes]] = {}
    for (module, key), value in search.found.items():
        if (module, key) in search.changed or key.startswith("__") or not _is_told_of(module):
            continue
        said = summary(value)
        if said is not None:
            told.setdefault(module, {})[key] = said
    return told


class _Search:
    """A search through code, from a function on.

    Attributes:
        found: By module and name, the globals that code names and that are not followed.
        changed: Names that code may set or change.
    """

    def __init__(self, function: Any) -> None:
        self.found: dict[tuple[str, str], Any] = {}
        self.changed: set[tuple[str, str]] = set()
        self._todo = [function]
        seen: set[object] = set()
        while self._todo and len(seen) < _MOST_FUNCTIONS:
            one = _unwrapped(self._todo.pop())
            if type(one) is type:
                self._todo += filter(_is_followed, space_of(one).values())
            elif type(one) is types.FunctionType and one.__code__ not in seen:
                seen.add(one.__code__)
                self._go_through(one)

    def _go_through(self, function: types.FunctionType) -> None:
        space, home = function.__globals__, str(function.__globals__.get("__name__"))
        named = _named_by(function.__code__)
        self.changed |= {(home, name) for name in named.stored}
        for name, attributes in named.loaded.items():
            value = space.get(name)
            if type(value) is not types.ModuleType:
                self._take(home, name, space, named)
                continue
            for key in attributes:
                self._take(value.__name__, key, space_of(value), named)
            self.changed |= {(value.__name__, key) for key in named.set_on.get(name, ())}

    def _take(self, module: str, name: str, space: Mapping[str, Any], named: _Named) -> None:
        if name not in space:
            return
        value = space[name]
        if _is_followed(value):
            self._todo.append(value)
        if type(value) in _CODE:
            return
        self.found[module, name] = value
        if named.changes and type(value) in CONTAINERS:
            self.changed.add((module, name))


_MOST_FUNCTIONS = 1000
_CODE = frozenset(
    {type, abc.ABCMeta, functools.partial, types.ModuleType}
    | {types.FunctionType, types.BuiltinFunctionType, types.MethodType}
)
# Methods of containers by which they are changed.
_CHANGES = frozenset(
    {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"}
    | {"remove", "setdefault", "update"}
)


def _is_told_of(module: str) -> bool:
    top = module.partition(".")[0]
    return module not in MAIN_NAMES and top not in sys.stdlib_module_names and top != "safepool"


def _is_followed(value: Any) -> bool:
    """Tell whether this is code of the script, or of the program's own modules."""
    one = _unwrapped(value)
    if type(one) is not types.FunctionType and type(one) is not type:
        return False
    home = one.__module__
    return home in MAIN_NAMES or (type(home) is str and is_own(sys.modules.get(home)))


def _unwrapped(value: Any) -> Any:
    """Return the function in a partial, a bound method, a wrapper or an object that is called."""
    for _ in range(16):
        if type(value) in (types.FunctionType, type):
            inner = space_of(value).get("__wrapped__")
        elif type(value) in (types.MethodType, staticmethod, classmethod):
            inner = value.__func__
        elif type(value) is functools.partial:
            inner = value.func
        else:
            inner = space_of(value).get("__wrapped__") or space_of(type(value)).get("__call__")
        if inner is None:
            break
        value = inner
    return value


class _Named:
    """Globals that code names.

    Attributes:
        loaded: By name, the attributes that are asked of each.
        set_on: By name, the attributes that are set on each.
        stored: Names that it sets.
        changes: Whether it may change containers.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, set[str]] = {}
        self.set_on: dict[str, set[str]] = {}
        self.stored: set[str] = set()
        self.changes = False

    def add(self, step: dis.Instruction, after: dis.Instruction | None) -> None:
        """Note the effect of one instruction, given the next one."""
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            self.stored.add(step.argval)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            self.changes = True
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            attributes = self.loaded.setdefault(step.argval, set())
            if after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                attributes.add(after.argval)
            elif after is not None and after.opname in ("STORE_ATTR", "DELETE_ATTR"):
                self.set_on.setdefault(step.argval, set()).add(after.argval)


@functools.lru_cache(maxsize=1024)
def _named_by(code: types.CodeType) -> _Named:
    named = _Named()
    for inner in codes_in(code):
        steps = [step for step in dis.get_instructions(inner) if step.opname != "EXTENDED_ARG"]
        for step, after in itertools.zip_longest(steps, steps[1:]):
            named.add(step, after)
        named.changes = named.changes or not _CHANGES.isdisjoint(inner.co_names)
    return named
