"""Every start method has its row, and what a worker is told gets there whole."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import sys

import pytest

from safepool.workers.methods import find_context, method_of, script_method
from safepool.workers.standard import METHODS, Standard
from safepool.workers.start import StartMethod, WorkerStart

# One row per start method: whether a worker is a fork of the program, functions of the script
# always travel by value, and each worker runs the script itself.
SAYS: dict[str, tuple[bool, bool, bool]] = {
    "spawn": (False, False, True),
    "forkserver": (False, False, True),
    "fork": (True, False, False),
    "loky": (False, True, False),
    "loky_init_main": (False, False, False),
}


@pytest.mark.parametrize("name", [name for name in SAYS if name in METHODS])
def test_a_start_method_says_what_is_its_own(name: str) -> None:
    method = METHODS[name]
    assert (method.is_fork, method.by_value, method.runs_script) == SAYS[name]


def test_every_start_method_of_this_system_has_a_row() -> None:
    assert {*multiprocessing.get_all_start_methods(), "loky", "loky_init_main"} == {*METHODS}
    assert METHODS.keys() <= SAYS.keys()


def test_a_context_of_another_name_is_started_as_multiprocessings() -> None:
    class Context:
        def get_start_method(self) -> str:
            return "mine"

    method = method_of(Context())  # type: ignore[arg-type]
    assert type(method) is Standard
    assert script_method(method, "auto") is method


@pytest.mark.skipif(sys.platform != "linux", reason="our own is Linux's")
def test_our_own_context_is_its_start_method() -> None:
    context = find_context(None)
    assert isinstance(context, StartMethod)
    assert method_of(context) is context
    assert (context.is_fork, context.by_value, context.runs_script) == (False,) * 3


def test_all_that_a_worker_is_told_arrives() -> None:
    told = WorkerStart(
        environment={"A": "1", "B": None},
        threads=2,
        own={"C": "2"},
        index=3,
        cpus=(0, 3),
        by_name=True,
        learns=True,
        descriptors=(5,),
        forked=True,
        initializer=(print, ("x",)),
        foreign=(7, 8),
    )
    assert dataclasses.asdict(pickle.loads(pickle.dumps(told))) == dataclasses.asdict(told)
    # Each option differs from what it is by default, so that none is missing above.
    for field in dataclasses.fields(told):
        assert getattr(told, field.name) != field.default, field.name
