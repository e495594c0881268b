"""Floor 7: safepool as joblib's default backend, in a program that does not know of it.

``safepool.parallel_backend()`` keeps its pool as long as its ``with`` block. A program that was
started by ``safepool run --patch`` has no such block, so a pool lives as long as one call, or
as long as one ``with Parallel() as parallel:``.
"""

from __future__ import annotations

from typing import Any

from safepool.joblib_backend import SafepoolBackend

__all__ = ["DefaultBackend"]


class DefaultBackend(SafepoolBackend):
    """As its base; the workers end with the call."""

    def terminate(self) -> None:
        """End the workers of this ``Parallel`` object."""
        super().terminate()
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return DefaultBackend, ()
