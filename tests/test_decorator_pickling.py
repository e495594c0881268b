"""What ``safepool.worker`` returns travels to every pool, from ``__main__`` and from a module."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support_main_shapes as shapes

TESTS = Path(__file__).parent
PROGRAM = TESTS / "support_main_shapes.py"

# A pool may be used from the program's own functions, or from those of a module.
IMPORTED = (
    "import json, os, sys, support_main_shapes\n"
    "if __name__ == '__main__':\n"
    "    os.environ.update(THE_PROGRAM=str(os.getpid()), BLIS_NUM_THREADS='uncapped')\n"
    "    print(json.dumps(support_main_shapes.results(sys.argv[1])))\n"
)

POOLS = [
    "safepool",
    "joblib",
    "pickle",
    "standard-spawn",
    "standard-forkserver",
    "standard-fork",
    "multiprocessing-spawn",
    "multiprocessing-fork",
]


@pytest.mark.parametrize("place", ["__main__", "module"])
@pytest.mark.parametrize("pool", POOLS)
def test_every_shape_runs_capped_in_every_pool(pool: str, place: str, tmp_path: Path) -> None:
    program = PROGRAM
    if place == "module":
        program = tmp_path / "program.py"
        program.write_text(IMPORTED)
    found = run(program, pool, cwd=tmp_path)

    expected: dict[str, Any] = {name: [1, pool != "pickle", "1"] for name in shapes.SHAPES}
    expected |= {"inline builtin": 1, "callable": [2, pool != "pickle", "1"]}
    assert found == expected


def run(program: Path, *arguments: str, cwd: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-Wignore", program, *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_every_protocol_takes_it(shape: str, protocol: int) -> None:
    """And what has a name of its own is the same object afterwards."""
    function = shapes.SHAPES[shape]
    copied = pickle.loads(pickle.dumps(function, protocol))

    if shape in ("decorated", "inline, of a name that is its own", "static method"):
        assert copied is function
    else:
        assert type(copied) is type(function)
