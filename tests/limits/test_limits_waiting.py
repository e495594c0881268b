"""How long processes waited for a CPU: text in, seconds out, and nothing raised."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safepool.limits.waiting import WaitWatch, parse_idle, parse_schedstat

# One row per text of /proc/<pid>/schedstat.
SCHEDSTATS: dict[str, tuple[int, int] | None] = {
    "1027455921 1006301150 40\n": (1027455921, 1006301150),
    "0 0 0": (0, 0),
    "": None,
    "17": None,
    "a b c": None,
    "-1 5 1": None,
    "1.5 5 1": None,
    f"{'9' * 30} 1 1": None,
}


@pytest.mark.parametrize("text", SCHEDSTATS)
def test_schedstat(text: str) -> None:
    assert parse_schedstat(text) == SCHEDSTATS[text]


STAT = "cpu  1 2 3 400 5\ncpu0 1 0 1 70 5\ncpu1 1 0 1 30 5\ncpu10 0 0 0 7 0\nintr 5 0 0 9 9\n"

# One row per affinity mask: the idle ticks of its CPUs.
IDLE: dict[tuple[int, ...], int] = {(): 0, (0,): 70, (1,): 30, (0, 1): 100, (10,): 7, (99,): 0}


@pytest.mark.parametrize("cpus", IDLE, ids=str)
def test_idle(cpus: tuple[int, ...]) -> None:
    assert parse_idle(STAT, cpus) == IDLE[cpus]


@given(st.text())
def test_no_text_raises(text: str) -> None:
    """Whatever a kernel prints, a number or nothing comes out."""
    parse_schedstat(text)
    assert parse_idle(text, [0, 1]) >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_busy_process_ran_and_a_sleeping_one_did_not() -> None:
    watch = WaitWatch()
    assert watch.sample([os.getpid()]) is None
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass
    sample = watch.sample([os.getpid()])
    assert sample is not None
    assert 0.15 < sample.ran_s < 5

    with subprocess.Popen(
        [sys.executable, "-c", "print('ready', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"ready\n"
        watch.sample([sleeper.pid])
        time.sleep(0.2)
        sample = watch.sample([sleeper.pid])
        assert sample is not None
        assert sample.ran_s < 0.1
        assert sleeper.stdin is not None
        sleeper.stdin.close()


def test_a_process_that_is_gone_is_no_sample() -> None:
    watch = WaitWatch()
    assert watch.sample([2**22 + 1]) is None
    assert watch.sample([2**22 + 1]) is None
