"""Docstrings: fields begin with a noun, and the map of a room has all its modules."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from safepool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[1] / "safepool"
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
FIELD = re.compile(r" {4}[*\w`][^:]*: (.*)")
NO_NOUN = re.compile(r"(What|Of|As|How|It|Asked|Who|Whose|Whoever|Those)\b")


def fields_of(docstring: str) -> Iterator[str]:
    """Yield the first line of each description in a docstring."""
    section, first = "", False
    for line in docstring.splitlines():
        if found := SECTION.fullmatch(line):
            section, first = found[1], True
        elif line and not line.startswith(" "):
            section = ""
        elif section in {"Returns", "Yields"} and first and line:
            first = False
            yield line.strip()
        elif section in {"Args", "Attributes", "Raises"} and (described := FIELD.match(line)):
            yield described[1]


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented() -> Iterator[tuple[Path, Documented]]:
    """Yield what may have a docstring in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Documented):
                yield path, node


def documented_fields() -> Iterator[tuple[str, str]]:
    """Yield each field of the package, after the place of its docstring."""
    for path, node in documented():
        place = f"{path.relative_to(PACKAGE)}, {getattr(node, 'name', 'module')}"
        yield from ((place, field) for field in fields_of(ast.get_docstring(node) or ""))


def test_fields_begin_with_a_noun() -> None:
    """``Number of calls`` is read once; ``How many.`` sends its reader back to the name."""
    fields = list(documented_fields())

    assert len(fields) > 1000
    assert [field for field in fields if NO_NOUN.match(field[1])] == []


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    """So does the first line of each class, function and module."""
    said = [
        (path.name, docstring.partition("\n")[0])
        for path, node in documented()
        if (docstring := ast.get_docstring(node)) and NO_NOUN.match(docstring)
    ]

    assert said == []


def test_the_map_of_each_room_has_all_its_modules() -> None:
    """A new module is found by who looks for it, and one that is gone is looked for by nobody."""
    absent = []
    for path in sorted(PACKAGE.rglob("__init__.py")):
        if path.parent != PACKAGE:  # its map is help(safepool), of public names
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            words = {*re.findall(r"\w+", text)}
            absent += [one for one in path.parent.glob("*.py") if one.stem not in words]

    assert [path for path in absent if path.name != "__init__.py"] == []


def test_the_arguments_of_a_pool_stand_in_groups_with_their_defaults() -> None:
    """``help(safepool.ProcessPool)`` is the reference: none is missing, and no default is old."""
    # The compiler takes the indent away from Python 3.13 on.
    told = inspect.cleandoc(ProcessPool.__doc__ or "").split("Args:\n")[1].split("\n\nA global")[0]
    groups = re.findall(r"^ {4}\*(\w+)\*$", told, re.MULTILINE)
    found = dict(re.findall(r"^ {4}(\w+) \([^;]*; default ([^)]*)\)+:", told, re.MULTILINE))
    parameters = inspect.signature(ProcessPool).parameters.values()

    assert groups == ["Size", "Threads", "Memory", "Failure", "Start", "Observation"]
    assert {
        name: ast.literal_eval(text if text != "(" else "()") for name, text in found.items()
    } == {one.name: one.default for one in parameters}
