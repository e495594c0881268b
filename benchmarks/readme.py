"""Write the figures of README.md: run the demo and put what it prints between the markers.

    python benchmarks/readme.py [--cpus 1]

Needs root on Linux for the limit. Nothing in the README's figures is typed by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- demo-output: begin -->\n"
END = "<!-- demo-output: end -->"


def main() -> None:
    """Run the demo and rewrite the block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", default="1", help="the limit in CPUs (default: 1)")
    cpus = parser.parse_args().cpus
    shown = subprocess.run(
        [sys.executable, "-m", "safepool", "demo", "--cpus", cpus],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    block = f"```console\n$ safepool demo --cpus {cpus}\n{shown}```\n"
    README.write_text(before + BEGIN + block + END + after, encoding="utf-8")
    print(shown, end="")


if __name__ == "__main__":
    main()
