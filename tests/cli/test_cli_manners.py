"""Manners at a terminal: width, colours, letters, examples, broken outputs, Ctrl-C."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from support_processes import still_alive

import safepool
import safepool.cli
from safepool.cli import main
from safepool.cli.colour import paint_for, plain
from safepool.cli.limits_screen import read_screen
from safepool.cli.watch import Line

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(safepool.__file__).parent.parent
HERE = Path(__file__).parent
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="terminals and signals of POSIX")


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return every subcommand there is."""
    parser = safepool.cli._parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {"": parser, **action.choices}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "safepool", *arguments]


def environ(**variables: str) -> dict[str, str]:
    """Return an environment that says nothing of colours or letters but ``variables``."""
    left_out = ("NO_COLOR", "FORCE_COLOR", "TERM", "LC_ALL", "LANG", "PYTHONUNBUFFERED")
    rest = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**rest, "PYTHONPATH": str(REPOSITORY), **variables}


# Width.


@pytest.mark.parametrize("path", sorted(HERE.glob("*screens/*.txt")), ids=lambda path: path.stem)
def test_a_screen_fits_80_columns_but_for_what_must_stay_in_one_piece(path: Path) -> None:
    """A path, or a variable with one: they are to be copied."""
    assert too_wide(path.read_text()) == []


def too_wide(text: str) -> list[str]:
    """Return the lines of more than 80 columns that have no path in them."""
    return [line for line in text.splitlines() if len(line) > 80 and "/" not in line]


@pytest.mark.parametrize("columns", ["40", "80", "300"])
@pytest.mark.parametrize("name", commands())
def test_help_fits_80_columns_whatever_the_terminal(
    name: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    assert main([*name.split(), "--help"]) == 0

    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80 or not line.isascii()] == []


# Help.


def examples(name: str) -> list[str]:
    """Return the example lines of a command's help."""
    text = commands()[name].format_help()
    _, _, rest = text.partition("\nexamples:\n")
    return [line.strip() for line in rest.split("\n\n")[0].splitlines()]


def words(line: str) -> list[str]:
    """Return safepool's arguments in one: without variables, the pipe and the explanation."""
    typed = re.split(r"  +| \| ", line)[0]
    first, *rest = [word for word in shlex.split(typed) if not re.match(r"[A-Z_]+=", word)]
    assert first == "safepool"
    return rest


@pytest.mark.parametrize("name", commands())
def test_every_command_has_examples_and_says_its_exit_codes(name: str) -> None:
    assert len(examples(name)) >= 2
    assert "Exit codes:" in commands()[name].format_help()


EXAMPLES = [line for name in commands() for line in examples(name)]


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_understood(line: str) -> None:
    """By the parser, as `main` gives it what was typed."""
    ours, theirs = safepool.cli._split(words(line))
    options = safepool.cli._parser().parse_args(ours)

    assert importlib.util.find_spec(f"safepool.cli.{options.module}")
    assert bool(theirs) == (" -- " in line)


# One row per word that is no command, and what the line must say.
TYPOS = {
    "docter": "Did you mean: safepool doctor",
    "limit": "Did you mean: safepool limits",
    "ls": "To start a program: safepool run -- ls ...",
    "qqq": "there is no command 'qqq', only limits, doctor",
}


@on_posix
@pytest.mark.parametrize("word", TYPOS)
def test_a_word_that_is_no_command_gets_what_may_have_been_meant(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("safepool: error: there is no command ")
    assert TYPOS[word] in err
    assert err.count("\n") == 1


def test_doctor_without_a_name_is_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for arguments in (["--json"], ["limits", "--json"], ["doctor", "--json"]):
        assert main(arguments) in {0, 1}
        told.append(json.loads(capsys.readouterr().out))

    assert told[0].keys() == told[1].keys() == told[2].keys()
    assert told[0]["because"] == told[2]["because"]


# Colours.


class Terminal(io.StringIO):
    """What says that it is one."""

    def isatty(self) -> bool:
        return True


# One row per environment: whether a terminal gets colours, and whether a file does.
COLOURS: dict[str, tuple[dict[str, str], bool, bool]] = {
    "nothing is set": ({}, True, False),
    "NO_COLOR": ({"NO_COLOR": "1"}, False, False),
    "NO_COLOR is 0": ({"NO_COLOR": "0"}, False, False),
    "NO_COLOR is empty": ({"NO_COLOR": ""}, True, False),
    "FORCE_COLOR": ({"FORCE_COLOR": "1"}, True, True),
    "FORCE_COLOR is empty": ({"FORCE_COLOR": ""}, True, False),
    "both": ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
    "a dumb terminal": ({"TERM": "dumb"}, False, False),
    "a dumb terminal, by force": ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
}


@on_posix
@pytest.mark.parametrize("case", COLOURS)
def test_colours_are_for_terminals_that_want_them(case: str) -> None:
    variables, on_a_terminal, in_a_file = COLOURS[case]

    assert (paint_for(Terminal(), variables) is not plain) == on_a_terminal
    assert (paint_for(io.StringIO(), variables) is not plain) == in_a_file
    assert (paint_for(None, variables) is not plain) == in_a_file


def test_colours_change_no_letter() -> None:
    """Neither the words nor where they stand; what is coloured is told apart by words too."""
    paint = paint_for(None, {"FORCE_COLOR": "1"})
    screen = read_screen()
    line = Line(seconds=1.0, cpus=1.0, used_cpus=1.0, periods=10, throttled_periods=3)

    for shown in (screen, line):
        coloured = shown.as_text(paint)
        assert ESCAPE.sub("", coloured) == shown.as_text()
        assert coloured != shown.as_text()


@on_posix
@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_real_terminal_gets_colours_unless_it_wants_none(no_color: str) -> None:
    variables = {"TERM": "xterm", **({"NO_COLOR": no_color} if no_color else {})}

    text = on_a_terminal([], environ(**variables))

    assert bool(ESCAPE.search(text)) == (no_color == "")
    assert "Verdict" in text
    assert too_wide(ESCAPE.sub("", text)) == []


def on_a_terminal(arguments: list[str], variables: dict[str, str]) -> str:
    """Run the command with a new terminal as its output, and return what it wrote."""
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            command(*arguments), stdout=theirs, stderr=subprocess.PIPE, env=variables
        )
    finally:
        os.close(theirs)
    with open(ours, "rb", buffering=0) as reader:
        written = b"".join(chunks(reader))
    _, err = process.communicate(timeout=60)
    assert err == b""
    return written.decode("ascii")


