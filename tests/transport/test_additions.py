"""What a script has put into modules is found, and nothing else is taken for it."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest

from safepool.transport import marks
from safepool.transport.additions import Addition, add, additions_to, homes
from safepool.transport.held import sources_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ABOVE = "added_by_test"


def test_nothing_is_taken_for_the_scripts() -> None:
    """Of all that is imported here."""
    assert additions_to(homes([*sys.modules])) == []


def ours(source: str) -> Any:
    """Return a function of the script."""
    return eval(f"lambda x: {source}", marks.main_space())


# How a module is before, how the script adds to it, and what is found there.
ADDED: dict[str, tuple[dict[str, Any], Callable[[Any, Any], object], list[tuple[str, Any]]]] = {
    "a key": ({"r": {}}, lambda m, f: m.r.update(k=f), [("item", "k")]),
    "a key in another": ({"r": {"a": {}}}, lambda m, f: m.r["a"].update(k=f), [("item", "k")]),
    "an ordered key": ({"r": OrderedDict()}, lambda m, f: m.r.update(k=f), [("item", "k")]),
    "the end of a list": ({"r": [1]}, lambda m, f: m.r.append(f), [("last", None)]),
    "the start of a list": ({"r": [1]}, lambda m, f: m.r.insert(0, f), [("first", None)]),
    "a member": ({"r": {1}}, lambda m, f: m.r.add(f), [("member", None)]),
    "an attribute": ({"f": len}, lambda m, f: setattr(m, "f", f), [("attribute", "f")]),
    "data": ({"r": {}}, lambda m, _: m.r.update(k=1), []),
    "a large container": ({"r": dict.fromkeys(range(2000))}, lambda m, f: m.r.update(k=f), []),
}


@pytest.mark.parametrize("how", ADDED)
def test_an_addition_is_found_and_made_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a module that is as it was before."""
    before, change, expected = ADDED[how]
    module, function = types.ModuleType(ABOVE), ours("x")
    monkeypatch.setitem(sys.modules, ABOVE, module)
    copies = [{name: copied(value) for name, value in before.items()} for _ in range(2)]
    vars(module).update(copies[0])
    assert additions_to([ABOVE]) == []

    change(module, function)
    found = additions_to([ABOVE])
    after = {name: getattr(module, name) for name in before}
    vars(module).update(copies[1])
    for one in found * 2:  # a second time changes nothing
        add(one)

    assert [(one.how, one.key) for one in found] == expected
    assert all(type(one) is Addition and one.value is function for one in found)
    if found:
        assert {name: getattr(module, name) for name in before} == after


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, copied(one)) for key, one in value.items())
    return value.copy() if hasattr(value, "copy") else value


@pytest.mark.parametrize(
    ("cells", "expected"), [([""], ["import json\n"]), (["", "a"], ["", "a"])]
)
def test_a_script_that_ipython_runs_has_no_cells(
    cells: list[str], expected: list[str], tmp_path: Path
) -> None:
    """``ipython script.py`` has the list of cells as well, with an empty text."""
    script = tmp_path / "script.py"
    script.write_text("import json\n")

    assert [*sources_of({"In": cells, "__file__": str(script)})] == expected
