"""``safepool env``: what each reader of it understands, and that it is what ``run`` sets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import support_schemas

import safepool
from safepool.cli import main
from safepool.cli.env import written
from safepool.cli.run import PROGRAM_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a path, or a variable that somebody has registered, may be. ``OLD`` is to be removed.
VALUES: dict[str, str | None] = {
    "NUMBER": "2",
    "PATHS": "/a b/c:/d",
    "QUOTES": 'it\'s "so"',
    "ESCAPES": "a\\b\\\\c\\'d \\\\e",
    "FOLDER": "c:\\mine\\",
    "SIGNS": "$HOME `id` ${x} # ! * ~ ; & | < > %",
    "LINES": "one\ntwo\tthree",
    "LETTERS": "p\u00f6d \udcff",
    "EMPTY": "",
    "OLD": None,
}
SHOW = f"import json, os; print(json.dumps({{n: os.environ.get(n) for n in {[*VALUES]}}}))"


def heard(command: list[str]) -> Mapping[str, str | None]:
    ended = subprocess.run(
        [os.fsencode(word) for word in command],
        capture_output=True,
        env={**os.environ, "OLD": "x", "SHOW": SHOW, "PYTHON": sys.executable},
        timeout=60,
        check=True,
    )
    found: dict[str, str | None] = json.loads(ended.stdout)
    return found


def test_a_shell_sets_what_was_said() -> None:
    text = written(VALUES, "sh")

    assert heard(["sh", "-ec", 'eval "$1"; "$PYTHON" -c "$SHOW"', "sh", text]) == VALUES


def test_a_shell_needs_no_quotes_around_numbers() -> None:
    """As many write it: ``eval $(safepool env)``."""
    text = written({"NUMBER": "2", "PATHS": "/a:/b", "OLD": None}, "sh")

    found = heard(["sh", "-ec", 'eval $1; "$PYTHON" -c "$SHOW"', "sh", text])
    assert (found["NUMBER"], found["PATHS"], found["OLD"]) == ("2", "/a:/b", None)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_sets_what_was_said() -> None:
    text = written(VALUES, "fish")

    assert heard(["fish", "-Nc", 'echo $argv[1] | source; $PYTHON -c "$SHOW"', text]) == VALUES


def test_a_dotenv_file_says_the_same() -> None:
    dotenv = pytest.importorskip("dotenv")
    import io

    values = {name: value for name, value in VALUES.items() if name != "LETTERS"}
    found = dotenv.dotenv_values(stream=io.StringIO(written(values, "dotenv")), interpolate=False)

    assert found == {name: value for name, value in values.items() if value is not None}


def test_docker_s_env_file_has_no_quotes_to_take_literally(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    assert main(["env", "--format", "dotenv", "--force"]) == 0

    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert all("'" not in line and '"' not in line for line in lines)
    assert {row.name for row in PROGRAM_VARIABLES if not row.only_if} <= {
        line.partition("=")[0] for line in lines
    }


def test_json_is_one_object_and_null_removes() -> None:
    assert json.loads(written(VALUES, "json")) == VALUES


# One row per command line: what it prints, and what it does not.
LINES: dict[str, tuple[list[str], str, str]] = {
    "sh": ([], "export GOMAXPROCS=6;\n", "MAKEFLAGS"),
    "fish": (["--shell", "fish"], "set -gx CARGO_BUILD_JOBS 3;\n", "MAKEFLAGS"),
    "dotenv": (["--format", "dotenv"], "\nLLAMA_ARG_THREADS=6\n", "MAX_JOBS"),
    "json": (["--format", "json"], '"RAYON_NUM_THREADS": "2"', "MAX_JOBS"),
    "make": (["--makeflags"], "export MAKEFLAGS=-j3;\n", "MAX_JOBS"),
}


@pytest.mark.parametrize("line", LINES)
def test_it_prints_what_run_would_set(
    line: str, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers for what starts processes, all CPUs for a program that is one process."""
    arguments, printed, not_printed = LINES[line]
    for name in ("GOMAXPROCS", "CARGO_BUILD_JOBS", "LLAMA_ARG_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    # What the user has set stays.
    monkeypatch.setenv("MAX_JOBS", "9")

    assert main(["env", "--workers", "3", "--threads", "2", *arguments]) == 0

    out = capsysbinary.readouterr().out.decode()
    assert printed in out
    assert not_printed not in out


def test_it_is_said_again_without_harm(
    capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    for _ in range(2):
        assert main(["env", "--patch", "--force", "--format", "json"]) == 0
        changes = json.loads(capsysbinary.readouterr().out)
        support_schemas.check("env", changes)
        monkeypatch.setenv("PYTHONPATH", changes["PYTHONPATH"])

    start, *rest = changes["PYTHONPATH"].split(os.pathsep)
    assert start.startswith(os.path.dirname(safepool.__file__))
    assert rest == ["/mine"]


def test_two_forms_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--shell", "fish", "--format", "json"]) == 2
    assert main(["env", "--shell", "csh"]) == 2

    assert capsys.readouterr().err.count("\n") == 2


def test_every_variable_has_a_source() -> None:
    assert all(row.source and "{}" in row.form for row in PROGRAM_VARIABLES)
    assert len({row.name for row in PROGRAM_VARIABLES}) == len(PROGRAM_VARIABLES)
