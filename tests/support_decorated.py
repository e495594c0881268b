"""Decorated functions that workers must find by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import support_tasks

import safepool

if TYPE_CHECKING:
    import threading


@safepool.worker
def pools() -> list[tuple[str, int]]:
    return support_tasks.native_pools("scipy.linalg")


@safepool.worker
def add(x: int, y: int = 0) -> int:
    """Add two numbers."""
    return x + y


@safepool.worker
def divide(x: int, y: int) -> float:
    return x / y


@safepool.worker
def variable() -> str | None:
    return os.environ.get("OPENBLAS_NUM_THREADS")


@safepool.worker
def nested_variables() -> tuple[str | None, str | None]:
    inner = variable()
    return os.environ.get("OPENBLAS_NUM_THREADS"), inner


@safepool.worker
def wait(inside: threading.Event, may_go: threading.Event) -> None:
    inside.set()
    may_go.wait(30)


@safepool.worker
def pools_after(inside: threading.Event, other: threading.Thread) -> list[tuple[str, int]]:
    """Look at the pools after another thread has left its own call."""
    inside.set()
    other.join(30)
    return support_tasks.native_pools("scipy.linalg")
