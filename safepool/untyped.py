"""Floor 0: what type checkers see in the place of a class of a library without types.

They take such a class for unknown, and then every class that extends it, even in the user's
program.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Untyped", "UntypedMixin"]


class Untyped:
    """Accepts any arguments, and has the attributes that derived classes need of their base."""

    compute_batch_size: Any
    configure: Any
    dispatch_table: Any
    effective_n_jobs: Any
    reducer_override: Any
    submit: Any

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None:
        """Be made of anything."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class UntypedMixin:
    """Has none of these attributes, and is named before the other base."""
