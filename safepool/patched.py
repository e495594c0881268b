"""``Pool`` of ``safepool run --patch``, in the place of ``multiprocessing.pool.Pool``.

The class also replaces ``multiprocess.pool.Pool``. ``isinstance(x, Pool)`` in the program has the
same answer as before: a ``ThreadPool`` is such a pool, and works as before.
"""

from __future__ import annotations

import multiprocessing.pool
import sys
from collections.abc import Callable, Iterable
from typing import Any

from safepool import multiprocessing_pool


def _originals() -> tuple[type, ...]:
    modules = (sys.modules.get(f"{name}.pool") for name in ("multiprocessing", "multiprocess"))
    return tuple(vars(one)["_safepool_replaces"] for one in modules if one is not None)


class _InItsPlace(type):
    """Lets a class stand for the standard ones, and its subclasses for themselves."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (
            cls is Pool and isinstance(instance, _originals())
        )

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or (
            cls is Pool and issubclass(subclass, _originals())
        )


class Pool(multiprocessing_pool.Pool, metaclass=_InItsPlace):
    """Pool for an unmodified program.

    Args:
        processes: The most workers.
        initializer: Function that each worker calls once.
        initargs: Arguments of ``initializer``.
        maxtasksperchild: Replace a worker after this many tasks.
        context: The context of ``multiprocessing`` or ``multiprocess`` that starts the workers.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any | None = None,
    ) -> None:
        if context is not None and type(context).__module__.startswith("multiprocess."):
            # A pickler without this package's arguments would pickle its processes.
            context = multiprocessing.get_context(context.get_start_method())
        super().__init__(processes, initializer, initargs, maxtasksperchild, context)
