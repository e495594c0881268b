"""README.md is run: its Python blocks here, its two commands by ``.ci/run``.

And all of them together, with the examples of the public docstrings, in each way to start a
program.

A fenced ``python`` block is a script of its own, started in a fresh interpreter. One that
cannot be run says why, in the line above it: ``<!-- not run: needs a Dask cluster -->``.
"""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import error_texts
import pytest

import safepool

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README.md")

# A fence may be indented, as in a list. What stands above it may be a comment for us.
BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]*(?P<comment>[^\n]*?)[ ]*-->[ ]*\n(?:[ ]*\n)?)?"
    r"^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)

# Each block takes some seconds; on a machine that has much else to do, thirty times as long.
EXAMPLE_LIMIT_S = 240
# And all of them together.
ALL_LIMIT_S = 400

# The commands that .ci/run reads from the file, and the extra that each one installs.
COMMANDS = {"test-command": "test", "demo-command": "demo"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        line: Line number of its first line of text.
        language: The word after the fence.
        comment: What the HTML comment right above it says; empty without one.
        text: Its text, without the indent of the fence.
    """

    line: int
    language: str
    comment: str
    text: str


def blocks() -> list[Block]:
    """List the fenced blocks of README.md, in order."""
    text = README.read_text() if README.exists() else ""
    return [
        Block(
            line=text.count("\n", 0, found.start("text")) + 1,
            language=found["language"],
            comment=found["comment"] or "",
            text=re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE),
        )
        for found in BLOCK.finditer(text)
    ]


EXAMPLES = {
    f"line {block.line}": block
    for block in blocks()
    if block.language in ("python", "py", "python3") and not block.comment.startswith("not run:")
}


@pytest.mark.timeout(EXAMPLE_LIMIT_S + 20)
@pytest.mark.parametrize("place", EXAMPLES)
def test_an_example_runs(place: str, tmp_path: Path) -> None:
    """A reader who pastes the block into a file sees it work."""
    example = EXAMPLES[place]
    script = tmp_path / "example.py"
    script.write_text(example.text)

    run = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=EXAMPLE_LIMIT_S,
        check=False,
    )

    assert run.returncode == 0, f"README.md, {place}:\n{run.stdout}"


# Both kinds of initializer: a function of the program, and what a module has.
INITIALIZERS = """
import json
settings = {}
def begin(number):
    settings["number"] = number
def look(x):
    return settings["number"] + x
with safepool.ProcessPool(2, initializer=begin, initargs=(3,)) as pool:
    assert list(pool.map(look, range(3))) == [3, 4, 5]
with safepool.ProcessPool(1, initializer=json.loads, initargs=("{}",)) as pool:
    assert pool.submit(abs, -1).result() == 1
print("the end")
"""


def documented() -> str:
    """Return one program of all that README.md and the public docstrings show, without guards."""
    texts = [block.text for block in EXAMPLES.values() if "__main__" not in block.text]
    for name in safepool.__all__:
        if name == "PoolBrokenError":
            continue  # its initializer prints a traceback, which is looked for here
        for found in doctest.DocTestFinder(exclude_empty=True).find(getattr(safepool, name), name):
            shown = [example.source for example in found.examples if not example.exc_msg]
            texts.append("import safepool\nfrom safepool import *\n" + "".join(shown))
    return "\n".join([*texts, INITIALIZERS])


def typed(program: str) -> str:
    """Return what somebody types at a prompt, where an empty line ends a statement."""
    lines: list[str] = []
    for statement in ast.parse(program).body:
        inner = [line for line in ast.unparse(statement).splitlines() if line.strip()]
        lines += inner if len(inner) == 1 else [*inner, ""]
    return "\n".join(lines) + "\n"


# One row per way to start a program: the command, and the standard input; {} is its text.
WAYS: dict[str, tuple[list[str], str]] = {
    "script": (["program.py"], ""),
    "guarded script": (["guarded.py"], ""),
    "-c": (["-c", "{}"], ""),
    "standard input": (["-"], "{}"),
    "-m": (["-m", "program"], ""),
    "zip": (["app.zip"], ""),
    "cProfile": (["-m", "cProfile", "-o", "profile", "program.py"], ""),
    "prompt": (["-i", "-q"], "typed"),
    "IPython": (["-m", "IPython", "--simple-prompt", "--colors=NoColor"], "typed"),
    "Jupyter": (
        ["-m", "nbconvert", "--to", "notebook", "--execute", "--stdout", "program.ipynb"],
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(ALL_LIMIT_S + 20)
@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_documented_runs_in_each_way_to_start_a_program(
    way: str, tmp_path: Path
) -> None:
    """A prompt and a notebook have no script, and a guarded one is run in the server as well."""
    for name in {"IPython": ["IPython"], "Jupyter": ["nbconvert", "ipykernel"]}.get(way, []):
        pytest.importorskip(name)
    program = documented()
    (tmp_path / "program.py").write_text(program)
    guarded = 'if __name__ == "__main__":\n' + textwrap.indent(program, "    ")
    (tmp_path / "guarded.py").write_text(guarded)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as app:
        app.writestr("__main__.py", program)
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    # A cell runs in an event loop.
    cells = [cell | {"source": program.replace("asyncio.run(main())", "await main()")}]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "program.ipynb").write_text(json.dumps(notebook))
    command, stdin = WAYS[way]

    run = subprocess.run(
        [sys.executable, *(program if part == "{}" else part for part in command)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)},
        input={"{}": program, "typed": typed(program)}.get(stdin, ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=ALL_LIMIT_S,
        check=False,
    )

    assert (run.returncode, "the end" in run.stdout) == (0, True), run.stdout
    assert way == "Jupyter" or "Traceback" not in run.stdout, run.stdout


def test_readme_has_examples() -> None:
    """A fence that this file does not recognise is an example that never runs."""
    assert EXAMPLES
    assert README.read_text().count("```") == 2 * len(blocks())


def test_readme_is_read_in_one_go() -> None:
    """The reference is in the docstrings."""
    assert len(README.read_text().splitlines()) <= 300


def test_the_texts_that_readme_quotes_are_those_of_the_code() -> None:
    """Somebody looks for the words of an error. Dots stand for what differs."""
    table = README.read_text().split("<!-- texts: begin -->")[1].split("<!-- texts: end -->")[0]
    quoted = re.findall(r'"([^"`|]{12,})"', table)
    texts = [*(row.text for row in error_texts.rows()), *error_texts.constants("errors.py")]

    assert len(quoted) > 9
    for quote in quoted:
        parts = quote.split(" ... ")
        assert any(all(part in text for part in parts) for text in texts), quote


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_line_and_names_an_extra_that_exists(name: str) -> None:
    """What CI runs is what the reader is told to run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = COMMANDS[name]

    (command,) = [block.text for block in blocks() if block.comment == name]

    assert command.count("\n") == 1
    assert f"[{extra}]" in command
    assert extra in project["optional-dependencies"]
