"""Lazy imports (Python 3.15) are sent, preloaded and capped like others, and done by tasks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from support_processes import run_python

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.version_info < (3, 15), reason="imports are lazy from 3.15 on")


def run(program: str, *options: str, cwd: Path) -> tuple[str, str]:
    """Run a program from a file; return its output and its errors."""
    (cwd / "program.py").write_text(program)
    done = run_python(*options, "program.py", cwd=cwd)
    return done.stdout, done.stderr


# What the script imports lazily, what a function of it does with that, and what comes of it.
SHAPES = {
    "a module": ("lazy import wave", "wave.__name__", "wave"),
    "a module by another name": ("lazy import wave as w", "w.__name__", "wave"),
    "a submodule": ("lazy import xml.dom.minidom", "xml.dom.minidom.__name__", "xml.dom.minidom"),
    "a submodule by another name": ("lazy import xml.sax as x", "x.__name__", "xml.sax"),
    "a function": ("lazy from colorsys import hls_to_rgb as f", "f.__name__", "hls_to_rgb"),
    "a module from a package": ("lazy from xml import sax as x", "x.__name__", "xml.sax"),
    "two of one package": (
        "lazy import xml.dom.minidom\nlazy import xml.sax",
        "f'{xml.dom.minidom.__name__} {xml.sax.__name__}'",
        "xml.dom.minidom xml.sax",
    ),
}

SCRIPT = """
import sys
{imports}
import safepool

def names(_=None):
    return {use}

class Named:
    def __call__(self):
        return names()

def returned():
    made = Named()
    made.now = made()
    return made

with safepool.ProcessPool(1, initializer=names) as pool:
    found = {{pool.submit(names).result(60) for _ in range(3)}}
    found |= {{*pool.map(names, range(3))}}
    found.add(pool.submit(lambda: names()).result(60))
    found.add(pool.submit(Named()).result(60))
    found.add(pool.submit(returned).result(60).now)
    print(*found)
print(sorted({{"wave", "xml", "colorsys"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_function_of_the_script_names_a_lazy_import(shape: str, tmp_path: Path) -> None:
    """The worker imports it; the program does not."""
    imports, use, expected = SHAPES[shape]
    program = SCRIPT.format(imports=imports, use=use)

    assert run(program, cwd=tmp_path) == (f"{expected}\n[]\n", "")


def test_a_script_that_imports_all_lazily(tmp_path: Path) -> None:
    """``-X lazy_imports=all``: every statement of the script, of its libraries, and of ours."""
    imports, use, expected = SHAPES["two of one package"]
    program = SCRIPT.format(imports=imports.replace("lazy ", ""), use=use)

    assert run(program, "-X", "lazy_imports=all", cwd=tmp_path) == (f"{expected}\n[]\n", "")


ARRAYS = """
import sys
{lazy}import numpy as np
import safepool

def loaded():
    return "numpy.linalg" in sys.modules

def threads():
    import threadpoolctl
    product = np.ones((64, 64)) @ np.ones((64, 64))
    return product[0, 0], {{row["num_threads"] for row in threadpoolctl.threadpool_info()}}

with safepool.ProcessPool(1) as pool:
    print(pool.submit(loaded).result(60))
    print("numpy" in sys.modules)
    print(*pool.submit(threads).result(60))
    print(pool.submit(np.sum, np.ones(1_000_000)).result(60))
"""


@pytest.mark.parametrize("mode", ["normal", "all"])
def test_a_library_that_is_imported_lazily_is_preloaded_and_capped(
    mode: str, tmp_path: Path
) -> None:
    """The server imports it, as if the program had; the program does when it uses it."""
    program = ARRAYS.format(lazy="lazy " if mode == "normal" else "")
    printed, errors = run(program, "-X", f"lazy_imports={mode}", cwd=tmp_path)

    assert (printed, errors) == ("True\nFalse\n64.0 {1}\n1000000.0\n", "")


def test_all_lazily_and_no_descriptor_left(tmp_path: Path) -> None:
    """What our own modules need is imported when a worker starts, not under a task."""
    program = """
import safepool, support_errors
for method in None, "loky":
    with safepool.ProcessPool(1, method) as pool:
        error = pool.submit(support_errors.fail_without_descriptors, "no descriptor").exception(60)
        print(type(error).__name__, error.errno, pool.submit(abs, -3).result(60))
"""
    assert run(program, "-X", "lazy_imports=all", cwd=tmp_path) == ("OSError 24 3\n" * 2, "")
