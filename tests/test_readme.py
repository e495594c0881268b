"""README.md is run: its Python blocks here, its two commands by ``.ci/run``.

A fenced ``python`` block is a script of its own, started in a fresh interpreter. One that
cannot be run says why, in the line above it: ``<!-- not run: needs a Dask cluster -->``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README.md")

# A fence may be indented, as in a list. What stands above it may be a comment for us.
BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]*(?P<comment>[^\n]*?)[ ]*-->[ ]*\n(?:[ ]*\n)?)?"
    r"^(?P<indent>[ ]*)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)

# Each block takes some seconds; on a machine that has much else to do, ten times as long.
EXAMPLE_LIMIT_S = 100

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
    if block.language in ("python", "py", "python3")
}


@pytest.mark.parametrize("place", EXAMPLES)
def test_an_example_runs(place: str, tmp_path: Path) -> None:
    """A reader who pastes the block into a file sees it work."""
    example = EXAMPLES[place]
    if example.comment.startswith("not run:"):
        pytest.skip(f"README.md, {place}: {example.comment.removeprefix('not run:').strip()}")
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


def test_readme_has_examples() -> None:
    """A fence that this file does not recognise is an example that never runs."""
    assert EXAMPLES
    assert README.read_text().count("```") == 2 * len(blocks())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_line_and_names_an_extra_that_exists(name: str) -> None:
    """What CI runs is what the reader is told to run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = COMMANDS[name]

    (command,) = [block.text for block in blocks() if block.comment == name]

    assert command.count("\n") == 1
    assert f"[{extra}]" in command
    assert extra in project["optional-dependencies"]
