"""Nothing is imported from the working directory that the program does not import from there."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import util
from pathlib import Path

import pytest

import safepool
from safepool.workers.safe_path import is_safe, safe_path

LIBRARIES = Path(os.__file__).parent
THIRD_PARTY = {"cloudpickle", "joblib", "loky", "numpy", "psutil", "threadpoolctl", "tqdm"}
HOSTILE = """
import posix
mark = posix.open("hijacked", posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND, 0o600)
posix.write(mark, b"NAME\\n")
posix.close(mark)
raise ImportError("NAME of the working directory")
"""
PROGRAM = """
import os, sys
import safepool

def f(x):
    import decimal, json
    return x + int(decimal.Decimal(json.dumps(x))), sys.flags.safe_path, os.environ.get(VARIABLE)

VARIABLE = "PYTHONSAFEPATH"
if __name__ == "__main__":
    for method in sys.argv[1:]:
        with safepool.ProcessPool(1, mp_context=None if method == "default" else method) as pool:
            print(method, *pool.submit(f, 2).result())
"""


def folder_of_an_attacker(folder: Path) -> Path:
    """Make a folder in which every library has a namesake."""
    folder.mkdir()
    own = {"sitecustomize", "usercustomize", "safepool", "__main__"}
    for name in {*sys.stdlib_module_names, *THIRD_PARTY, *own}:
        (folder / f"{name}.py").write_text(HOSTILE.replace("NAME", name))
    return folder


# The resource tracker of a program is started by the first pool that needs one.
@pytest.mark.skipif(sys.platform != "linux", reason="the default is loky elsewhere, and no fork")
@pytest.mark.parametrize(
    "methods", [("default", "loky"), ("fork", "spawn", "forkserver")], ids="+".join
)
def test_namesakes_in_the_working_directory_are_not_imported(
    methods: tuple[str, ...], tmp_path: Path
) -> None:
    """Into no worker, server or resource tracker; the variable that sees to it stays unseen."""
    (tmp_path / "program.py").write_text(PROGRAM)
    here = folder_of_an_attacker(tmp_path / "here")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(Path(safepool.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *methods],
        cwd=here, env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip

    assert not (here / "hijacked").exists(), (here / "hijacked").read_text()
    assert (ran.stderr, ran.returncode) == ("", 0)
    assert ran.stdout.splitlines() == [f"{method} 4 {method != 'fork'} None" for method in methods]


# By what sys.path has ("." is the working directory): is the directory left out for the standard
# library, and for what is in site-packages?
PATHS: dict[str, tuple[list[str], bool, bool]] = {
    "a script elsewhere": (["/app", "LIBRARY", "SITE"], True, True),
    "a prompt": (["", "LIBRARY", "SITE"], False, False),
    "-m": (["HERE", "LIBRARY", "SITE"], False, False),
    "by another name": (["HERE/../here/.", "LIBRARY", "SITE"], False, False),
    "behind both": (["/app", "LIBRARY", "SITE", "HERE"], True, True),
    "between both": (["/app", "LIBRARY", "HERE", "SITE"], True, False),
    "elsewhere": (["/app", "LIBRARY", "/other"], True, True),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_directory_counts_where_the_program_has_it(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is ahead of what is imported."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    known = {"HERE": str(tmp_path / "here"), "LIBRARY": str(LIBRARIES), "SITE": "/site"}
    entries, standard, third = PATHS[path]
    monkeypatch.setattr(
        sys, "path", [known.get(one, one.replace("HERE", known["HERE"])) for one in entries]
    )
    module = type(sys)("of_site")
    module.__file__ = "/site/of_site/__init__.py"
    monkeypatch.setitem(sys.modules, "of_site", module)

    assert (is_safe(), is_safe("of_site")) == (standard, third)
    with safe_path():
        assert (util._args_from_interpreter_flags()[-1:] == ["-P"]) is standard  # type: ignore[attr-defined]
    assert "-P" not in util._args_from_interpreter_flags()  # type: ignore[attr-defined]


def test_a_library_of_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that has it at the end of its path, and the library there."""
    module = type(sys)("of_here")
    module.__file__ = str(tmp_path / "of_here.py")
    monkeypatch.setitem(sys.modules, "of_here", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/app", str(LIBRARIES), str(tmp_path)])

    assert (is_safe(), is_safe("of_here")) == (True, False)


def test_a_directory_that_is_gone_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "path", ["", str(LIBRARIES)])

    assert is_safe()


def test_a_frozen_program_gets_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyInstaller's knows the command of a resource tracker by its options, all of them."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with safe_path():
        assert "-P" not in util._args_from_interpreter_flags()  # type: ignore[attr-defined]
