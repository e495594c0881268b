"""The comparison at the head of the README: what `safepool demo` prints under a limit.

    python benchmarks/demo.py [--cpus 1]

Needs root on Linux, for a control group with a quota.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

from figures import show_screen


def main() -> int:
    """Run the demo, and keep its screen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpus", default="1")
    arguments = ["demo", "--cpus", parser.parse_args().cpus]
    command = [sys.executable, "-m", "safepool", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.stdout:
        show_screen(shlex.join(["safepool", *arguments]), done.stdout.strip("\n"))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