def chunks(reader: io.RawIOBase) -> Iterator[bytes]:
    """Yield what comes until the other side is closed, which is EIO on Linux."""
    while True:
        try:
            chunk = reader.read(4096)
        except OSError:
            return
        if not chunk:
            return
        yield chunk


# Letters.


@on_posix
@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii:strict"}])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 0),
        (["--help"], 0),
        (["doctor", "gr\u00fcn"], 1),
        (["doctor", b"\xff\xfe"], 1),
        (["run", "--explain", "--", b"\xff\xfe"], 127),
        (["gr\u00fcn"], 2),
        (["--pid", "\u0661"], 2),
        (["demo", "--plot", "/gr\u00fcn/x.svg"], 1),
    ],
)
def test_ascii_is_enough(
    arguments: list[str | bytes], code: int, variables: dict[str, str]
) -> None:
    """Also for names of any bytes: an error is a line, never a traceback."""
    ended = subprocess.run(
        [*command(), *arguments],
        capture_output=True,
        env=environ(**variables),
        timeout=60,
        check=False,
    )

    # 1 where the machine that the tests run on has a problem.
    assert ended.returncode in ({0, 1} if arguments == [] else {code})
    assert ended.stdout.isascii()
    assert b"Traceback" not in ended.stderr
    if not variables.get("LC_ALL"):
        assert ended.stderr.isascii()


# Outputs that cannot be written.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [[], ["--json"], ["doctor", "json"], ["--watch"], ["demo", "--tasks", "1"]]
)
def test_a_full_disk_is_one_line(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            command(*arguments),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environ(PYTHONUNBUFFERED=unbuffered),
            timeout=60,
            check=False,
        )

    assert ended.stderr == ("safepool: error: cannot write the output: No space left on device\n")
    assert ended.returncode == 1


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr("safepool.cli.limits_screen.read_screen", refuse)

    assert main([]) == 1

    assert capsys.readouterr() == (
        "",
        "safepool: error: the system refuses: Permission denied: /x\n",
    )


# One row per stream that was closed before the start: shell text, and the exit codes it may have.
CLOSED = {
    "output": ('exec "$@" >&-', {0, 1}),
    "error": ('exec "$@" --pid 999999999 2>&-', {2}),
    "input": ('exec "$@" <&-', {0, 1}),
    "error of the doctor": ('exec "$@" --json doctor no_such_module 2>&-', {1}),
    "all of run": ('exec "$@" run --explain -- true <&- >&- 2>&-', {0}),
    "all": ('exec "$@" <&- >&- 2>&-', {0, 1}),
}


@on_posix
@pytest.mark.parametrize("stream", CLOSED)
def test_a_stream_that_was_closed_is_not_missed(stream: str) -> None:
    script, codes = CLOSED[stream]

    ended = subprocess.run(
        ["sh", "-c", script, "sh", *command()],
        capture_output=True,
        text=True,
        env=environ(),
        timeout=60,
        check=False,
    )

    assert ended.returncode in codes
    assert ended.stderr == ""
    # What was meant for an error goes nowhere else.
    if stream == "error of the doctor":
        assert json.loads(ended.stdout)["libraries"][0]["error"]
    else:
        assert (ended.stdout == "") == (stream != "input")


# Ctrl-C.


HANG = "import time; open('imported', 'w').close(); time.sleep(60)"
PROGRAM = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "print('here', flush=True); time.sleep(60)"
)

# One row per command that takes time: its arguments, the file or line that says that it is in the
# middle of it, and how it ends.
INTERRUPTED = {
    "watch": (["--watch"], 130),
    "watch as JSON": (["--json", "--watch"], 130),
    "doctor": (["doctor", "hang"], 130),
    # The program's own.
    "run": (["run", "--", sys.executable, "-c", PROGRAM], -signal.SIGINT),
}


@on_posix
@pytest.mark.parametrize("what", INTERRUPTED)
def test_ctrl_c_is_silent_and_leaves_no_process(what: str, tmp_path: Path) -> None:
    """A real signal, to everything that the terminal would send it to."""
    arguments, code = INTERRUPTED[what]
    (tmp_path / "hang.py").write_text(HANG)
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**environ(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        start_new_session=True,
    )
    try:
        wait_until_busy(process, tmp_path / "imported")
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert (process.returncode, err) == (code, "")
    assert still_alive([child.pid for child in family], after_s=5) == []


def wait_until_busy(process: subprocess.Popen[str], imported: Path) -> None:
    """Wait for a first line, or for the hanging import."""
    assert process.stdout is not None
    if "doctor" not in process.args:  # type: ignore[operator]
        assert process.stdout.readline() != ""
        return
    deadline = time.monotonic() + 60
    while not imported.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert imported.exists()
