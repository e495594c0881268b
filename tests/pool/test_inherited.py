"""What a pool that stands for forks looks for among the program's globals."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from safepool.pool import inherited

if TYPE_CHECKING:
    import pytest


class Proxy:
    """Stands for something that is not there, as a web framework's for the current request."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("there is no request")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("there is no request")


class Measured(type):
    @property
    def __dict__(cls) -> Any:  # type: ignore[override]
        raise RuntimeError("not to be asked")


class Strange(metaclass=Measured):
    __module__ = 5  # type: ignore[assignment]


def _released() -> memoryview:
    view = memoryview(b"text")
    view.release()
    return view


def test_globals_of_any_kind_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    itself: list[Any] = []
    itself.append(itself)
    space = {
        "add": np.add,
        "vectorized": np.vectorize(abs),
        "polynomial": np.poly1d([1, 2]),
        "kind": np.dtype("f8"),
        "limits": np.finfo(float),
        "steps": np.nditer(np.zeros(3)),
        "matrix": np.ma.masked_array([1, 2]),
        "request": Proxy(),
        "metaclass": Strange,
        "strange": Strange(),
        "released": _released(),
        "itself": itself,
    }
    monkeypatch.setattr(inherited, "main_space", lambda: space)
    assert not inherited.shared_with_forks().endswith(" of __main__")

    def use() -> tuple[Any, ...]:
        return (np, Proxy, Strange)

    assert inherited.data_of(use) is not None


def test_memory_that_a_fork_shares_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with mmap.mmap(-1, 64) as memory:
        for held in (memory, memoryview(memory), np.frombuffer(memory), [{"inside": memory}]):
            monkeypatch.setattr(inherited, "main_space", lambda held=held: {"held": held})
            assert inherited.shared_with_forks() == "held of __main__"
        monkeypatch.undo()
        del held
