"""The schemas of what commands print for programs: in the package, and strict enough to fail."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import support_schemas

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = ("cluster", "demo", "doctor", "env", "limits", "report", "top", "watch")

LINE = {"seconds": 1.0, "cpus": 2.5, "used_cpus": None}
LINE |= {"periods": None, "throttled_periods": None, "throttled_us": None}

# One row per line of --watch that its schema does not allow, and what is said of it.
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a key that is new": (LINE | {"more": 1}, "watch: more is not described"),
    "a key that is gone": ({"seconds": 1.0}, "watch: no cpus"),
    "another type": (LINE | {"cpus": "2.5"}, "watch.cpus: '2.5' is no number"),
    "a flag for a number": (LINE | {"periods": True}, "watch.periods: True is no integer or null"),
}


def test_a_line_is_what_its_schema_says() -> None:
    support_schemas.check("watch", LINE)


@pytest.mark.parametrize("case", WRONG)
def test_what_a_schema_does_not_say_is_found(case: str) -> None:
    value, said = WRONG[case]

    with pytest.raises(AssertionError, match=said):
        support_schemas.check("watch", value)


def keys(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key that a schema allows, with what the schema says of it."""
    if isinstance(part, dict):
        properties = part.get("properties", {})
        yield from properties.items()
        for inner in (*part.values(), *properties.values()):
            yield from keys(inner)
    for inner in part if isinstance(part, list) else ():
        yield from keys(inner)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_schema_describes_each_key_in_words_of_json(command: str) -> None:
    """The schemas are the only description of the keys."""
    described = {
        key: said.get("description", said.get("$ref", ""))
        for key, said in keys(support_schemas.schema(f"{command}.json"))
    }

    assert [key for key, text in described.items() if not text] == []
    assert [key for key, text in described.items() if re.search(r"\bNone\b|:class:", text)] == []


def test_there_is_a_schema_for_each_command_that_prints_json() -> None:
    names = {file.name for file in (files("safepool.cli") / "schemas").iterdir()}

    assert names == {f"{command}.json" for command in COMMANDS}
    for name in names:
        assert support_schemas.schema(name)["$schema"].endswith("2020-12/schema")
