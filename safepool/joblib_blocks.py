"""Blocks that reach every thread: joblib's own settings hold only in the thread that makes them.

While a block is open, its backends are joblib's defaults in threads without a setting of their
own. Such threads belong to a library that calls ``Parallel`` in threads (optuna's ``n_jobs=2``),
or compute a call's input. The latest of several open blocks counts. After the end of the last one,
joblib has its own defaults again.

Not covered:
    * A thread that existed before, and has nothing to do with the block: the block's defaults hold
      there as well.
    * ``joblib.parallel_config(backend="safepool")``: joblib itself applies that.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from joblib import parallel

# joblib's names of its default backends, and our names in its table of backends. Ours stay in the
# table, because another thread may be about to look them up.
_NAMES = {
    "DEFAULT_BACKEND": "safepool block",
    "DEFAULT_THREAD_BACKEND": "safepool block, threads",
}


Block: TypeAlias = "Mapping[str, Callable[..., Any]]"
"""Makers of the backends of a block, by joblib's names for them, the keys of `_NAMES`."""


class _Blocks:
    """The open blocks of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Block] = []
        self._before: dict[str, str] = {}

    def enter(self, block: Block) -> None:
        with self._lock:
            if not self._open:
                for kind, ours in _NAMES.items():
                    self._before[kind] = getattr(parallel, kind)
                    parallel.BACKENDS[ours] = functools.partial(self._make, kind)
                    setattr(parallel, kind, ours)
            self._open.append(block)

    def leave(self, block: Block) -> None:
        with self._lock:
            # Compared by identity: an inner block may have equal arguments.
            self._open = [one for one in self._open if one is not block]
            for kind, ours in _NAMES.items():
                # Unless the program has set another one inside the block.
                if not self._open and getattr(parallel, kind) == ours:
                    setattr(parallel, kind, self._before[kind])

    def _make(self, kind: str, **parameters: Any) -> Any:
        with self._lock:
            last = self._open[-1] if self._open else None
            make = parallel.BACKENDS[self._before[kind]] if last is None else last[kind]
        return make(**parameters)

    def forked(self) -> None:
        self._lock = threading.Lock()  # a thread that the child has not may hold it


_blocks = _Blocks()
enter: Callable[[Block], None] = _blocks.enter
leave: Callable[[Block], None] = _blocks.leave
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_blocks.forked)
