"""The error of a command that cannot do its work, and the exit code that it ends with."""

from __future__ import annotations

from safepool.errors import SafepoolError


class CommandError(SafepoolError):
    """A command cannot do its work.

    Args:
        reason: The event, its place and the remedy.
        code: The exit code.
    """

    def __init__(self, reason: str, code: int = 2) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code

    def __str__(self) -> str:
        return self.reason
