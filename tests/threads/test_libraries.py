"""The look at the loader's list: it sees what was loaded, and costs nothing otherwise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import support_natives as natives

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the loader's list is Linux's")

# Each program prints what it saw before, and after, it loaded something.
SEEN = {
    "an extension module": "import _decimal, sys; assert '_decimal' in sys.modules",
    "a plain dlopen": "import _ctypes_test, ctypes",
    "several at once": "import _sqlite3, _lzma, _bz2",
}


@pytest.mark.parametrize("what", SEEN)
def test_a_new_library_is_seen_once(what: str, tmp_path: Path) -> None:
    code = (
        "import json\nfrom safepool.threads.native import LoadedLibraries\n"
        "libraries = LoadedLibraries()\n"
        "first = libraries.changed()\nall_of_them = libraries.fresh()\n"
        "before = libraries.changed()\n"
        f"{SEEN[what]}\n"
        "after = libraries.changed()\nnew = libraries.fresh()\n"
        "print(json.dumps([first, len(all_of_them) > 3, before, after, new, "
        "libraries.changed()]))\n"
    )

    first, many, before, after, new, again = natives.run(code, folder=tmp_path, cpus=None)

    assert (first, many, before, after, again) == (True, True, False, True, False)
    assert all(".so" in path for path in new)


def test_a_dlopen_without_an_import_is_seen(tmp_path: Path) -> None:
    """The number of modules does not tell: that is what the loader is asked for."""
    code = (
        "import ctypes, json, sys, _ctypes_test\n"
        "import importlib.util, _bz2, os\n"
        "from safepool.threads.native import LoadedLibraries\n"
        "path = importlib.util.find_spec('_sqlite3').origin\n"
        "libraries = LoadedLibraries()\nlibraries.fresh()\n"
        "modules = len(sys.modules)\n"
        "ctypes.CDLL(path)\n"
        "print(json.dumps([len(sys.modules) - modules, libraries.changed(), "
        "any('sqlite3' in p for p in libraries.fresh())]))\n"
    )

    assert natives.run(code, folder=tmp_path, cpus=None) == [0, True, True]


def test_an_unloaded_library_leaves_no_dangling_pointer(tmp_path: Path) -> None:
    """The last of the list is held on to; others may go, and later ones are still seen."""
    code = (
        "import _ctypes, ctypes, json, importlib.util\n"
        "from safepool.threads.native import LoadedLibraries\n"
        "def path(name): return importlib.util.find_spec(name).origin\n"
        "libraries = LoadedLibraries()\nlibraries.fresh()\n"
        "seen = []\n"
        "for name in ['_bz2', '_lzma', '_sqlite3', '_decimal'] * 3:\n"
        "    handle = _ctypes.dlopen(path(name), 2)\n"
        "    new = libraries.fresh()\n"
        "    _ctypes.dlclose(handle)\n"
        "    seen.append(bool(new))\n"
        "    assert not libraries.changed()\n"
        "print(json.dumps(seen[:4]))\n"
    )

    assert natives.run(code, folder=tmp_path, cpus=None) == [True] * 4


def test_without_the_loaders_list_modules_are_counted(tmp_path: Path) -> None:
    """As on macOS and Windows: an import is seen, and nothing is claimed about files."""
    code = (
        "import ctypes, json\n"
        "class Program:\n"
        "    def __init__(self, *a, **k): self._handle = 0\n"
        "import safepool.threads.native as l\n"
        "ctypes.CDLL = Program\n"
        "libraries = l.LoadedLibraries()\n"
        "first, files = libraries.changed(), libraries.fresh()\n"
        "before = libraries.changed()\nimport colorsys\n"
        "print(json.dumps([first, files, before, libraries.changed()]))\n"
    )

    assert natives.run(code, folder=tmp_path, cpus=None) == [True, None, False, True]
