"""Being told of an import."""

from __future__ import annotations

import importlib
import sys

from safepool.threads.imports import AfterImport


def test_two_that_are_told_of_the_same_import_do_not_ask_each_other_for_ever() -> None:
    told: list[str] = []
    first = AfterImport(lambda name, _module: told.append(f"first: {name}"))
    second = AfterImport(lambda name, _module: told.append(f"second: {name}"))
    sys.modules.pop("colorsys", None)
    try:
        for finder in (first, second):
            finder.start(frozenset({"colorsys"}))
        importlib.import_module("colorsys")
    finally:
        for finder in (first, second):
            finder.stop()
    assert sorted(told) == ["first: colorsys", "second: colorsys"]
