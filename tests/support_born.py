"""What a worker imports and compiles between its fork and a task; preloaded by its fork server."""

from __future__ import annotations

import os
import re
import sys
import warnings
from typing import Any

PATTERN = "a pattern of this module"
warnings.filterwarnings("ignore", message=PATTERN)

_before: set[str] = set()
_compiled: list[object] = []


def imported() -> set[str]:
    """Modules that this process has imported since its fork."""
    return sys.modules.keys() - _before


def compiled() -> list[object]:
    """Patterns that this process has compiled since its fork."""
    return [*_compiled]


def _born() -> None:
    _before.update(sys.modules)
    compiler: Any = re
    compile_as_ever = compiler._compiler.compile

    def compile_and_note(pattern: object, flags: int = 0) -> object:
        _compiled.append(pattern)
        return compile_as_ever(pattern, flags)

    compiler._compiler.compile = compile_and_note


if sys.platform == "linux":
    os.register_at_fork(after_in_child=_born)
