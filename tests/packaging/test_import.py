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


# Prints what the program and a worker have loaded of the package when the first task has ended,
# and how many functions and annotations were compiled from text in the program.
FIRST_POOL = """
import json, sys

made = []
sys.addaudithook(lambda event, told: event == "compile" and made.append(told[1] == "<string>"))
import safepool

def modules():
    return [name for name in sys.modules if name.startswith("safepool")]

if __name__ == "__main__":
    with safepool.ProcessPool(1) as pool:
        of_worker = pool.submit(modules).result()
    print(json.dumps([modules(), of_worker, sum(made)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the fork server")
def test_what_the_first_pool_loads(tmp_path: Path) -> None:
    """CPU time of a program that makes one pool; a frozen dataclass compiles six functions."""
    script = tmp_path / "script.py"
    script.write_text(FIRST_POOL)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True
    )
    of_program, of_worker, compiled = json.loads(run.stdout)

    of_server = {"server", "birth", "script", "traces"}
    assert of_server.isdisjoint(name.rpartition(".")[2] for name in of_program)
    assert len(of_program) <= 165
    assert len(of_worker) <= 75
    assert compiled <= 480


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
