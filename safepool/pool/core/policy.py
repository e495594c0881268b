"""Policy of a call beside its arguments: its time limit, and how often it may be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# Attribute in which a decorated function keeps its policy; functools.wraps copies it.
_ATTRIBUTE = "__safepool_policy__"


class Policy(NamedTuple):
    """Rules for a call.

    Attributes:
        timeout_s: Seconds from its start after which it is ended; ``None`` is never.
        retries: Number of times that it is run again when its worker was lost; ``None`` is not
            said.
    """

    timeout_s: float | None = None
    retries: int | None = None

    def otherwise(self, other: Policy) -> Policy:
        """Return this policy, and ``other``'s where this one says nothing."""
        return Policy(
            timeout_s=other.timeout_s if self.timeout_s is None else self.timeout_s,
            retries=other.retries if self.retries is None else self.retries,
        )

    def attach(self, function: Callable[..., Any]) -> None:
        """Let pools that are given this function find the policy."""
        setattr(function, _ATTRIBUTE, self)


NO_POLICY = Policy()


def policy_of(function: Callable[..., Any], default: Policy) -> Policy:
    """Return the policy for calls of ``function``.

    Args:
        function: The function; a decorated one has its own policy, also inside of
            ``functools.partial``.
        default: The pool's policy.
    """
    own = getattr(function, _ATTRIBUTE, None) or getattr(
        getattr(function, "func", None), _ATTRIBUTE, None
    )
    if not isinstance(own, Policy):
        return default
    return own if default is NO_POLICY else own.otherwise(default)
