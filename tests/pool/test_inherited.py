"""What a pool that stands for forks looks for among the program's globals."""

from __future__ import annotations

import functools
import importlib
import mmap
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from safepool import ProcessPool
from safepool.pool import executor, inherited
from safepool.workers.unlike import summary, unlike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType


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


OWN = """
import functools
import own_limits

LEVEL = 1
COUNT = 0
TABLE, ITEMS, FILLED = {}, [1], {}
LATER = iter(())

def level(_=0):
    return LEVEL, own_limits.LIMIT, no_such

def limits():
    own_limits.MODE = 3
    return own_limits.LIMIT, own_limits.MODE

def count():
    global COUNT
    COUNT += 1

def fill():
    FILLED["a"] = 1
    return ITEMS

@functools.wraps(level)
def wrapped():
    return level()

class Called:
    def __call__(self):
        return LEVEL

    def method(self):
        return TABLE

    @staticmethod
    def plain():
        return ITEMS

    @classmethod
    def of_class(cls):
        return LATER

def by_class():
    return Called

called = Called()

def through():
    return called, wrapped, level
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module of the program's own."""
    (tmp_path / "own_limits.py").write_text("LIMIT, MODE = 5, 1\n")
    (tmp_path / "own_levels.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_levels")
    del sys.modules["own_levels"], sys.modules["own_limits"]


# One row per way to name data: a function, and what is found of it by module.
NAMED: dict[str, tuple[Callable[[Any], Any], dict[str, set[str]]]] = {
    "global, attribute of a module": (
        lambda own: own.level,
        {"own_levels": {"LEVEL"}, "own_limits": {"LIMIT"}},
    ),
    "attribute that is set": (lambda own: own.limits, {"own_limits": {"LIMIT"}}),
    "global that is set": (lambda own: own.count, {}),
    "container that is changed": (lambda own: own.fill, {}),
    "partial": (lambda own: functools.partial(own.Called()), {"own_levels": {"LEVEL"}}),
    "method": (lambda own: own.Called().method, {"own_levels": {"TABLE"}}),
    "static method": (lambda own: vars(own.Called)["plain"], {"own_levels": {"ITEMS"}}),
    "class method": (lambda own: vars(own.Called)["of_class"], {"own_levels": {"LATER"}}),
    "class": (lambda own: own.by_class, {"own_levels": {"LEVEL", "TABLE", "ITEMS", "LATER"}}),
    "other functions": (
        lambda own: own.through,
        {"own_levels": {"LEVEL", "called"}, "own_limits": {"LIMIT"}},
    ),
}


@pytest.mark.parametrize("named", NAMED)
def test_the_data_that_code_names_is_found(named: str, own: ModuleType) -> None:
    make, expected = NAMED[named]
    found = {module: {*names} for module, names in inherited.data_of(make(own)).items()}
    assert found == expected


def test_what_wraps_itself_is_given_up() -> None:
    def around() -> None:
        """Wrap itself."""

    around.__wrapped__ = around  # type: ignore[attr-defined]
    assert inherited._unwrapped(around) is around
    assert inherited.data_of(around) == {}


def test_a_value_is_compared_with_the_modules_own_here(own: ModuleType) -> None:
    told = {
        "own_levels": {
            "LEVEL": summary(1) or b"",
            "ITEMS": summary([2]) or b"",
            "GONE": summary(1) or b"",
        },
        "no_such_module": {"X": b"x"},
    }
    assert unlike(told) == ["ITEMS of own_levels", "GONE of own_levels"]
    own.LEVEL = 2  # type: ignore[attr-defined]
    assert unlike(told)[0] == "LEVEL of own_levels"


def test_what_workers_lack_of_a_module_is_said(
    own: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both for a call and for a map, once for each function."""
    monkeypatch.setattr(executor, "_stands_for_forks", lambda: True)
    monkeypatch.setattr(executor, "shared_with_forks", lambda: "")
    own.LEVEL, own.no_such = 2, None
    own.ITEMS = [3]
    with ProcessPool(1) as pool:
        assert pool.submit(own.Called()).result(timeout=60) == 1
        assert [*pool.map(own.Called.plain, timeout=60)] == []
        assert pool.submit(own.Called.plain).result(timeout=60) == [1]
    assert "value of LEVEL of own_levels" in caplog.text
    assert "value of ITEMS of own_levels" in caplog.text


def test_a_program_that_shares_memory_with_forks_gets_forks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if sys.platform != "linux":
        pytest.skip("there are forks")
    monkeypatch.setattr(executor, "_stands_for_forks", lambda: True)
    monkeypatch.setattr(executor, "shared_with_forks", lambda: "lock of __main__")
    with ProcessPool(1) as pool:
        assert pool._mp_context.get_start_method() == "fork"  # type: ignore[union-attr]
    assert "inherit lock of __main__" in caplog.text


def test_a_program_that_shares_nothing_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "main_space", dict)
    monkeypatch.setattr(inherited, "is_own", lambda _: False)
    assert inherited.shared_with_forks() == ""
