"""What a forked worker has of the program, and a worker of ours has not.

For pools that stand for forked ones (``safepool run --patch``): their program does not know of it,
and nobody changes it. Looked for is what connects a fork with the program, among the globals of
its own modules:

    lock, queue, value of ``multiprocessing``    a worker that runs the script makes another one
    ``RawArray``, an array of NumPy on it, mmap   a worker has a copy

Not covered:
    * Defaults of functions, closures, and what an object of a library holds.
    * What was made after the pool: a fork has not got it, either.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from safepool.transport.marks import MAIN_NAMES, main_space, space_of
from safepool.workers.preload import is_own

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["shared_with_forks"]

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
    """Return the name of a global that a forked worker would share with the program.

    Returns:
        As in ``"lock of __main__"``; empty if there is none.
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
    if kind in _NOTHING or not depth:
        return False
    home = type.__getattribute__(kind, "__module__")
    if home in _SHARED or (home == "mmap" and kind.__name__ == "mmap"):
        return True
    if kind is dict or kind in _SEQUENCES:
        parts = value.values() if kind is dict else value
        return len(value) <= _MOST_ITEMS and any(_is_shared(one, depth - 1) for one in [*parts])
    if home == "numpy" or kind is memoryview:
        return _is_shared(value.obj if kind is memoryview else value.base, depth)
    # A class or an instance of the program's own, or a value of ctypes in shared memory.
    own = value if kind is type else kind
    if home == "ctypes" or own.__module__ in MAIN_NAMES or is_own(sys.modules.get(own.__module__)):
        space = space_of(value)
        return len(space) <= _MOST_ITEMS and any(
            _is_shared(one, depth - 1) for one in [*space.values()]
        )
    return False


_NOTHING = frozenset({int, float, complex, bool, str, bytes, type(None)})
_SEQUENCES = frozenset({list, tuple, set, frozenset})
