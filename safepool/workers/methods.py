"""Choice of a pool's start method.

safepool      forked from a server that has no threads (``context``); Linux, by default
loky          a fresh interpreter each, ``__main__`` never imported; the default elsewhere, where
              loky comes with safepool
spawn, forkserver, fork    ``multiprocessing``'s own, if the caller asks for one
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Literal

from safepool.errors import MissingExtraError
from safepool.transport.lazy import eager_imports
from safepool.workers.plan import plan_main
from safepool.workers.standard import METHODS, Standard
from safepool.workers.start import StartMethod

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.context import BaseContext


def find_context(
    wanted: BaseContext | str | None,
    preload: str | Sequence[str] = "auto",
    main: Literal["auto", "run", "value"] = "value",
    *,
    end_subprocesses: bool = False,
) -> BaseContext:
    """Return the context that starts workers.

    Args:
        wanted: A context, or the name of one: ``"safepool"`` (forked from a server, Linux only),
            ``"loky"`` (each worker a fresh interpreter, started by exec), or one of
            ``multiprocessing``'s. ``None`` is the first of these that works here.
        preload: Modules that the server imports ahead.
        main: Source of the program's ``__main__`` in workers, as in :func:`plan_main`.
        end_subprocesses: Whether the programs that tasks have started end with the program.

    Raises:
        MissingExtraError: ``wanted`` is loky, which is not installed.
        ValueError: No context has this name; or ``main`` is ``"run"`` without a script that can be
            run; or the context cannot provide ``end_subprocesses``.
    """
    if wanted is None or wanted == "safepool":
        ours = _server_context(preload, main, end_subprocesses)
        if ours is not None:
            return ours
        if wanted is not None:
            raise ValueError(
                'mp_context="safepool" forks workers from a server of its own, which needs Linux '
                "with /proc, and a program that is not frozen into one file. Leave it out"
            )
    if end_subprocesses:
        raise ValueError(
            "end_subprocesses=True needs workers that safepool forks from a server of its own: on "
            'Linux with /proc, and with mp_context=None or "safepool". Leave it out'
        )
    if wanted is None or wanted == "loky":
        try:
            # Imports register the reducers of loky; -X lazy_imports=all would delay these imports.
            with eager_imports():
                from loky.backend import get_context  # noqa: PLC0415 -- needed on few systems
        except ImportError as error:
            if wanted is None and sys.platform == "linux":
                # Frozen into one file, or without /proc.
                return multiprocessing.get_context("spawn")
            raise MissingExtraError("loky", "pip install 'safepool[loky]'") from error
        context: BaseContext = get_context("loky")
        return context
    return multiprocessing.get_context(wanted) if isinstance(wanted, str) else wanted


def method_of(context: BaseContext) -> StartMethod:
    """Return how a context starts workers."""
    if isinstance(context, StartMethod):
        return context
    return METHODS.get(context.get_start_method(), Standard)(context)


if sys.platform == "linux":
    # Not where it is used: a signal's handler that makes a pool above that import would find half
    # a module.
    from safepool.workers.context import ServerContext


def _server_context(preload: str | Sequence[str], main: str, kept: bool) -> BaseContext | None:
    # A frozen program would be started again instead of an interpreter. The server counts its
    # threads in /proc before each fork.
    if sys.platform == "linux" and not hasattr(sys, "frozen") and _has_proc():
        return ServerContext(preload, plan_main(main), kept=kept)
    return None


def script_method(method: StartMethod, main: str) -> StartMethod:
    """Return the method that knows which names of the script workers have."""
    if sys.platform == "linux" and method.runs_script and main != "value" and _has_proc():
        plan = plan_main("auto")
        if plan.name.rpartition(".")[2] == "__main__":  # spawn runs no such module
            plan = plan.without("it is a package")
        return ServerContext([], plan, asked_only=True)
    return method


def _has_proc() -> bool:
    return os.path.isdir("/proc/self/task")
