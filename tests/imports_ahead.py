"""Each test file is a program of its own, as far as fork servers import ahead for its workers.

They import what the program refers to, and behind pytest that would be whatever any test file
refers to, once all are collected: seconds for each server.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from safepool.workers import preload

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def _a_file_is_a_program_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hide the test files and their helpers, apart from this one and those that it uses."""
    program = request.node.obj
    uses = {
        getattr(value, "__name__" if inspect.ismodule(value) else "__module__", "")
        for value in list(vars(program).values())
    }
    is_own = preload.is_own

    def is_own_here(module: object) -> bool:
        file = getattr(module, "__file__", None) or ""
        if module is not program and Path(file).is_relative_to(TESTS):
            return getattr(module, "__name__", None) in uses
        return is_own(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preload, "is_own", is_own_here)
        patch.setattr(preload, "_learned", {})
        yield
