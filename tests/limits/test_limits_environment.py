"""The environment's bounds: they only ever lower, and junk is told, not raised."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from safepool.limits import read_limits
from safepool.limits.environment import BOUNDS, EXACT_WORKERS, X_OPTION, read_environment

JUNK = ["", " ", "0", "-1", "1.5", "abc", "24(x2)", "1,2", "٣", "9" * 20]


@pytest.mark.parametrize("variable", BOUNDS, ids=lambda variable: variable.name)
def test_a_number_is_a_bound_with_its_source(variable: object) -> None:
    """Every variable of the table is read, and keeps its name and text."""
    name = variable.name  # type: ignore[attr-defined]

    [bound] = read_limits(environ={name: " 3 "}).bounds

    assert (bound.name, bound.cpus, bound.source, bound.raw) == (name, 3.0, name, " 3 ")


@pytest.mark.parametrize("text", JUNK, ids=repr)
@pytest.mark.parametrize("name", [*(variable.name for variable in BOUNDS), EXACT_WORKERS])
def test_junk_is_told_and_sets_nothing(name: str, text: str) -> None:
    """A typo in a job script must not stop the program, nor pass silently."""
    limits = read_limits(environ={name: text})

    assert limits.bounds == ()
    assert limits.exact_workers is None
    assert [entry.source for entry in limits.skipped] == [name]


def test_pythons_default_is_no_ceiling_and_no_junk() -> None:
    """PYTHON_CPU_COUNT=default is documented, and means: as if it were not set."""
    limits = read_limits(environ={"PYTHON_CPU_COUNT": "default"})

    assert limits.bounds == ()
    assert limits.skipped == ()


def test_bounds_come_in_the_order_of_the_table() -> None:
    """On a tie the first one is named as binding, so the order is fixed."""
    environ = {variable.name: "2" for variable in reversed(BOUNDS)}

    names = [bound.name for bound in read_limits(environ=environ).bounds]

    assert names == [variable.name for variable in BOUNDS]


def test_the_exact_number_is_not_a_bound() -> None:
    """SAFEPOOL_MAX_WORKERS replaces the computed number; it may be larger."""
    limits = read_limits(environ={EXACT_WORKERS: "64"})

    assert limits.bounds == ()
    assert limits.exact_workers is not None
    assert limits.exact_workers.cpus == 64.0


@pytest.mark.parametrize(
    ("value", "expected"), [("5", [5.0]), ("default", []), ("x", []), (True, [])], ids=repr
)
def test_pythons_option_is_a_bound(value: str | bool, expected: list[float]) -> None:
    """``-X cpu_count=n`` is read from the interpreter's options; without a value it is junk."""
    bounds, _, skipped = read_environment({}, {"cpu_count": value})

    assert [bound.cpus for bound in bounds] == expected
    assert all(bound.name == X_OPTION for bound in bounds)
    assert bool(skipped) == (value not in {"5", "default"})


def test_this_processs_environment_and_options_are_read_by_default() -> None:
    """Without arguments the program's own environment counts."""
    code = "import safepool.limits as l; print([(b.name, b.cpus) for b in l.read_limits().bounds])"
    # An interpreter that knows the option (3.13) refuses junk, so a number is given.
    program = subprocess.run(
        [sys.executable, "-X", "cpu_count=7", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NSLOTS": "3"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert program.stdout.strip() == "[('NSLOTS', 3.0), ('-X cpu_count', 7.0)]"


def test_a_captured_machine_has_no_environment(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process's variables say nothing about another machine."""
    monkeypatch.setenv("NSLOTS", "3")

    assert read_limits(root=str(tmp_path)).bounds == ()
    assert [b.cpus for b in read_limits(root=str(tmp_path), environ={"NSLOTS": "4"}).bounds] == [4]


def test_every_row_says_who_sets_it_and_where_that_is_documented() -> None:
    """A variable without a source is a rumour."""
    assert len({variable.name for variable in BOUNDS}) == len(BOUNDS)
    assert all(variable.set_by and variable.documented for variable in BOUNDS)
