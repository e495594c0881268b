"""Equal values have equal fingerprints in two processes, in whatever order their sets are."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safepool.transport.fingerprints import fingerprint


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass
class Settings:
    names: set[str]
    table: dict[frozenset[str], int]


# One row per kind of set.
VALUES: dict[str, object] = {
    "text": {"a", "b", "c", "d"},
    "frozen": frozenset({b"a", b"b", b"c", b"d"}),
    "in an instance": Settings({"a", "b", "c"}, {frozenset({"p", "q", "r"}): 1}),
    "members": [{*Colour}, {Access.READ, Access.READ | Access.WRITE}],
    "types": {int, str, Settings, Colour},
    "mixed": {1, "a", None, (1, frozenset({"u", "v", "w"}))},
}


def prints() -> str:
    return "\n".join(f"{name} {fingerprint(value)!r}" for name, value in VALUES.items())


def test_the_order_of_sets_does_not_count() -> None:
    program = f"import {Path(__file__).stem} as tests; print(tests.prints())"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1


def test_other_sets_have_other_fingerprints() -> None:
    values = [
        {"a"},
        {"b"},
        {"a", "b"},
        frozenset({"a"}),
        {"1"},
        {1},
        {1.0},
        {("1",)},
        [{"a"}, {"a"}],
    ]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_what_has_no_order_is_looked_at_all_the_same() -> None:
    one, other = Settings({"a"}, {}), Settings({"b"}, {})
    assert fingerprint([{"x", one.__class__}, one]) != fingerprint([{"x", one.__class__}, other])
    found = fingerprint({object(), "a"})
    assert found


class LazyModule(ModuleType):
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} would load it")


def test_a_module_that_is_loaded_late_is_not_loaded_for_it() -> None:
    assert fingerprint(LazyModule("late")) == fingerprint(ModuleType("late"))
