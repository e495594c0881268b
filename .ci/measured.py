"""Measures the coverage of every process of a virtual environment, whatever its variables are.

`.ci/run coverage` puts this file and a .pth file that imports it into the environment's packages.
coverage.py's own way is a variable, which tests clear, and which programs would see; and its
`os._exit` cannot be pickled.

Not covered: ``python -S``, and a process that is killed.
"""

import functools
import os
import sys
from pathlib import Path

import coverage

_ROOT = Path(sys.prefix).parent


def _saved_before(name):
    end = getattr(os, name)

    @functools.wraps(end)
    def saved(*arguments, **keywords):
        if measure := coverage.Coverage.current():
            measure.save()
        return end(*arguments, **keywords)

    # By which it is pickled.
    saved.__module__ = "os"
    del saved.__wrapped__
    setattr(os, name, saved)


_SETTINGS = {
    "COVERAGE_PROCESS_START": str(_ROOT / "pyproject.toml"),
    "SAFEPOOL_SOURCE": str(_ROOT / "safepool"),
    "COVERAGE_FILE": str(_ROOT / ".venv" / "coverage" / "data"),
}
os.environ.update(_SETTINGS)
coverage.process_startup()
for _name in _SETTINGS:
    del os.environ[_name]
for _name in ("_exit", "execv", "execve"):
    _saved_before(_name)
