"""The command line: what it prints where, and the exit code it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import safepool
from safepool.cli import demo, main

REPOSITORY = Path(safepool.__file__).parent.parent

# One row per way to ask for help: what the text must mention.
HELP: dict[str, tuple[list[str], list[str]]] = {
    "the command": (
        ["--help"],
        [
            "limits",
            "doctor",
            "run",
            "env",
            "demo",
            "report",
            "top",
            "--json",
            "--pid",
            "--watch",
            "--version",
            "130",
        ],
    ),
    "run": (
        ["run", "--help"],
        [
            *("--workers", "--threads", "--reserve", "--force", "--explain", "--patch"),
            *("--makeflags", "examples:", "safepool run --", "126", "127", "python -I"),
        ],
    ),
    "env": (["env", "--help"], ["--shell", "--format", "--workers", "--makeflags", "examples:"]),
    "limits": (["limits", "--help"], ["--json"]),
    "doctor": (
        ["doctor", "--help"],
        [
            *("LIBRARY", "--timeout", "--json", "examples:", "safepool doctor numpy"),
            *("--pid N            without a library:", "--watch            without a library:"),
            "Exit codes",
        ],
    ),
    "report": (["report", "--help"], ["FILE", "--json", "examples:", "Exit codes", "perfetto"]),
    "top": (["top", "--help"], ["PID", "--json", "examples:", "Exit codes", "your own user"]),
    "demo": (["demo", "--help"], ["--tasks", "--points", "--cpus", "--bound", "--plot", "--json"]),
}

# One row per wrong use: what the one line on standard error must name.
WRONG: dict[str, tuple[list[str], str]] = {
    "unknown command": (["fly"], "fly"),
    "unknown option": (["demo", "--fast"], "--fast"),
    "no number of a process": (["top", "many"], "'many'"),
    "no tasks": (["demo", "--tasks", "0"], "from 1 to 100000, found '0'"),
    "more tasks than memory": (["demo", "--tasks", "1000000000000"], "from 1 to 100000"),
    "tasks in words": (["demo", "--tasks", "many"], "'many'"),
    "too few points": (["demo", "--points", "15"], "at least 16, found '15'"),
    "no time": (["doctor", "--timeout", "0", "numpy"], "at least 0.1, found '0'"),
    "unknown option of the doctor": (["doctor", "numpy", "--fast"], "--fast"),
    "a process and a library": (
        ["doctor", "--pid", "1", "numpy"],
        "cannot be combined with a library",
    ),
    "no process": (["--pid", "0"], "at least 1, found '0'"),
    "no CPUs": (["demo", "--cpus", "0"], "at least 0.01, found '0'"),
    "negative CPUs": (["demo", "--cpus=-1"], "found '-1'"),
    "CPUs that are not a number": (["demo", "--cpus", "nan"], "found 'nan'"),
    "a picture of another kind": (["demo", "--plot", "x.gif"], ".svg or .png, found 'x.gif'"),
    "endless bound": (["demo", "--bound", "inf"], "found 'inf'"),
}


@pytest.mark.parametrize("asked", HELP)
def test_help_names_every_option_and_fits_the_screen(
    asked: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments, mentioned = HELP[asked]

    assert main(arguments) == 0

    out, err = capsys.readouterr()
    assert [word for word in mentioned if word not in out] == []
    assert err == ""
    assert [line for line in out.splitlines() if len(line) > 80 or not line.isascii()] == []


@pytest.mark.parametrize("use", WRONG)
def test_wrong_use_is_one_line_on_standard_error(
    use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, named = WRONG[use]

    assert main(arguments) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("safepool")
    assert named in err
    assert err.count("\n") == 1


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"safepool {safepool.__version__}\n"


@pytest.mark.parametrize("arguments", [["--json"], ["limits", "--json"], ["--json", "limits"]])
def test_json_may_stand_before_or_after_the_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # 1 where the machine that the tests run on has a problem.
    assert main(arguments) in {0, 1}
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize("package", ["numpy", "scipy"])
def test_a_missing_package_is_named_with_its_remedy(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and exit code 2, before anything is started."""
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else object()
    )

    assert main(["demo"]) == 2

    assert capsys.readouterr() == (
        "",
        (
            f"safepool: error: {package} is not installed. "
            "Install it with: pip install 'safepool[demo]'\n"
        ),
    )


def test_a_picture_without_matplotlib_names_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert main(["demo", "--plot", "x.svg"]) == 2

    assert capsys.readouterr() == (
        "",
        (
            "safepool: error: matplotlib is not installed. "
            "Install it with: pip install 'safepool[plot]'\n"
        ),
    )


def test_a_group_that_stays_is_an_error_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_one() -> int:
        raise demo.host().groups.GroupLeftError("/sys/fs/cgroup/cpu/x", "busy")

    monkeypatch.setattr(demo, "run", leave_one)

    assert main(["demo"]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert "rmdir /sys/fs/cgroup/cpu/x" in err
    assert err.count("\n") == 1


def test_ctrl_c_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", be_interrupted)

    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str], unbuffered: str) -> None:
    """As in ``safepool | head -1``, here with a reader that has left before the first line.

    Without a buffer the first print fails, with one only the flush at the end does.
    """
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run(
            [sys.executable, "-W", "error", "-m", "safepool", *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            timeout=60,
            check=False,
        )
    finally:
        os.close(write_end)

    assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_command_imports_neither_numpy_nor_the_demo() -> None:
    """``safepool`` answers at once, also where NumPy takes seconds to load."""
    code = (
        "import sys, safepool.cli; safepool.cli.main([])\n"
        "unwanted = ('numpy', 'scipy', 'safepool.cli.demo', 'safepool.cli.doctor')\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
        check=True,
    )

    assert ended.stdout.splitlines()[-1] == "[]"
