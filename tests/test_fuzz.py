"""What reads text or bytes that others wrote answers, or raises what is documented."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support_fuzz
from hypothesis import given, settings
from hypothesis import strategies as st
from support_fuzz import TARGETS, Target, grow

# So many times as many inputs, and others in each run.
TIMES = int(os.environ.get("SAFEPOOL_TEST_FUZZ_TIMES", "1"))
ATHERIS_S = 10 * TIMES


@pytest.mark.unit
@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_lead_somewhere_new_are_followed(name: str) -> None:
    """The same inputs in every run, as long as the package's lines are the same."""
    seed = "1" if TIMES == 1 else str(time.time_ns())
    found = grow(TARGETS[name], inputs=TIMES * TARGETS[name].inputs, seed=seed)

    assert found > 20


@pytest.mark.unit
@pytest.mark.parametrize("name", TARGETS)
@settings(derandomize=TIMES == 1, max_examples=100 * TIMES)
@given(data=st.data())
def test_inputs_of_any_kind(name: str, data: st.DataObject) -> None:
    """Bytes, and what the seeds and the words of a reader make together; the same in every run."""
    target = TARGETS[name]
    pieces = st.sampled_from((*target.seeds, *target.words))
    joined = st.lists(st.one_of(pieces, st.binary(max_size=5)), max_size=12).map(b"".join)

    target.read(data.draw(st.one_of(joined, st.binary(max_size=100))))


@pytest.mark.unit
def test_a_reader_that_fails_is_found() -> None:
    """Three steps deep, where chance alone does not come."""

    def read(data: bytes) -> None:
        if data[:1] != b"a":
            return
        if data[1:2] != b"b":
            return
        if data[2:3] == b"c":
            raise ZeroDivisionError

    own = Target(read=read, seeds=(b"x",), words=(b"a", b"b", b"c"), inputs=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support_fuzz, "PACKAGE", str(Path(__file__)))
        with pytest.raises(AssertionError, match=r"b'abc.*ZeroDivisionError"):
            grow(own, inputs=20_000, seed="1")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris: pip install '.[fuzz]'"
)
@pytest.mark.timeout(ATHERIS_S + 400)
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing(name: str, tmp_path: Path) -> None:
    """A fuzzer that sees each branch and comparison; other inputs in each run."""
    done = subprocess.run(
        [sys.executable, support_fuzz.__file__, name, str(ATHERIS_S)],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # it leaves a file there
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )

    assert done.returncode == 0, done.stderr[-5_000:]
