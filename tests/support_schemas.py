"""Compare what a command prints with ``--json`` with the schema that the package publishes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def schema(name: str) -> Any:
    """Return a schema by the name of its file."""
    file = files("safepool.cli") / "schemas" / name
    return json.loads(file.read_text(encoding="utf-8"))


def check(name: str, told: object) -> None:
    """Fail unless a value is what its schema says, without a key that the schema does not have."""
    whole = schema(f"{name}.json")
    problems = _problems(told, whole, whole, name)
    assert not problems, "\n".join(problems)


def _problems(value: Any, part: Any, whole: Any, place: str) -> list[str]:
    if "$ref" in part:
        file, _, path = part["$ref"].partition("#/")
        part = whole = schema(file) if file else whole
        for key in path.split("/"):
            part = part[key]
        return _problems(value, part, whole, place)
    if "anyOf" in part:
        found = [_problems(value, one, whole, place) for one in part["anyOf"]]
        return min(found, key=len)
    if "const" in part or "enum" in part:
        allowed = part.get("enum", [part.get("const")])
        return [] if value in allowed else [f"{place}: {value!r} is none of {allowed}"]
    names = [part["type"]] if isinstance(part["type"], str) else part["type"]
    kinds = tuple(kind for name in names for kind in TYPES[name])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return [f"{place}: {value!r} is no {' or '.join(names)}"]
    if isinstance(value, list):
        inner = [(f"{place}[{at}]", one, part["items"]) for at, one in enumerate(value)]
    elif isinstance(value, dict):
        known, others = part.get("properties", {}), part.get("additionalProperties")
        missing = [f"{place}: no {key}" for key in part.get("required", []) if key not in value]
        extra = [f"{place}: {key} is not described" for key in value if key not in known]
        if missing or (extra and others is None):
            return missing + extra
        inner = [(f"{place}.{key}", one, known.get(key, others)) for key, one in value.items()]
    else:
        inner = []
    return [each for where, one, of in inner for each in _problems(one, of, whole, where)]
