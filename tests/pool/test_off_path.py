"""Modules that the program has loaded from files which no import finds: plugins, tests."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import pickle
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safepool import ProcessPool
from safepool.workers import off_path

if TYPE_CHECKING:
    from importlib.machinery import SourceFileLoader

POINT = """
class Point:
    def __init__(self, x):
        self.x = x

def move(point):
    return Point(point.x + 1)
"""


@pytest.fixture(autouse=True)
def _no_module_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plugin_point", "plugin_tree", "plugin_space"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def load(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    file: Path,
    loader: SourceFileLoader | None = None,
    folders: list[str] | None = None,
) -> Any:
    """Load a module as the documentation of importlib has it: "Importing a source file"."""
    spec = importlib.util.spec_from_file_location(
        name, file, loader=loader, submodule_search_locations=folders
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def move_in_a_worker(module: Any) -> int:
    with ProcessPool(1) as pool:
        moved = pool.submit(module.move, module.Point(1)).result(60)
    assert type(moved) is module.Point
    return int(moved.x)


def test_a_module_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "any_name.py"
    file.write_text(POINT)
    assert move_in_a_worker(load(monkeypatch, "plugin_point", file)) == 2


def test_a_file_without_a_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plugin_point"
    file.write_text(POINT)
    loader = importlib.machinery.SourceFileLoader("plugin_point", str(file))
    assert move_in_a_worker(load(monkeypatch, "plugin_point", file, loader)) == 2


def test_a_module_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "inner.py").write_text(POINT)
    load(monkeypatch, "plugin_tree", tmp_path / "__init__.py", folders=[str(tmp_path)])
    inner = importlib.import_module("plugin_tree.inner")
    monkeypatch.setitem(sys.modules, "plugin_tree.inner", inner)
    assert move_in_a_worker(inner) == 2


def test_a_module_below_one_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "inner.py"
    file.write_text(POINT)
    inner = load(monkeypatch, "plugin_space.inner", file)
    monkeypatch.setitem(sys.modules, "plugin_space", types.ModuleType("plugin_space"))
    assert move_in_a_worker(inner) == 2


def test_a_file_that_is_gone_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gone.py"
    file.write_text(POINT)
    module = load(monkeypatch, "plugin_point", file)
    file.unlink()
    with pytest.raises(ModuleNotFoundError, match="plugin_point"):
        move_in_a_worker(module)


def test_modules_of_the_path_are_not_in_the_table() -> None:
    import json.decoder

    import numpy as np

    table = off_path.modules_off_path()
    assert not table.keys() & {json.decoder.__name__, np.__name__, "numpy.linalg", "sys", "os"}


def test_a_module_that_cannot_be_asked_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace without its parent raises; neither that nor an odd path breaks a pool."""
    folder = tmp_path / "plugin_space" / "inner"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), ["no", "folder"]])
    importlib.import_module("plugin_space.inner")
    parent = sys.modules.pop("plugin_space")
    try:
        with pytest.raises(KeyError):
            list(sys.modules["plugin_space.inner"].__path__)
        found = off_path.modules_off_path()
        assert found.keys().isdisjoint({"plugin_space", "plugin_space.inner"})
        with ProcessPool(1) as pool:
            assert pool.submit(abs, -1).result(60) == 1
    finally:
        sys.modules["plugin_space"] = parent
        del sys.modules["plugin_space.inner"], sys.modules["plugin_space"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_function_of_a_module_whose_package_cannot_be_imported_is_an_error_of_its_call(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickle imports the packages above, although the module is there. The pool goes on."""
    folder = tmp_path / "plugin_space"
    folder.mkdir()
    (folder / "point.py").write_text(POINT)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        module = importlib.import_module("plugin_space.point")
    del sys.modules["plugin_space"]
    try:
        with ProcessPool(1) as pool:
            pool.submit(abs, -1).result(60)
            before = [] if alone else [pool.submit(time.sleep, 0) for _ in range(50)]
            assert isinstance(pool.submit(module.move, 1).exception(60), pickle.PicklingError)
            with pytest.raises(pickle.PicklingError):
                list(pool.map(module.move, [1], timeout=60))
            assert [one.result(60) for one in before] == [None] * len(before)
            assert pool.submit(abs, -1).result(60) == 1
    finally:
        del sys.modules["plugin_space.point"]


def test_functions_of_a_test_of_pytest(tmp_path: Path) -> None:
    """Pytest's importlib mode enters ``checks.inner.test_point``, and no import finds it."""
    folder = tmp_path / "checks" / "inner"
    folder.mkdir(parents=True)
    (folder / "test_point.py").write_text(
        f"import safepool\n{POINT}\n"
        "def test_move():\n"
        "    with safepool.ProcessPool(1) as pool:\n"
        "        assert type(pool.submit(move, Point(1)).result(60)) is Point\n"
    )
    pytest_itself = str(Path(sys.executable).with_name("pytest"))
    if not os.path.exists(pytest_itself):
        pytest.skip("needs the command pytest")
    command = [pytest_itself, "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "checks"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "1 passed" in done.stdout, done.stdout
