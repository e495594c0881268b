"""Decorated functions that workers must find by name."""

from __future__ import annotations

import os

import support_tasks

import safepool


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
