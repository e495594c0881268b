"""What `import safepool` costs and promises, asked in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import safepool

ROOT = Path(__file__).parents[2]

# What a statement adds to sys.modules: what a site's .pth files load at start does not count.
ADDED_MODULES = """
import json, sys
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""

# One row per statement that must work with nothing but the standard library installed.
LIGHT = {
    "the package": "import safepool",
    "the limits": "import safepool; safepool.read_limits()",
    "the budget": "import safepool; safepool.cpu_count()",
    "the pool": "import safepool; safepool.ProcessPool",
    "a worker": "import safepool.workers.main",
    "the command": "import safepool.cli",
}


def added_modules(statement: str) -> list[str]:
    """Run a statement in a fresh interpreter and list what it has imported."""
    run = subprocess.run(
        [sys.executable, "-c", ADDED_MODULES.format(statement=statement)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    added: list[str] = json.loads(run.stdout)
    return added


@pytest.mark.parametrize("what", LIGHT)
def test_nothing_third_party_is_imported(what: str) -> None:
    """A program pays for NumPy, joblib and the like only if it uses them."""
    roots = {module.partition(".")[0] for module in added_modules(LIGHT[what])}

    # multiprocessing gives `__main__` a second name.
    # The last is of the standard library and not on its list (3.15).
    own = sys.stdlib_module_names | {"__mp_main__", "_missing_stdlib_info"}
    assert roots - own == {"safepool"}


def test_importing_the_package_loads_no_other_module_of_it() -> None:
    """Public names load on first use; but joblib is to find the backend of its name."""
    ours = {name for name in added_modules("import safepool") if name.startswith("safepool")}

    finder = {"safepool.registration", "safepool.threads", "safepool.threads.imports"}
    assert ours == {"safepool"} | finder


@pytest.mark.parametrize("name", safepool.__all__)
def test_a_public_name_resolves_and_is_documented(name: str) -> None:
    """What the package promises is there, and says what it is."""
    assert getattr(safepool, name).__doc__
    assert name in dir(safepool)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    """`hasattr` and `from safepool import x` work as with any module."""
    assert not hasattr(safepool, "no_such_name")


def test_the_public_names_are_sorted() -> None:
    """The list is sorted and has no name twice: a merge shows as one line."""
    assert list(safepool.__all__) == sorted(set(safepool.__all__))


def test_dir_lists_what_is_public_and_nothing_else() -> None:
    """What an editor or a prompt proposes after ``safepool.``."""
    assert dir(safepool) == sorted({*safepool.__all__, "limits", "threads"})
