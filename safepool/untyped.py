"""Floor 0: base classes for type checkers, instead of classes of libraries without types.

Otherwise type checkers treat those classes as unknown, and every class that extends them, also in
the user's program.
"""

from __future__ import annotations

from typing import Any


class Untyped:
    """Accepts any arguments, and has the attributes that derived classes need of their base."""

    compute_batch_size: Any
    configure: Any
    dispatch_table: Any
    effective_n_jobs: Any
    reducer_override: Any
    submit: Any

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None:
        """Accept any arguments."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class UntypedMixin:
    """A second base class, without these attributes; it comes first."""
