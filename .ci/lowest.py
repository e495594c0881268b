"""Print the oldest supported release of each dependency, as pip constraints.

``name>=1.5``, on whatever system, becomes ``name==1.5``. Run it in the project's root, with the
names of the extras to include: ``python .ci/lowest.py demo``. Without any: ``dependencies`` only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<version>[\w.]+)(\s*;.*)?$")


def constraint(requirement: str) -> str:
    """Turn one requirement into the constraint that allows its lower bound only.

    Args:
        requirement: As in pyproject.toml: a name and a lower bound.

    Raises:
        SystemExit: It has no lower bound, or more than one condition.
    """
    found = REQUIREMENT.match(requirement)
    if found is None:
        sys.exit(f"lowest.py: {requirement!r} is not of the form 'name>=version'")
    return f"{found['name']}=={found['version']}"


def main(extras: list[str]) -> None:
    """Print one constraint a line."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    # An extra may name another one of ours: `safepool[demo]`.
    outer = [row for row in requirements if not row.startswith(project["name"] + "[")]
    print("\n".join(constraint(requirement) for requirement in outer))


if __name__ == "__main__":
    main(sys.argv[1:])
