"""Write the figures of the READMEs: run their commands and put the output between the markers.

    python benchmarks/readme.py                # all of them
    python benchmarks/readme.py joblib-times   # one

Needs root on Linux for the limits, and a quiet machine. Nothing in these blocks is typed by hand.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# By the name of a block: the file that has it, and the command as it is shown.
BLOCKS = {
    "demo-output": ("README.md", "safepool demo --cpus 1"),
    "joblib-times": (
        "benchmarks/README.md",
        "python benchmarks/joblib_backend.py --backends safepool loky",
    ),
}


def output_of(command: str) -> str:
    """Run a command of BLOCKS and return what it prints, aims that it missed included."""
    program, *arguments = shlex.split(command)
    own = ["-m", "safepool"] if program == "safepool" else []
    done = subprocess.run(
        [sys.executable, *own, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode and not done.stdout:
        raise SystemExit(f"{command} ended with {done.returncode}")
    return done.stdout.strip("\n")


def main() -> None:
    """Run the commands and rewrite their blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", nargs="*", metavar="block", help=", ".join(BLOCKS))
    for name in parser.parse_args().blocks or BLOCKS:
        file, command = ROOT / BLOCKS[name][0], BLOCKS[name][1]
        shown = f"```console\n$ {command}\n{output_of(command)}\n```\n"
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = file.read_text(encoding="utf-8").split(begin)
        _, after = rest.split(end)
        file.write_text(before + begin + shown + end + after, encoding="utf-8")
        print(shown, end="", flush=True)


if __name__ == "__main__":
    main()
